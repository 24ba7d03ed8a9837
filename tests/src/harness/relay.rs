//! A TCP link that can be made slow, silent or broken.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the link does with what the server sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Good,
    /// Everything arrives so much later.
    Slow(Duration),
    /// Nothing arrives any more; connections stay, and new ones are taken.
    Silent,
    /// Connections are reset, open ones and new ones.
    Resets,
}

/// Ended when dropped, with its connections.
pub struct Relay {
    pub address: SocketAddr,
    link: watch::Sender<Link>,
    accept: JoinHandle<()>,
}

impl Relay {
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (link, watched) = watch::channel(Link::Good);
        let accept = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(carry(client, server, watched.clone()));
            }
        });
        Self { address, link, accept }
    }

    pub fn set(&self, link: Link) {
        self.link.send_replace(link);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

async fn carry(client: TcpStream, server: SocketAddr, mut link: watch::Receiver<Link>) {
    let mut resets = link.clone();
    let reset = async move {
        let told = resets.wait_for(|link| *link == Link::Resets).await.is_ok();
        if !told {
            std::future::pending::<()>().await;
        }
    };
    // Closing with this sends a reset in place of an end.
    let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
    let Ok(server) = TcpStream::connect(server).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = async { tokio::io::copy(&mut from_client, &mut to_server).await.map(drop) };
    // A delay line, not a throttle: what is read now is written `delay` later, and reading goes on meanwhile.
    let (queue, mut due) = tokio::sync::mpsc::channel(1_024);
    let read = async {
        loop {
            let mut part = vec![0; 16 << 10];
            let count = from_server.read(&mut part).await?;
            part.truncate(count);
            // What arrives in silence is given when the link is good again, as after a lost route.
            if link.wait_for(|link| *link != Link::Silent).await.is_err() {
                return Ok(());
            }
            let delay = match *link.borrow() {
                Link::Slow(delay) => delay,
                Link::Good | Link::Silent | Link::Resets => Duration::ZERO,
            };
            if count == 0 || queue.send((tokio::time::Instant::now() + delay, part)).await.is_err() {
                return std::io::Result::Ok(());
            }
        }
    };
    let write = async {
        while let Some((at, part)) = due.recv().await {
            tokio::time::sleep_until(at).await;
            to_client.write_all(&part).await?;
        }
        std::io::Result::Ok(())
    };
    tokio::select! {
        () = reset => {}
        _ = up => {}
        _ = read => {}
        _ = write => {}
    }
}
