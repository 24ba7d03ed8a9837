//! A consistent-hash ring. Its points come from the pods' identities, never from their addresses, so
//! a pod that comes back elsewhere keeps its keys.
//!
//! The heaviest pod owns [`POINTS`] points, the others fewer in proportion to their weight, hashed by
//! XXH3-64. A key belongs to the pod of the first point at or after its hash; the pods of the points
//! that follow are where it goes next. A walk along them allocates nothing.

use std::net::IpAddr;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::weight_of;

/// Points of the heaviest pod. The share of a pod deviates by about 1 / sqrt(points): 8 % for 160.
pub const POINTS: u64 = 160;

/// The places of a pool's pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// Sorted by hash.
    points: Vec<Point>,
    /// Pods in the list the ring was made from.
    pods: usize,
    /// Pods with at least one point.
    placed: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    hash: u64,
    /// The pod's index in the list the ring was made from.
    pod: u32,
    /// Steps back to the same pod's point before this one, once round at most. It tells a walk without
    /// a set of the pods seen: this point is the first of its pod if more steps back than were made.
    gap: u32,
}

/// The place of a key on the ring.
pub fn key_hash(key: &[u8]) -> u64 {
    xxh3_64(key)
}

/// The place of a client's address on the ring. The port has no part in it, and an IPv4 address is the
/// same one when it comes mapped into IPv6.
pub fn address_hash(address: IpAddr) -> u64 {
    match address.to_canonical() {
        IpAddr::V4(address) => key_hash(&address.octets()),
        IpAddr::V6(address) => key_hash(&address.octets()),
    }
}

