//! One place for a connection: at most one is ready, at most one connect is under way.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::Ping;
use h2::client::{Connection, SendRequest};
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;

use super::error::{ConnectError, UpstreamError};
use super::way::{Beside, Way};
use super::{Inner, Ordering, UpstreamSettings};

pub(super) type Sender = SendRequest<Bytes>;

/// Calls that may be begun before the server has said how many it takes at a time.
const FIRST_CALLS: usize = 100;

#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    ready: Option<Ready>,
    connecting: Option<watch::Receiver<Option<Connected>>>,
    resting: Option<Resting>,
}

#[derive(Debug)]
struct Ready {
    sender: Sender,
    /// Our own generation that the handshake used.
    generation: u64,
    /// Closed with the connection.
    ended: watch::Receiver<()>,
}

/// A connect failed; until then no other is begun.
#[derive(Debug)]
struct Resting {
    until: Instant,
    failures: u32,
    error: Arc<ConnectError>,
}

impl Ready {
    /// Whether calls can be begun: it is open, and the server has not said that it goes away. Asks no peer and never
    /// waits, since this sender itself begins none.
    fn is_open(&mut self) -> bool {
        matches!(self.sender.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(Ok(())))
    }
}

impl Slot {
    pub(super) fn is_resting(&self) -> bool {
        let mut state = self.0.lock();
        let is_ready = state.ready.as_mut().is_some_and(Ready::is_open);
        !is_ready && state.resting.as_ref().is_some_and(|resting| Instant::now() < resting.until)
    }

    /// Lets go of the connection that is ready.
    pub(super) fn forget(&self) {
        self.0.lock().ready = None;
    }

    /// Closed when the connection that is ready has ended; none if none is.
    pub(super) fn ended(&self) -> Option<watch::Receiver<()>> {
        self.0.lock().ready.as_ref().map(|ready| ready.ended.clone())
    }
}

type Connected = Result<Sender, Arc<ConnectError>>;

impl Inner {
    /// A connection that can be called on. The connect itself is a task of its own: a caller that gives
    /// up takes nothing from those who wait with it.
    pub(super) async fn sender(self: &Arc<Self>) -> Result<Sender, UpstreamError> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.slots.len();
        let mut connecting = {
            let mut state = self.slots[index].0.lock();
            if let Some(ready) = &mut state.ready {
                if ready.generation == self.way.generation() && ready.is_open() {
                    return Ok(ready.sender.clone());
                }
                // Its streams go on to their ends; the connection closes with the last of them.
                state.ready = None;
            }
            match &state.connecting {
                // An error says that the task is gone, with the runtime that it ran on.
                Some(connecting) if connecting.has_changed().is_ok() => connecting.clone(),
                _ => {
                    if let Some(resting) = state.resting.as_ref().filter(|resting| Instant::now() < resting.until) {
                        return Err(UpstreamError::Unreachable(resting.error.clone()));
                    }
                    let (done, connecting) = watch::channel(None);
                    state.connecting = Some(connecting.clone());
                    tokio::spawn(self.clone().fill(index, done));
                    connecting
                }
            }
        };
        let connected = match connecting.wait_for(Option::is_some).await {
            Ok(connected) => (*connected).clone(),
            Err(_) => None,
        };
        connected.unwrap_or_else(|| Err(Arc::new(ConnectError::GivenUp))).map_err(UpstreamError::Unreachable)
    }

    async fn fill(self: Arc<Self>, index: usize, done: watch::Sender<Option<Connected>>) {
        let connected =
            timeout(self.settings.connect_timeout, self.connect()).await.unwrap_or(Err(ConnectError::Timeout));
        let mut state = self.slots[index].0.lock();
        state.connecting = None;
        let connected = match connected {
            Ok((sender, generation, ended)) => {
                self.metrics.connected("connected");
                tracing::debug!(upstream = %self.way, "upstream connected");
                state.resting = None;
                state.ready = Some(Ready { sender: sender.clone(), generation, ended });
                Ok(sender)
            }
            Err(error) => {
                self.metrics.connected(error.reason());
                let failures = state.resting.take().map_or(0, |resting| resting.failures).saturating_add(1);
                if failures == 1 {
                    tracing::warn!(upstream = %self.way, %error, "upstream cannot be reached");
                }
                let error = Arc::new(error);
                let until = Instant::now() + self.rest(failures);
                state.resting = Some(Resting { until, failures, error: error.clone() });
                Err(error)
            }
        };
        drop(state);
        done.send_replace(Some(connected));
    }

    async fn connect(&self) -> Result<(Sender, u64, watch::Receiver<()>), ConnectError> {
        match &self.way {
            Way::Mutual { workload, address, expected } => {
                let began = Instant::now();
                let stream = TcpStream::connect(address).await.map_err(ConnectError::Tcp)?;
                let round_trip = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                self.round_trip_us.store(round_trip.max(1), Ordering::Relaxed);
                stream.set_nodelay(true).map_err(ConnectError::Tcp)?;
                let (config, generation) = workload.client(expected.clone());
                // The name is not looked at; an address keeps the handshake free of one.
                let name = ServerName::IpAddress(address.ip().into());
                let stream = TlsConnector::from(config).connect(name, stream).await.map_err(ConnectError::Tls)?;
                if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
                    return Err(ConnectError::Protocol);
                }
                self.speak(stream, generation).await
            }
            Way::Beside(Beside::Tcp(authority)) => {
                let stream = TcpStream::connect(authority.as_str()).await.map_err(ConnectError::Tcp)?;
                stream.set_nodelay(true).map_err(ConnectError::Tcp)?;
                self.speak(stream, self.way.generation()).await
            }
            Way::Beside(Beside::Unix(path)) => {
                let stream = UnixStream::connect(path).await.map_err(ConnectError::Tcp)?;
                self.speak(stream, self.way.generation()).await
            }
        }
    }

    async fn speak<S>(&self, stream: S, generation: u64) -> Result<(Sender, u64, watch::Receiver<()>), ConnectError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let heard = Arc::new(AtomicBool::new(false));
        let (stream, said) = Listened::of(stream, heard.clone());
        let settings = self.settings.clone();
        let (sender, connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_max_send_streams(FIRST_CALLS)
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window)
            .max_frame_size(64 << 10)
            .max_header_list_size(32 << 10)
            // Many calls may be cancelled at once; h2 must remember them to ignore their late frames.
            .max_concurrent_reset_streams(1_024)
            .handshake(stream)
            .await
            .map_err(ConnectError::Http)?;
        let upstream = self.way.to_string();
        let (open, ended) = watch::channel(());
        // It ends when the last sender and stream are gone, when the peer closes, or when a ping stays
        // unanswered.
        tokio::spawn(async move {
            if let Err(error) = drive(connection, &heard, &settings).await {
                tracing::debug!(upstream, %error, "upstream connection ended");
            }
            drop(open);
        });
        // A call that is sent before the server has accepted our certificate would be lost with a
        // refusal, and nobody could say whether it was seen. One beside us says its settings at once, too.
        said.await.map_err(|_| ConnectError::Closed)?;
        Ok((sender, generation, ended))
    }

    /// Doubles with each failure up to the longest, less up to a tenth, so that many do not come back
    /// at the same moment.
    fn rest(&self, failures: u32) -> Duration {
        let doubled = self.settings.rest.saturating_mul(1 << (failures - 1).min(16));
        doubled.min(self.settings.longest_rest).mul_f64(1.0 - 0.1 * rand::random::<f64>())
    }
}

