//! A control node that writes its plan to moto's Route 53.

use std::time::{Duration, Instant};

use crate::support::{Domain, apply, eventually};

#[path = "../../src/dns/route53/moto.rs"]
mod moto;

use moto::Moto;

/// Region, value and weight of each record, but those of the zone itself.
async fn records(moto: &Moto) -> Vec<(String, String, i64)> {
    let listed = moto.client.list_resource_record_sets().hosted_zone_id(&moto.zone).send().await.unwrap();
    let sets = listed.resource_record_sets().iter().filter(|set| set.name() != "example.com.");
    let record = |set: &aws_sdk_route53::types::ResourceRecordSet| {
        let value = set.resource_records()[0].value().to_owned();
        (set.set_identifier().unwrap_or(set.name()).to_owned(), value, set.weight().unwrap_or(-1))
    };
    sets.map(record).collect()
}

fn regions(us: u32) -> [String; 2] {
    [("eu", "127.0.0.1", 80), ("us", "127.0.0.2", us)].map(|(name, address, weight)| {
        format!(
            "---\napiVersion: spillway/v1\nkind: Region\nmetadata: {{name: {name}}}\nspec: {{trustDomain: spillway.test, \
             weight: {weight}, gateways: [{{name: g, address: '{address}:1'}}]}}\n"
        )
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_writes_its_plan_by_its_settings() {
    let moto = Moto::start().await;
    let domain = Domain::create();
    let keys = domain.path("aws");
    std::fs::write(&keys, "[default]\naws_access_key_id = test\naws_secret_access_key = test\n").unwrap();
    let store = format!(
        "sqlite: {}\nroute53: {{hostedZone: {}, name: infer.example.com, endpoint: '{}', credentials: {{file: '{}'}}}}",
        domain.path("control.db").display(),
        moto.zone,
        moto.endpoint,
        keys.display()
    );
    let node = domain.node("c-0", &store).await;
    let epoch = node.parts.leading.fence().unwrap().epoch;
    let mut alice = domain.alice(&node).await;
    for (us, weight) in [(20, 64), (40, 128)] {
        assert_eq!(apply(&mut alice, &regions(us)).await.faults, Vec::<String>::new());
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let records = records(&moto).await;
            let is = |region: &str, value: &str, weight| {
                records.iter().any(|(name, found, its)| name == region && found.starts_with(value) && *its == weight)
            };
            let stamp = format!("\"epoch={epoch} plan=");
            if is("eu", "127.0.0.1", 255)
                && is("us", "127.0.0.2", weight)
                && is("_spillway.infer.example.com.", &stamp, -1)
            {
                assert_eq!(records.len(), 3, "{records:?}");
                break;
            }
            assert!(Instant::now() < deadline, "{us} is not written: {records:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let shows = |line: &str| node.parts.metrics.encode().unwrap().contains(line);
    eventually("it is counted", || shows("spillway_control_route53_corrections_total{outcome=\"corrected\"}")).await;
    node.stop().await;
}
