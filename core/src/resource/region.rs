//! Region: a place that serves by itself, how others reach it, and how much it should take.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::reader::{Field, Fields};
use crate::identity::TrustDomain;
use crate::units::{InvalidUnit, Name, Rate};

/// A place that serves by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Region {
    /// The trust domain that its workloads and clients belong to.
    pub trust_domain: TrustDomain,
    /// How peers, probes and DNS reach it, each name and each address once. Default none: it is neither probed nor
    /// answered, and no request is forwarded to it.
    pub gateways: Vec<GatewayAddress>,
    /// Its planned part of the traffic; only the proportions between regions count. Finite, at least 0; default 100.
    pub weight: f64,
    /// What it can serve, where that is declared and not measured.
    pub capacity: Option<Rate>,
    /// What a request costs there, in any unit that is the same for all regions. Finite, at least 0; default 1.
    pub cost: f64,
}

/// One gateway. It proves itself as `spiffe://<trust domain>/region/<region>/gateway/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GatewayAddress {
    pub name: Name,
    pub address: SocketAddr,
}

impl Region {
    pub const WEIGHT: f64 = 100.0;
    pub const COST: f64 = 1.0;
    /// DNS answers, probes and links are one for each.
    pub const MOST_GATEWAYS: usize = 64;
}

pub(super) fn read(spec: &Field<'_>) -> Option<Region> {
    let fields = spec.map();
    let trust_domain = fields.required("trustDomain").and_then(|field| {
        let text = field.text()?;
        TrustDomain::parse(text).map_err(|fault| field.fault(fault.to_string())).ok()
    });
    let gateways = fields.optional("gateways").map(|field| read_gateways(&field)).unwrap_or_default();
    let weight = amount(&fields, "weight", Region::WEIGHT);
    let capacity = fields.optional("capacity").map(|field| field.parse(Rate::parse));
    let cost = amount(&fields, "cost", Region::COST);
    fields.finish();
    Some(Region {
        trust_domain: trust_domain?,
        gateways,
        weight: weight?,
        capacity: match capacity {
            Some(capacity) => Some(capacity?),
            None => None,
        },
        cost: cost?,
    })
}

fn read_gateways(list: &Field<'_>) -> Vec<GatewayAddress> {
    let items = list.items();
    if items.len() > Region::MOST_GATEWAYS {
        list.fault(format!("expected at most {} gateways", Region::MOST_GATEWAYS));
    }
    let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    let mut gateways = Vec::with_capacity(items.len());
    for item in &items {
        let Some(gateway) = read_gateway(item) else { continue };
        if !names.insert(gateway.name.clone()) {
            item.fault(format!("the gateway '{}' is given twice", gateway.name));
        }
        if !addresses.insert(gateway.address) {
            item.fault(format!("the address {} is given twice", gateway.address));
        }
        gateways.push(gateway);
    }
    gateways
}

fn read_gateway(field: &Field<'_>) -> Option<GatewayAddress> {
    const ADDRESS: InvalidUnit = InvalidUnit("an address and a port that can be reached, such as 192.0.2.7:443");
    let fields = field.map();
    let name = fields.required("name").and_then(|field| field.parse(Name::parse));
    let reachable = |address: &SocketAddr| address.port() != 0 && !address.ip().is_unspecified();
    let address = fields
        .required("address")
        .and_then(|field| field.parse(|text| text.parse().ok().filter(reachable).ok_or(ADDRESS)));
    fields.finish();
    Some(GatewayAddress { name: name?, address: address? })
}

fn amount(fields: &Fields<'_>, name: &'static str, default: f64) -> Option<f64> {
    const AMOUNT: InvalidUnit = InvalidUnit("a number from 0 to 1000000, such as 1.5");
    let Some(field) = fields.optional(name) else { return Some(default) };
    let fits = |number: &f64| (0.0..=1_000_000.0).contains(number);
    field.parse(|text| text.parse().ok().filter(fits).map(|number: f64| number.abs()).ok_or(AMOUNT))
}
