//! Plots as SVG, readable on a light and on a dark page: bars for what is compared, lines for what grows.
//!
//! Each value is a median with its 95 % interval, drawn as a whisker. No plot without points: what was
//! not measured is not drawn.

use std::fmt::Write as _;

use anyhow::{Result, ensure};

use super::super::statistics::Median;

#[derive(Clone, Debug)]
pub struct Plot {
    /// Of the file, without its ending: `a-z 0-9 -`.
    pub name: String,
    pub title: String,
    pub shape: Shape,
}

#[derive(Clone, Debug)]
pub enum Shape {
    Bars(Bars),
    /// The axes of x and y.
    Lines(Axis, Axis, Vec<Line>),
}

/// Horizontal bars from 0 on, one colour for each subject.
#[derive(Clone, Debug)]
pub struct Bars {
    /// What a bar's length is, with its unit, such as `CPU, µs a call`.
    pub unit: String,
    pub groups: Vec<Group>,
}

#[derive(Clone, Debug)]
pub struct Group {
    pub label: String,
    /// Subject and value.
    pub bars: Vec<(String, Median)>,
}

#[derive(Clone, Debug)]
pub struct Axis {
    /// With its unit.
    pub label: String,
    /// Whether each tick is ten times the one before; else it begins at 0.
    pub logarithmic: bool,
}

#[derive(Clone, Debug)]
pub struct Line {
    pub label: String,
    pub points: Vec<(f64, Median)>,
}

const WIDTH: f64 = 760.0;
/// Of the drawing area of lines.
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 90.0;
/// Where bars begin: room for the labels of groups.
const LEFT_OF_BARS: f64 = 170.0;
/// Right of it stands a bar's value.
const RIGHT: f64 = 40.0;
const RIGHT_OF_BARS: f64 = 120.0;
const TOP: f64 = 64.0;
const BELOW: f64 = 52.0;
const BAR: f64 = 18.0;
const BETWEEN_GROUPS: f64 = 14.0;
/// Ticks wanted on an axis that begins at 0.
const TICKS: f64 = 5.0;
/// Okabe and Ito (2008): told apart with any colour vision, and seen on white and on black.
const COLOURS: [&str; 6] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"];

impl Plot {
    pub fn svg(&self) -> Result<String> {
        let plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-';
        ensure!(!self.name.is_empty() && self.name.chars().all(plain), "{:?} names no file", self.name);
        match &self.shape {
            Shape::Bars(bars) => self.bars(bars),
            Shape::Lines(x, y, lines) => self.lines(x, y, lines),
        }
    }

    fn bars(&self, bars: &Bars) -> Result<String> {
        let values: Vec<&Median> = bars.groups.iter().flat_map(|group| &group.bars).map(|(_, value)| value).collect();
        let scale = Scale::over(values.iter().copied(), false, LEFT_OF_BARS, WIDTH - RIGHT_OF_BARS)?;
        let mut subjects: Vec<&str> = Vec::new();
        for (subject, _) in bars.groups.iter().flat_map(|group| &group.bars) {
            if !subjects.contains(&subject.as_str()) {
                subjects.push(subject);
            }
        }
        let height = values.len() as f64 * BAR + bars.groups.len() as f64 * BETWEEN_GROUPS;
        let mut canvas = Canvas::new(&self.title, height, &subjects);
        canvas.ticks_below(&scale, &bars.unit, height);
        let mut y = TOP + BETWEEN_GROUPS / 2.0;
        for group in &bars.groups {
            let middle = y + group.bars.len() as f64 * BAR / 2.0 + 4.0;
            canvas.text(LEFT_OF_BARS - 8.0, middle, "end", &group.label);
            for (subject, value) in &group.bars {
                let colour = subjects.iter().position(|one| one == subject).unwrap_or_default();
                canvas.bar(&scale, y, value, colour);
                y += BAR;
            }
            y += BETWEEN_GROUPS;
        }
        Ok(canvas.end())
    }

    fn lines(&self, x: &Axis, y: &Axis, lines: &[Line]) -> Result<String> {
        let points = || lines.iter().flat_map(|line| &line.points);
        let places: Vec<Median> = points().map(|(x, _)| Median { value: *x, low: *x, high: *x }).collect();
        let across = Scale::over(places.iter(), x.logarithmic, LEFT, WIDTH - RIGHT)?;
        let up = Scale::over(points().map(|(_, value)| value), y.logarithmic, TOP + HEIGHT, TOP)?;
        let labels: Vec<&str> = lines.iter().map(|line| line.label.as_str()).collect();
        let mut canvas = Canvas::new(&self.title, HEIGHT, &labels);
        canvas.ticks_below(&across, &x.label, HEIGHT);
        canvas.ticks_left(&up, &y.label);
        for (colour, line) in lines.iter().enumerate() {
            canvas.line(&across, &up, line, colour);
        }
        Ok(canvas.end())
    }
}

/// From values to places on the page.
struct Scale {
    from: f64,
    to: f64,
    logarithmic: bool,
    start: f64,
    end: f64,
}

