use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use spillway_core::identity::{SpiffeId, TrustDomain};
use spillway_core::resilience::Outcome;
use spillway_core::resource;
use spillway_core::snapshot::Snapshot;
use spillway_runtime::authority::{Authority, LeafRequest};
use spillway_runtime::telemetry::Metrics;
use spillway_runtime::tls::Workload;
use spillway_runtime::upstream::UpstreamMetrics;
use tempfile::TempDir;

use super::*;
use crate::clock::Clock;
use crate::members::Members;
use crate::pods::fleet::Fleet;
use crate::pods::metrics::PodMetrics;

const LEFT: Duration = Duration::from_secs(2);

/// A book, and what fleets are made with. Nothing is called.
struct World {
    book: Book,
    workload: Arc<Workload>,
    _folder: TempDir,
}

impl World {
    fn new() -> Self {
        spillway_runtime::tls::install_provider();
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
        let id = SpiffeId::parse("spiffe://spillway.test/region/eu/gateway/gw-0").unwrap();
        let leaf = authority.issue(&LeafRequest::new(id, Duration::from_secs(3_600))).unwrap();
        let settings = leaf.save_workload(folder.path(), authority.trust_bundle()).unwrap();
        let book = Book::new(Clock::start(), PodMetrics::new(&Metrics::new("test")));
        Self { book, workload: Workload::load(&settings).unwrap(), _folder: folder }
    }

    /// A pool of so many pods, and a model `m` with these lines.
    fn fleet(&self, pods: usize, lines: &str, before: Option<&Fleet>) -> Arc<Fleet> {
        let pods: String =
            (1..=pods).map(|pod| format!("    - {{ name: pod-{pod}, address: \"127.0.0.1:{pod}\" }}\n")).collect();
        let text = format!(
            "
apiVersion: spillway/v1
kind: Region
metadata: {{ name: eu }}
spec: {{ trustDomain: spillway.test }}
---
apiVersion: spillway/v1
kind: Pool
metadata: {{ name: scorers }}
spec:
  region: eu
  pods:
{pods}---
apiVersion: spillway/v1
kind: Model
metadata: {{ name: m }}
spec:
  pools: [scorers]
  versions: [1]
  backend: onnx
  deadline: 2s
  inputs: [{{ name: x, datatype: FP32, shape: [-1] }}]
  outputs: [{{ name: y, datatype: FP32, shape: [-1] }}]
  {lines}
"
        );
        let snapshot = Arc::new(Snapshot::compile(1, &resource::parse(&text).unwrap()).unwrap());
        let region = Name::parse("eu").unwrap();
        let metrics = UpstreamMetrics::default();
        let members = Arc::new(Members::of(snapshot, &region, None));
        let fleet = Arc::new(Fleet::new(members, &region, &self.workload, &self.book, &metrics, before));
        self.book.keep(&fleet);
        fleet
    }

    fn lane(&self, pods: usize, lines: &str) -> Arc<Lane> {
        self.fleet(pods, lines, None).lane("m").unwrap().clone()
    }
}

fn entities() -> Entities {
    Entities::default()
}

fn take(lane: &Arc<Lane>) -> Result<Lease, NoPod> {
    lane.take(&mut lane.seek(&entities(), None), LEFT)
}

fn pod(lease: &Lease) -> String {
    lease.link().key().pod.to_string()
}

/// Calls until the pod has had so many, which all end so; those of others are good.
fn end(lane: &Arc<Lane>, bad: &str, times: usize, outcome: Outcome) {
    let mut left = times;
    while left > 0 {
        let lease = take(lane).unwrap();
        if pod(&lease) == bad {
            left -= 1;
            lease.end(outcome);
        } else {
            lease.end(Outcome::Success);
        }
    }
}

fn in_flight(lane: &Lane) -> usize {
    lane.pool.pods.iter().map(|pod| pod.state.in_flight()).sum()
}

