//! A pod's own report of its load: the trailer `endpoint-load-metrics` in its native text form
//! (Open Request Cost Aggregation, Envoy's `xds.data.orca.v3.OrcaLoadReport`).
//!
//! ```text
//! endpoint-load-metrics: TEXT application_utilization=0.42, named_metrics.queue=3, named_metrics.in_flight=5
//! ```
//!
//! The rule: a report is an advice. One that cannot be read is counted and changes nothing.

use http::{HeaderMap, HeaderName};
use spillway_core::routing::Reported;

pub const LOAD: HeaderName = HeaderName::from_static("endpoint-load-metrics");

/// Bytes of a report, and figures in it: ours has four.
const LONGEST: usize = 1_024;
const MOST: usize = 32;

#[derive(Debug, PartialEq, Eq)]
pub struct Unreadable;

/// The report in an answer's trailers, if there is one.
pub fn reported(trailers: &HeaderMap) -> Option<Result<Reported, Unreadable>> {
    trailers.get(LOAD).map(|value| parse(value.as_bytes()).ok_or(Unreadable))
}

/// Utilisation where it is given, since it knows what the pod can do; else the requests there.
fn parse(text: &[u8]) -> Option<Reported> {
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= LONGEST)?;
    let (mut utilisation, mut in_flight, mut queue) = (None, None, None);
    for (index, figure) in text.strip_prefix("TEXT ")?.split(',').enumerate() {
        let (name, value) = figure.split_once('=')?;
        let value: f64 = value.trim().parse().ok()?;
        if index >= MOST || !value.is_finite() || value < 0.0 {
            return None;
        }
        match name.trim() {
            "application_utilization" => utilisation = Some(value),
            "named_metrics.in_flight" => in_flight = Some(value),
            "named_metrics.queue" => queue = Some(value),
            _ => {}
        }
    }
    let requests = in_flight.map(|in_flight| Reported::Requests((in_flight + queue.unwrap_or(0.0)) as usize));
    utilisation.map(Reported::Utilisation).or(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_utilisation_or_else_requests() {
        let ours = b"TEXT application_utilization=0.42, named_metrics.queue=3, named_metrics.in_flight=5, x=1";
        assert_eq!(parse(ours), Some(Reported::Utilisation(0.42)));
        assert_eq!(parse(b"TEXT named_metrics.queue=3,named_metrics.in_flight=5"), Some(Reported::Requests(8)));
        assert_eq!(parse(b"TEXT application_utilization=7"), Some(Reported::Utilisation(7.0)), "routing cuts it");
    }

    #[test]
    fn what_cannot_be_read_is_no_report() {
        let long = format!("TEXT application_utilization=0.{}", "1".repeat(LONGEST));
        let many = format!("TEXT {}application_utilization=1", "a=1,".repeat(MOST));
        for bad in [
            "",
            "TEXT",
            "TEXT ",
            "JSON {\"application_utilization\":0.4}",
            "TEXT application_utilization",
            "TEXT application_utilization=NaN",
            "TEXT application_utilization=inf",
            "TEXT application_utilization=-0.1",
            "TEXT application_utilization=0.1,",
            "TEXT named_metrics.queue=3",
            &long,
            &many,
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(parse(&[0xff, 0xfe]), None);
    }
}
