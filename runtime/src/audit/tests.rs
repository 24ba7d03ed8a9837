use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use spillway_core::audit::Finding;
use spillway_core::identity::TrustDomain;

use super::*;
use crate::authority::Authority;
use crate::drain::Drain;
use crate::file::write_atomic;
use crate::fixture::{CLIENT, Domain, GATEWAY, SIDECAR, eventually, id};
use crate::snapshot::{Subscription, seal};
use crate::tls::Workload;

const SOON: Duration = Duration::from_secs(10);

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn settings(&self) -> AuditSettings {
        AuditSettings { path: self.at("audit.log"), rotate: 1 << 20, keep: 10 }
    }

    /// A process that records so many changes, and stops.
    fn process(&self, settings: &AuditSettings, records: u64) -> Metrics {
        let metrics = Metrics::new("test");
        let audit = start(settings, &metrics);
        for generation in 0..records {
            audit.record(change(generation));
        }
        audit.stop(SOON);
        metrics
    }

    /// All files of the log.
    fn files(&self) -> Vec<PathBuf> {
        let is_log = |path: &PathBuf| path.extension().is_some_and(|extension| extension != "head");
        fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().path()).filter(is_log).collect()
    }

    fn verify(&self) -> (Report, Vec<Finding>) {
        let mut found = Vec::new();
        let report = verify(&self.files(), &HeadToCheck::Beside, |_, one| found.push(one.finding.clone())).unwrap();
        (report, found)
    }

    fn text(&self) -> String {
        fs::read_to_string(self.at("audit.log")).unwrap()
    }

    fn append(&self, bytes: &[u8]) {
        OpenOptions::new().append(true).open(self.at("audit.log")).unwrap().write_all(bytes).unwrap();
    }
}

/// The writer of the process before may not have let go yet.
fn start(settings: &AuditSettings, metrics: &Metrics) -> Audit {
    let until = Instant::now() + SOON;
    loop {
        match Audit::start(Some(settings), "gateway", &id(GATEWAY), metrics) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(5));
            }
            started => return started.unwrap(),
        }
    }
}

fn change(generation: u64) -> Event {
    Event::RevocationsChanged { generation, serials: 1, ids: 2 }
}

fn shows(metrics: &Metrics, line: &str) -> bool {
    metrics.encode().unwrap().contains(&format!("\nspillway_audit_{line}\n"))
}