const TURNS: &str = "routing: { policy: weighted_round_robin }";

#[test]
fn a_request_has_each_pod_once_and_a_full_pool_refuses() {
    let (world, mut leases) = (World::new(), Vec::new());
    let lane = world.lane(3, "");
    let mut seek = lane.seek(&entities(), None);
    for others in [true, true, false] {
        leases.push(lane.take(&mut seek, LEFT).unwrap());
        assert_eq!(lane.has_others(&seek), others);
    }
    let names: std::collections::BTreeSet<String> = leases.iter().map(pod).collect();
    assert_eq!(names.len(), 3);
    assert_eq!(lane.take(&mut seek, LEFT).err(), Some(NoPod::Gone));
    while let Ok(lease) = take(&lane) {
        leases.push(lease);
    }
    assert_eq!(take(&lane).err(), Some(NoPod::Full));
    assert_eq!((leases.len() as u32, in_flight(&lane) as u32), (lane.pool.capacity(), lane.pool.capacity()));
    let mut placed = lane.seek(&entities(), None).with_place();
    drop(lane.take(&mut placed, LEFT).expect("the gate heard of another limit"));
    leases.pop();
    assert!(take(&lane).is_ok(), "who goes makes room");
    drop(leases);
    assert_eq!(in_flight(&lane), 0);
}

#[test]
fn a_full_pool_does_not_spill_to_bad_pods() {
    let world = World::new();
    let lane = world.lane(4, TURNS);
    end(&lane, "pod-2", 5, Outcome::Failure);
    let leases: Vec<Lease> = std::iter::from_fn(|| take(&lane).ok()).collect();
    assert!(leases.iter().all(|lease| pod(lease) != "pod-2"));
    assert_eq!(take(&lane).err(), Some(NoPod::Full));
}

#[test]
fn retries_do_not_go_to_bad_pods_and_first_attempts_do_where_there_is_no_other() {
    let world = World::new();
    let lane = world.lane(2, TURNS);
    end(&lane, "pod-1", 5, Outcome::Failure);
    let mut seek = lane.seek(&entities(), None);
    let lease = lane.take(&mut seek, LEFT).unwrap();
    assert_eq!(pod(&lease), "pod-2");
    assert_eq!(lane.take(&mut seek, LEFT).err(), Some(NoPod::Gone));
    lease.end(Outcome::Success);
    // Not half of the pool can be out: the second is held, and that is panic.
    end(&lane, "pod-2", 5, Outcome::Failure);
    let chosen = lane.would_choose(&entities(), None).unwrap();
    assert_eq!(chosen.reason, Reason::Panic);
    let pods: std::collections::BTreeSet<String> = (0..4).map(|_| pod(&take(&lane).unwrap())).collect();
    assert_eq!(pods.len(), 2);
    lane.pool.pods[0].state.checked(false, Duration::ZERO);
    assert!((0..4).all(|_| pod(&take(&lane).unwrap()) == "pod-2"), "panic still heeds health checks");
    lane.pool.pods[1].state.checked(false, Duration::ZERO);
    assert!(take(&lane).is_ok(), "somebody is asked");
}

#[test]
fn a_breaker_that_is_open_is_respected_where_another_pod_is_there() {
    let world = World::new();
    let lane = world.lane(2, TURNS);
    let now = world.book.recorder.clock.now();
    let open = |index: usize| {
        let breaker = lane.breakers[index].as_ref().unwrap();
        for _ in 0..20 {
            let (permit, _) = breaker.permit(now);
            breaker.record(permit.unwrap(), Outcome::Failure, now);
        }
        assert!(breaker.is_open());
    };
    open(0);
    assert!((0..4).all(|_| pod(&take(&lane).unwrap()) == "pod-2"));
    open(1);
    assert_eq!(lane.would_choose(&entities(), None).unwrap().reason, Reason::Panic);
}

