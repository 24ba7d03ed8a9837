//! A report as a picture: an SVG that stands alone.
//!
//! From top to bottom, over one axis of time: who answered each second's requests, and which failed; which region
//! clients asked first; the marks, and the phases of the time to recovery. Below stand the objectives.
//!
//! The rule: the same report gives the same bytes, and no text of a report is taken for markup.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::report::{Drawn, Moment, Outcome, Report, percent, seconds};

const WIDTH: f64 = 1200.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 1176.0;
const TOP: f64 = 168.0;
const PANEL: f64 = 150.0;
const GAP: f64 = 46.0;
const MARKS: f64 = 132.0;
/// Of colours that people who see red and green alike can tell apart (Okabe and Ito).
const REGIONS: [&str; 6] = ["#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6bb1"];
const PHASES: [&str; 6] = ["#f4a582", "#fddbc7", "#e0e0e0", "#c6dbef", "#92c5de", "#4393c3"];
const FAILED: &str = "#d62728";
const INK: &str = "#1f2933";
const FAINT: &str = "#7b8794";
const LINE: &str = "#e4e7eb";

/// An SVG document.
pub fn picture(report: &Report) -> String {
    let axis = Axis::of(report);
    let regions: BTreeSet<&str> = report
        .seconds
        .iter()
        .flat_map(|second| second.served.keys().chain(second.first.keys()))
        .map(String::as_str)
        .collect();
    let colours: BTreeMap<&str, &str> = regions.iter().copied().zip(REGIONS.into_iter().cycle()).collect();
    let first_panel = TOP;
    let second_panel = first_panel + PANEL + GAP;
    let marks = second_panel + PANEL + GAP;
    let objectives = marks + MARKS + 78.0;
    let rows = report.objectives.len().div_ceil(3);
    let height = objectives + 26.0 + rows as f64 * 24.0;
    let mut svg = Svg::default();
    svg.say(&format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"Inter, 'Helvetica Neue', Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"{INK}\">"
    ));
    svg.say(&format!("<title>{}</title>", escaped(&title(report))));
    svg.say(&format!("<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>"));
    head(&mut svg, report);
    legend(&mut svg, &colours);
    if !report.seconds.is_empty() {
        fault(&mut svg, report, &axis, first_panel - 8.0, marks + MARKS);
        let served = |second: &Drawn| (second.served.clone(), second.failed);
        panel(&mut svg, report, &axis, first_panel, "requests answered, per second and region", &colours, &served);
        let first = |second: &Drawn| (second.first.clone(), 0);
        panel(&mut svg, report, &axis, second_panel, "asked first, per second and region", &colours, &first);
        moments(&mut svg, report, &axis, first_panel, marks);
        phases(&mut svg, report, &axis, marks + MARKS);
        ticks(&mut svg, &axis, marks + MARKS + 14.0);
    }
    judged(&mut svg, report, objectives);
    svg.say("</svg>");
    svg.0
}

/// Time to place.
struct Axis {
    from: f64,
    to: f64,
}

impl Axis {
    fn of(report: &Report) -> Self {
        let first = report.seconds.first().map_or(0, |second| second.at_s);
        let last = report.seconds.last().map_or(1, |second| second.at_s.saturating_add(1));
        let reached = report.timeline.iter().filter_map(|moment| moment.at_ms).max().unwrap_or_default();
        let reached = i64::try_from(reached / 1_000 + 1).unwrap_or(i64::MAX);
        let to = last.max(reached);
        Self { from: first as f64, to: to.max(first.saturating_add(1)) as f64 }
    }

    fn x(&self, second: f64) -> f64 {
        LEFT + (second - self.from) / (self.to - self.from) * (RIGHT - LEFT)
    }

    /// Seconds between ticks: so that there are at most twelve.
    fn step(&self) -> f64 {
        let steps = [1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0];
        let fits = |step: &&f64| (self.to - self.from) / **step <= 12.0;
        steps.iter().find(fits).copied().unwrap_or(1_800.0)
    }
}

fn title(report: &Report) -> String {
    let on = report.target.as_ref().map(|target| format!(" on {target}")).unwrap_or_default();
    format!("{}{on}", report.drill)
}

