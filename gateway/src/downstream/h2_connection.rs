//! One HTTP/2 connection, from its preface to its end: streams out of it, each served by a task.
//!
//! The rule: a client that floods, breaks the protocol or keeps sending requests that mean two things
//! loses its connection, and that is counted. What one stream asks for is not judged here.

use std::io::ErrorKind;
use std::sync::Arc;

use h2::Reason;
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::v2::server::{H2Accept, H2Options, HttpSession, default_h2_options, handshake};
use pingora_core::protocols::{Digest, Stream};
use pingora_core::server::ShutdownWatch;
use tokio::time::{Instant, sleep};

use crate::downstream::connection::{Connection, IDLE_TIME};
use crate::downstream::framing::MAX_HEAD;
use crate::edge::Edge;
use crate::errors::HeadFault;
use crate::exchange::Exchange;
use crate::shared::Shared;

/// Streams of one connection at a time.
const STREAMS: u32 = 100;
/// A large tensor in few frames: at h2's own 16 KiB each costs its reader and its writer a call of the kernel.
const FRAME: u32 = 64 << 10;
/// What a stream, and a connection, may send before it is read.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// What a stream's answer may have waiting for a slow reader.
const SEND_BUFFER: usize = 32 << 10;
/// Streams that the client reset while we had not looked at them (CVE-2023-44487), those that we
/// remember to have reset, and those that it made us reset (CVE-2025-8671): beyond it, GOAWAY.
const RESETS: usize = 20;
const LOCAL_RESETS: usize = 256;
/// Requests of one connection that Pingora refused for meaning two things.
const MOST_AMBIGUOUS: u32 = 32;

/// Serves a connection until it ends, or until it is empty after `stopping` says so.
pub async fn serve(edge: &Arc<Edge>, connection: Box<Connection>, mut stopping: ShutdownWatch) {
    let (shared, caller) = (&edge.shared, connection.caller().clone());
    let stream: Stream = connection;
    let digest = Arc::new(Digest {
        ssl_digest: stream.get_ssl_digest(),
        timing_digest: stream.get_timing_digest(),
        proxy_digest: stream.get_proxy_digest(),
        socket_digest: stream.get_socket_digest(),
    });
    let mut h2 = match handshake(stream, Some(options())).await {
        Ok(h2) => h2,
        Err(error) => return count_end(shared, &error),
    };
    let (stop, flooded, idle) = (stopping.wait_for(|stop| *stop), caller.flooded.notified(), sleep(IDLE_TIME));
    tokio::pin!(stop, flooded, idle);
    // Each stream's task holds one more of it.
    let open = Arc::new(());
    let (mut is_stopping, mut is_ended, mut was_used) = (false, false, false);
    let mut ambiguous = 0;
    loop {
        let accepted = tokio::select! {
            biased;
            _ = &mut stop, if !is_stopping => {
                is_stopping = true;
                h2.graceful_shutdown();
                continue;
            }
            () = &mut flooded, if !is_ended => {
                is_ended = true;
                shared.metrics.connection_ended("flood");
                h2.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                continue;
            }
            accepted = HttpSession::from_h2_conn(&mut h2, digest.clone()) => accepted,
            () = &mut idle, if !is_stopping => {
                if !was_used && Arc::strong_count(&open) == 1 {
                    return;
                }
                was_used = false;
                idle.as_mut().reset(Instant::now() + IDLE_TIME);
                continue;
            }
        };
        match accepted {
            Ok(Some(H2Accept::Session(session))) => {
                was_used = true;
                let (edge, open) = (edge.clone(), open.clone());
                // On the heap before it is spawned: a task that is thousands of bytes is moved more than once.
                tokio::spawn(Box::pin(async move {
                    let mut session = ServerSession::new_http2(session);
                    edge.answer(&mut session).await;
                    // It fails where the client is gone, which the record says.
                    let _ = session.finish().await;
                    drop(open);
                }));
            }
            Ok(Some(H2Accept::Rejected)) => {
                Exchange::record_fault(shared, &caller, HeadFault::Ambiguous);
                ambiguous += 1;
                if ambiguous == MOST_AMBIGUOUS {
                    is_ended = true;
                    shared.metrics.connection_ended("ambiguous-requests");
                    h2.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                }
            }
            Ok(None) => return,
            // What we ended ourselves was counted with its reason.
            Err(_) if is_ended => return,
            Err(error) => return count_end(shared, &error),
        }
    }
}

fn options() -> H2Options {
    let mut options = default_h2_options();
    options
        .max_header_list_size(MAX_HEAD as u32)
        .max_concurrent_streams(STREAMS)
        .max_frame_size(FRAME)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(RESETS)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(Some(LOCAL_RESETS));
    options
}

/// Counts why h2 gave a connection up, if that was the peer's doing. That a peer is gone is no news.
fn count_end(shared: &Shared, error: &pingora_core::Error) {
    if let Some(h2) = error.cause.as_ref().and_then(|cause| cause.downcast_ref::<h2::Error>())
        && let Some(reason) = reason_of_end(h2)
    {
        shared.metrics.connection_ended(reason);
    }
}

fn reason_of_end(error: &h2::Error) -> Option<&'static str> {
    match (error.get_io(), error.reason()) {
        (Some(io), _) => (io.kind() == ErrorKind::TimedOut).then_some("timeout"),
        _ if error.is_remote() => None,
        // How h2 ends what floods with what it bounds itself: resets, CONTINUATIONs, errors.
        (None, Some(Reason::ENHANCE_YOUR_CALM)) => Some("flood"),
        (None, reason) => reason.map(|_| "protocol"),
    }
}