#[test]
fn what_is_explained_is_what_happens_and_changes_nothing() {
    let world = World::new();
    let lane = world.lane(3, TURNS);
    for _ in 0..7 {
        let told = lane.would_choose(&entities(), None).unwrap();
        assert_eq!(lane.would_choose(&entities(), None).unwrap(), told);
        assert_eq!(in_flight(&lane), 0);
        assert_eq!(take(&lane).unwrap().link().key(), lane.pool.pods[told.pod].key());
    }
}

#[test]
fn a_call_that_is_given_up_late_is_a_timeout_and_early_is_nothing() {
    let world = World::new();
    let lane = world.lane(2, TURNS);
    for _ in 0..20 {
        drop(take(&lane).unwrap());
    }
    let out = || lane.pool.state.outliers.lock().pods(Duration::ZERO).filter(|pod| pod.reason.is_some()).count();
    assert_eq!(out(), 0);
    for _ in 0..10 {
        // Its deadline has passed when it is dropped.
        drop(lane.take(&mut lane.seek(&entities(), None), Duration::ZERO));
    }
    assert!(out() > 0);
}

#[test]
fn a_stream_takes_no_room_after_its_first_answer_and_its_end_is_judged() {
    let world = World::new();
    let lane = world.lane(1, "");
    let mut lease = take(&lane).unwrap();
    lease.answered();
    let state = lease.link().state.clone();
    assert_eq!((state.calls(), state.in_flight()), (0, 1));
    lease.close(Outcome::Failure);
    assert_eq!(state.in_flight(), 0);
    for _ in 0..4 {
        take(&lane).unwrap().close(Outcome::Failure);
    }
    let penalty = lane.pool.state.outliers.lock().penalty(state.id, world.book.recorder.clock.now());
    assert!(penalty > 0.4, "{penalty}");
}

#[test]
fn the_book_keeps_what_snapshots_share_and_forgets_the_rest() {
    let world = World::new();
    let before = world.fleet(3, "retries: { budget: 10% }", None);
    let lane = before.lane("m").unwrap().clone();
    let weak = Arc::downgrade(&lane.pool.pods[2].state);
    lane.pool.pods[0].state.checked(false, Duration::ZERO);
    let budget = |lane: &Lane| lane.state.traffic.lock().budget.clone();
    assert!(lane.may_repeat(&lane.seek(&entities(), None), Failure::Died { idempotent: true }, 1, LEFT).is_ok());
    let spent = budget(&lane);

    let after = world.fleet(2, "retries: { budget: 10% }", Some(&before));
    let next = after.lane("m").unwrap();
    assert!(Arc::ptr_eq(&next.pool.pods[0].state, &lane.pool.pods[0].state), "what is known of it");
    assert_eq!(world.book.failed(), 1);
    assert_eq!(budget(next), spent);
    drop((lane, before));
    world.book.keep(&after);
    assert!(weak.upgrade().is_none());

    let after = world.fleet(2, "retries: { budget: 20% }", Some(&after));
    assert!(budget(after.lane("m").unwrap()).left(Duration::ZERO) > spent.left(Duration::ZERO), "it is a new one");
}

/// Whatever becomes of calls, in any order: each comes back, and no pod is given more than it takes.
#[test]
fn every_lease_comes_back() {
    let world = World::new();
    for (seed, policy) in (0..30).zip(["", TURNS, "routing: { policy: least_request }"].into_iter().cycle()) {
        let mut random = StdRng::seed_from_u64(seed);
        let lane = world.lane(3, policy);
        let mut leases: Vec<Lease> = Vec::new();
        for _ in 0..400 {
            let step = random.random_range(0..10);
            if step < 6 {
                let mut seek = lane.seek(&entities(), None);
                for _ in 0..=step % 2 {
                    if let Ok(lease) = lane.take(&mut seek, LEFT) {
                        let state = &lease.link().state;
                        assert!(state.calls() <= state.limit(), "seed {seed}");
                        leases.push(lease);
                    }
                }
            } else if !leases.is_empty() {
                let index = random.random_range(0..leases.len());
                match step {
                    6 => drop(leases.swap_remove(index)),
                    7 => {
                        leases.swap_remove(index).end(Outcome::Success);
                    }
                    8 => leases.swap_remove(index).close(Outcome::Failure),
                    _ => leases[index].answered(),
                }
            }
            world.book.sweep();
        }
        assert_eq!(in_flight(&lane), leases.len(), "seed {seed}");
        drop(leases);
        assert_eq!(in_flight(&lane), 0, "seed {seed}");
    }
}

