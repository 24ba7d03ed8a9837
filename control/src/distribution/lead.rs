//! What this node is, from one change of it to the next, and the tasks of the leader.
//!
//! The rule: a role ends with everything that belongs to it: its hub, its streams, its writes. What has settled is
//! written with the fence; so the next leader knows it, and a past one cannot say otherwise.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_core::units::Name;
use spillway_proto::control;
use spillway_runtime::drain::Drain;
use spillway_runtime::link::BEAT;
use spillway_runtime::telemetry::Chain;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::hub::Hub;
use super::relay::Relay;
use super::settled::{KEY, Settled};
use super::{Distribution, Standing};
use crate::store::{Fence, StoreError, Write};

/// How often the rollout is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How long a store that did not answer is left alone.
const REST: Duration = Duration::from_millis(500);
/// How often a follower reads what has settled.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Nudges of one pulse; more are as good as all.
const MOST_NUDGES: usize = 256;

/// What this node is, and its end.
pub(super) struct Role {
    pub part: Part,
    pub over: CancellationToken,
}

pub(super) enum Part {
    /// It is not known yet.
    None,
    Hub {
        hub: Arc<Mutex<Hub>>,
        leads: bool,
    },
    Relay(Relay),
}

impl Role {
    pub fn none() -> Self {
        Self { part: Part::None, over: CancellationToken::new() }
    }

    pub fn hub(&self) -> Option<&Mutex<Hub>> {
        match &self.part {
            Part::Hub { hub, .. } => Some(hub),
            Part::None | Part::Relay(_) => None,
        }
    }
}

impl Distribution {
    /// Plays the role of now until draining.
    pub async fn run(self, drain: Drain) {
        let mut standing = self.0.around.standing.clone();
        loop {
            let now = standing.borrow_and_update().clone();
            tracing::info!(standing = describe(&now), "the distribution has a role");
            let over = CancellationToken::new();
            // Also when this future is dropped.
            let guard = over.clone().drop_guard();
            let goes_on = tokio::select! {
                never = self.play(&now, &over) => match never {},
                changed = standing.wait_for(|standing| *standing != now) => changed.is_ok(),
                // Streams have no end of their own: nodes go elsewhere, and the drain need not wait for them.
                () = drain.draining() => false,
            };
            self.0.role.store(Arc::new(Role::none()));
            self.0.around.served.send_replace(None);
            drop(guard);
            if !goes_on {
                return;
            }
        }
    }

    async fn play(&self, standing: &Standing, over: &CancellationToken) -> std::convert::Infallible {
        match standing {
            Standing::Following(leader) => {
                let relay = Relay::new(leader.clone(), self.0.around.workload.clone());
                self.take_part(Part::Relay(relay), over);
                loop {
                    // So that it is known when both the leader and the store are gone.
                    if let Err(error) = self.settled().await {
                        tracing::debug!(error = %Chain(&error), "what has settled is not known anew");
                    }
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            }
            Standing::Leading(fence) => {
                let settled = self.until_done(|| self.take_over(fence)).await;
                self.serve(&settled, Some(fence), over).await
            }
            Standing::Alone => {
                let settled = self.until_done(|| self.settled_or_known()).await;
                self.serve(&settled, None, over).await
            }
        }
    }

    fn take_part(&self, part: Part, over: &CancellationToken) {
        self.0.role.store(Arc::new(Role { part, over: over.clone() }));
    }

    /// Streams in, versions and plans out. With a fence it leads.
    async fn serve(
        &self,
        settled: &Settled,
        fence: Option<&Fence>,
        over: &CancellationToken,
    ) -> std::convert::Infallible {
        let epoch = fence.map_or(settled.epoch, |fence| fence.epoch);
        let hub = Arc::new(Mutex::new(Hub::new(self.0.settings.rollout.clone(), epoch, settled)));
        self.take_part(Part::Hub { hub: Arc::clone(&hub), leads: fence.is_some() }, over);
        let settle = async {
            match fence {
                Some(fence) => self.settle(&hub, fence, settled.clone()).await,
                None => std::future::pending().await,
            }
        };
        let (never, _, _) = tokio::join!(self.beat(&hub, fence.is_some()), self.fetch(&hub, fence.is_some()), settle);
        never
    }

    /// Ticks, pulses, plans.
    async fn beat(&self, hub: &Mutex<Hub>, leads: bool) -> std::convert::Infallible {
        let around = &self.0.around;
        let leader = if leads { around.node.to_string() } else { String::new() };
        let began = self.now();
        let (mut plan, mut nudges) = (around.plan.clone(), around.nudges.subscribe());
        plan.mark_changed();
        let mut nudged = BTreeSet::new();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut beats = tokio::time::interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let mut pulse_is_due = false;
            tokio::select! {
                _ = ticks.tick() => pulse_is_due = !nudged.is_empty(),
                _ = beats.tick() => pulse_is_due = true,
                nudge = nudges.recv() => match nudge {
                    Ok(nudge) if nudged.len() < MOST_NUDGES => {
                        nudged.insert(nudge);
                        continue;
                    }
                    Ok(_) | Err(RecvError::Lagged(_)) => continue,
                    // Never: we hold a sender.
                    Err(RecvError::Closed) => std::future::pending().await,
                },
                // Ends with the process: then nothing changes any more.
                Ok(()) = plan.changed() => {}
            }
            let now = self.now();
            let newest = plan.borrow_and_update().clone();
            let mut hub = hub.lock();
            if let Some(plan) = newest {
                hub.set_plan(plan, now);
            }
            if leads && now.saturating_sub(began) >= self.0.settings.gather {
                hub.begin(now);
            }
            hub.tick(now);
            if pulse_is_due {
                let nudged = std::mem::take(&mut nudged).into_iter().collect();
                hub.pulse(control::Pulse { nudged, leader: leader.clone() }, now);
            }
        }
    }

