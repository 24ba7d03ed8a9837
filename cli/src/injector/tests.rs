use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::dev::injector::{FILE, serve};
use crate::drill::injector::Injectors;
use spillway_figures::{Goal, record};

/// Processes that are written down.
#[derive(Default)]
pub struct Doubles(Mutex<State>);

#[derive(Default)]
struct State {
    pids: BTreeMap<String, u32>,
    /// Those that were killed.
    dead: BTreeSet<String>,
    log: Vec<String>,
    /// Cannot be started.
    stuck: bool,
}

impl Doubles {
    pub fn run(&self, name: &str, pid: u32) {
        self.0.lock().pids.insert(name.to_owned(), pid);
    }

    fn log(&self) -> Vec<String> {
        self.0.lock().log.clone()
    }

    fn note(&self, what: &str, name: &str) -> Result<()> {
        self.0.lock().log.push(format!("{what} {name}"));
        Ok(())
    }
}

impl Processes for Doubles {
    fn names(&self) -> Vec<String> {
        self.0.lock().pids.keys().cloned().collect()
    }

    fn pid(&self, name: &str) -> Option<u32> {
        let state = self.0.lock();
        state.pids.get(name).copied().filter(|_| !state.dead.contains(name))
    }

    fn kill(&self, name: &str) -> Result<()> {
        self.0.lock().dead.insert(name.to_owned());
        self.note("kill", name)
    }

    fn pause(&self, name: &str) -> Result<()> {
        if name.ends_with("stubborn") {
            anyhow::bail!("it does not want to");
        }
        self.note("pause", name)
    }

    fn resume(&self, name: &str) -> Result<()> {
        self.note("resume", name)
    }

    fn start(&self, name: &str) -> Result<()> {
        if !self.0.lock().stuck {
            self.0.lock().dead.remove(name);
        }
        self.note("start", name)
    }
}

fn fault(act: Act, on: &[&str]) -> Fault {
    Fault { act, on: on.iter().map(|&name| name.to_owned()).collect(), from: Vec::new() }
}

fn injector() -> (Arc<Injector>, Arc<Doubles>) {
    let doubles = Arc::new(Doubles::default());
    for name in ["eu/gateway", "eu/scorer", "eu/stubborn"] {
        doubles.run(name, 1);
    }
    let links = Links::new(doubles.clone());
    (Injector::new(doubles.clone(), links), doubles)
}

const ONE: LeaseId = LeaseId(1);

#[tokio::test]
async fn what_was_broken_is_mended_when_the_lease_is_given_back() {
    let (injector, doubles) = injector();
    let faults = [fault(Act::Kill, &["eu/gateway"]), fault(Act::Pause, &["eu/scorer"])];
    let left = injector.inject(ONE, "region-loss", &faults).unwrap();
    assert!(left <= Lease::LIFE && left > Lease::LIFE - Duration::from_secs(2));
    assert_eq!(injector.drill().as_deref(), Some("region-loss"));
    let busy = injector.inject(LeaseId(2), "other", &faults).unwrap_err();
    assert!(matches!(busy, InjectError::Denied(Denied::Busy)));
    assert!(injector.remove(LeaseId(2)), "of that one nothing is left");
    assert_eq!(doubles.log(), ["kill eu/gateway", "pause eu/scorer"]);
    assert!(injector.remove(ONE) && injector.remove(ONE));
    assert_eq!(doubles.log()[2..], ["start eu/gateway", "resume eu/scorer"]);
    assert_eq!(injector.drill(), None);
    assert_eq!(injector.renew(ONE), Err(Denied::Over));
}

#[tokio::test]
async fn a_fault_that_fails_leaves_nothing_broken() {
    let (injector, doubles) = injector();
    let faults = [fault(Act::Kill, &["eu/gateway"]), fault(Act::Pause, &["eu/stubborn"])];
    assert!(matches!(injector.inject(ONE, "d", &faults), Err(InjectError::Failed(name, _)) if name == "eu/stubborn"));
    assert_eq!(doubles.log(), ["kill eu/gateway", "start eu/gateway", "resume eu/stubborn"]);
    assert_eq!(injector.drill(), None);
}

