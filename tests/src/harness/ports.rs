//! Ports for those that cannot be started on port 0.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

/// Below 22,000, so that neither the kernel (32,768 and up) nor a Redis Cluster bus (port + 10,000) takes them.
const FIRST: u16 = 12_000;
const LAST: u16 = 21_900;

static TAKEN: AtomicU16 = AtomicU16::new(0);

/// A port that nothing listens on, never given twice in this process.
pub fn free() -> u16 {
    block(1)
}

/// The first of some neighbouring free ports.
pub fn block(count: u16) -> u16 {
    // Tests run as processes of their own: each begins elsewhere.
    let start = u16::try_from(std::process::id() % 97).expect("less than 97") * 100;
    let span = LAST - FIRST;
    loop {
        let taken = TAKEN.fetch_add(count, Ordering::Relaxed);
        assert!(taken < span, "no free port is left");
        let first = FIRST + (start + taken) % (span - count);
        if (first..first + count).all(is_free) {
            return first;
        }
    }
}

pub fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(local(port)).is_ok()
}
