//! Pool: the pods of one region that serve the same models.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::{NonZeroU8, NonZeroU16};

use super::reader::Field;
use crate::units::{DnsName, InvalidUnit, Name};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    pub region: Name,
    pub source: PodSource,
}

/// Where the pods of a pool are known from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodSource {
    /// `pods`.
    Listed(Vec<Pod>),
    /// `dns`.
    Dns(DnsSource),
}

/// What DNS is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DnsSource {
    /// `name` and `port`: the addresses of a name, such as that of a headless Service.
    Hosts { name: DnsName, port: NonZeroU16 },
    /// `srv`: the targets of SRV records.
    Services { name: DnsName },
}

/// One sidecar. Its identity, not its address, places it on the ring.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pod {
    pub name: Name,
    pub address: SocketAddr,
    /// Up to [`Pod::FULL_WEIGHT`]; only the proportions between the pods of a pool count.
    pub weight: NonZeroU8,
}

impl Pod {
    /// What a pod has that is not said to have less.
    pub const FULL_WEIGHT: NonZeroU8 = NonZeroU8::new(100).unwrap();
}

pub(super) fn read(spec: &Field<'_>) -> Option<Pool> {
    let fields = spec.map();
    let region = fields.required("region").and_then(|field| field.parse(Name::parse));
    let source = match (fields.optional("pods"), fields.optional("dns")) {
        (Some(pods), None) => Some(PodSource::Listed(read_list(&pods))),
        (None, Some(dns)) => read_dns(&dns).map(PodSource::Dns),
        (Some(_), Some(dns)) => {
            dns.fault("there are pods already; expected either pods or dns");
            None
        }
        (None, None) => {
            spec.fault("has no pods; expected pods, a list, or dns");
            None
        }
    };
    fields.finish();
    Some(Pool { region: region?, source: source? })
}

fn read_list(list: &Field<'_>) -> Vec<Pod> {
    let mut pods = Vec::new();
    let mut seen = BTreeSet::new();
    for item in list.items() {
        let Some(pod) = read_pod(&item) else { continue };
        if !seen.insert(pod.name.clone()) {
            item.fault(format!("the pod '{}' is given twice", pod.name));
        }
        pods.push(pod);
    }
    if pods.is_empty() {
        list.fault("at least one pod is expected");
    }
    pods
}

fn read_pod(field: &Field<'_>) -> Option<Pod> {
    const ADDRESS: InvalidUnit = InvalidUnit("an address and a port, such as 10.0.0.7:9443");
    let fields = field.map();
    let name = fields.required("name").and_then(|field| field.parse(Name::parse));
    let address = fields.required("address").and_then(|field| field.parse(|text| text.parse().map_err(|_| ADDRESS)));
    let weight = match fields.optional("weight") {
        Some(field) => field.number(1..=Pod::FULL_WEIGHT.get().into()).and_then(|weight| u8::try_from(weight).ok()),
        None => Some(Pod::FULL_WEIGHT.get()),
    };
    fields.finish();
    Some(Pod { name: name?, address: address?, weight: NonZeroU8::new(weight?)? })
}

fn read_dns(field: &Field<'_>) -> Option<DnsSource> {
    let fields = field.map();
    let (name, port, srv) = (fields.optional("name"), fields.optional("port"), fields.optional("srv"));
    fields.finish();
    match (name, port, srv) {
        (Some(name), Some(port), None) => {
            let name = name.parse(DnsName::host);
            let port = port.number(1..=u16::MAX.into()).and_then(|port| u16::try_from(port).ok());
            Some(DnsSource::Hosts { name: name?, port: NonZeroU16::new(port?)? })
        }
        (None, None, Some(srv)) => Some(DnsSource::Services { name: srv.parse(DnsName::service)? }),
        _ => {
            field.fault("expected either name and port, or srv alone, whose records have ports");
            None
        }
    }
}