#[test]
fn a_restart_continues_the_chain() {
    let folder = Folder::new();
    for _ in 0..3 {
        assert!(shows(&folder.process(&folder.settings(), 4), "records_total 6"));
    }
    let (report, found) = folder.verify();
    assert_eq!((report.records, report.first, report.last.seq, report.faults), (18, 1, 18, 0));
    assert_eq!(found, []);
    for name in ["audit.log", "audit.log.head"] {
        assert_eq!(fs::metadata(folder.at(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
    }
    assert!(folder.text().contains(&format!("\"event\":\"started\",\"process\":\"gateway\",\"id\":\"{GATEWAY}\"")));
    assert_eq!(fs::read_dir(folder.0.path()).unwrap().count(), 2, "nothing else is left");
}

#[test]
fn what_a_crash_cuts_is_told_and_the_chain_goes_on() {
    let folder = Folder::new();
    folder.process(&folder.settings(), 4);
    folder.append(b"{\"seq\":7,\"time\":\"20");
    assert_eq!(folder.verify().1, [Finding::Unfinished]);
    folder.process(&folder.settings(), 1);
    // And once more, in the record that tells of it.
    folder.append(b"{\"seq\":11,");
    folder.process(&folder.settings(), 1);
    let (report, found) = folder.verify();
    assert_eq!((report.last.seq, report.faults), (14, 0));
    assert_eq!(found, [Finding::Recovered { bytes: 19 }, Finding::Recovered { bytes: 10 }]);
}

#[test]
fn a_line_that_lacks_its_end_alone_is_whole() {
    let folder = Folder::new();
    folder.process(&folder.settings(), 4);
    let text = folder.text();
    fs::write(folder.at("audit.log"), text.trim_end()).unwrap();
    folder.process(&folder.settings(), 1);
    assert_eq!(folder.verify().1, []);
}

#[test]
fn an_end_that_is_cut_before_a_restart_stays_a_fault() {
    let folder = Folder::new();
    folder.process(&folder.settings(), 4);
    let text = folder.text();
    let end = text.trim_end().rfind('\n').unwrap() + 1;
    fs::write(folder.at("audit.log"), &text[..end]).unwrap();
    assert_eq!(folder.verify().1, [Finding::EndIsMissing { from: 6, to: 6 }]);
    let named = serde_json::from_slice(&fs::read(folder.at("audit.log.head")).unwrap()).unwrap();
    folder.process(&folder.settings(), 4);
    assert_eq!(folder.verify().1, [Finding::EndWasCut(named)]);
    // The whole file, too.
    let named = serde_json::from_slice(&fs::read(folder.at("audit.log.head")).unwrap()).unwrap();
    fs::remove_file(folder.at("audit.log")).unwrap();
    folder.process(&folder.settings(), 4);
    assert_eq!(folder.verify().1, [Finding::EndWasCut(named)]);
}

#[test]
fn the_last_record_changed_before_a_restart_stays_a_fault() {
    let folder = Folder::new();
    folder.process(&folder.settings(), 4);
    let text = folder.text();
    fs::write(folder.at("audit.log"), text.replace("stopped", "started")).unwrap();
    folder.process(&folder.settings(), 1);
    assert!(folder.verify().1.contains(&Finding::Changed), "{:?}", folder.verify());
}

#[test]
fn full_files_are_kept_as_one_chain() {
    let folder = Folder::new();
    let settings = AuditSettings { rotate: 2_000, keep: 4, ..folder.settings() };
    folder.process(&settings, 10);
    let (report, found) = folder.verify();
    assert_eq!((report.first, report.faults, found), (1, 0, vec![]));
    folder.process(&settings, 100);
    let mut names: Vec<String> =
        folder.files().iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect();
    names.sort();
    assert_eq!(names, ["audit.log", "audit.log.1", "audit.log.2", "audit.log.3", "audit.log.4"]);
    assert!(folder.text().contains("\"event\":\"rotated\""));
    let (report, found) = folder.verify();
    assert_eq!((report.faults, found), (0, vec![Finding::BeginsAt { seq: report.first }]));
    assert!(report.first > 1 && fs::metadata(folder.at("audit.log.1")).unwrap().len() < 2_500);

    fs::remove_file(folder.at("audit.log.2")).unwrap();
    assert!(matches!(folder.verify().1[..], [Finding::BeginsAt { .. }, Finding::Missing { .. }]));
}

#[test]
fn a_crash_within_a_rotation_leaves_one_chain() {
    let folder = Folder::new();
    folder.process(&folder.settings(), 4);
    fs::rename(folder.at("audit.log"), folder.at("audit.log.1")).unwrap();
    folder.process(&folder.settings(), 4);
    assert_eq!(folder.verify().1, []);
    assert!(folder.text().starts_with("{\"seq\":7,") && folder.text().contains("\"event\":\"rotated\""));

    fs::rename(folder.at("audit.log"), folder.at("audit.log.0")).unwrap();
    fs::rename(folder.at("audit.log.1"), folder.at("audit.log.2")).unwrap();
    fs::rename(folder.at("audit.log.0"), folder.at("audit.log.1")).unwrap();
    fs::write(folder.at("audit.log"), "{\"se").unwrap();
    folder.process(&folder.settings(), 4);
    assert_eq!(folder.verify().1, [Finding::Recovered { bytes: 4 }]);
    fs::remove_file(folder.at("audit.log.2")).unwrap();
    fs::remove_file(folder.at("audit.log.1")).unwrap();
    assert_eq!(folder.verify().1[1], Finding::BeginsAt { seq: 14 });
}

#[test]
fn a_file_that_cannot_be_rotated_grows_on() {
    let folder = Folder::new();
    let settings = AuditSettings { rotate: 2_000, ..folder.settings() };
    fs::create_dir_all(folder.at("audit.log.new/full")).unwrap();
    let metrics = folder.process(&settings, 20);
    assert!(!shows(&metrics, "failures_total 0") && shows(&metrics, "records_total 22"));
    assert!(fs::metadata(folder.at("audit.log")).unwrap().len() > 4_000);
    fs::remove_dir_all(folder.at("audit.log.new")).unwrap();
    folder.process(&settings, 1);
    assert!(folder.at("audit.log.1").exists());
    assert_eq!(folder.verify().1, []);
}

/// A writer whose turns the test takes.
fn by_hand(folder: &Folder) -> (Writer, Arc<Queue>, Counter) {
    let (queue, failures) = (Arc::new(Queue::default()), Counter::default());
    let log = LogFile::open(AuditSettings { rotate: u64::MAX, ..folder.settings() }).unwrap();
    (Writer::new(log, queue.clone(), Counter::default(), failures.clone()), queue, failures)
}

#[test]
fn a_full_disk_stops_nobody_and_what_was_lost_is_told() {
    let folder = Folder::new();
    let (mut writer, queue, failures) = by_hand(&folder);
    queue.push(Timestamp::default(), change(0));
    assert!(writer.turn());
    let full = OpenOptions::new().append(true).open("/dev/full").unwrap();
    let file = std::mem::replace(writer.log().file(), full);
    // The writer takes what there is and holds on to it; the queue fills up behind.
    queue.push(Timestamp::default(), change(1));
    assert!(writer.turn());
    for generation in 0..queue::WAITING as u64 + 5 {
        queue.push(Timestamp::default(), change(generation));
    }
    assert!(writer.turn());
    assert_eq!(failures.get(), 2);
    *writer.log().file() = file;
    while !folder.text().contains("lost") {
        assert!(writer.turn());
    }
    let (report, found) = folder.verify();
    assert_eq!((report.records, report.faults), (2 + queue::WAITING as u64 + 1, 0));
    assert_eq!(found, [Finding::Lost { records: 5 }]);
}

#[test]
fn a_file_that_is_taken_away_is_noticed() {
    let folder = Folder::new();
    let metrics = Metrics::new("test");
    let audit = start(&folder.settings(), &metrics);
    audit.flush(SOON);
    fs::rename(folder.at("audit.log"), folder.at("elsewhere.gone")).unwrap();
    audit.record(change(1));
    audit.flush(SOON);
    audit.stop(SOON);
    assert!(shows(&metrics, "failures_total 1"));
    fs::remove_file(folder.at("elsewhere.gone")).unwrap();
    assert!(matches!(folder.verify().1[..], [Finding::EndWasCut(_)]), "{:?}", folder.verify());
}

#[test]
fn a_log_has_one_writer() {
    let folder = Folder::new();
    let audit = start(&folder.settings(), &Metrics::new("test"));
    let second = Audit::start(Some(&folder.settings()), "gateway", &id(GATEWAY), &Metrics::new("test"));
    let problem = second.unwrap_err().to_string();
    assert_eq!(problem, format!("{}: another process writes to it", folder.at("audit.log").display()));
    audit.stop(SOON);
    assert_eq!(folder.verify().1, []);
}

#[test]
fn what_is_no_audit_log_is_left_alone() {
    let folder = Folder::new();
    let start = |path: &Path| {
        let settings = AuditSettings { path: path.into(), ..folder.settings() };
        Audit::start(Some(&settings), "gateway", &id(GATEWAY), &Metrics::new("test")).map(|_| ()).unwrap_err()
    };
    for content in ["root:x:0:0\n", "x", "\n"] {
        fs::write(folder.at("other"), content).unwrap();
        assert_eq!(start(&folder.at("other")).kind(), io::ErrorKind::InvalidData, "{content:?}");
        assert_eq!(fs::read_to_string(folder.at("other")).unwrap(), content);
    }
    assert_eq!(start(Path::new("/dev/null")).kind(), io::ErrorKind::InvalidData);
    assert_eq!(start(&folder.at("no/folder")).kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_flood_of_denials_is_one_record() {
    let folder = Folder::new();
    let metrics = Metrics::new("test");
    let audit = start(&folder.settings(), &metrics);
    let denial = || Denial { tenant: Some("acme".into()), code: "not-allowed".into(), ..Denial::default() };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..5_000).for_each(|_| audit.denied(denial)));
        }
    });
    audit.stop(SOON);
    let text = folder.text();
    let records: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let denied: Vec<_> = records.iter().filter(|record| record["event"] == "denied").collect();
    let count: u64 = denied.iter().map(|record| record["count"].as_u64().unwrap()).sum();
    assert_eq!((count, denied[0]["tenant"].as_str()), (20_000, Some("acme")));
    assert!(denied.len() < 10, "{}", denied.len());
    assert_eq!(records.last().unwrap()["event"], "stopped");
    assert!(shows(&metrics, "dropped_total 0"));
}