#[test]
fn a_good_look_at_pods_counts_for_moments_and_a_bad_one_for_itself() {
    let world = World::new();
    let lane = world.lane(2, "");
    let all = |serving| {
        lane.pool.pods.iter().for_each(|pod| {
            pod.state.checked(serving, world.book.recorder.clock.now());
        });
    };
    assert!(lane.was_usable(), "unknown is not down");
    all(false);
    std::thread::sleep(LOOKED);
    assert!(!lane.was_usable());
    all(true);
    assert!(lane.was_usable());
    // Who has looked does not wait for anybody.
    lane.usable_until_us.store(u64::MAX, Ordering::Relaxed);
    let _held = lane.pool.state.outliers.lock();
    assert!(lane.was_usable());
}

#[test]
fn a_large_pool_keeps_its_bound_although_sums_are_remembered() {
    let lane = World::new().lane(2 * FEW_PODS, "");
    let leases: Vec<Lease> = (0..6 * FEW_PODS)
        .map(|number| {
            let site = Entities::One(format!("site-{number}").into());
            lane.take(&mut lane.seek(&site, None), LEFT).unwrap()
        })
        .collect();
    // At most a quarter more than their share of 384 on 128 pods; of remembered totals it can be less.
    let most = lane.pool.pods.iter().map(|pod| pod.state.in_flight()).max();
    assert_eq!(leases.len(), 384);
    assert!(matches!(most, Some(3 | 4)), "{most:?}");
}

#[test]
fn only_in_large_pools_is_a_sum_remembered() {
    let world = World::new();
    let site = Entities::One("site".into());
    for (pods, remembered) in [(FEW_PODS, false), (FEW_PODS + 1, true)] {
        let lane = world.lane(pods, "");
        // As if every pod had a million calls: the owner of an entity is never full.
        lane.carried.in_flight.store((pods as f64 * 1e6).to_bits(), Ordering::Relaxed);
        lane.carried.weight.store((pods as f64).to_bits(), Ordering::Relaxed);
        lane.carried.until_us.store(u64::MAX, Ordering::Relaxed);
        let leases: Vec<Lease> = (0..4).map(|_| lane.take(&mut lane.seek(&site, None), LEFT).unwrap()).collect();
        let owner = pod(&leases[0]);
        assert_eq!(leases.iter().all(|lease| pod(lease) == owner), remembered, "{pods} pods");
    }
}

#[test]
fn a_sum_is_remembered_for_a_while_unless_a_new_one_is_asked_for() {
    let (carried, now, sums) = (Carried::default(), Duration::from_secs(9), std::cell::Cell::new(0));
    let sum = || {
        sums.set(sums.get() + 1);
        Totals { in_flight: f64::from(sums.get()), weight: 3.0 }
    };
    let asked = [
        (Fresh::Lately, now, 1.0),
        (Fresh::Lately, now + SUMMED / 2, 1.0),
        (Fresh::Lately, now + SUMMED, 2.0),
        (Fresh::Now, now + SUMMED, 3.0),
        (Fresh::Lately, now + SUMMED, 3.0),
    ];
    for (fresh, at, in_flight) in asked {
        assert_eq!(carried.totals(fresh, at, &sum), Totals { in_flight, weight: 3.0 });
    }
}
