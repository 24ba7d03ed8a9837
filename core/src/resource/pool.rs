//! Pool: the pods of one region that serve the same models.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::reader::Field;
use crate::units::{InvalidUnit, Name};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    pub region: Name,
    pub pods: Vec<Pod>,
}

/// One sidecar. Its identity, not its address, places it on the ring.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pod {
    pub name: Name,
    pub address: SocketAddr,
}

pub(super) fn read(spec: &Field<'_>) -> Option<Pool> {
    let fields = spec.map();
    let region = fields.required("region").and_then(|field| field.parse(Name::parse));
    let mut pods = Vec::new();
    let mut seen = BTreeSet::new();
    if let Some(list) = fields.required("pods") {
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
    }
    fields.finish();
    Some(Pool { region: region?, pods })
}

fn read_pod(field: &Field<'_>) -> Option<Pod> {
    const ADDRESS: InvalidUnit = InvalidUnit("an address and a port, such as 10.0.0.7:9443");
    let fields = field.map();
    let name = fields.required("name").and_then(|field| field.parse(Name::parse));
    let address = fields.required("address").and_then(|field| field.parse(|text| text.parse().map_err(|_| ADDRESS)));
    fields.finish();
    Some(Pod { name: name?, address: address? })
}