impl Ring {
    /// Builds a ring from pod identities. The same identities make the same ring in any order, up to
    /// the indexes.
    pub fn new<'a>(identities: impl IntoIterator<Item = &'a str>) -> Self {
        Self::weighted(identities.into_iter().map(|identity| (identity, 1.0)))
    }

    /// Builds a ring from pod identities with their configured weights, of which only the proportions
    /// count. A pod with weight 0 (or below, or not a number) has no place; any other has one point at
    /// least.
    pub fn weighted<'a>(pods: impl IntoIterator<Item = (&'a str, f64)>) -> Self {
        let pods: Vec<(&str, f64)> = pods.into_iter().map(|(identity, weight)| (identity, weight_of(weight))).collect();
        let heaviest = pods.iter().map(|(_, weight)| *weight).fold(0.0, f64::max);
        let mut points = Vec::new();
        for (pod, (identity, weight)) in (0_u32..).zip(&pods) {
            if *weight > 0.0 {
                // Points of a smaller weight are the first ones of a larger: a pod whose weight falls
                // gives up keys and takes none.
                let count = ((weight / heaviest * POINTS as f64).round() as u64).max(1);
                let hash = |point| xxh3_64_with_seed(identity.as_bytes(), point);
                points.extend((0..count).map(|point| Point { hash: hash(point), pod, gap: 0 }));
            }
        }
        points.sort_unstable();
        let mut ring = Self { points, placed: 0, pods: pods.len() };
        ring.measure_gaps();
        ring
    }

    /// Pods in the list the ring was made from, those without a point included.
    pub fn pods(&self) -> usize {
        self.pods
    }

    /// The pods in the order in which this key prefers them, each once; those without a point never.
    pub fn order(&self, hash: u64) -> impl Iterator<Item = usize> + '_ {
        let (before, after) = self.points.split_at(self.start(hash));
        let around = (0_u32..).zip(after.iter().chain(before));
        around.filter(|(steps, point)| point.gap > *steps).map(|(_, point)| point.pod as usize).take(self.placed)
    }

    /// The pod that owns a key.
    pub fn owner(&self, hash: u64) -> Option<usize> {
        self.points.get(self.start(hash)).or(self.points.first()).map(|point| point.pod as usize)
    }

    fn start(&self, hash: u64) -> usize {
        self.points.partition_point(|point| point.hash < hash)
    }

    /// Two times round: in the second round each pod's point before is known.
    fn measure_gaps(&mut self) {
        let count = self.points.len();
        let mut last = vec![None; self.pods];
        for step in 0..2 * count {
            let point = &mut self.points[step % count];
            if let Some(before) = last[point.pod as usize].replace(step) {
                point.gap = u32::try_from(step - before).unwrap_or(u32::MAX);
            }
        }
        self.placed = last.iter().flatten().count();
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const KEYS: u64 = 20_000;

    fn pods(count: usize) -> Vec<String> {
        (0..count).map(|index| format!("spiffe://td/region/eu/sidecar/scorers/pod-{index}")).collect()
    }

    fn ring(pods: &[String]) -> Ring {
        Ring::new(pods.iter().map(String::as_str))
    }

    fn owner<'a>(ring: &Ring, pods: &'a [String], key: u64) -> &'a str {
        &pods[ring.owner(key_hash(&key.to_le_bytes())).unwrap()]
    }

    #[test]
    fn an_added_pod_takes_only_its_share() {
        for count in [2, 4, 10] {
            let (before, after) = (pods(count), pods(count + 1));
            let (old, new) = (ring(&before), ring(&after));
            let newcomer = after.last().unwrap();
            let moved: Vec<u64> =
                (0..KEYS).filter(|key| owner(&old, &before, *key) != owner(&new, &after, *key)).collect();
            assert!(moved.iter().all(|key| owner(&new, &after, *key) == newcomer), "keys move to the new pod alone");
            let share = moved.len() as f64 / KEYS as f64;
            assert!(share <= 1.0 / (count + 1) as f64 * 1.2, "{count} pods: {share} of the keys moved");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
        #[test]
        fn through_any_changes_only_the_changed_pods_keys_move(changes in vec(0..12_usize, 1..12)) {
            let all = pods(12);
            let mut present = vec![true; 6];
            present.resize(12, false);
            let members = |present: &[bool]| -> Vec<String> {
                all.iter().zip(present).filter(|(_, is)| **is).map(|(pod, _)| pod.clone()).collect()
            };
            for changed in changes {
                let before = members(&present);
                present[changed] = !present[changed];
                let after = members(&present);
                if before.is_empty() || after.is_empty() {
                    continue;
                }
                let (old, new) = (ring(&before), ring(&after));
                for key in 0..500 {
                    let (from, to) = (owner(&old, &before, key), owner(&new, &after, key));
                    let concerned = if present[changed] { to } else { from };
                    prop_assert!(from == to || concerned == all[changed], "{key}: {from} to {to}");
                }
            }
        }
    }

    #[test]
    fn the_order_of_the_list_does_not_matter() {
        let (forward, mut backward) = (pods(5), pods(5));
        backward.reverse();
        let (a, b) = (ring(&forward), ring(&backward));
        assert!((0..KEYS).all(|key| owner(&a, &forward, key) == owner(&b, &backward, key)));
    }

    #[test]
    fn pods_share_the_keys_evenly() {
        let list = pods(4);
        let ring = ring(&list);
        let mut counts = [0_u64; 4];
        for key in 0..KEYS {
            counts[ring.owner(key_hash(&key.to_le_bytes())).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (KEYS / 5..KEYS * 3 / 10).contains(count)), "{counts:?}");
    }

    #[test]
    fn every_pod_comes_up_once_in_the_order_of_preference() {
        let list = pods(7);
        let ring = ring(&list);
        for key in 0..100_u64 {
            let hash = key_hash(&key.to_le_bytes());
            let mut order: Vec<usize> = ring.order(hash).collect();
            assert_eq!(order.first().copied(), ring.owner(hash));
            order.sort_unstable();
            assert_eq!(order, [0, 1, 2, 3, 4, 5, 6]);
        }
        assert_eq!(Ring::default().order(5).count(), 0);
        assert_eq!(Ring::default().owner(5), None);
    }

    #[test]
    fn the_walk_goes_by_the_first_point_of_each_pod() {
        let list = pods(9);
        let ring =
            Ring::weighted(list.iter().map(String::as_str).zip([1.0, 0.5, 0.01, 0.0, 1.0, 0.2, 0.7, 0.001, 0.3]));
        for key in 0..500_u64 {
            let hash = key_hash(&key.to_le_bytes());
            let mut naive: Vec<usize> = Vec::new();
            let start = ring.points.iter().position(|point| point.hash >= hash).unwrap_or(0);
            for point in ring.points[start..].iter().chain(&ring.points[..start]) {
                if !naive.contains(&(point.pod as usize)) {
                    naive.push(point.pod as usize);
                }
            }
            assert_eq!(ring.order(hash).collect::<Vec<_>>(), naive);
            assert_eq!(naive.len(), 8, "the pod without weight has no place");
        }
        assert_eq!(ring.order(u64::MAX).next(), ring.owner(u64::MAX), "past the last point the ring begins anew");
    }

    #[test]
    fn points_are_in_proportion_to_weight() {
        let list = pods(6);
        let points = |weights: [f64; 6]| {
            let ring = Ring::weighted(list.iter().map(String::as_str).zip(weights));
            assert_eq!(ring.pods(), 6);
            (0..6).map(|pod| ring.points.iter().filter(|point| point.pod == pod).count()).collect::<Vec<_>>()
        };
        assert_eq!(points([4.0, 2.0, 1.0, 0.001, 0.0, 4.0]), [160, 80, 40, 1, 0, 160]);
        assert_eq!(points([0.25; 6]), [160; 6], "only the proportions count");
        assert_eq!(points([1.0, f64::NAN, f64::INFINITY, -1.0, -0.0, 1e300])[1..5], [0, 0, 0, 0]);
        assert_eq!(points([0.0; 6]), [0; 6]);
    }

    #[test]
    fn a_pod_that_loses_weight_only_gives_up_keys() {
        let list = pods(5);
        let with = |weight| Ring::weighted(list.iter().map(String::as_str).zip([1.0, 1.0, weight, 1.0, 1.0]));
        let (full, half) = (with(1.0), with(0.5));
        let (mut had, mut kept) = (0_u64, 0_u64);
        for key in 0..KEYS {
            let hash = key_hash(&key.to_le_bytes());
            if full.owner(hash) == Some(2) {
                had += 1;
                kept += u64::from(half.owner(hash) == Some(2));
            } else {
                assert_eq!(full.owner(hash), half.owner(hash), "no other key moves");
            }
        }
        assert!((had * 2 / 5..had * 3 / 5).contains(&kept), "{kept} of {had} kept");
    }

    #[test]
    fn an_address_has_one_place_however_it_is_written() {
        let hash = |text: &str| address_hash(text.parse().unwrap());
        assert_eq!(hash("192.0.2.7"), hash("::ffff:192.0.2.7"));
        assert_ne!(hash("192.0.2.7"), hash("192.0.2.8"));
        assert_ne!(hash("2001:db8::1"), hash("2001:db8::2"));
    }
}
