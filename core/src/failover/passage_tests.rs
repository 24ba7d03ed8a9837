use super::*;
use crate::resource;

const RESOURCES: &str = "
{apiVersion: spillway/v1, kind: Region, metadata: {name: eu}, spec: {trustDomain: td}}
---
{apiVersion: spillway/v1, kind: Region, metadata: {name: us}, spec: {trustDomain: td}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: acme}, spec: {mayLeaveRegion: [us]}}
---
{apiVersion: spillway/v1, kind: Tenant, metadata: {name: globex}}
---
{apiVersion: spillway/v1, kind: Revocation, metadata: {name: lost}, spec: {serials: ['0a'], ids: ['spiffe://td/tenant/acme/client/gone']}}
";

const NOW: Duration = Duration::from_secs(1_700_000_000);
const SECOND: Duration = Duration::from_secs(1);
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://{path}")).unwrap()
}

fn passage() -> Passage {
    Passage {
        client: id("td/tenant/acme/client/web"),
        serial: Serial::parse("0b").unwrap(),
        not_after: NOW + SECOND * 60,
        class: Class::High,
        from: name("eu"),
        to: name("us"),
        path: INFER.to_owned(),
        request_id: "r-1".to_owned(),
        issued: NOW,
        expires: NOW + LIFE,
        hops: 1,
    }
}

fn admitted(passage: &Passage, sender: &str, now: Duration) -> Result<Principal, NoPassage> {
    let snapshot = Snapshot::compile(1, &resource::parse(RESOURCES).unwrap()).unwrap();
    let (region, sender) = (name("us"), id(sender));
    passage.admit(&Arrival { snapshot: &snapshot, region: &region, sender: &sender, path: INFER, now })
}

const SENDER: &str = "td/region/eu/gateway/gw-0";

#[test]
fn a_gateway_of_another_region_speaks_for_a_client() {
    let principal = admitted(&passage(), SENDER, NOW).unwrap();
    assert_eq!((principal.tenant.as_str(), principal.client.as_str()), ("acme", "web"));
}

#[test]
fn t21_nobody_else_does() {
    for sender in [
        "td/region/us/gateway/gw-0",
        "td/region/mars/gateway/gw-0",
        "other/region/eu/gateway/gw-0",
        "td/region/eu/sidecar/scorers/pod-0",
        "td/region/eu/control/c-0",
        "td/tenant/acme/client/web",
    ] {
        assert_eq!(admitted(&passage(), sender, NOW), Err(NoPassage::Stranger), "{sender}");
    }
    let other = Passage { from: name("us"), ..passage() };
    assert_eq!(admitted(&other, SENDER, NOW), Err(NoPassage::Stranger), "in another region's name");
}

#[test]
fn each_word_of_it_binds() {
    let good = passage();
    for (changed, why) in [
        (Passage { to: name("ap"), ..good.clone() }, NoPassage::Elsewhere),
        (
            Passage { path: "/inference.GRPCInferenceService/ModelStreamInfer".into(), ..good.clone() },
            NoPassage::Elsewhere,
        ),
        (Passage { hops: 0, ..good.clone() }, NoPassage::Twice),
        (Passage { hops: 2, ..good.clone() }, NoPassage::Twice),
        (Passage { expires: NOW + LIFE + SECOND, ..good.clone() }, NoPassage::Stale),
        (Passage { expires: NOW - SECOND, ..good.clone() }, NoPassage::Stale),
        (Passage { not_after: NOW - SECOND, ..good.clone() }, NoPassage::Client),
        (Passage { serial: Serial::parse("0a").unwrap(), ..good.clone() }, NoPassage::Client),
        (Passage { client: id("td/tenant/acme/client/gone"), ..good.clone() }, NoPassage::Client),
        (Passage { client: id("td/tenant/globex/client/web"), ..good.clone() }, NoPassage::Residence),
        (
            Passage { client: id("td/tenant/initech/client/web"), ..good.clone() },
            NoPassage::Denied(Denied::UnknownTenant),
        ),
        (Passage { client: id("other/tenant/acme/client/web"), ..good.clone() }, NoPassage::Denied(Denied::NotAClient)),
        (Passage { client: id("td/region/eu/gateway/gw-0"), ..good.clone() }, NoPassage::Denied(Denied::NotAClient)),
    ] {
        assert_eq!(admitted(&changed, SENDER, NOW), Err(why), "{changed:?}");
    }
}

#[test]
fn it_holds_for_its_life_and_what_clocks_may_differ() {
    for (now, holds) in [
        (NOW - SKEW, true),
        (NOW - SKEW - SECOND, false),
        (NOW + LIFE + SKEW, true),
        (NOW + LIFE + SKEW + SECOND, false),
    ] {
        let admitted = admitted(&passage(), SENDER, now);
        assert_eq!(admitted.is_ok(), holds, "{now:?}");
        assert!(holds || admitted == Err(NoPassage::Stale));
    }
}