#[test]
fn without_a_log_nothing_is_asked_for() {
    let audit = Audit::start(None, "gateway", &id(GATEWAY), &Metrics::new("test")).unwrap();
    audit.denied(|| unreachable!());
    audit.stop(SOON);
}

#[test]
fn a_tap_hears_what_is_recorded_and_no_denials_with_a_log_and_without() {
    let folder = Folder::new();
    let with = start(&folder.settings(), &Metrics::new("test"));
    let without = Audit::off();
    for audit in [with, without] {
        let (to, mut listener) = mpsc::channel(2);
        let lost = Counter::default();
        let audit = audit.tapped(to, lost.clone());
        audit.denied(Denial::default);
        for generation in 0..5 {
            audit.clone().record(change(generation));
        }
        let heard: Vec<Event> = std::iter::from_fn(|| listener.try_recv().ok()).map(|(_, event)| event).collect();
        assert_eq!((heard, lost.get()), (vec![change(0), change(1)], 3), "whoever records never waits");
        drop(listener);
        audit.record(change(5));
        assert_eq!(lost.get(), 3, "one that nobody listens to any more loses nothing");
        audit.stop(SOON);
    }
    let (report, _) = folder.verify();
    assert_eq!(report.records, 9, "the log has all of them");
}

#[test]
fn lines_that_are_too_long_are_no_records() {
    let folder = Folder::new();
    folder.process(&folder.settings(), 1);
    let text = folder.text();
    let (first, rest) = text.split_once('\n').unwrap();
    let mut file = File::create(folder.at("audit.log")).unwrap();
    let long = "x".repeat(5 << 20);
    // The piece behind the last full megabyte is a record.
    let long = &long[..(4 << 20)];
    write!(file, "{first}\n{long}{first}\n{rest}").unwrap();
    assert_eq!(folder.verify().1, [Finding::NoRecord { lines: 1 }]);
    write!(file, "{long}").unwrap();
    assert_eq!(folder.verify().1, [Finding::NoRecord { lines: 1 }, Finding::Unfinished]);
}