fn head(svg: &mut Svg, report: &Report) {
    let colour = match report.outcome {
        Outcome::Pass => "#147d64",
        Outcome::Fail => FAILED,
        Outcome::Refused | Outcome::Aborted => "#b7791f",
    };
    svg.text(28.0, 46.0, &title(report), "font-size=\"24\" font-weight=\"600\"");
    svg.text(28.0, 68.0, &format!("{}  ·  {}", report.description, report.began), &format!("fill=\"{FAINT}\""));
    svg.say(&format!(
        "<rect x=\"{}\" y=\"22\" width=\"112\" height=\"32\" rx=\"16\" fill=\"{colour}\"/>",
        RIGHT - 112.0
    ));
    let outcome = report.outcome.name().to_uppercase();
    svg.text(
        RIGHT - 56.0,
        43.0,
        &outcome,
        "fill=\"#ffffff\" font-weight=\"600\" text-anchor=\"middle\" letter-spacing=\"1\"",
    );
    let time = |ms: Option<u64>| ms.map_or_else(|| "–".to_owned(), seconds);
    let at = |name: &str| report.timeline.iter().find(|moment| moment.name == name).and_then(|moment| moment.at_ms);
    let figures = [
        ("recovery time", time(report.recovery.as_ref().map(|recovery| recovery.rto_ms))),
        ("verdict", time(at("verdict"))),
        ("95 % moved", time(at("95 % of clients moved"))),
        ("errors back", time(at("errors back under the objective"))),
        ("served", percent(report.requests.success)),
        ("failed", report.requests.failed.to_string()),
        ("data loss", report.data.as_ref().map_or_else(|| "–".to_owned(), |data| time(data.rpo_ms))),
    ];
    let mut x = 28.0;
    for (name, figure) in figures {
        svg.text(x, 106.0, &figure, "font-size=\"19\" font-weight=\"600\"");
        svg.text(x, 124.0, name, &format!("fill=\"{FAINT}\" font-size=\"12\""));
        x += 128.0;
    }
    if let Some(reason) = report.reasons.first() {
        let more = report.reasons.len() - 1;
        let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
        svg.text(
            28.0,
            146.0,
            &format!("{}{more}", clipped(reason, 150)),
            &format!("fill=\"{colour}\" font-size=\"12\""),
        );
    }
}

fn legend(svg: &mut Svg, colours: &BTreeMap<&str, &str>) {
    let mut x = RIGHT;
    let entries = colours.iter().map(|(name, colour)| (*name, *colour)).chain([("failed", FAILED)]);
    let entries: Vec<(&str, &str)> = entries.collect();
    for (name, colour) in entries.into_iter().rev() {
        x -= 26.0 + 7.2 * name.chars().count() as f64;
        svg.say(&format!("<rect x=\"{x:.1}\" y=\"114\" width=\"11\" height=\"11\" rx=\"2\" fill=\"{colour}\"/>"));
        svg.text(x + 16.0, 124.0, name, "font-size=\"12\"");
    }
}

/// The time in which the fault is there.
fn fault(svg: &mut Svg, report: &Report, axis: &Axis, top: f64, bottom: f64) {
    let at = |name: &str| report.timeline.iter().find(|moment| moment.name == name).and_then(|moment| moment.at_ms);
    let Some(from) = at("fault injected") else { return };
    let from = axis.x(from as f64 / 1e3);
    let to = at("fault removed").map_or(RIGHT, |to| axis.x(to as f64 / 1e3));
    svg.say(&format!(
        "<rect x=\"{from:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{FAILED}\" fill-opacity=\"0.05\"/>",
        (to - from).max(0.0),
        bottom - top
    ));
}

type Count<'a> = &'a dyn Fn(&Drawn) -> (BTreeMap<String, u64>, u64);

