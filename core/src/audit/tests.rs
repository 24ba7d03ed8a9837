use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::*;

fn time(second: u64) -> Timestamp {
    (SystemTime::UNIX_EPOCH + Duration::from_secs(second)).into()
}

fn denied(model: &str) -> Event {
    let denial = Denial { model: Some(model.into()), code: "not-allowed".into(), ..Denial::default() };
    Event::Denied { denial, count: 1 }
}

/// A log of so many records, and its end.
fn log(records: usize) -> (Vec<u8>, Head) {
    let (mut lines, mut head) = (Vec::new(), Head::default());
    for index in 0..records {
        let event = match index % 3 {
            0 => denied("m"),
            1 => Event::RevocationsChanged { generation: index as u64, serials: 1, ids: 0 },
            _ => Event::Stopped,
        };
        head.append(time(index as u64), &event, &mut lines).unwrap();
    }
    (lines, head)
}

fn verify(log: &[u8], head: Option<Head>) -> (Vec<Found>, Verifier) {
    let mut verifier = Verifier::new(head);
    let mut lines: Vec<&[u8]> = log.split(|byte| *byte == b'\n').collect();
    let rest = lines.pop().unwrap_or_default();
    let mut found: Vec<Found> = lines.into_iter().flat_map(|line| verifier.line(line)).collect();
    found.append(&mut verifier.finish(rest));
    (found, verifier)
}

fn found(log: &[u8], head: Option<Head>) -> Vec<(u64, Finding)> {
    verify(log, head).0.into_iter().map(|Found { line, finding }| (line, finding)).collect()
}

fn has_fault(log: &[u8], head: Option<Head>) -> bool {
    verify(log, head).0.iter().any(|found| !found.finding.is_note())
}

fn lines(log: &[u8]) -> Vec<Vec<u8>> {
    log.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
}

#[test]
fn a_line_has_the_form_that_is_documented() {
    let (mut line, mut head) = (Vec::new(), Head::default());
    head.append(time(1), &denied("m\n\u{9b}"), &mut line).unwrap();
    let text = String::from_utf8(line).unwrap();
    let zeros = "0".repeat(64);
    let body = format!(
        r#"{{"seq":1,"time":"1970-01-01T00:00:01.000Z","event":"denied","tenant":null,"client":null,"id":null,"model":"m\n\u009b","version":null,"action":null,"code":"not-allowed","reason":null,"request_id":null,"address":null,"count":1,"prev":"{zeros}"}}"#
    );
    let hash = Hash::of(format!("{zeros}{body}").as_bytes());
    assert_eq!(text, format!("{},\"hash\":\"{hash}\"}}\n", &body[..body.len() - 1]));
    assert_eq!(head, Head { seq: 1, hash });
}

#[test]
fn every_event_is_written_and_read() {
    let events = [
        (denied("m"), "denied"),
        (Event::SnapshotAccepted { version: 1, sha256: Hash::of(b"") }, "snapshot-accepted"),
        (Event::SnapshotRefused { reason: "checksum", problem: "p".into(), serving: 1 }, "snapshot-refused"),
        (Event::RevocationsChanged { generation: 1, serials: 1, ids: 1 }, "revocations-changed"),
        (
            Event::CertificateChanged {
                generation: 2,
                serial: "0a".into(),
                not_after: time(9),
                trust_bundle_sha256: Hash::of(b"x"),
            },
            "certificate-changed",
        ),
        (Event::OverrideEnded { region: "eu".into(), author: None }, "override-ended"),
        (Event::LeadershipChanged { epoch: 7, leads: true }, "leadership-changed"),
        (Event::CertificateRefused { problem: "p".into() }, "certificate-refused"),
        (Event::Started { process: "gateway", id: "spiffe://td/x".into(), version: "1" }, "started"),
        (Event::Stopped, "stopped"),
        (Event::Rotated, "rotated"),
        (Event::Lost { records: 3 }, "lost"),
        (Event::Recovered { bytes: 0, sha256: None, rotated: false, head: Some(Head::default()) }, "recovered"),
    ];
    let (mut written, mut head) = (Vec::new(), Head::default());
    for (event, name) in events {
        let from = written.len();
        head.append(time(0), &event, &mut written).unwrap();
        let line = &written[from..written.len() - 1];
        let record = Record::read(line).unwrap_or_else(|| panic!("{name}: {}", String::from_utf8_lossy(line)));
        assert!(record.is_sound() && record.head() == head);
        let json: serde_json::Value = serde_json::from_slice(line).unwrap();
        assert_eq!(json["event"], name);
    }
}