impl Scale {
    /// Holds all values and their intervals.
    fn over<'a>(values: impl Iterator<Item = &'a Median>, logarithmic: bool, start: f64, end: f64) -> Result<Self> {
        let mut ends: Option<(f64, f64)> = None;
        for Median { value, low, high } in values {
            ensure!(
                low <= value && value <= high && high.is_finite() && *low >= 0.0,
                "{low} {value} {high} cannot be drawn"
            );
            ensure!(!logarithmic || *low > 0.0, "{low} has no place on a logarithmic axis");
            let (least, most) = ends.unwrap_or((*low, *high));
            ends = Some((least.min(*low), most.max(*high)));
        }
        let Some((least, most)) = ends else { anyhow::bail!("there are no points") };
        let (from, to) = if logarithmic {
            let (from, to) = (10_f64.powf(least.log10().floor()), 10_f64.powf(most.log10().ceil()));
            (from, if to > from { to } else { from * 10.0 })
        } else {
            let most = if most > 0.0 { most } else { 1.0 };
            let step = step(most);
            (0.0, (most / step).ceil() * step)
        };
        Ok(Self { from, to, logarithmic, start, end })
    }

    fn place(&self, value: f64) -> f64 {
        let share = if self.logarithmic {
            (value.log10() - self.from.log10()) / (self.to.log10() - self.from.log10())
        } else {
            (value - self.from) / (self.to - self.from)
        };
        self.start + share * (self.end - self.start)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.logarithmic {
            let (from, to) = (self.from.log10().round() as i32, self.to.log10().round() as i32);
            return (from..=to).map(|power| 10_f64.powi(power)).collect();
        }
        let step = step(self.to);
        let count = (self.to / step).round() as u32;
        (0..=count).map(|tick| f64::from(tick) * step).collect()
    }
}

/// 1, 2 or 5 times a power of ten.
fn step(most: f64) -> f64 {
    let rough = most / TICKS;
    let power = 10_f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|times| times * power).into_iter().find(|step| *step >= rough * 0.999).unwrap_or(power)
}

struct Canvas {
    svg: String,
}

impl Canvas {
    /// `height`: of the drawing area, between the title with the legend and the axis.
    fn new(title: &str, height: f64, legend: &[&str]) -> Self {
        let whole = TOP + height + BELOW;
        let mut canvas = Self { svg: String::new() };
        let _ = write!(
            canvas.svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {whole:.0}\" width=\"{WIDTH}\" height=\"{whole:.0}\" role=\"img\">\n\
             <title>{}</title>\n\
             <style>\n\
             .page {{ fill: #ffffff }} text {{ fill: #1f2328; font: 12px system-ui, sans-serif }} .title {{ font-weight: 600; font-size: 15px }}\n\
             .grid {{ stroke: #d0d7de }} .whisker {{ stroke: #1f2328 }}\n\
             @media (prefers-color-scheme: dark) {{ .page {{ fill: #0d1117 }} text {{ fill: #e6edf3 }} .grid {{ stroke: #30363d }} .whisker {{ stroke: #e6edf3 }} }}\n\
             </style>\n\
             <rect class=\"page\" width=\"{WIDTH}\" height=\"{whole:.0}\"/>\n\
             <text class=\"title\" x=\"16\" y=\"24\">{}</text>\n",
            escape(title),
            escape(title),
        );
        let mut x = 16.0;
        for (at, label) in legend.iter().enumerate() {
            let _ = writeln!(
                canvas.svg,
                "<rect x=\"{x:.1}\" y=\"36\" width=\"12\" height=\"12\" fill=\"{}\"/>",
                colour(at)
            );
            canvas.text(x + 17.0, 46.0, "start", label);
            // About the width of a letter at 12 px.
            x += 34.0 + 7.0 * label.chars().count() as f64;
        }
        canvas
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let _ = writeln!(self.svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(text));
    }

    fn stroke(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ =
            writeln!(self.svg, "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>");
    }

    fn ticks_below(&mut self, scale: &Scale, label: &str, height: f64) {
        let bottom = TOP + height;
        for tick in scale.ticks() {
            let x = scale.place(tick);
            self.stroke("grid", (x, TOP), (x, bottom));
            self.text(x, bottom + 18.0, "middle", &number(tick));
        }
        self.text(f64::midpoint(scale.start, scale.end), bottom + 40.0, "middle", label);
    }

    fn ticks_left(&mut self, scale: &Scale, label: &str) {
        for tick in scale.ticks() {
            let y = scale.place(tick);
            self.stroke("grid", (LEFT, y), (WIDTH - RIGHT, y));
            self.text(LEFT - 8.0, y + 4.0, "end", &number(tick));
        }
        let middle = f64::midpoint(scale.start, scale.end);
        let _ = writeln!(
            self.svg,
            "<text transform=\"translate(20 {middle:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            escape(label)
        );
    }

