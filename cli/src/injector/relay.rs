//! TCP links of our own: each stands before the address that a process listens on, and can be broken.
//!
//! The rule: a link changes nothing while no rule is for it. A rule that begins or ends is felt by open connections
//! too. What was held back is given on when the rule ends, as after a route that was lost for a while.
//!
//! ```text
//! pass    bytes, ends and resets as they come
//! delay   all of it so much later, in each direction; reading goes on meanwhile
//! drop    nothing goes on; connections are taken, as the kernel takes them, and hear nothing
//! refuse  connections are reset, open ones and new ones (SO_LINGER 0)
//! ```

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Processes;

/// Connections of a link at a time; more wait in the kernel.
const MOST_CONNECTIONS: usize = 4_096;
/// Of one direction: pieces under way, and their size.
const MOST_PIECES: usize = 64;
const PIECE: usize = 16 << 10;
const CONNECT: Duration = Duration::from_secs(5);

/// What a link does with a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    #[default]
    Pass,
    Delay(Duration),
    Drop,
    Refuse,
}

/// What is done to connections, or to those alone that come from some processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub mode: Mode,
    pub from: Vec<String>,
}

/// All links. They end when it is dropped.
pub struct Links {
    processes: Arc<dyn Processes>,
    links: Mutex<BTreeMap<String, Link>>,
    accepting: Mutex<JoinSet<()>>,
}

struct Link {
    rules: watch::Sender<Arc<Vec<Rule>>>,
}

impl Links {
    pub fn new(processes: Arc<dyn Processes>) -> Arc<Self> {
        Arc::new(Self { processes, links: Mutex::default(), accepting: Mutex::default() })
    }

    /// A link to the process of this name, which listens at `target`. Where the link listens.
    pub async fn add(&self, name: &str, listen: SocketAddr, target: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let (rules, watched) = watch::channel(Arc::default());
        if self.links.lock().insert(name.to_owned(), Link { rules }).is_some() {
            return Err(io::Error::other(format!("there are two links to {name}")));
        }
        let way = Way { target, listen: address, processes: self.processes.clone() };
        self.accepting.lock().spawn(accept(listener, Arc::new(way), watched));
        Ok(address)
    }

    pub fn names(&self) -> Vec<String> {
        self.links.lock().keys().cloned().collect()
    }

    /// Adds a rule for a link. The last one that fits a connection counts.
    pub fn add_rule(&self, name: &str, rule: Rule) {
        if let Some(link) = self.links.lock().get(name) {
            link.rules.send_modify(|rules| Arc::make_mut(rules).push(rule));
        }
    }

    /// All links pass again.
    pub fn clear(&self) {
        for link in self.links.lock().values() {
            link.rules.send_if_modified(|rules| {
                let any = !rules.is_empty();
                *rules = Arc::default();
                any
            });
        }
    }
}

/// Where a link leads.
struct Way {
    target: SocketAddr,
    listen: SocketAddr,
    processes: Arc<dyn Processes>,
}

async fn accept(listener: TcpListener, way: Arc<Way>, rules: watch::Receiver<Arc<Vec<Rule>>>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MOST_CONNECTIONS => match accepted {
                Ok((client, from)) => drop(connections.spawn(carry(client, from, way.clone(), rules.clone()))),
                // Out of descriptors, for a moment.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection, under the rules of each moment.
async fn carry(client: TcpStream, from: SocketAddr, way: Arc<Way>, mut rules: watch::Receiver<Arc<Vec<Rule>>>) {
    // Until both sides have ended well, an end is a reset.
    let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
    let mut judge = Judge { way: way.clone(), from, process: None };
    let first = rules.borrow_and_update().clone();
    let (set, mode) = watch::channel(judge.mode(&first).await);
    let judging = async {
        while rules.changed().await.is_ok() {
            let now = rules.borrow_and_update().clone();
            set.send_replace(judge.mode(&now).await);
        }
    };
    let mut refusing = mode.clone();
    let refused = async move {
        if refusing.wait_for(|mode| *mode == Mode::Refuse).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        biased;
        () = refused => {}
        () = judging => {}
        _ = through(client, way.target, mode) => {}
    }
}

async fn through(mut client: TcpStream, target: SocketAddr, mut mode: watch::Receiver<Mode>) -> io::Result<()> {
    passing(&mut mode).await?;
    let mut server = tokio::time::timeout(CONNECT, TcpStream::connect(target)).await??;
    SockRef::from(&server).set_linger(Some(Duration::ZERO))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    // Borrowed halves: owned ones would end their direction well when dropped.
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    tokio::try_join!(pump(from_client, to_server, mode.clone()), pump(from_server, to_client, mode.clone()))?;
    SockRef::from(&client).set_linger(None)?;
    SockRef::from(&server).set_linger(None)
}

/// One direction, to its end.
async fn pump<R, W>(mut from: R, mut to: W, mode: watch::Receiver<Mode>) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (queue, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(MOST_PIECES);
    let mut held = mode.clone();
    let read = async {
        loop {
            let mut piece = vec![0; PIECE];
            let count = from.read(&mut piece).await?;
            piece.truncate(count);
            let delay = match *mode.borrow() {
                Mode::Delay(delay) => delay,
                Mode::Pass | Mode::Drop | Mode::Refuse => Duration::ZERO,
            };
            if queue.send((Instant::now() + delay, piece)).await.is_err() || count == 0 {
                return io::Result::Ok(());
            }
        }
    };
    let write = async {
        while let Some((at, piece)) = due.recv().await {
            tokio::time::sleep_until(at).await;
            passing(&mut held).await?;
            if piece.is_empty() {
                to.shutdown().await?;
                break;
            }
            to.write_all(&piece).await?;
        }
        io::Result::Ok(())
    };
    tokio::try_join!(read, write).map(drop)
}

/// Waits until bytes may go on.
async fn passing(mode: &mut watch::Receiver<Mode>) -> io::Result<()> {
    let open = mode.wait_for(|mode| !matches!(mode, Mode::Drop | Mode::Refuse)).await;
    open.map(drop).map_err(|_| io::ErrorKind::ConnectionReset.into())
}

/// Which rule is for a connection.
struct Judge {
    way: Arc<Way>,
    from: SocketAddr,
    /// The process that it comes from, once somebody wanted to know. The inner one is none if none of ours does.
    process: Option<Option<String>>,
}

impl Judge {
    async fn mode(&mut self, rules: &[Rule]) -> Mode {
        let mut mode = Mode::Pass;
        for rule in rules {
            if rule.from.is_empty()
                || self.process().await.is_some_and(|name| rule.from.iter().any(|from| from == name))
            {
                mode = rule.mode;
            }
        }
        mode
    }

    async fn process(&mut self) -> Option<&str> {
        if self.process.is_none() {
            let (way, from) = (self.way.clone(), self.from);
            let find = move || way.processes.caller(from, way.listen);
            self.process = Some(tokio::task::spawn_blocking(find).await.unwrap_or_default());
        }
        self.process.as_ref().and_then(Option::as_deref)
    }
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
