use std::time::Duration;

use spillway_core::drill::report::About;
use spillway_core::drill::{End, Recorder, builtin, definition};

use super::*;

fn report(second: u32) -> Report {
    let drill = definition::read(builtin::text("store-loss").unwrap()).unwrap();
    let about = About { began: format!("2026-03-01T12:00:{second:02}.000Z"), ..About::default() };
    Report::new(&drill, &End::Completed, &Recorder::new(&drill, None), about, Duration::ZERO)
}

#[test]
fn reports_are_kept_in_three_forms_and_read_back_newest_first() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("drills");
    assert_eq!(earlier(&folder), [], "nothing ran yet");
    let file = save(&folder, &report(1)).unwrap();
    assert_eq!(file.file_name().unwrap(), "2026-03-01T120001.000Z-store-loss.json");
    assert!(file.with_extension("svg").exists() && file.with_extension("txt").exists());
    save(&folder, &report(2)).unwrap();
    std::fs::write(folder.join("3-broken.json"), "{").unwrap();
    std::fs::write(folder.join("notes.md"), "").unwrap();
    assert_eq!(earlier(&folder), [report(2), report(1)]);
}

#[test]
fn a_report_for_others_has_plain_names() {
    let folder = tempfile::tempdir().unwrap();
    save_plain(folder.path(), &report(1)).unwrap();
    let mut names: Vec<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["report.json", "report.txt", "timeline.svg"]);
}
