//! An answer as it is kept, and what must still be so for it to be given.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use spillway_core::cache::freshness::Times;
use spillway_core::cache::key::Key;
use spillway_core::units::Name;

/// What a result is about: what a purge names it by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    pub tenant: Name,
    pub model: Name,
    /// A [`spillway_core::routing::key_hash`] of each entity.
    pub entities: Box<[u64]>,
}

/// What the answer says about how it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Made {
    pub model_version: Option<HeaderValue>,
    /// Degraded answers are shared by those who asked together, and never stored.
    pub degraded: Option<HeaderValue>,
    /// When it was made.
    pub feature_age_ms: Option<i64>,
    /// Answers of other regions are shared by those who asked together, and never stored.
    pub region: Option<HeaderValue>,
}

/// One answer, whole.
#[derive(Debug)]
pub struct Entry {
    pub key: Key,
    pub about: Arc<About>,
    /// The `ModelInferResponse` without its id, in bytes of its own.
    pub message: Bytes,
    pub made: Made,
    pub times: Times,
    /// The last purge that was known when its call began.
    pub mark: u64,
    /// The flush of the feature channel after which it was stored; `None` where it depends on no row.
    pub generation: Option<u64>,
}

impl Entry {
    /// What it takes in memory, but for its place in the store.
    pub fn bytes(&self) -> u64 {
        let about = size_of::<About>() + size_of_val(&*self.about.entities);
        let header = |value: &Option<HeaderValue>| value.as_ref().map_or(0, HeaderValue::len);
        let made = header(&self.made.model_version) + header(&self.made.degraded);
        (size_of::<Self>() + about + made + self.message.len() + self.key.material.len()) as u64
    }

    /// The age of the features in it, in milliseconds, when it is `age` old itself.
    pub fn feature_age_ms(&self, age: Duration) -> Option<i64> {
        let since = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
        self.made.feature_age_ms.map(|made| made.saturating_add(since))
    }
}

/// An entry that is given to a request.
#[derive(Clone, Debug)]
pub struct Kept {
    pub entry: Arc<Entry>,
    /// Since the model made it; zero where it was made for this request among others.
    pub age: Duration,
}
