//! One client connection: the TLS stream that Pingora reads and writes, and what is known of the peer.
//!
//! The rule: on HTTP/1.1 Pingora gets the bytes of one request at a time, after their framing was
//! checked ([`crate::downstream::framing`]); what lies behind stays here for the next, and an answer's head waits for its
//! body, so that a small answer is one TLS record and one write. On HTTP/2 bytes pass through.
//! A peer that takes nothing for [`WRITE_TIME`] is cut off, on both.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::raw_connect::ProxyDigest;
use pingora_core::protocols::tls::SslDigest;
use pingora_core::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
};
use pingora_http::ResponseHeader;
use spillway_runtime::tls::{Accepted, Peer, Protocol};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, timeout, timeout_at};
use tokio_rustls::server::TlsStream;

use crate::downstream::framing::{Body, BodyLength, HeadScan, check_head};
use crate::downstream::h2_frames::FrameWatch;
use crate::errors::HeadFault;

/// A peer must take some bytes within this time while we have some for it.
pub const WRITE_TIME: Duration = Duration::from_secs(10);
/// A request head must be whole this long after its first byte.
pub const HEAD_TIME: Duration = Duration::from_secs(10);
/// A connection without a request is closed after this.
pub const IDLE_TIME: Duration = Duration::from_secs(60);
/// Bytes that wait for a slow reader in the TLS session.
const WRITE_BUFFER: usize = 32 << 10;
/// What is gathered of an HTTP/1.1 answer before it is written: one TLS record.
const RECORD: usize = 16 << 10;
/// After an early answer the rest of the request is read for so long, so that the answer arrives
/// before the reset that unread bytes would cause.
const LINGER_TIME: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;

/// What is known of a connection by all its requests.
pub struct Caller {
    pub peer: Arc<Peer>,
    pub address: SocketAddr,
    /// Asks the connection's task to close it.
    pub close: Notify,
    /// Tells the connection's task of a flood of HTTP/2 frames.
    pub flooded: Notify,
    /// What is wrong with the framing of the current request's body.
    pub fault: OnceLock<HeadFault>,
}

/// Finds the caller of a request.
pub fn caller(session: &ServerSession) -> Option<&Arc<Caller>> {
    session.digest()?.proxy_digest.as_ref()?.user_data.as_ref()?.downcast_ref()
}

pub struct Connection {
    /// `None` only while it is dropped.
    tls: Option<TlsStream<TcpStream>>,
    raw_fd: RawFd,
    http2: bool,
    frames: FrameWatch,
    buffer: BytesMut,
    /// Bytes of `buffer` that are the current head.
    head: usize,
    /// What is gathered of an HTTP/1.1 answer.
    gathered: BytesMut,
    body: Body,
    caller: Arc<Caller>,
    facts: Facts,
    /// Runs while the peer takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Runs while an HTTP/2 header block is incomplete.
    head_timer: Option<Pin<Box<Sleep>>>,
}

/// What Pingora asks a stream for.
struct Facts {
    ssl: Arc<SslDigest>,
    socket: Arc<SocketDigest>,
    proxy: Arc<ProxyDigest>,
}

/// How waiting for a request ended.
pub enum NextHead {
    Ready,
    /// The peer closed, or was idle.
    Gone,
    Fault(HeadFault),
}

impl Connection {
    pub fn new(accepted: Accepted<TcpStream>, address: SocketAddr) -> Result<Self, pingora_core::BError> {
        let Accepted { stream: mut tls, peer, protocol } = accepted;
        let caller =
            Arc::new(Caller { peer, address, close: Notify::new(), flooded: Notify::new(), fault: OnceLock::new() });
        let (tcp, session) = tls.get_mut();
        let raw_fd = tcp.as_raw_fd();
        session.set_buffer_limit(Some(WRITE_BUFFER));
        let http2 = protocol == Protocol::H2;
        let socket = SocketDigest::from_raw_fd(raw_fd);
        // The cells are new, so that setting them cannot fail.
        let _ = socket.peer_addr.set(Some(caller.address.into()));
        let _ = socket.local_addr.set(None);
        let anchor: Box<dyn std::any::Any + Send + Sync> = Box::new(caller.clone());
        let facts = Facts {
            ssl: Arc::new(SslDigest::new("", "TLSv1.3", None, None, Vec::new())),
            socket: Arc::new(socket),
            proxy: Arc::new(ProxyDigest::new(Box::new(ResponseHeader::build(200, Some(0))?), Some(anchor))),
        };
        Ok(Self {
            tls: Some(tls),
            raw_fd,
            http2,
            frames: FrameWatch::default(),
            buffer: BytesMut::new(),
            head: 0,
            gathered: BytesMut::new(),
            body: Body::new(BodyLength::Declared(0)),
            caller,
            facts,
            stalled: None,
            head_timer: None,
        })
    }

