//! What a report looks like: golden files of one run that is made up.
//!
//! Made anew by: `SPILLWAY_GOLDEN=1 cargo test -p spillway golden`

use std::path::Path;
use std::time::Duration;

use spillway_core::drill::record::{Failure, RegionSight, Served};
use spillway_core::drill::report::{About, DataLoss};
use spillway_core::drill::{End, Recorder, Report, Request, Sight, builtin, definition, picture, text};
use spillway_core::health::Phase;
use spillway_core::units::Name;

use super::client::class_of;

const REGIONS: [&str; 3] = ["ap-south", "eu-west", "us-east"];
const TARGET: &str = "eu-west";

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// Milliseconds into the run; the fault comes at 10 s.
fn sight(at: u64) -> Sight {
    let (version, weight, phase) = match at {
        0..11_300 => (40, 1.0 / 3.0, Phase::Up),
        11_300..14_200 => (40, 1.0 / 3.0, Phase::Suspect),
        14_200..14_400 => (40, 1.0 / 3.0, Phase::Down),
        14_400..68_000 => (41, 0.0, Phase::Down),
        68_000..76_000 => (41, 0.0, Phase::Probation),
        76_000..84_000 => (42, 0.05, Phase::Ramp { percent: 5 }),
        84_000..92_000 => (43, 0.2, Phase::Ramp { percent: 50 }),
        _ => (44, 1.0 / 3.0, Phase::Up),
    };
    let regions = REGIONS.map(|region| {
        let is_target = region == TARGET;
        let weight = if is_target { weight } else { (1.0 - weight) / 2.0 };
        let phase = if is_target { phase } else { Phase::Up };
        let failing = if is_target && (11_300..60_000).contains(&at) { 4 } else { 0 };
        (name(region), RegionSight { phase: Some(phase), failing, weight })
    });
    Sight { plan_version: version, regions: regions.into() }
}

/// Sixty clients, one request a second each, at a moment of their own.
fn request(client: u32, second: u64) -> Request {
    let sent = second * 1_000 + u64::from(client) * 16;
    let home = REGIONS[client as usize % 3];
    // Clients of the target ask DNS anew when their TTL of 30 s, or of 5 s once it is suspected, is over.
    let asks_again = 14_400 + u64::from(client) * 480;
    let returns = 76_000 + u64::from(client) * 300;
    let away = home == TARGET && (asks_again..returns).contains(&sent);
    let other = if client.is_multiple_of(2) { "us-east" } else { "ap-south" };
    let first = if away { other } else { home };
    let dead = first == TARGET && (10_000..60_000).contains(&sent);
    let failed = dead && sent < 12_400;
    let by = if dead { other } else { first };
    let why = if client % 4 == 1 { Failure::TimedOut } else { Failure::Unreachable };
    Request {
        client,
        class: class_of(client),
        sent: Duration::from_millis(sent),
        took: Duration::from_millis(4),
        first: Some(name(first)),
        retries: u32::from(dead),
        outcome: if failed { Err(why) } else { Ok(Served { region: Some(name(by)) }) },
    }
}

fn report(began: &str, earlier: Vec<Report>) -> Report {
    let drill = definition::read(builtin::text("region-loss").unwrap()).unwrap();
    let mut recorder = Recorder::new(&drill, Some(name(TARGET)));
    for second in 0..100_u64 {
        let now = Duration::from_secs(second);
        if second == 10 {
            recorder.injected(now);
        }
        if second == 60 {
            recorder.removed(now);
        }
        for quarter in 0..4 {
            let at = second * 1_000 + quarter * 250;
            recorder.sight(sight(at), Duration::from_millis(at));
        }
        let answered = if (15..76).contains(&second) { "us-east" } else { TARGET };
        recorder.answer(1, &name(answered), now);
        (0..60).for_each(|client| recorder.request(&request(client, second)));
    }
    let data = Some(DataLoss { written: 16, rpo_ms: Some(1_000) });
    let about = About { began: began.into(), data, clients: 60, earlier };
    Report::new(&drill, &End::Completed, &recorder, about, Duration::from_secs(100))
}

#[test]
fn golden_report_text_and_picture() {
    let before = report("2026-02-01T12:00:00.000Z", Vec::new());
    let report = report("2026-03-01T12:00:00.000Z", vec![before]);
    let json = serde_json::to_string_pretty(&report).unwrap() + "\n";
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/drill/golden");
    for (file, made) in
        [("report.json", json), ("report.txt", text::text(&report)), ("timeline.svg", picture::picture(&report))]
    {
        let file = folder.join(file);
        if std::env::var_os("SPILLWAY_GOLDEN").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&file, &made).unwrap();
        }
        let golden = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(made == golden, "{} is not as it was; SPILLWAY_GOLDEN=1 makes it anew", file.display());
    }
}