#[tokio::test]
async fn nobody_unknown_is_broken() {
    let (injector, doubles) = injector();
    for faults in [[fault(Act::Kill, &["us/gateway"])], [fault(Act::Drop, &["eu/gateway"])]] {
        let known = [fault(Act::Kill, &["eu/gateway"]), faults[0].clone()];
        assert!(matches!(injector.inject(ONE, "d", &known), Err(InjectError::Unknown { .. })));
    }
    assert_eq!(doubles.log(), [""; 0]);
}

#[tokio::test]
async fn what_cannot_be_mended_is_tried_again_and_keeps_others_out() {
    let (injector, doubles) = injector();
    injector.inject(ONE, "d", &[fault(Act::Kill, &["eu/gateway"]), fault(Act::Pause, &["eu/scorer"])]).unwrap();
    doubles.0.lock().stuck = true;
    assert!(!injector.remove(ONE), "it was told to start, and does not run");
    assert!(injector.inject(LeaseId(2), "d", &[]).is_err());
    assert_eq!(injector.drill().as_deref(), Some("d"));
    doubles.0.lock().stuck = false;
    injector.mend_if_over();
    assert_eq!(doubles.log()[2..], ["start eu/gateway", "resume eu/scorer", "start eu/gateway"]);
    assert_eq!(injector.drill(), None);
}

#[tokio::test]
async fn a_removal_is_confirmed_when_all_runs_again() {
    let (injector, doubles) = injector();
    let folder = tempfile::tempdir().unwrap();
    let _serving = serve(injector.clone(), folder.path()).await.unwrap();
    let remote = Injectors::of_dev(&folder.path().join(FILE)).await.unwrap();
    remote.reach().await.unwrap();
    remote.inject(1, "d", &[fault(Act::Kill, &["eu/gateway"])]).await.unwrap();
    doubles.0.lock().stuck = true;
    let removed = tokio::spawn(async move { remote.remove(1).await });
    let tried = || doubles.log().iter().filter(|line| *line == "start eu/gateway").count() >= 2;
    while !tried() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!removed.is_finished());
    doubles.0.lock().stuck = false;
    removed.await.unwrap().unwrap();
    assert_eq!(injector.drill(), None);
}

#[tokio::test]
async fn only_who_has_the_secret_is_served() {
    let (injector, _) = injector();
    let folder = tempfile::tempdir().unwrap();
    let serving = serve(injector, folder.path()).await.unwrap();
    let file = folder.path().join(FILE);
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let remote = Injectors::of_dev(&file).await.unwrap();
    let reach = remote.reach().await.unwrap();
    assert_eq!(reach.processes, ["eu/gateway", "eu/scorer", "eu/stubborn"]);
    let text = std::fs::read_to_string(&file).unwrap();
    for wrong in [text.replace("\"secret\":\"", "\"secret\":\"0"), text.replace("\"secret\"", "\"token\"")] {
        std::fs::write(&file, wrong).unwrap();
        let refused = match Injectors::of_dev(&file).await {
            Ok(stranger) => stranger.reach().await.is_err(),
            Err(_) => true,
        };
        assert!(refused);
    }
    drop(serving);
    assert!(!file.exists());
}

/// Issue 5, scenario 7, without processes: whoever renews falls silent.
#[tokio::test]
async fn a_controller_that_dies_in_mid_fault_leaves_no_fault_after_15_s() {
    let (injector, doubles) = injector();
    let folder = tempfile::tempdir().unwrap();
    let _serving = serve(injector, folder.path()).await.unwrap();
    let remote = Injectors::of_dev(&folder.path().join(FILE)).await.unwrap();
    remote.reach().await.unwrap();
    let began = Instant::now();
    remote.inject(7, "region-loss", &[fault(Act::Kill, &["eu/gateway"])]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    remote.renew(7).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(remote);
    let killed = Instant::now();
    let mended = || doubles.log().iter().any(|line| line == "start eu/gateway");
    while !mended() {
        assert!(killed.elapsed() < Duration::from_secs(20), "the fault is still there");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(began.elapsed() > Lease::LIFE + Duration::from_secs(2), "the renewal counted");
    let gone = killed.elapsed().as_secs_f64();
    assert!(record("control.drill.controller_killed.fault_gone", gone, "s", Goal::AtMost(15.0)), "{gone}");
}
