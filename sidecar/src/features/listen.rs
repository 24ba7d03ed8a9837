//! Hears which rows other processes have overwritten, and drops them from L1.
//!
//! From Redis with a lease (`runtime::feature_changes`), and from a SQLite file that others write too, whose
//! changes are numbered as well. Becoming deaf, and every gap in the numbers, flushes L1.

use std::sync::Arc;

use spillway_core::feature::{Channel, Heard, RowKey};
use spillway_runtime::feature_changes::{self, Listener as _};

use super::flight::Flights;
use super::memory::Memory;
use super::metrics::Metrics;

/// What is told of changes: L1, and reads that are under way.
pub(super) struct Listener<T> {
    pub memory: Arc<Memory>,
    pub flights: Flights<T>,
    pub metrics: Arc<Metrics>,
}

impl<T: Send + Sync + 'static> feature_changes::Listener for Listener<T> {
    fn changed(&mut self, _number: u64, rows: &str) -> bool {
        for row in rows.lines() {
            let Some(key) = RowKey::parse(row) else { return false };
            self.memory.invalidate(&key);
            self.flights.forget(&key);
            self.metrics.heard.inc();
        }
        true
    }

    fn flush(&mut self, _number: u64) {
        self.metrics.gaps.inc();
        self.drop_all();
    }

    fn hearing(&mut self, hears: bool) {
        if hears {
            tracing::info!("features: changes are heard");
        } else {
            tracing::warn!("features: changes are not heard; rows in memory are not believed");
            self.metrics.lost.inc();
            self.drop_all();
        }
    }
}

impl<T> Listener<T> {
    /// Reads that began before must not be shared with those that begin now, nor be kept.
    fn drop_all(&self) {
        self.memory.flush();
        self.flights.forget_all();
    }
}

/// The listening end of a SQLite file's changes.
pub(super) struct FileListener<T> {
    listener: Listener<T>,
    channel: Channel,
    /// Whether L1 is to be believed by what is heard here; else it hears from Redis what matters.
    alone: bool,
}

impl<T: Send + Sync + 'static> FileListener<T> {
    pub fn new(listener: Listener<T>, alone: bool) -> Self {
        Self { listener, channel: Channel::default(), alone }
    }

    pub fn message(&mut self, number: u64, row: &str) {
        if self.channel.message(number) == Heard::Gap || !self.listener.changed(number, row) {
            self.listener.flush(number);
        }
    }

    pub fn counter(&mut self, number: u64) {
        if self.channel.counter(number) == Heard::Gap {
            self.listener.flush(number);
        }
    }

    pub fn hears(&mut self) {
        self.set(true);
    }

    /// Something may be missed from now on.
    pub fn lost(&mut self) {
        self.channel.lost();
        self.set(false);
    }

    fn set(&mut self, hears: bool) {
        if self.alone && self.listener.memory.set_heard(hears) != hears {
            self.listener.hearing(hears);
        }
    }
}