    pub fn is_http2(&self) -> bool {
        self.http2
    }

    pub fn caller(&self) -> &Arc<Caller> {
        &self.caller
    }

    /// Whether the last request was read to its end.
    pub fn is_between_requests(&self) -> bool {
        self.head == 0 && self.body.is_done()
    }

    /// Waits for the next HTTP/1.1 head and checks it.
    pub async fn next_head(&mut self) -> NextHead {
        debug_assert!(self.is_between_requests());
        let mut scan = HeadScan::default();
        let idle_until = Instant::now() + IDLE_TIME;
        let mut head_until = (!self.buffer.is_empty()).then(|| Instant::now() + HEAD_TIME);
        loop {
            match scan.scan(&self.buffer) {
                Ok(Some(end)) => {
                    return match check_head(&self.buffer[..end]) {
                        Ok(length) => {
                            self.head = end;
                            self.body = Body::new(length);
                            NextHead::Ready
                        }
                        Err(fault) => NextHead::Fault(fault),
                    };
                }
                Ok(None) => {}
                Err(fault) => return NextHead::Fault(fault),
            }
            let Some(tls) = &mut self.tls else { return NextHead::Gone };
            self.buffer.reserve(4 << 10);
            match timeout_at(head_until.unwrap_or(idle_until), tls.read_buf(&mut self.buffer)).await {
                Ok(Ok(0) | Err(_)) => return NextHead::Gone,
                Ok(Ok(_)) => {
                    head_until.get_or_insert_with(|| Instant::now() + HEAD_TIME);
                }
                Err(_) if head_until.is_some() => return NextHead::Fault(HeadFault::TooSlow),
                Err(_) => return NextHead::Gone,
            }
        }
    }

    /// Answers on behalf of a request that Pingora never saw, and closes.
    pub async fn refuse(mut self, fault: HeadFault) {
        let body = crate::answer::error_body(&fault.to_string());
        let status = fault.status();
        let head = format!(
            "HTTP/1.1 {} {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nspillway-error: {}\r\nconnection: close\r\n\r\n",
            status.as_u16(),
            status.canonical_reason().unwrap_or(""),
            body.len(),
            fault.code(),
        );
        let wire = [head.as_bytes(), &body].concat();
        // The peer may be gone already, which is what we are about to do ourselves.
        let _ = self.write_all(&wire).await;
        let _ = self.flush().await;
        self.body = Body::new(BodyLength::Declared(u64::MAX));
    }