#[test]
fn a_whole_log_is_right() {
    let (log, head) = log(7);
    assert_eq!(found(&log, Some(head)), []);
    assert_eq!(found(&log, None), []);
    let (_, verifier) = verify(&log, None);
    assert_eq!((verifier.records(), verifier.first(), verifier.last()), (7, Some(1), Some(head)));
}

#[test]
fn faults_are_told_once_with_their_line() {
    let (log, head) = log(6);
    let whole = lines(&log);
    let told = |edit: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut lines = whole.clone();
        edit(&mut lines);
        found(&lines.concat(), Some(head))
    };
    let removed = |at: usize| {
        told(&|lines| {
            lines.remove(at);
        })
    };
    let changed = told(&|lines| lines[2] = String::from_utf8_lossy(&lines[2]).replace("stopped", "started").into());
    assert_eq!(changed, [(3, Finding::Changed)]);
    let seq = told(&|lines| lines[2] = String::from_utf8_lossy(&lines[2]).replace("\"seq\":3", "\"seq\":300").into());
    assert_eq!(seq, [(3, Finding::Changed)]);
    assert_eq!(removed(2), [(3, Finding::Missing { from: 3, to: 3 })]);
    assert_eq!(removed(0), [(1, Finding::Beginning { seq: 2 })]);
    assert_eq!(removed(5), [(5, Finding::EndIsMissing { from: 6, to: 6 })]);
    assert_eq!(told(&|lines| lines.insert(3, lines[2].clone())), [(4, Finding::Repeated)]);
    let swapped = told(&|lines| lines.swap(2, 3));
    assert_eq!(swapped, [(3, Finding::Missing { from: 3, to: 3 }), (4, Finding::OutOfOrder { after: 4 })]);
    let garbage = told(&|lines| lines.insert(1, b"garbage\n\n".to_vec()));
    assert_eq!(garbage, [(2, Finding::NoRecord { lines: 2 })]);
    let joined = told(&|lines| lines[1] = lines[1].trim_ascii_end().to_vec());
    assert_eq!(joined, [(2, Finding::NoRecord { lines: 1 }), (3, Finding::Missing { from: 2, to: 3 })]);
}

#[test]
fn a_record_made_anew_does_not_fit_its_successor_or_the_head() {
    let (log, head) = log(4);
    for at in 0..4_usize {
        let mut lines = lines(&log);
        let before = at.checked_sub(1).map(|before| &lines[before]);
        let mut forged = before.map_or(Head::default(), |line| Record::read(line.trim_ascii_end()).unwrap().head());
        let mut line = Vec::new();
        forged.append(time(0), &denied("forged"), &mut line).unwrap();
        lines[at] = line;
        let told = found(&lines.concat(), Some(head));
        let expected = if at == 3 { (4, Finding::OtherThanHead) } else { (at as u64 + 2, Finding::Unlinked) };
        assert_eq!(told, [expected]);
    }
}

