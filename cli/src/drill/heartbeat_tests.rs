use super::super::support::{Domain, Rows, place_of, serve_rows};
use super::*;

/// Two regions that share their rows or not.
async fn place(domain: &Domain, eu: Rows, us: Rows) -> (Place, Vec<JoinSet<()>>) {
    let mut sidecars = std::collections::BTreeMap::new();
    let mut loaders = std::collections::BTreeMap::new();
    let mut tasks = Vec::new();
    for (region, rows) in [("eu", eu), ("us", us)] {
        let (server, task) = serve_rows(domain, region, rows).await;
        sidecars.insert(Name::parse(region).unwrap(), vec![server]);
        loaders.insert(Name::parse(region).unwrap(), domain.identity(&format!("region/{region}/loader/one")));
        tasks.push(task);
    }
    let mut place = place_of(domain, domain.identity("region/eu/loader/one"));
    (place.loaders, place.sidecars) = (loaders, sidecars);
    (place, tasks)
}

fn heartbeat() -> Heartbeat {
    Heartbeat { group: Name::parse("site").unwrap() }
}

async fn until(beating: &Beating, what: impl Fn(&Seen) -> bool) {
    let end = tokio::time::Instant::now() + Duration::from_secs(20);
    while !what(&beating.seen.lock()) {
        assert!(tokio::time::Instant::now() < end, "not in time");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn rows_that_are_shared_lose_nothing() {
    let domain = Domain::create();
    let rows = Rows::default();
    let (place, _tasks) = place(&domain, rows.clone(), rows).await;
    let beating = Beating::start(&place, &Name::parse("eu").unwrap(), &heartbeat()).unwrap().unwrap();
    until(&beating, |seen| seen.written >= 2).await;
    beating.injected();
    let written = beating.seen.lock().written;
    until(&beating, |seen| seen.last_read == Some(seen.last_written)).await;
    let loss = beating.loss();
    assert_eq!((loss.written, loss.rpo_ms), (written, Some(0)));
}

#[tokio::test]
async fn what_did_not_get_across_is_lost_and_what_comes_later_does_not_count() {
    let domain = Domain::create();
    let (eu, us) = (Rows::default(), Rows::default());
    let (place, _tasks) = place(&domain, eu.clone(), us.clone()).await;
    let beating = Beating::start(&place, &Name::parse("eu").unwrap(), &heartbeat()).unwrap().unwrap();
    until(&beating, |seen| seen.written == 1).await;
    assert_eq!(beating.loss().rpo_ms, None, "nothing can be read elsewhere");
    let across = eu.0.lock().clone();
    let known = across.as_ref().unwrap().event_time_micros;
    *us.0.lock() = across;
    until(&beating, |seen| seen.written >= 3 && seen.last_read.is_some()).await;
    beating.injected();
    beating.removed();
    *us.0.lock() = eu.0.lock().clone();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let lost = beating.seen.lock().last_written - known;
    assert!(lost > 0, "the first of three beats got across");
    assert_eq!(beating.loss().rpo_ms.unwrap(), u64::try_from(lost / 1_000).unwrap());
}

#[tokio::test]
async fn nobody_to_read_from_is_no_measurement() {
    let domain = Domain::create();
    let (mut place, _tasks) = place(&domain, Rows::default(), Rows::default()).await;
    place.sidecars.remove("us");
    assert!(Beating::start(&place, &Name::parse("eu").unwrap(), &heartbeat()).unwrap().is_none());
    assert!(Beating::start(&place, &Name::parse("us").unwrap(), &heartbeat()).unwrap().is_none());
    place.loaders.clear();
    assert!(Beating::start(&place, &Name::parse("eu").unwrap(), &heartbeat()).unwrap().is_none());
}
