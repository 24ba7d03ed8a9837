//! How long a request may take: decided once at the edge, absolute from then on.
//!
//! The shortest of what the caller asked for wins, clamped to what the model allows. A value that
//! cannot be read never lengthens a request: it counts as absent.

use std::time::Duration;

/// A request with less than this left is not sent on: it could not be answered in time.
pub const SHORTEST_USEFUL: Duration = Duration::from_micros(500);

/// What the caller said about time, each as read from its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The `timeout` request parameter.
    pub parameter: Option<Duration>,
    /// The `grpc-timeout` header.
    pub grpc_timeout: Option<Duration>,
    /// The `x-request-timeout-ms` header.
    pub header: Option<Duration>,
}

/// What decided how long a request may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Parameter,
    GrpcTimeout,
    Header,
    /// The model's `deadline`.
    Default,
    /// The model's `maxDeadline`.
    Max,
}

impl Source {
    /// As `explain` calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Parameter => "timeout",
            Self::GrpcTimeout => "grpc-timeout",
            Self::Header => "x-request-timeout-ms",
            Self::Default => "deadline",
            Self::Max => "maxDeadline",
        }
    }
}

/// The time that a request gets from its arrival.
///
/// `default` and `max` are the model's. Zero and absent mean the default, as Triton has it.
pub fn allowed(asked: Asked, default: Duration, max: Duration) -> Duration {
    decided(asked, default, max).0
}

/// The same, and what decided it; of equal times the first in the order of [`Source`].
pub fn decided(asked: Asked, default: Duration, max: Duration) -> (Duration, Source) {
    let asked = [
        (asked.parameter, Source::Parameter),
        (asked.grpc_timeout, Source::GrpcTimeout),
        (asked.header, Source::Header),
    ];
    let shortest = asked
        .into_iter()
        .filter_map(|(time, source)| Some((time.filter(|time| !time.is_zero())?, source)))
        .min_by_key(|(time, _)| *time)
        .unwrap_or((default, Source::Default));
    if shortest.0 <= max { shortest } else { (max, Source::Max) }
}

/// Triton's `timeout` parameter: microseconds. Negative is absent.
pub fn parse_timeout_parameter(micros: i64) -> Option<Duration> {
    u64::try_from(micros).ok().map(Duration::from_micros)
}

/// `x-request-timeout-ms`: digits only.
pub fn parse_milliseconds(text: &str) -> Option<Duration> {
    digits(text, 12).map(Duration::from_millis)
}

/// `grpc-timeout`: 1 to 8 digits and one of `H M S m u n` (gRPC over HTTP/2, "Timeout").
pub fn parse_grpc_timeout(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number = digits(number, 8)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3_600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// A `grpc-timeout` for what is left, in the finest unit that fits into 8 digits.
pub fn format_grpc_timeout(left: Duration) -> String {
    const MAX: u128 = 99_999_999;
    let micros = left.as_micros();
    if micros <= MAX {
        format!("{micros}u")
    } else if left.as_millis() <= MAX {
        format!("{}m", left.as_millis())
    } else {
        format!("{}S", u128::from(left.as_secs()).min(MAX))
    }
}

fn digits(text: &str, at_most: usize) -> Option<u64> {
    let plausible = !text.is_empty() && text.len() <= at_most && text.bytes().all(|byte| byte.is_ascii_digit());
    plausible.then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: Duration = Duration::from_millis(200);
    const MAX: Duration = Duration::from_secs(5);

    #[test]
    fn the_shortest_request_wins_within_the_models_limit() {
        let asked = Asked {
            parameter: Some(Duration::from_millis(50)),
            grpc_timeout: Some(Duration::from_millis(40)),
            header: Some(Duration::from_secs(1)),
        };
        assert_eq!(decided(asked, DEFAULT, MAX), (Duration::from_millis(40), Source::GrpcTimeout));
        let long = Asked { header: Some(Duration::from_secs(3_600)), ..Asked::default() };
        assert_eq!(decided(long, DEFAULT, MAX), (MAX, Source::Max));
        let exact = Asked { header: Some(MAX), ..Asked::default() };
        assert_eq!(decided(exact, DEFAULT, MAX), (MAX, Source::Header));
        assert_eq!(decided(Asked::default(), DEFAULT, MAX), (DEFAULT, Source::Default));
    }

    #[test]
    fn t53_absent_zero_negative_and_overflowing_deadlines_mean_the_default() {
        assert_eq!(allowed(Asked::default(), DEFAULT, MAX), DEFAULT);
        let zero = Asked { parameter: Some(Duration::ZERO), ..Asked::default() };
        assert_eq!(allowed(zero, DEFAULT, MAX), DEFAULT);
        assert_eq!(parse_timeout_parameter(-1), None);
        for bad in ["", "-5", "1e3", "99999999999999999999", " 5", "+5"] {
            assert_eq!(parse_milliseconds(bad), None, "{bad:?}");
        }
        for bad in ["", "m", "5", "5x", "123456789m", "-5m", "5 m", "5ms", "5µ"] {
            assert_eq!(parse_grpc_timeout(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn grpc_timeouts_round_trip_without_growing() {
        for left in [Duration::from_micros(1), Duration::from_millis(1_234), Duration::from_secs(500), MAX * 10_000] {
            let parsed = parse_grpc_timeout(&format_grpc_timeout(left)).unwrap();
            assert!(parsed <= left && left - parsed < Duration::from_secs(1), "{left:?} became {parsed:?}");
        }
        assert_eq!(parse_grpc_timeout("100m"), Some(Duration::from_millis(100)));
    }
}