#[tokio::test]
async fn changes_of_snapshot_certificate_and_revocations_are_recorded() {
    let (folder, domain) = (Folder::new(), Domain::create());
    let metrics = Metrics::new("test");
    let audit = start(&folder.settings(), &metrics);
    let snapshot = |version, ids: &str| {
        let resources = format!(
            "{{apiVersion: spillway/v1, kind: Region, metadata: {{name: eu}}, spec: {{trustDomain: td}}}}\n---\n\
             {{apiVersion: spillway/v1, kind: Revocation, metadata: {{name: r}}, spec: {{ids: [{ids}]}}}}\n"
        );
        let sealed = seal(&spillway_core::resource::parse(&resources).unwrap(), version);
        write_atomic(&folder.at("snapshot.head"), &sealed, 0o644).unwrap();
        Hash::of(&sealed).to_string()
    };
    let first = snapshot(1, CLIENT);
    let settings = domain.settings(GATEWAY, None);
    let workload = Workload::load(&settings).unwrap();
    let snapshots = Arc::new(Subscription::start(folder.at("snapshot.head"), &metrics, &audit).unwrap());
    workload.revoke(&snapshots.load().revoked);
    let drain = Drain::new(Duration::ZERO);
    let tasks = [
        tokio::spawn(workload.clone().watch(audit.clone(), drain.clone())),
        tokio::spawn(workload.clone().follow(snapshots.clone(), audit.clone(), drain.clone())),
        tokio::spawn(snapshots.clone().watch(drain.clone())),
    ];
    let second = snapshot(2, &format!("{CLIENT}, {SIDECAR}"));
    eventually("the revocations are taken", || workload.generation() == 3).await;
    write_atomic(&folder.at("snapshot.head"), b"rubbish", 0o644).unwrap();
    write_atomic(&settings.trust_bundle, b"rubbish", 0o644).unwrap();
    let refused = |metrics: &Metrics| {
        let text = metrics.encode().unwrap();
        text.contains("snapshot_rejected_total{reason=\"malformed\"} 1")
    };
    eventually("the snapshot is refused", || refused(&metrics)).await;
    eventually("the bundle is refused", || {
        audit.flush(SOON);
        folder.text().contains("certificate-refused")
    })
    .await;
    let other = Authority::create(TrustDomain::parse("spillway.test").unwrap()).unwrap();
    let bundle = [domain.authority.trust_bundle(), other.trust_bundle()].concat();
    write_atomic(&settings.trust_bundle, bundle.as_bytes(), 0o644).unwrap();
    eventually("the bundle is taken", || workload.generation() == 4).await;
    drain.stop();
    for task in tasks {
        task.await.unwrap();
    }
    audit.stop(SOON);
    assert_eq!(folder.verify().1, []);
    let text = folder.text();
    let records: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |event: &str| records.iter().filter(|record| record["event"] == event).cloned().collect::<Vec<_>>();
    let accepted = of("snapshot-accepted");
    assert_eq!((&accepted[0]["sha256"], &accepted[1]["sha256"]), (&first.into(), &second.into()));
    let refused = &of("snapshot-refused")[0];
    assert_eq!((&refused["reason"], &refused["serving"]), (&"malformed".into(), &2.into()));
    assert_eq!(of("revocations-changed").len(), 1, "the first are those of the start");
    assert_eq!(of("revocations-changed")[0]["ids"], 2);
    let certificates = of("certificate-changed");
    assert_eq!((&certificates[0]["generation"], &certificates[1]["generation"]), (&2.into(), &4.into()));
    assert_eq!(certificates[1]["trust_bundle_sha256"], Hash::of(bundle.as_bytes()).to_string());
    assert!(of("certificate-refused")[0]["problem"].as_str().unwrap().contains("trust bundle"));
}

