//! A limit and what is left of it as HTTP fields: `RateLimit-Policy`, `RateLimit` and `Retry-After`.
//!
//! Forms of draft-ietf-httpapi-ratelimit-headers-11 (lists of strings with parameters, RFC 9651):
//!
//! ```text
//! RateLimit-Policy: "tenant";q=100;w=60     quota and window (s, at least 1)
//! RateLimit: "tenant";r=50;t=30             tokens left, seconds for which they must do
//! ```
//!
//! Several limits are one list: their items joined by `, `. Times round up to whole seconds, so that a
//! client which waits as long as it was told is never early.

use std::fmt::Write;
use std::time::Duration;

/// The largest integer of a structured field (RFC 9651, section 3.3.1).
const LARGEST_INTEGER: u64 = 999_999_999_999_999;

/// An item of `RateLimit-Policy`: `quota` tokens in each `window`.
pub fn policy(name: &str, quota: u64, window: Duration) -> String {
    let mut item = string(name);
    let _ = write!(item, ";q={};w={}", quota.min(LARGEST_INTEGER), seconds(window).max(1));
    item
}

/// An item of `RateLimit`: the tokens left, and [`super::Decision::reset`].
pub fn service_limit(name: &str, remaining: u64, reset: Option<Duration>) -> String {
    let mut item = string(name);
    let _ = write!(item, ";r={}", remaining.min(LARGEST_INTEGER));
    if let Some(reset) = reset {
        let _ = write!(item, ";t={}", seconds(reset));
    }
    item
}

/// The value of `Retry-After`: whole seconds, at least 1.
pub fn retry_after(wait: Duration) -> u64 {
    seconds(wait).max(1)
}

fn seconds(duration: Duration) -> u64 {
    let whole = duration.as_secs().saturating_add(u64::from(duration.subsec_nanos() > 0));
    whole.min(LARGEST_INTEGER)
}

/// A string of a structured field: printable ASCII, `"` and `\` escaped. Anything else becomes `_`.
fn string(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 32);
    quoted.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            ' '..='~' => quoted.push(character),
            _ => quoted.push('_'),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_are_the_drafts() {
        assert_eq!(policy("burst", 100, Duration::from_secs(60)), r#""burst";q=100;w=60"#);
        assert_eq!(service_limit("default", 50, Some(Duration::from_secs(30))), r#""default";r=50;t=30"#);
        assert_eq!(service_limit("default", 0, None), r#""default";r=0"#);
    }

    #[test]
    fn times_round_up_to_whole_seconds() {
        assert_eq!(policy("a", 1, Duration::from_millis(5)), r#""a";q=1;w=1"#);
        assert_eq!(policy("a", 1, Duration::ZERO), r#""a";q=1;w=1"#, "a window is never zero");
        assert_eq!(service_limit("a", 1, Some(Duration::ZERO)), r#""a";r=1;t=0"#);
        assert_eq!(service_limit("a", 1, Some(Duration::from_nanos(1_000_000_001))), r#""a";r=1;t=2"#);
        assert_eq!(retry_after(Duration::from_nanos(1)), 1);
        assert_eq!(retry_after(Duration::from_millis(1_500)), 2);
    }

    #[test]
    fn a_name_cannot_break_out_of_its_string() {
        let name = "a\"b\\c\r\nSet-Cookie: ü";
        assert_eq!(service_limit(name, 1, None), r#""a\"b\\c__Set-Cookie: _";r=1"#);
    }

    #[test]
    fn numbers_stay_within_structured_fields() {
        let largest = r#""a";q=999999999999999;w=999999999999999"#;
        assert_eq!(policy("a", u64::MAX, Duration::MAX), largest);
    }
}
