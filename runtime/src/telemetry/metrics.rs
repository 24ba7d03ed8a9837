//! The registry of one process, written as OpenMetrics text.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};

use super::process::ProcessCollector;

/// The media type of [`Metrics::encode`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Cheap to clone; all clones are the same registry.
#[derive(Clone)]
pub struct Metrics(Arc<Mutex<Registry>>);

impl Metrics {
    /// `process`: what this process is, such as `gateway`.
    pub fn new(process: &'static str) -> Self {
        let mut registry = Registry::with_prefix("spillway");
        let version = env!("CARGO_PKG_VERSION");
        let build = Info::new(vec![("version", version), ("process", process)]);
        registry.register("build", "The version that runs", build);
        registry.register_collector(Box::new(ProcessCollector));
        Self(Arc::new(Mutex::new(registry)))
    }

    /// Registers a metric and returns it, so that its handle is looked up once.
    ///
    /// `name` goes without the prefix `spillway_`; a counter's name goes without `_total`, which the
    /// text format adds.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        self.0.lock().register(name, help, metric.clone());
        metric
    }

    /// A family of metrics made by `S::default`.
    pub fn family<S, M>(&self, name: &str, help: &str) -> Family<S, M>
    where
        S: Clone + std::hash::Hash + Eq,
        M: Default,
        Family<S, M>: Metric + Clone,
    {
        self.register(name, help, Family::default())
    }

    /// For what [`Metrics::register`] cannot express, such as units and collectors.
    pub fn registry(&self) -> parking_lot::MutexGuard<'_, Registry> {
        self.0.lock()
    }

    /// All metrics as OpenMetrics text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(16 << 10);
        encode(&mut text, &self.0.lock())?;
        Ok(text)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;

    #[test]
    fn a_counter_is_found_under_its_whole_name() {
        let metrics = Metrics::new("test");
        let counter = metrics.register("thing_made", "Things made", Counter::<u64>::default());
        counter.inc();
        let text = metrics.encode().unwrap();
        assert!(text.contains("spillway_thing_made_total 1\n"), "{text}");
        assert!(text.contains("spillway_build_info{version=\""), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn the_process_says_what_it_uses() {
        let text = Metrics::new("test").encode().unwrap();
        for name in ["resident_memory_bytes", "open_fds", "cpu_seconds_total", "threads"] {
            assert!(text.contains(&format!("\nspillway_process_{name} ")), "{name}: {text}");
        }
    }
}