/// Why a connection was given up.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Http(#[from] h2::Error),
    #[error("a ping was not answered")]
    Silent,
}

/// Runs a connection to its end. A peer that says nothing for a while is pinged, and given up if it does not answer.
async fn drive<S>(
    connection: Connection<S, Bytes>,
    heard: &AtomicBool,
    settings: &UpstreamSettings,
) -> Result<(), Ended>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut connection = pin!(connection);
    // Nobody else has taken it.
    let Some(mut pings) = connection.ping_pong() else { return Ok(connection.await?) };
    let Some(ping_every) = settings.ping_every else { return Ok(connection.await?) };
    loop {
        tokio::select! {
            biased;
            ended = connection.as_mut() => return Ok(ended?),
            () = sleep(ping_every) => {}
        }
        if heard.swap(false, Ordering::Relaxed) {
            continue;
        }
        tokio::select! {
            biased;
            ended = connection.as_mut() => return Ok(ended?),
            answered = timeout(settings.ping_timeout, pings.ping(Ping::opaque())) => {
                answered.map_err(|_| Ended::Silent)??;
            }
        }
    }
}

/// A stream that notes when its peer says something.
#[derive(Debug)]
struct Listened<S> {
    stream: S,
    /// Something came; whoever wants to know clears it.
    heard: Arc<AtomicBool>,
    /// For the first time.
    first: Option<oneshot::Sender<()>>,
}

impl<S> Listened<S> {
    fn of(stream: S, heard: Arc<AtomicBool>) -> (Self, oneshot::Receiver<()>) {
        let (first, said) = oneshot::channel();
        (Self { stream, heard, first: Some(first) }, said)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Listened<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.heard.store(true, Ordering::Relaxed);
            if let Some(first) = self.first.take() {
                // Who has given up needs not be told.
                let _ = first.send(());
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Listened<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    /// h2 asks once, before anything was read, whether to keep payloads from 256 bytes on apart, each with a write of its
    /// own, or only those from 1 KiB on. Later it asks whether what is apart can go out with its head.
    fn is_write_vectored(&self) -> bool {
        self.first.is_none() && self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