/// A process that ends within a write, at any byte of it, and again while it tells of that.
#[test]
fn wherever_a_crash_cuts_the_log_is_whole_and_what_the_head_names_is_not_to_be_cut() {
    let folder = Folder::new();
    let path = folder.at("audit.log");
    let write = |records: u64, head: bool| {
        let mut log = LogFile::open(folder.settings()).unwrap();
        (0..records).for_each(|generation| log.append(Timestamp::default(), &change(generation)).unwrap());
        log.write().unwrap();
        if head {
            log.write_head().unwrap();
        }
    };
    write(2, true);
    let named = fs::read(&path).unwrap().len();
    write(2, false);
    let whole = fs::read(&path).unwrap();
    let head = fs::read(folder.at("audit.log.head")).unwrap();
    let is_right = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        fs::write(folder.at("audit.log.head"), &head).unwrap();
        write(1, true);
        folder.verify().0.faults == 0
    };
    for cut in (0..named - 20).step_by(7).chain(named - 20..=whole.len()) {
        // The line break alone may be missing: the record is there.
        let is_honest = cut + 1 >= named;
        assert_eq!(is_right(&whole[..cut]), is_honest, "cut at {cut}, named are {named}");
        if is_honest {
            let told = fs::read(&path).unwrap();
            let again = (cut + told.len()) / 2;
            assert!(is_right(&told[..again]), "cut at {cut} and {again}");
        }
    }
}