#[test]
fn rotated_files_are_one_chain() {
    let (first, mut head) = log(5);
    let (mut second, mut third) = (Vec::new(), Vec::new());
    head.append(time(9), &Event::Rotated, &mut second).unwrap();
    head.append(time(9), &Event::Stopped, &mut second).unwrap();
    head.append(time(9), &Event::Rotated, &mut third).unwrap();
    assert_eq!(found(&[&first[..], &second, &third].concat(), Some(head)), []);
    assert_eq!(found(&[&second[..], &third].concat(), Some(head)), [(1, Finding::BeginsAt { seq: 6 })]);
    let told = found(&[&first[..], &third].concat(), Some(head));
    assert_eq!(told, [(6, Finding::Missing { from: 6, to: 7 })]);
    let cut = second.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    assert_eq!(found(&[&second[cut..], &third].concat(), Some(head)), [(1, Finding::Beginning { seq: 7 })]);

    let mut verifier = Verifier::new(Some(head));
    let mut told: Vec<Found> = lines(&first).iter().flat_map(|line| verifier.line(line.trim_ascii_end())).collect();
    told.extend(verifier.next_file(b"{\"seq\":6,"));
    told.extend(lines(&second).iter().flat_map(|line| verifier.line(line.trim_ascii_end())));
    assert_eq!(told, [Found { line: 6, finding: Finding::NoRecord { lines: 1 } }]);
}

/// What a crash left, and the record that a restart writes about it.
fn recovered(debris: &[u8], rotated: bool, head: &mut Head) -> Vec<u8> {
    let mut log = [debris, b"\n"].concat();
    let event = Event::Recovered { bytes: debris.len() as u64, sha256: Some(Hash::of(debris)), rotated, head: None };
    head.append(time(9), &event, &mut log).unwrap();
    log
}

#[test]
fn what_a_crash_left_is_a_note_and_must_stay_as_it_was() {
    let (mut log, mut head) = log(2);
    for debris in [&b"{\"seq\":3,\"ti"[..], b"two\nlines", b"\0\0\0"] {
        let line = lines(&log).len() as u64 + 1;
        log.extend(recovered(debris, false, &mut head));
        let told = found(&log, Some(head));
        assert_eq!(told.last(), Some(&(line, Finding::Recovered { bytes: debris.len() as u64 })));
    }
    assert!(!has_fault(&log, Some(head)));
    let text = String::from_utf8(log).unwrap();
    for changed in ["two\ntimes", "two", "two\nlines\n", ""] {
        let log = text.replace("two\nlines", changed);
        let told = found(log.as_bytes(), Some(head));
        assert!(told.iter().any(|(_, finding)| *finding == Finding::NothingRecovered), "{changed:?}: {told:?}");
    }
}

#[test]
fn a_crash_in_the_first_record_of_a_new_file_is_a_note() {
    let (_, before) = log(5);
    for (rotated, beginning) in [(true, Finding::BeginsAt { seq: 6 }), (false, Finding::Beginning { seq: 6 })] {
        let mut head = before;
        let log = recovered(b"{\"seq\":6,\"ti", rotated, &mut head);
        assert_eq!(found(&log, Some(head)), [(1, Finding::Recovered { bytes: 12 }), (2, beginning)]);
    }
}

#[test]
fn an_end_that_a_restart_found_cut_stays_a_fault() {
    let (mut log, mut head) = log(2);
    let named = Head { seq: 9, hash: Hash::of(b"9") };
    head.append(time(9), &Event::Recovered { bytes: 0, sha256: None, rotated: false, head: Some(named) }, &mut log)
        .unwrap();
    assert_eq!(found(&log, Some(head)), [(3, Finding::EndWasCut(named))]);
}

#[test]
fn an_unfinished_last_line_is_honest_only_beside_a_head_that_is_all_there() {
    let (log, head) = log(3);
    let unfinished = [&log[..], b"{\"seq\":4"].concat();
    assert_eq!(found(&unfinished, Some(head)), [(4, Finding::Unfinished)]);
    assert_eq!(found(&unfinished, None), [(4, Finding::Cut)]);
    let cut = &log[..log.len() - 1];
    assert_eq!(found(cut, Some(head)), [(3, Finding::Cut), (3, Finding::EndIsMissing { from: 3, to: 3 })]);
}

