//! Log lines: JSON to stderr, for changes of state.

use tracing::level_filters::LevelFilter;
use tracing_log::{AsLog, LogTracer};
use tracing_subscriber::EnvFilter;

/// Which lines are written when `SPILLWAY_LOG` says nothing.
/// Pingora reports what clients do wrong as its own errors; those are counted and in the access log.
/// Hickory tells of each datagram that is no answer; questions without one are counted.
const DEFAULT_FILTER: &str = "info,pingora_core=off,pingora_proxy=off,hickory_net=off,hickory_resolver=off,scylla=warn,h2=warn,hyper=warn,rustls=warn,tower=warn,opentelemetry=warn";

/// Sends `tracing` and `log` records to stderr as one JSON object per line. The first call of the
/// process decides; later ones change nothing.
///
/// The environment variable `SPILLWAY_LOG` filters, in the syntax of `tracing-subscriber`'s
/// `EnvFilter`, such as `info,spillway_runtime=debug`. A filter that cannot be read is said and the
/// default used.
pub fn init_logging() {
    let asked = std::env::var("SPILLWAY_LOG").ok();
    let parsed = asked.as_deref().map(EnvFilter::try_new);
    let refused = matches!(parsed, Some(Err(_)));
    let filter = parsed.and_then(Result::ok).unwrap_or_else(|| EnvFilter::new(DEFAULT_FILTER));
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .finish();
    if tracing::subscriber::set_global_default(subscriber).is_err() {
        return;
    }
    // Without the level, `log` builds each of Pingora's trace lines before the filter drops it; one of
    // them walks the whole buffer for every chunk of a body.
    let level = LevelFilter::current().as_log();
    // Fails only if someone else bridges `log` already.
    let _ = LogTracer::builder().with_max_level(level).init();
    if refused {
        tracing::warn!(expected = DEFAULT_FILTER, "SPILLWAY_LOG is no filter; the default is used");
    }
}
