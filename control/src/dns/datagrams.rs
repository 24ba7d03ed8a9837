//! Datagrams of one socket, answered one after the other where they are read.
//!
//! The rule: an answer is sent at once or not at all. A socket that takes no more loses the answer, as the network might
//! have; its client asks again.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spillway_runtime::drain::Drain;
use tokio::net::UdpSocket;

use super::answer::Responder;
use super::server::{MOST_QUERY, Server};

/// Answers of one view before others have their turn and a new view is taken.
const BATCH: usize = 64;
/// After a failure that is not of a single datagram.
const PAUSE: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    Nothing,
    Perhaps,
    Failed,
}

/// Answers until draining begins, and then what has already come.
pub async fn answer(socket: UdpSocket, server: Arc<Server>, drain: Drain) {
    let mut message = vec![0; MOST_QUERY + 1];
    let mut out = Vec::with_capacity(MOST_QUERY);
    loop {
        let is_draining = tokio::select! {
            ready = socket.readable() => ready.is_err(),
            () = drain.draining() => true,
        };
        loop {
            match batch(&socket, &server, &mut message, &mut out) {
                Left::Nothing => break,
                Left::Perhaps => tokio::task::yield_now().await,
                Left::Failed => {
                    tokio::time::sleep(PAUSE).await;
                    break;
                }
            }
            if !drain.is_serving() {
                break;
            }
        }
        if is_draining {
            return;
        }
    }
}

fn batch(socket: &UdpSocket, server: &Server, message: &mut [u8], out: &mut Vec<u8>) -> Left {
    let served = server.served();
    let responder = Responder::of(&server.zone, served.as_deref());
    for _ in 0..BATCH {
        let (length, from) = match socket.try_recv_from(message) {
            Ok(received) => received,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Left::Nothing,
            Err(_) => {
                server.metrics.unreceived.inc();
                return Left::Failed;
            }
        };
        let began = Instant::now();
        server.datagram(&responder, message.get(..length).unwrap_or_default(), from, out);
        if !out.is_empty() {
            if socket.try_send_to(out, from).is_err() {
                server.metrics.unsent.inc();
            }
            server.metrics.took(began.elapsed());
        }
    }
    Left::Perhaps
}