    /// Has versions at hand: the newest, and those that are missing.
    async fn fetch(&self, hub: &Mutex<Hub>, leads: bool) -> std::convert::Infallible {
        let library = &self.0.around.library;
        let mut newest = library.newest();
        let mut announced = 0;
        loop {
            let current = *newest.borrow_and_update();
            let missing = hub.lock().take_missing();
            let new = (leads && current > announced).then_some(current);
            for number in missing.into_iter().chain(new) {
                match library.version(number).await {
                    Ok(Some(version)) if Some(number) == new => {
                        announced = number;
                        hub.lock().announce(version, self.now());
                    }
                    Ok(Some(version)) => hub.lock().shelve(version, self.now()),
                    Ok(None) => hub.lock().lose(number),
                    Err(error) => {
                        tracing::warn!(number, error = %Chain(&error), "a version cannot be fetched");
                        tokio::time::sleep(REST).await;
                    }
                }
            }
            // A change is looked for as often as what is missing.
            let _ = tokio::time::timeout(TICK, newest.changed()).await;
        }
    }

    /// Writes what has settled and what was stopped, and tells what all may serve.
    async fn settle(&self, hub: &Mutex<Hub>, fence: &Fence, mut written: Settled) -> std::convert::Infallible {
        loop {
            let (settled, served) = {
                let hub = hub.lock();
                (hub.to_keep(), hub.served().cloned())
            };
            if settled != written {
                self.until_done(|| self.write(fence, &settled)).await;
                written = settled;
            }
            self.0.around.served.send_if_modified(|known| {
                let changed = known.as_ref().map(|known| known.number) != served.as_ref().map(|served| served.number);
                known.clone_from(&served);
                changed
            });
            tokio::time::sleep(TICK).await;
        }
    }

    /// Makes the settled version this epoch's, before anything is pushed in it.
    async fn take_over(&self, fence: &Fence) -> Result<Settled, StoreError> {
        let settled = Settled { epoch: fence.epoch, ..self.settled().await? };
        self.write(fence, &settled).await?;
        Ok(settled)
    }

    async fn settled(&self) -> Result<Settled, StoreError> {
        let Some(value) = self.0.around.store.get(KEY).await? else { return Ok(Settled::default()) };
        let corrupt = |_| StoreError::Corrupt { key: KEY.into() };
        let settled: Settled = serde_json::from_slice(&value.bytes).map_err(corrupt)?;
        *self.0.known.lock() = Some(settled.clone());
        Ok(settled)
    }

    async fn settled_or_known(&self) -> Result<Settled, StoreError> {
        let stored = self.settled().await;
        stored.or_else(|error| self.0.known.lock().clone().ok_or(error))
    }

    async fn write(&self, fence: &Fence, settled: &Settled) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(settled).map_err(|_| StoreError::Corrupt { key: KEY.into() })?;
        self.0.around.store.commit(fence, &[], vec![Write::Put(KEY.into(), bytes.into())]).await?;
        *self.0.known.lock() = Some(settled.clone());
        Ok(())
    }

    /// Asks the store until it answers. A fence that holds no more ends the role, not this.
    async fn until_done<T, F: Future<Output = Result<T, StoreError>>>(&self, ask: impl Fn() -> F) -> T {
        loop {
            match ask().await {
                Ok(done) => return done,
                Err(error) => tracing::warn!(error = %Chain(&error), "the rollout's state is not in the store"),
            }
            tokio::time::sleep(REST).await;
        }
    }
}

fn describe(standing: &Standing) -> String {
    match standing {
        Standing::Leading(fence) => format!("leading, epoch {}", fence.epoch),
        Standing::Following(leader) => {
            let node: &Name = &leader.node;
            format!("following {node}, epoch {}", leader.epoch)
        }
        Standing::Alone => "alone".to_owned(),
    }
}
