//! One HTTP/2 connection, from its preface to its end: streams out of it, each served by a task.
//!
//! The rule: a client that floods, breaks the protocol or keeps sending requests that mean two things
//! loses its connection, and that is counted. What one stream asks for is not judged here.

use std::io::ErrorKind;
use std::sync::Arc;

use h2::Reason;
use pingora_core::apps::HttpServerApp;
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::v2::server::{H2Accept, HttpSession, handshake};
use pingora_core::protocols::{Digest, Stream};
use pingora_core::server::ShutdownWatch;
use pingora_proxy::HttpProxy;
use tokio::time::{Instant, sleep};

use crate::downstream::connection::{Connection, IDLE_TIME};
use crate::edge::Edge;
use crate::errors::HeadFault;
use crate::exchange::Exchange;
use crate::shared::Shared;

/// Requests of one connection that Pingora refused for meaning two things.
const MOST_AMBIGUOUS: u32 = 32;

/// Serves a connection until it ends, or until it is empty after `stopping` says so.
pub async fn serve(
    app: &Arc<HttpProxy<Edge>>,
    shared: &Arc<Shared>,
    connection: Connection,
    mut stopping: ShutdownWatch,
) {
    let caller = connection.caller().clone();
    let shutdown = stopping.clone();
    let stream: Stream = Box::new(connection);
    let digest = Arc::new(Digest {
        ssl_digest: stream.get_ssl_digest(),
        timing_digest: stream.get_timing_digest(),
        proxy_digest: stream.get_proxy_digest(),
        socket_digest: stream.get_socket_digest(),
    });
    let mut h2 = match handshake(stream, app.h2_options()).await {
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
                let (app, shutdown, open) = (app.clone(), shutdown.clone(), open.clone());
                tokio::spawn(async move {
                    app.process_new_http(ServerSession::new_http2(session), &shutdown).await;
                    drop(open);
                });
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
