//! What a process takes from the control plane: judged, kept on disk, then served.
//!
//! The rule: everything is checked before anything is written, and written before it is served. Whatever fails, what
//! is served stays, and the sender gets a stable word and every fault.
//!
//! ```text
//! Delta ─▶ epoch ─▶ base ─▶ SHA-256 of the result ─▶ resources ─▶ semantics ── VALIDATED ─▶ disk ── PERSISTED ─▶ swap ── APPLIED
//! Plan ──▶ SHA-256 ─▶ epoch ─▶ weights, regions ───────────────────┘
//! ```

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message;
use sha2::{Digest, Sha256};
use spillway_core::failover::UnfitPlan;
use spillway_core::rollout::semantics::MOST_BYTES;
use spillway_core::rollout::{Confirmed, Contents, Held, Offer, Unsafe, check};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::{ByteSize, Name};
use spillway_proto::control;
use spillway_proto::control::ack::Step;

use super::delta;
use super::epoch::Epoch;
use super::refusal::{Reason, Refusal};
use crate::audit::{Audit, Hash};
use crate::generations::{Generations, beside};
use crate::plan::{KeptPlan, MOST_PLAN_BYTES, Plans};
use crate::snapshot::{Kept, Subscription, compile, wrap};
use crate::telemetry::Metrics;

/// What a Delta has beside the resources: names that were removed, hashes.
const ROOM: u64 = 1 << 20;

/// What is served, where it is kept, and what has been seen. One push at a time.
#[derive(Debug)]
pub struct Intake {
    snapshots: Arc<Subscription>,
    plans: Arc<Plans>,
    /// Of the snapshot that is served: it stands on the disk, too.
    encoded: Bytes,
    snapshot_file: Generations,
    plan_file: Generations,
    plan_sha256: Option<Bytes>,
    epoch: Epoch,
    serving: Serving,
}

/// What heartbeats say, also while a push is being taken. Cheap to clone; all clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Serving(Arc<Mutex<control::Serving>>);

impl Serving {
    pub fn now(&self) -> control::Serving {
        self.0.lock().clone()
    }
}

impl Intake {
    /// Takes up what was kept beside `snapshot` when the process ran last: `snapshot` and `plan`, each with its
    /// `.previous`, and `snapshot.epoch`. What is good of it is served at once; if nothing is, the subscription is
    /// empty until the first push. Blocks on the file system.
    pub fn resume(snapshot: &Path, metrics: &Metrics, audit: &Audit) -> Self {
        let (snapshots, Kept { generations: snapshot_file, encoded }) = Subscription::resume(snapshot, metrics, audit);
        let (plans, kept) = Plans::resume(&snapshot.with_file_name("plan"), metrics);
        let KeptPlan { generations: plan_file, sha256: plan_sha256 } = kept;
        let mut epoch = Epoch::resume(beside(snapshot, ".epoch"));
        if let Some(plan) = plans.current()
            && let Err(error) = epoch.see(plan.epoch)
        {
            tracing::warn!(%error, "the newest epoch cannot be kept");
        }
        let intake = Self {
            snapshots: Arc::new(snapshots),
            plans: Arc::new(plans),
            encoded,
            snapshot_file,
            plan_file,
            plan_sha256,
            epoch,
            serving: Serving::default(),
        };
        intake.tell_serving();
        intake
    }

    pub fn snapshots(&self) -> Arc<Subscription> {
        self.snapshots.clone()
    }

    pub fn plans(&self) -> Arc<Plans> {
        self.plans.clone()
    }

    pub(super) fn serving(&self) -> Serving {
        self.serving.clone()
    }

    /// Takes a Delta, and tells each step that it came to. Blocks on the file system.
    pub fn take_delta(&mut self, delta: control::Delta, mut tell: impl FnMut(Step)) -> Result<(), Refusal> {
        let taken = self.try_delta(delta, &mut tell);
        if let Err(Refusal { reason, errors }) = &taken {
            self.snapshots.tell_refused(reason.as_str(), &errors.join("; "));
        }
        taken
    }

    /// Takes a plan, and tells each step that it came to. Blocks on the file system.
    pub fn take_plan(&mut self, sealed: control::SealedPlan, mut tell: impl FnMut(Step)) -> Result<(), Refusal> {
        let taken = self.try_plan(sealed, &mut tell);
        if let Err(Refusal { reason, errors }) = &taken {
            self.plans.tell_refused(reason.as_str(), &errors.join("; "));
        }
        taken
    }