/// Columns, one for each second, from the bottom: regions by name, then what failed.
fn panel(
    svg: &mut Svg,
    report: &Report,
    axis: &Axis,
    top: f64,
    name: &str,
    colours: &BTreeMap<&str, &str>,
    count: Count<'_>,
) {
    let bottom = top + PANEL;
    svg.text(LEFT, top - 12.0, name, &format!("fill=\"{FAINT}\" font-size=\"12\""));
    let counted: Vec<(f64, BTreeMap<String, u64>, u64)> = report
        .seconds
        .iter()
        .map(|second| {
            let (counts, failed) = count(second);
            (second.at_s as f64, counts, failed)
        })
        .collect();
    let sum = |counts: &BTreeMap<String, u64>, failed: u64| counts.values().sum::<u64>() + failed;
    let most = counted.iter().map(|(_, counts, failed)| sum(counts, *failed)).max().unwrap_or_default().max(1);
    let scale = (PANEL - 6.0) / most as f64;
    for (share, label) in [(0, 0), (1, most)] {
        let y = if share == 0 { bottom } else { bottom - most as f64 * scale };
        svg.say(&format!("<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{RIGHT}\" y2=\"{y:.1}\" stroke=\"{LINE}\"/>"));
        svg.text(
            LEFT - 8.0,
            y + 4.0,
            &label.to_string(),
            &format!("fill=\"{FAINT}\" font-size=\"11\" text-anchor=\"end\""),
        );
    }
    let width = axis.x(axis.from + 1.0) - LEFT;
    // One path for each colour: a picture of an hour stays small.
    let mut paths: BTreeMap<&str, String> = BTreeMap::new();
    for (at, counts, failed) in &counted {
        let mut y = bottom;
        let parts = colours.iter().map(|(name, colour)| (*colour, counts.get(*name).copied().unwrap_or_default()));
        for (colour, count) in parts.chain([(FAILED, *failed)]).filter(|(_, count)| *count > 0) {
            let height = count as f64 * scale;
            y -= height;
            let path = paths.entry(colour).or_default();
            // Writing to memory cannot fail.
            let _ = write!(path, "M{:.1} {y:.1}h{:.1}v{height:.1}h-{:.1}z", axis.x(*at), width + 0.2, width + 0.2);
        }
    }
    for (colour, path) in paths {
        let opacity = if colour == FAILED { 1.0 } else { 0.82 };
        svg.say(&format!("<path d=\"{path}\" fill=\"{colour}\" fill-opacity=\"{opacity}\"/>"));
    }
}

/// Lines through the panels, and names in rows so that they do not cover each other.
fn moments(svg: &mut Svg, report: &Report, axis: &Axis, from: f64, top: f64) {
    let reached = report.timeline.iter().filter_map(|moment| Some((moment, moment.at_ms?)));
    let mut reached: Vec<(&Moment, u64)> = reached.collect();
    reached.sort_by_key(|(_, at)| *at);
    let mut ends: Vec<f64> = Vec::new();
    // Over all lines.
    let mut labels = Svg::default();
    for (moment, at) in reached {
        let x = axis.x(at as f64 / 1e3);
        let label = format!("{} {}", moment.mark, moment.name).trim().to_owned() + &format!("  {}", seconds(at));
        let width = 6.1 * label.chars().count() as f64 + 14.0;
        let left = x + 5.0 + width > RIGHT + 8.0;
        let (begin, end) = if left { (x - width, x) } else { (x, x + width) };
        let row = ends.iter().position(|taken| *taken <= begin).unwrap_or(ends.len());
        match ends.get_mut(row) {
            Some(taken) => *taken = end,
            None => ends.push(end),
        }
        // More rows than there is room for share the last one.
        let y = top - 12.0 + (row.min(7) as f64 + 1.0) * 16.0;
        let colour = match moment.mark.as_str() {
            "T0" | "" => FAILED,
            "T7" => "#147d64",
            _ => INK,
        };
        svg.say(&format!(
            "<path d=\"M{x:.1} {from}V{y:.1}\" stroke=\"{colour}\" stroke-opacity=\"0.45\" stroke-dasharray=\"3 3\"/>\
             <circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
            y - 4.0
        ));
        let (place, anchor) = if left { (x - 7.0, "end") } else { (x + 7.0, "start") };
        labels.text(place, y, &label, &format!("font-size=\"11.5\" text-anchor=\"{anchor}\" fill=\"{colour}\" stroke=\"#ffffff\" stroke-width=\"3\" paint-order=\"stroke\""));
    }
    svg.0.push_str(&labels.0);
}

