//! What the zone answers of its regions: the plan, made again under the node's own view of health.
//!
//! The rule: plan ∩ health. A region is answered only where both the plan and this node's probes let it, unless that
//! leaves none. A new view never takes the last address away (THREATS 66).
//!
//! | known                               | weights                      | standing                                  |
//! |-------------------------------------|------------------------------|-------------------------------------------|
//! | a plan                              | its own, under own health    | the plan's; out where own probes say down |
//! | no plan                             | those of the Regions         | steady; out where own probes say down     |
//! | own probes see every region down    | as if they had seen nothing: the prober is suspected, not the world ||

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use spillway_core::failover::{Site, Standing};
use spillway_core::snapshot::Snapshot;
use spillway_core::units::Name;
use spillway_runtime::plan::Published;

use super::zone::{Zone, parents};

const HTTPS_PORT: u16 = 443;

/// All that answers depend on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Version of the plan, or of the Snapshot where there is none.
    pub serial: u64,
    pub regions: BTreeMap<Name, Place>,
}

/// A region.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    pub weight: f64,
    pub standing: Standing,
    /// Of its gateways, each once.
    pub v4: Vec<IpAddr>,
    pub v6: Vec<IpAddr>,
    /// Of its first gateway.
    pub port: u16,
}

impl View {
    /// `down`: the regions that this node's own probes cannot reach.
    pub fn of(snapshot: &Snapshot, published: Option<&Published>, down: &BTreeSet<Name>) -> Self {
        let reachable = |name: &Name| !down.contains(name);
        let probed = snapshot.regions.iter().filter(|(_, region)| !region.gateways.is_empty());
        let is_isolated = !probed.clone().any(|(name, _)| reachable(name));
        let is_down = |name: &Name| !is_isolated && !reachable(name);
        let plan = published.map(|published| published.plan.under(|name| is_down(name).then_some(0.0)));
        let place = |(name, region): (&Name, &std::sync::Arc<spillway_core::resource::Region>)| {
            let planned = published.and_then(|published| published.standings.get(name));
            let standing = match planned {
                _ if is_down(name) => Standing::Out,
                Some((standing, _)) => *standing,
                None => Standing::Steady,
            };
            let addresses: BTreeSet<IpAddr> =
                region.gateways.iter().map(|gateway| gateway.address.ip().to_canonical()).collect();
            let (v4, v6) = addresses.into_iter().partition(IpAddr::is_ipv4);
            let weight = plan.as_ref().map_or(region.weight, |plan| plan.weight(name));
            let port = region.gateways.first().map_or(HTTPS_PORT, |gateway| gateway.address.port());
            (name.clone(), Place { weight, standing, v4, v6, port })
        };
        let serial = plan.as_ref().map_or(snapshot.version, |plan| plan.version);
        Self { serial, regions: snapshot.regions.iter().map(place).collect() }
    }

    /// Whether there is anything to answer.
    pub fn is_empty(&self) -> bool {
        self.regions.values().all(|place| place.v4.is_empty() && place.v6.is_empty())
    }

    /// This view, with the addresses of the last one where it has none, or none of IPv4 any more; and whether that
    /// was so.
    pub fn keeping(mut self, last: &Self) -> (Self, bool) {
        let has_v4 = |view: &Self| view.regions.values().any(|place| !place.v4.is_empty());
        let loses = has_v4(last) && !has_v4(&self) || self.is_empty() && !last.is_empty();
        if loses {
            for (name, place) in &last.regions {
                let kept = self.regions.entry(name.clone()).or_insert_with(|| place.clone());
                kept.v4.clone_from(&place.v4);
                if kept.v6.is_empty() {
                    kept.v6.clone_from(&place.v6);
                }
                kept.port = place.port;
            }
        }
        (self, loses)
    }
}

/// A view as the zone's names ask for it.
#[derive(Clone, Debug)]
pub struct Served {
    pub view: View,
    /// By name on the wire; None: a name below it is a region's.
    names: HashMap<Vec<u8>, Option<Name>>,
    /// Of each region, all addresses.
    addresses: BTreeMap<Name, Vec<IpAddr>>,
}

/// Which addresses are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
    Both,
}

/// Regions as [`spillway_core::failover::answer()`] takes them.
pub type Sites<'a> = BTreeMap<&'a Name, Site<'a>>;

impl Served {
    pub fn of(view: View, zone: &Zone) -> Self {
        let mut names = HashMap::new();
        for region in view.regions.keys() {
            let Some(wire) = zone.name_of(region.as_str()) else { continue };
            for between in parents(&wire).take_while(|parent| zone.apex_in(parent).is_some_and(|at| at > 0)) {
                names.entry(between.to_vec()).or_insert(None);
            }
            let named = names.entry(wire).or_insert(None);
            *named = named.take().or_else(|| Some(region.clone()));
        }
        let both = |(name, place): (&Name, &Place)| (name.clone(), [&place.v4[..], &place.v6[..]].concat());
        let addresses = view.regions.iter().map(both).collect();
        Self { view, names, addresses }
    }

    /// The region of a name on the wire. `Some(None)`: the name exists, and is no region's.
    #[allow(clippy::option_option)]
    pub fn region(&self, name: &[u8]) -> Option<Option<&Name>> {
        self.names.get(name).map(Option::as_ref)
    }

    pub fn sites(&self, family: Family) -> Sites<'_> {
        let site = |(name, place)| Some((name, self.site(name, place, family)?));
        self.view.regions.iter().filter_map(site).collect()
    }

    /// One region alone, as if nothing were wrong with it.
    pub fn pinned(&self, region: &Name, family: Family) -> Sites<'_> {
        let site = self.view.regions.get_key_value(region).and_then(|(name, place)| {
            let site = self.site(name, place, family)?;
            Some((name, Site { weight: 1.0, ..site }))
        });
        site.into_iter().collect()
    }

    pub fn all_of(&self, region: &Name) -> &[IpAddr] {
        self.addresses.get(region).map_or(&[], |addresses| addresses)
    }

    fn site<'a>(&'a self, name: &Name, place: &'a Place, family: Family) -> Option<Site<'a>> {
        let addresses = match family {
            Family::V4 => &place.v4,
            Family::V6 => &place.v6,
            Family::Both => self.addresses.get(name)?,
        };
        Some(Site { weight: place.weight, standing: place.standing, addresses })
    }
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod tests;
