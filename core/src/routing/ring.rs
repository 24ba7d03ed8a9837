//! A consistent-hash ring. Its points come from the pods' identities, never from their addresses, so
//! a pod that comes back elsewhere keeps its keys.
//!
//! Each pod owns [`POINTS`] points, hashed by XXH3-64. A key belongs to the pod of the first point at
//! or after its hash; the pods of the points that follow are where it goes next.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Points of one pod. The share of a pod deviates by about 1 / sqrt(points): 8 % for 160.
pub const POINTS: u64 = 160;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// Sorted by hash; the second is the pod's index in the list the ring was made from.
    points: Vec<(u64, u32)>,
    pods: usize,
}

/// The place of a key on the ring.
pub fn key_hash(key: &[u8]) -> u64 {
    xxh3_64(key)
}

impl Ring {
    /// Builds a ring from pod identities. The same identities make the same ring in any order, up to
    /// the indexes.
    pub fn new<'a>(identities: impl IntoIterator<Item = &'a str>) -> Self {
        let mut points = Vec::new();
        let mut pods = 0;
        for (index, identity) in (0_u32..).zip(identities) {
            points.extend((0..POINTS).map(|point| (xxh3_64_with_seed(identity.as_bytes(), point), index)));
            pods += 1;
        }
        points.sort_unstable();
        Self { points, pods }
    }

    /// The pods in the order in which this key prefers them, each once.
    pub fn order(&self, hash: u64) -> impl Iterator<Item = usize> + '_ {
        let start = self.points.partition_point(|(point, _)| *point < hash);
        let mut seen = vec![false; self.pods];
        let around = self.points[start..].iter().chain(&self.points[..start]);
        around
            .filter_map(move |(_, pod)| {
                let pod = *pod as usize;
                (!std::mem::replace(&mut seen[pod], true)).then_some(pod)
            })
            .take(self.pods)
    }

    /// The pod that owns a key.
    pub fn owner(&self, hash: u64) -> Option<usize> {
        let at = self.points.partition_point(|(point, _)| *point < hash);
        self.points.get(at).or(self.points.first()).map(|(_, pod)| *pod as usize)
    }
}

#[cfg(test)]
mod tests {
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
}