fn phases(svg: &mut Svg, report: &Report, axis: &Axis, top: f64) {
    let Some(recovery) = &report.recovery else { return };
    let mut at = 0.0;
    for (phase, colour) in recovery.phases.iter().zip(PHASES) {
        let (from, to) = (axis.x(at), axis.x(at + phase.ms as f64 / 1e3));
        at += phase.ms as f64 / 1e3;
        if phase.ms == 0 {
            continue;
        }
        let width = to - from;
        svg.say(&format!(
            "<rect x=\"{from:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"16\" fill=\"{colour}\" stroke=\"#ffffff\">\
             <title>{} {}</title></rect>",
            escaped(&phase.name),
            seconds(phase.ms)
        ));
        if width > 12.0 + 6.6 * phase.name.chars().count() as f64 {
            svg.text((from + to) / 2.0, top + 12.0, &phase.name, "font-size=\"11\" text-anchor=\"middle\"");
        }
    }
    let end = axis.x(at);
    svg.text(
        end + 6.0,
        top + 12.0,
        &format!("recovery time {}", seconds(recovery.rto_ms)),
        "font-size=\"11.5\" font-weight=\"600\"",
    );
}

fn ticks(svg: &mut Svg, axis: &Axis, top: f64) {
    let step = axis.step();
    let mut at = (axis.from / step).ceil() * step;
    while at <= axis.to {
        let x = axis.x(at);
        svg.say(&format!(
            "<line x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"{FAINT}\"/>",
            top + 6.0,
            top + 11.0
        ));
        svg.text(
            x,
            top + 24.0,
            &format!("{at} s"),
            &format!("fill=\"{FAINT}\" font-size=\"11\" text-anchor=\"middle\""),
        );
        at += step;
    }
}

fn judged(svg: &mut Svg, report: &Report, top: f64) {
    for (place, objective) in report.objectives.iter().enumerate() {
        let (row, column) = (place / 3, place % 3);
        let (x, y) = (28.0 + column as f64 * 388.0, top + row as f64 * 24.0);
        let (sign, colour) = if objective.met { ("✓", "#147d64") } else { ("✗", FAILED) };
        svg.text(x, y, sign, &format!("fill=\"{colour}\" font-weight=\"700\""));
        svg.text(x + 18.0, y, &objective.name, "font-weight=\"600\"");
        svg.text(x + 140.0, y, &objective.found, "");
        svg.text(x + 250.0, y, &objective.limit, &format!("fill=\"{FAINT}\""));
    }
}

#[derive(Default)]
struct Svg(String);

impl Svg {
    fn say(&mut self, markup: &str) {
        self.0.push_str(markup);
        self.0.push('\n');
    }

    fn text(&mut self, x: f64, y: f64, text: &str, attributes: &str) {
        let space = if attributes.is_empty() { "" } else { " " };
        self.say(&format!("<text x=\"{x:.1}\" y=\"{y:.1}\"{space}{attributes}>{}</text>", escaped(text)));
    }
}

fn clipped(text: &str, most: usize) -> String {
    if text.chars().count() <= most { text.to_owned() } else { text.chars().take(most).chain(['…']).collect() }
}

/// Text for XML 1.0, which has no control characters.
fn escaped(text: &str) -> String {
    let plain = text.chars().filter(|character| !character.is_control());
    plain.fold(String::with_capacity(text.len()), |mut escaped, character| {
        match character {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
        escaped
    })
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::example;
    use super::*;

    /// Every element is closed, in order.
    fn assert_well_formed(svg: &str) {
        let mut open: Vec<&str> = Vec::new();
        for tag in svg.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').expect("a tag that ends");
            let name = tag.split([' ', '/']).find(|part| !part.is_empty()).unwrap();
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn a_picture_shows_each_mark_that_was_reached() {
        let report = example();
        let svg = picture(&report);
        assert_well_formed(&svg);
        for moment in report.timeline.iter().filter(|moment| moment.at_ms.is_some()) {
            assert!(svg.contains(&moment.name), "{}", moment.name);
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert_eq!(picture(&report), svg);
    }

    #[test]
    fn no_text_is_taken_for_markup() {
        let report = Report { description: "</svg><script>&\"\u{1b}".into(), ..example() };
        let svg = picture(&report);
        assert_well_formed(&svg);
        assert!(svg.contains("&lt;/svg&gt;&lt;script&gt;&amp;&quot;") && !svg.contains("<script>"));
    }

    #[test]
    fn a_run_of_which_nothing_is_known_is_a_picture_too() {
        let mut report = example();
        report.seconds.clear();
        report.timeline.clear();
        report.recovery = None;
        assert_well_formed(&picture(&report));
        let mut report = example();
        report.seconds.truncate(1);
        assert_well_formed(&picture(&report));
    }
}