    fn bar(&mut self, scale: &Scale, y: f64, value: &Median, at: usize) {
        let Median { value: middle, low, high } = *value;
        let (start, end) = (scale.place(0.0), scale.place(middle));
        let _ = writeln!(
            self.svg,
            "<rect x=\"{start:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>",
            y + 1.0,
            end - start,
            BAR - 2.0,
            colour(at)
        );
        let y = y + BAR / 2.0;
        self.stroke("whisker", (scale.place(low), y), (scale.place(high), y));
        self.text(scale.place(high) + 6.0, y + 4.0, "start", &number(middle));
    }

    fn line(&mut self, across: &Scale, up: &Scale, line: &Line, at: usize) {
        let places: Vec<String> = line
            .points
            .iter()
            .map(|(x, value)| format!("{:.1},{:.1}", across.place(*x), up.place(value.value)))
            .collect();
        let colour = colour(at);
        let _ = writeln!(
            self.svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            places.join(" ")
        );
        for (x, value) in &line.points {
            let x = across.place(*x);
            self.stroke("whisker", (x, up.place(value.low)), (x, up.place(value.high)));
            let _ = writeln!(
                self.svg,
                "<circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{colour}\"/>",
                up.place(value.value)
            );
        }
    }

    fn end(mut self) -> String {
        self.svg.push_str("</svg>\n");
        self.svg
    }
}

fn colour(at: usize) -> &'static str {
    COLOURS[at % COLOURS.len()]
}

/// Three digits that say something; thousands apart.
fn number(value: f64) -> String {
    if value != 0.0 && value.abs() < 100.0 {
        let digits = 2 - value.abs().log10().floor() as i32;
        let text = format!("{value:.*}", usize::try_from(digits).unwrap_or_default());
        return if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text };
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exactly(value: f64) -> Median {
        Median { value, low: value, high: value }
    }

    fn lines(logarithmic: bool, points: &[(f64, f64)]) -> Plot {
        let points = points.iter().map(|(x, y)| (*x, exactly(*y))).collect();
        let axis = |label: &str, logarithmic| Axis { label: label.into(), logarithmic };
        let line = Line { label: "a <gateway>".into(), points };
        Plot {
            name: "growth".into(),
            title: "Cost & size".into(),
            shape: Shape::Lines(axis("models", logarithmic), axis("µs", false), vec![line]),
        }
    }

    #[test]
    fn numbers_are_short() {
        let found = [0.0, 0.5, 0.1234, 12.34, 99.0, 100.0, 1_000.0, 1_234_567.0, 0.00012].map(number);
        assert_eq!(found, ["0", "0.5", "0.123", "12.3", "99", "100", "1,000", "1,234,567", "0.00012"]);
    }

    #[test]
    fn ticks_are_round_and_hold_all_values() {
        for most in [0.3, 1.0, 7.0, 42.0, 99.0, 1_234.0] {
            let scale = Scale::over([exactly(most)].iter(), false, 0.0, 100.0).unwrap();
            let ticks = scale.ticks();
            assert!(scale.to >= most && (3..=8).contains(&ticks.len()), "{most}: {ticks:?}");
            assert!((ticks[ticks.len() - 1] - scale.to).abs() < 1e-9, "{most}: {ticks:?}");
        }
        let scale = Scale::over([exactly(4.0), exactly(1_000.0)].iter(), true, 0.0, 300.0).unwrap();
        assert_eq!(scale.ticks(), [1.0, 10.0, 100.0, 1_000.0]);
        assert_eq!([1.0, 10.0, 1_000.0].map(|value| scale.place(value).round()), [0.0, 100.0, 300.0]);
    }

    #[test]
    fn lines_show_each_point_and_escape_text() {
        let svg = lines(true, &[(1.0, 50.0), (10.0, 52.0), (10_000.0, 55.0)]).svg().unwrap();
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(
            svg.contains("a &lt;gateway&gt;") && svg.contains("Cost &amp; size") && svg.contains(">10,000<"),
            "{svg}"
        );
        assert!(svg.contains("prefers-color-scheme: dark") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn bars_of_one_subject_have_one_colour() {
        let group = |label: &str, ours: f64, theirs: f64| Group {
            label: label.into(),
            bars: vec![("Spillway".into(), exactly(ours)), ("Envoy".into(), exactly(theirs))],
        };
        let bars =
            Bars { unit: "CPU, µs a call".into(), groups: vec![group("grpc", 25.0, 54.0), group("h2", 30.0, 65.0)] };
        let svg = Plot { name: "unary".into(), title: "CPU".into(), shape: Shape::Bars(bars) }.svg().unwrap();
        // Two bars and one place in the legend.
        assert_eq!([COLOURS[0], COLOURS[1], COLOURS[2]].map(|colour| svg.matches(colour).count()), [3, 3, 0]);
        assert!(svg.contains(">54<") && svg.contains(">grpc<"), "{svg}");
    }

    #[test]
    fn nothing_measured_is_nothing_drawn() {
        assert!(lines(true, &[]).svg().is_err());
        assert!(lines(true, &[(0.0, 1.0)]).svg().is_err(), "0 on a logarithmic axis");
        assert!(lines(false, &[(1.0, f64::NAN)]).svg().is_err());
        assert!(Plot { name: "../up".into(), ..lines(false, &[(1.0, 1.0)]) }.svg().is_err());
    }
}