    fn try_delta(&mut self, delta: control::Delta, tell: &mut dyn FnMut(Step)) -> Result<(), Refusal> {
        let epoch = delta.epoch;
        self.check_epoch(epoch)?;
        let serving = self.serving.now();
        let same_version = delta.target == serving.snapshot_version;
        if same_version && delta.target_sha256 == serving.snapshot_sha256 && delta.target != 0 {
            self.see(epoch)?;
            tell(Step::Applied);
            return Ok(());
        }
        if delta.target == 0 {
            return Err(Refusal::new(Reason::Malformed, "it leads to no version"));
        }
        let own_base = delta.base == serving.snapshot_version && delta.base_sha256 == serving.snapshot_sha256;
        if delta.base != 0 && !own_base {
            let served = serving.snapshot_version;
            let problem = format!("it is made for the version {}; what is served is another {served}", delta.base);
            return Err(Refusal::new(Reason::Base, problem));
        }
        let size = ByteSize(delta.encoded_len() as u64);
        if size.0 > MOST_BYTES.0 + ROOM {
            return Err(vec![Unsafe::TooLarge { size, most: MOST_BYTES }].into());
        }
        let confirmed = confirmed(&delta.confirmed_empty);
        let resync = same_version && delta.base == 0;
        let encoded = delta::apply(delta, &self.encoded)?;
        let snapshot = compile(encoded.clone())?;
        let offered = contents(&snapshot);
        let offer = Offer {
            version: snapshot.version,
            epoch,
            size: ByteSize(encoded.len() as u64),
            resync,
            contents: &offered,
            confirmed: &confirmed,
        };
        let served = (!self.snapshots.is_empty()).then(|| self.snapshots.current());
        let held = served.as_ref().map(|served| (served.version, contents(served)));
        let held =
            Held { serving: held.as_ref().map(|(version, contents)| (*version, contents)), epoch: self.epoch.newest() };
        check(&offer, &held, MOST_BYTES)?;
        tell(Step::Validated);
        self.see(epoch)?;
        let sealed = wrap(encoded.clone());
        self.snapshot_file.write(&sealed).map_err(|error| Refusal::new(Reason::Unwritable, error))?;
        tell(Step::Persisted);
        self.encoded = encoded;
        self.snapshots.replace(snapshot, Hash::of(&sealed));
        self.tell_serving();
        tell(Step::Applied);
        Ok(())
    }

    fn try_plan(&mut self, sealed: control::SealedPlan, tell: &mut dyn FnMut(Step)) -> Result<(), Refusal> {
        let size = sealed.encoded_len();
        if size > MOST_PLAN_BYTES {
            let problem = format!("it has {size} bytes; expected at most {MOST_PLAN_BYTES}");
            return Err(Refusal::new(Reason::TooLarge, problem));
        }
        let published = crate::plan::open(&sealed)?;
        self.check_epoch(published.epoch)?;
        let served = self.plans.version();
        if published.plan.version == served && self.plan_sha256.as_ref() == Some(&sealed.sha256) {
            tell(Step::Applied);
            return Ok(());
        }
        // Without a snapshot nothing says which regions there are.
        let snapshot = self.snapshots.current();
        let known = |region: &Name| self.snapshots.is_empty() || snapshot.regions.contains_key(region);
        published.plan.check(Some(served), known).map_err(unfit)?;
        tell(Step::Validated);
        self.see(published.epoch)?;
        let unwritable = |error| Refusal::new(Reason::Unwritable, error);
        self.plan_file.write(&sealed.encode_to_vec()).map_err(unwritable)?;
        tell(Step::Persisted);
        self.plan_sha256 = Some(sealed.sha256);
        self.plans.replace(published);
        self.tell_serving();
        tell(Step::Applied);
        Ok(())
    }

    fn check_epoch(&self, offered: u64) -> Result<(), Refusal> {
        let seen = self.epoch.newest();
        if offered < seen { Err(vec![Unsafe::StaleLeader { offered, seen }].into()) } else { Ok(()) }
    }

    fn see(&mut self, epoch: u64) -> Result<(), Refusal> {
        self.epoch.see(epoch).map_err(|error| Refusal::new(Reason::Unwritable, error))
    }

    fn tell_serving(&self) {
        let sha256 = if self.encoded.is_empty() { Vec::new() } else { Sha256::digest(&self.encoded).to_vec() };
        *self.serving.0.lock() = control::Serving {
            snapshot_version: self.snapshots.load().version,
            snapshot_sha256: sha256.into(),
            plan_version: self.plans.version(),
        };
    }
}

fn contents(snapshot: &Snapshot) -> Contents {
    Contents::of(snapshot, |region| snapshot.regions.get(region).map_or(0.0, |region| region.weight))
}

/// Names that are none are nobody's.
fn confirmed(names: &[control::ResourceName]) -> Confirmed {
    let of = |kind: &str| -> BTreeSet<Name> {
        names.iter().filter(|named| named.kind == kind).filter_map(|named| Name::parse(&named.name).ok()).collect()
    };
    Confirmed { regions: of("Region"), pools: of("Pool") }
}

fn unfit(faults: Vec<UnfitPlan>) -> Refusal {
    let older = faults.iter().any(|fault| matches!(fault, UnfitPlan::Older { .. }));
    let reason = if older { Reason::Version } else { Reason::Unsafe };
    Refusal::of(reason, faults.iter().map(ToString::to_string))
}

#[cfg(test)]
#[path = "intake_tests.rs"]
mod tests;
