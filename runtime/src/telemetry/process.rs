//! What this process uses, read from `/proc/self` when metrics are asked for.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// Clock ticks per second in `/proc/self/stat`: fixed at 100 for user space on Linux (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;

#[derive(Debug)]
pub(super) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut gauge = |name: &str, help: &str, value: Option<i64>| {
            let Some(value) = value else { return Ok(()) };
            let metric = ConstGauge::new(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        gauge("process_resident_memory_bytes", "Memory in RAM", status("VmRSS:").map(|kib| kib * 1_024))?;
        gauge("process_threads", "Threads", status("Threads:"))?;
        gauge("process_open_fds", "Open file descriptors", open_descriptors())?;
        let Some(seconds) = cpu_seconds() else { return Ok(()) };
        let metric = ConstCounter::new(seconds);
        let name = "process_cpu_seconds";
        metric.encode(encoder.encode_descriptor(name, "CPU time, user and system", None, metric.metric_type())?)
    }
}

fn status(key: &str) -> Option<i64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

fn open_descriptors() -> Option<i64> {
    // One of them is the folder being read.
    i64::try_from(fs::read_dir("/proc/self/fd").ok()?.count()).ok().map(|count| count - 1)
}

fn cpu_seconds() -> Option<f64> {
    let text = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the command in parentheses and may hold anything: count from its end.
    // utime and stime are the fields 14 and 15 of the line, 12 and 13 from there (proc(5)).
    let rest = &text[text.rfind(')')? + 1..];
    let mut ticks = rest.split_whitespace().skip(11).map(str::parse::<u64>);
    let (user, system) = (ticks.next()?.ok()?, ticks.next()?.ok()?);
    Some((user + system) as f64 / TICKS_PER_SECOND)
}