#[test]
fn an_older_head_is_held_against_the_record_that_it_names() {
    let ((_, old), (log, _)) = (log(2), log(5));
    assert_eq!(found(&log, Some(old)), [(5, Finding::NewerThanHead { records: 3 })]);
    let other = Head { seq: 2, hash: Hash::of(b"other") };
    assert_eq!(found(&log, Some(other))[0], (2, Finding::OtherThanHead));
    let mut rotated = Vec::new();
    Head { seq: 7, ..old }.append(time(0), &Event::Rotated, &mut rotated).unwrap();
    let told = found(&rotated, Some(old));
    assert_eq!(told, [(1, Finding::BeginsAt { seq: 8 }), (1, Finding::OlderHead { seq: 2 })]);
}

#[test]
fn nothing_is_no_log() {
    assert_eq!(found(b"", None), [(0, Finding::Empty)]);
    assert_eq!(found(b"", Some(Head { seq: 4, ..Head::default() })), [(0, Finding::EndIsMissing { from: 1, to: 4 })]);
}

#[derive(Clone, Debug)]
enum Tampering {
    Byte { at: prop::sample::Index, xor: u8 },
    Insert { at: prop::sample::Index, byte: u8 },
    Remove { at: prop::sample::Index },
    Duplicate { at: prop::sample::Index, to: prop::sample::Index },
    Swap { one: prop::sample::Index, two: prop::sample::Index },
    Truncate { at: prop::sample::Index },
    CutBeginning { at: prop::sample::Index },
}

fn tampering() -> impl Strategy<Value = Tampering> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        (index(), 1_u8..).prop_map(|(at, xor)| Tampering::Byte { at, xor }),
        (index(), any::<u8>()).prop_map(|(at, byte)| Tampering::Insert { at, byte }),
        index().prop_map(|at| Tampering::Remove { at }),
        (index(), index()).prop_map(|(at, to)| Tampering::Duplicate { at, to }),
        (index(), index()).prop_map(|(one, two)| Tampering::Swap { one, two }),
        index().prop_map(|at| Tampering::Truncate { at }),
        index().prop_map(|at| Tampering::CutBeginning { at }),
    ]
}

fn tamper(log: &[u8], tampering: &Tampering) -> Vec<u8> {
    let (mut bytes, mut lines) = (log.to_vec(), lines(log));
    match tampering {
        Tampering::Byte { at, xor } => bytes[at.index(log.len())] ^= xor,
        Tampering::Insert { at, byte } => bytes.insert(at.index(log.len() + 1), *byte),
        Tampering::Truncate { at } => bytes.truncate(at.index(log.len())),
        Tampering::CutBeginning { at } => bytes = bytes.split_off(at.index(log.len()) + 1),
        Tampering::Remove { at } => {
            lines.remove(at.index(lines.len()));
            return lines.concat();
        }
        Tampering::Duplicate { at, to } => {
            let line = lines[at.index(lines.len())].clone();
            lines.insert(to.index(lines.len() + 1), line);
            return lines.concat();
        }
        Tampering::Swap { one, two } => {
            let (one, two) = (one.index(lines.len()), two.index(lines.len()));
            lines.swap(one, two);
            return lines.concat();
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_is_done_to_a_log_is_found(records in 1_usize..8, crashes in 0_usize..2, tampering in tampering()) {
        let (mut log, mut head) = log(records);
        for _ in 0..crashes {
            log.extend(recovered(b"{\"seq\":9,\"ti", false, &mut head));
            head.append(time(9), &Event::Stopped, &mut log).unwrap();
        }
        prop_assert!(!has_fault(&log, Some(head)));
        let tampered = tamper(&log, &tampering);
        let unfinished = tampered.strip_prefix(&log[..]).is_some_and(|more| !more.contains(&b'\n'));
        // Bytes behind the end are what a crash leaves: told, but no fault.
        if tampered != log && !unfinished {
            prop_assert!(has_fault(&tampered, Some(head)), "{}", String::from_utf8_lossy(&tampered));
        } else if tampered != log {
            prop_assert_eq!(found(&tampered, Some(head)).pop().map(|found| found.1), Some(Finding::Unfinished));
        }
    }

    #[test]
    fn no_bytes_stop_the_check(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(has_fault(&bytes, None));
    }
}
