//! Where each model stands on its ladder, for all threads of this gateway.
//!
//! The rule: only models that allow a level have a ladder, and at level 0 a request takes a lock only to tell how
//! it went. A ladder outlives changes of the snapshot as long as its model does.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::resilience::{DegradeSettings, Ladder, Level, Sample, Serve, Step};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;

use super::metrics::Metrics;
use crate::clock::Clock;

pub struct Ladders {
    clock: Clock,
    models: ArcSwap<HashMap<Name, Arc<ModelLadder>>>,
}

pub struct ModelLadder {
    model: Name,
    /// [`Level::step`] of the last look.
    step: AtomicU8,
    gauge: Gauge,
    state: Mutex<State>,
}

struct State {
    settings: DegradeSettings,
    ladder: Ladder,
}

impl Ladders {
    pub fn new(clock: Clock) -> Self {
        Self { clock, models: ArcSwap::default() }
    }

    /// `None`: the model has no ladder.
    pub fn of(&self, model: &str) -> Option<Arc<ModelLadder>> {
        self.models.load().get(model).cloned()
    }

    /// Takes over which models have ladders and what sets them off. For one task at a time.
    pub fn adopt(&self, snapshot: &Snapshot, metrics: &Metrics) {
        let before = self.models.load_full();
        let mut after = HashMap::new();
        for (name, model) in &snapshot.models {
            let settings = model.traffic.degradation.as_ref().map(|degradation| &degradation.settings);
            let Some(settings) = settings.filter(|settings| settings.allowed.contains(&true)) else { continue };
            let kept = before.get(name).cloned();
            let ladder = kept.unwrap_or_else(|| Arc::new(ModelLadder::new(name, settings, metrics)));
            ladder.reconfigure(settings, self.clock);
            after.insert(name.clone(), ladder);
        }
        for gone in before.keys().filter(|name| !after.contains_key(*name)) {
            metrics.forget(gone.as_str());
        }
        self.models.store(Arc::new(after));
    }

    /// Has every ladder look at the time: without requests nobody else does.
    pub fn look(&self) {
        for ladder in self.models.load().values() {
            ladder.level(self.clock);
        }
    }

    /// Where each model stands, in no order.
    pub fn levels(&self) -> Vec<(Name, Level)> {
        self.models.load().iter().map(|(name, ladder)| (name.clone(), ladder.level(self.clock))).collect()
    }

    pub fn level(&self, ladder: &ModelLadder) -> Level {
        ladder.level(self.clock)
    }

    pub fn serve(&self, ladder: &ModelLadder) -> Serve {
        if ladder.is_normal() {
            return Serve::At(Level::default());
        }
        let mut state = ladder.state.lock();
        let serve = state.ladder.serve(self.clock.now());
        ladder.show(&mut state, self.clock);
        serve
    }

    pub fn observe(&self, ladder: &ModelLadder, sample: Sample) {
        let mut state = ladder.state.lock();
        state.ladder.observe(sample, self.clock.now());
        ladder.show(&mut state, self.clock);
    }
}

impl ModelLadder {
    fn new(model: &Name, settings: &DegradeSettings, metrics: &Metrics) -> Self {
        let state = State { settings: settings.clone(), ladder: Ladder::new(settings.clone()) };
        Self {
            model: model.clone(),
            step: AtomicU8::new(Step::Normal.number()),
            gauge: metrics.level(model.as_str()),
            state: Mutex::new(state),
        }
    }

    fn reconfigure(&self, settings: &DegradeSettings, clock: Clock) {
        let mut state = self.state.lock();
        if state.settings != *settings {
            state.settings = settings.clone();
            state.ladder.reconfigure(settings.clone(), clock.now());
            self.show(&mut state, clock);
        }
    }

    pub fn is_normal(&self) -> bool {
        self.step.load(Ordering::Relaxed) == Step::Normal.number()
    }

    fn level(&self, clock: Clock) -> Level {
        self.show(&mut self.state.lock(), clock)
    }

    /// Shows where the ladder stands, and says a change.
    fn show(&self, state: &mut State, clock: Clock) -> Level {
        let level = state.ladder.level(clock.now());
        let step = level.step.number();
        // Under the lock: changes are told in the order in which they happened.
        let before = self.step.swap(step, Ordering::Relaxed);
        if before != step {
            self.gauge.set(step.into());
            let reason = level.reason.map_or("recovered", |reason| reason.as_str());
            if before < step {
                tracing::warn!(model = %self.model, before, level = step, reason, "the model is served with less");
            } else {
                tracing::info!(model = %self.model, before, level = step, reason, "the model is served with more again");
            }
        }
        level
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use spillway_core::resource;
    use spillway_runtime::telemetry::Metrics as Registry;

    use super::*;

    fn snapshot(version: u64, degradation: &str) -> Snapshot {
        let text = format!(
            "apiVersion: spillway/v1\nkind: Region\nmetadata: {{name: eu}}\nspec: {{trustDomain: spillway.test}}\n---\n\
             apiVersion: spillway/v1\nkind: Pool\nmetadata: {{name: p}}\nspec: {{region: eu, pods: [{{name: a, address: '127.0.0.1:1'}}]}}\n---\n\
             apiVersion: spillway/v1\nkind: Model\nmetadata: {{name: m}}\nspec:\n  pools: [p]\n  versions: [1]\n  backend: onnx\n  \
             deadline: 1s\n  inputs: [{{name: x, datatype: FP32, shape: [-1]}}]\n  outputs: [{{name: y, datatype: FP32, shape: [-1]}}]\n  cache: {{ttl: 1m}}\n{degradation}"
        );
        Snapshot::compile(version, &resource::parse(&text).unwrap()).unwrap()
    }

    fn error() -> Sample {
        Sample { step: Step::Normal, features: None, prediction: None, error: true }
    }

    #[test]
    fn ladders_come_stay_and_go_with_their_models() {
        let (ladders, metrics) = (Ladders::new(Clock::start()), Metrics::new(&Registry::new("test")));
        ladders.adopt(&snapshot(1, ""), &metrics);
        assert!(ladders.of("m").is_none());
        ladders.adopt(&snapshot(2, "  degradation: {levels: [3, 4], enterAfter: 0s}\n"), &metrics);
        let ladder = ladders.of("m").unwrap();
        assert_eq!(ladders.serve(&ladder).level().step, Step::Normal);
        let began = std::time::Instant::now();
        while ladder.level(ladders.clock).step != Step::StaticAnswer {
            ladders.observe(&ladder, error());
            assert!(began.elapsed() < Duration::from_secs(10));
        }
        assert_eq!((ladder.gauge.get(), ladders.levels().len()), (4, 1));
        // Another setting: the same ladder, no further down than is allowed.
        ladders.adopt(&snapshot(3, "  degradation: {levels: [3]}\n"), &metrics);
        assert!(Arc::ptr_eq(&ladder, &ladders.of("m").unwrap()));
        assert_eq!(ladders.levels()[0].1.step, Step::CachedPrediction);
        ladders.adopt(&snapshot(4, ""), &metrics);
        assert!(ladders.of("m").is_none());
    }
}
