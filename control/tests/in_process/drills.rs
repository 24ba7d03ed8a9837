//! What the control plane knows of a drill that runs.

use std::time::{Duration, Instant};

use spillway_proto::control::{EndDrillRequest, RunningDrill, SetDrillRequest, StatusRequest};
use tonic::Code;

use crate::support::{Client, Domain, eventually, refused};

fn drill(lease: u64, stage: &str) -> SetDrillRequest {
    SetDrillRequest { lease, drill: "region-loss".into(), target: "eu".into(), stage: stage.into() }
}

pub async fn shown(client: &mut Client) -> Vec<RunningDrill> {
    client.status(StatusRequest {}).await.unwrap().into_inner().drills
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_is_shown_a_drill_and_a_second_one_is_refused() {
    let domain = Domain::create();
    let node = domain.alone().await;
    let (mut alice, mut bob) = (domain.alice(&node).await, domain.caller("operator/bob", &node).await);
    assert_eq!(shown(&mut bob).await, []);
    alice.set_drill(drill(7, "preflight")).await.unwrap();
    alice.set_drill(drill(7, "observe\u{1b}[2J")).await.unwrap();
    let told = shown(&mut bob).await;
    assert_eq!(
        (told.len(), &*told[0].drill, &*told[0].target, &*told[0].stage),
        (1, "region-loss", "eu", "observe[2J")
    );
    assert_eq!(told[0].author, "spiffe://spillway.test/operator/alice");
    assert!((10_000..=15_000).contains(&told[0].left_ms) && told[0].began_unix_ms > 1_700_000_000_000, "{told:?}");
    for lease in [8, 7] {
        let (code, word, text) = refused(bob.set_drill(drill(lease, "preflight")).await);
        assert_eq!((code, &*word), (Code::FailedPrecondition, "drill-runs"));
        assert_eq!(text, "the drill region-loss of eu runs, by spiffe://spillway.test/operator/alice; one at a time");
    }
    for bad in [
        SetDrillRequest { drill: "no name!".into(), ..drill(7, "") },
        SetDrillRequest { target: "../eu".into(), ..drill(7, "") },
    ] {
        assert_eq!(refused(alice.set_drill(bad).await).0, Code::InvalidArgument);
    }
    // Nobody ends another's.
    bob.end_drill(EndDrillRequest { lease: 7, how: "pass".into() }).await.unwrap();
    assert_eq!(shown(&mut alice).await.len(), 1);
    alice.end_drill(EndDrillRequest { lease: 7, how: "pass".into() }).await.unwrap();
    assert_eq!(shown(&mut bob).await, []);
    bob.set_drill(drill(8, "preflight")).await.unwrap();

    let (began, ended) = (node.audited("drill-began"), node.audited("drill-ended"));
    assert_eq!((began.len(), ended.len()), (2, 1), "{began:?} {ended:?}");
    assert_eq!((&began[0]["drill"], &began[0]["target"]), (&"region-loss".into(), &"eu".into()));
    assert_eq!(
        (&ended[0]["how"], &ended[0]["author"]),
        (&"pass".into(), &"spiffe://spillway.test/operator/alice".into())
    );
    assert_eq!(node.audited("intent-refused").len(), 4);
    let events = alice.status(StatusRequest {}).await.unwrap().into_inner().events;
    assert!(events.iter().any(|event| event.ends_with("the drill region-loss of eu has ended: pass")), "{events:?}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_operators_announce_drills() {
    let domain = Domain::create();
    let node = domain.alone().await;
    for stranger in ["operator/mallory", "region/eu/gateway/gw-0", "tenant/acme/client/web", "region/us/control/c-1"] {
        let mut client = domain.caller(stranger, &node).await;
        assert_eq!(refused(client.set_drill(drill(1, "")).await).0, Code::PermissionDenied, "{stranger}");
        let ending = client.end_drill(EndDrillRequest::default()).await;
        assert_eq!(refused(ending).0, Code::PermissionDenied, "{stranger}");
    }
    assert_eq!(shown(&mut domain.alice(&node).await).await, []);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drill_whose_controller_is_gone_is_forgotten_within_15_s() {
    let domain = Domain::create();
    let node = domain.alone().await;
    let mut alice = domain.alice(&node).await;
    let last = Instant::now();
    alice.set_drill(drill(7, "observe")).await.unwrap();
    // It speaks every 3 s. The rest of the 15 s is this machine's, should it be busy.
    tokio::time::sleep(Duration::from_millis(12_100)).await;
    assert_eq!(shown(&mut alice).await.len(), 1, "four of its words may be lost");
    eventually("it is forgotten", || node.audited("drill-ended").len() == 1).await;
    println!("a drill was forgotten {:?} after its last word", last.elapsed());
    assert!(last.elapsed() < Duration::from_secs(19), "{:?}", last.elapsed());
    assert_eq!(node.audited("drill-ended")[0]["how"], "forgotten");
    assert_eq!(shown(&mut alice).await, []);
    alice.set_drill(drill(8, "preflight")).await.unwrap();
    node.stop().await;
}