    fn tls(&mut self) -> io::Result<Pin<&mut TlsStream<TcpStream>>> {
        self.tls.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Reads what belongs to the current request's body.
    fn poll_body(&mut self, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.buffer.is_empty() {
            let offered = self.buffer.len().min(into.remaining());
            let taken = self.body.take(&self.buffer[..offered]).map_err(|fault| self.malformed(fault))?;
            into.put_slice(&self.buffer[..taken]);
            self.buffer.advance(taken);
            return Poll::Ready(Ok(()));
        }
        let before = into.filled().len();
        ready!(self.tls()?.poll_read(cx, into))?;
        let read = into.filled().len() - before;
        let taken = self.body.take(&into.filled()[before..]).map_err(|fault| self.malformed(fault))?;
        if taken < read {
            self.buffer.extend_from_slice(&into.filled()[before + taken..]);
            into.set_filled(before + taken);
        }
        Poll::Ready(Ok(()))
    }

    /// Between requests: notices that the peer goes away, and keeps what it sends for later.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.buffer.is_empty() {
            // A request that was sent early waits here. That its sender left is seen when it is read.
            return Poll::Pending;
        }
        let mut space = [0; 512];
        let mut early = ReadBuf::new(&mut space);
        ready!(self.tls()?.poll_read(cx, &mut early))?;
        if early.filled().is_empty() {
            return Poll::Ready(Ok(()));
        }
        self.buffer.extend_from_slice(early.filled());
        Poll::Pending
    }

    fn malformed(&self, fault: HeadFault) -> io::Error {
        // Only the first fault is told; the connection ends with it.
        let _ = self.caller.fault.set(fault);
        io::Error::new(io::ErrorKind::InvalidData, fault)
    }

    fn poll_http2(&mut self, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.frames.is_flood() {
            // Nothing more is read: the connection's task says goodbye and ends it.
            self.caller.flooded.notify_one();
            return Poll::Pending;
        }
        let before = into.filled().len();
        let read = self.tls()?.poll_read(cx, into);
        if read.is_ready() {
            self.frames.see(&into.filled()[before..], std::time::Instant::now);
        }
        if !self.frames.is_open() {
            self.head_timer = None;
            return read;
        }
        let timer = self.head_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(HEAD_TIME)));
        if timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }

    /// Gathers what is small. What would not fit goes out with what was gathered before it.
    fn poll_gather(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.gathered.is_empty() && bytes.len() >= RECORD {
            return self.tls()?.poll_write(cx, bytes);
        }
        if self.gathered.len() == RECORD {
            ready!(self.poll_gathered(cx))?;
        }
        let taken = bytes.len().min(RECORD - self.gathered.len());
        self.gathered.extend_from_slice(&bytes[..taken]);
        Poll::Ready(Ok(taken))
    }

    /// Hands what was gathered to TLS.
    fn poll_gathered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.is_empty() {
            let Some(tls) = &mut self.tls else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
            let written = ready!(Pin::new(tls).poll_write(cx, &self.gathered))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.gathered.advance(written);
        }
        // A connection that waits for its next request holds nothing.
        self.gathered = BytesMut::new();
        Poll::Ready(Ok(()))
    }

    /// Starts or stops the clock of a peer that takes nothing.
    fn watch_stall<T>(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.stalled = None;
            return outcome;
        }
        let timer = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(WRITE_TIME)));
        if timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.http2 {
            return this.poll_http2(cx, into);
        }
        if this.head > 0 {
            let taken = this.head.min(into.remaining());
            into.put_slice(&this.buffer[..taken]);
            this.buffer.advance(taken);
            this.head -= taken;
            return Poll::Ready(Ok(()));
        }
        if this.body.is_done() { this.poll_gone(cx) } else { this.poll_body(cx, into) }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = if self.http2 { self.tls()?.poll_write(cx, bytes) } else { self.poll_gather(cx, bytes) };
        self.watch_stall(cx, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if !self.http2 {
            let first = bytes.iter().find(|bytes| !bytes.is_empty()).map_or(&[][..], |bytes| bytes);
            return self.poll_write(cx, first);
        }
        let outcome = self.tls()?.poll_write_vectored(cx, bytes);
        self.watch_stall(cx, outcome)
    }

    /// h2 asks once, before anything was read, whether to keep payloads from 256 bytes on apart, each with a write of its
    /// own, or only those from 1 KiB on. Later it asks whether what is apart can go out with its head.
    fn is_write_vectored(&self) -> bool {
        self.http2 && self.frames.has_begun()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = match self.poll_gathered(cx) {
            Poll::Ready(Ok(())) => self.tls()?.poll_flush(cx),
            other => other,
        };
        self.watch_stall(cx, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = match self.poll_gathered(cx) {
            Poll::Ready(Ok(())) => self.tls()?.poll_shutdown(cx),
            other => other,
        };
        self.watch_stall(cx, outcome)
    }
}

/// An answer to a request that was not read to its end must still arrive: closing with unread bytes
/// resets the connection and may destroy it on the way.
impl Drop for Connection {
    fn drop(&mut self) {
        let Some(mut tls) = self.tls.take() else { return };
        if self.http2 || self.body.is_done() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(timeout(LINGER_TIME, async move {
            let _ = tls.shutdown().await;
            let mut waste = vec![0; 16 << 10];
            let mut left = LINGER_BYTES;
            while let Ok(read @ 1..) = tls.get_mut().0.read(&mut waste).await {
                left = left.saturating_sub(read);
                if left == 0 {
                    break;
                }
            }
        }));
    }
}

#[async_trait]
impl Shutdown for Connection {
    async fn shutdown(&mut self) {
        if self.body.is_done() {
            // The peer may have closed before us.
            let _ = AsyncWriteExt::shutdown(self).await;
        }
    }
}

impl UniqueID for Connection {
    fn id(&self) -> RawFd {
        self.raw_fd
    }
}

impl Ssl for Connection {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        Some(self.facts.ssl.clone())
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        Some(if self.http2 { ALPN::H2 } else { ALPN::H1 })
    }
}

impl GetTimingDigest for Connection {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for Connection {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        Some(self.facts.proxy.clone())
    }
}

impl GetSocketDigest for Connection {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        Some(self.facts.socket.clone())
    }
}

impl Peek for Connection {}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("http2", &self.http2).finish_non_exhaustive()
    }
}
