//! What a request wishes of the cache: its `Cache-Control` (RFC 9111, section 5.2.1).
//!
//! The rule: a wish can only narrow what the operator's settings allow. Unknown directives are ignored; a
//! number that cannot be read, and the strictest of several, count as the strictest wish (RFC 9111, 4.2.1).

use std::time::Duration;

/// A longer time is taken as this one: 2^31 seconds (RFC 9111, 1.2.2).
const LONGEST: Duration = Duration::from_secs(1 << 31);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Ask the model, whatever is stored.
    pub no_cache: bool,
    /// Do not store the answer.
    pub no_store: bool,
    /// Answer from what is stored, or with 504.
    pub only_if_cached: bool,
    /// The oldest answer that will do. Without `max_stale`, a stale one will not.
    pub max_age: Option<Duration>,
    /// How long an answer may have been stale; [`Duration::MAX`] is any time.
    pub max_stale: Option<Duration>,
    /// How long an answer must stay fresh.
    pub min_fresh: Option<Duration>,
}

impl Wish {
    /// Reads all `Cache-Control` values of a request, in any order.
    pub fn read<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut wish = Self::default();
        for directive in values.into_iter().flat_map(directives) {
            wish.add(directive);
        }
        wish
    }

    /// Whether the request has a call of its own, shared with no other.
    pub fn is_alone(&self) -> bool {
        self.no_cache || self.no_store
    }

    /// The wish of a tenant that may have one; no wish at all of another.
    pub fn if_allowed(self, allowed: bool) -> Self {
        if allowed { self } else { Self::default() }
    }

    fn add(&mut self, directive: &[u8]) {
        let equals = directive.iter().position(|byte| *byte == b'=');
        let (name, argument) = match equals.and_then(|at| directive.split_at_checked(at)) {
            Some((name, rest)) => (name, rest.get(1..).map(<[u8]>::trim_ascii)),
            None => (directive, None),
        };
        let name = name.trim_ascii();
        let is = |expected: &str| name.eq_ignore_ascii_case(expected.as_bytes());
        let or_zero = || argument.and_then(seconds).unwrap_or_default();
        if is("no-cache") {
            self.no_cache = true;
        } else if is("no-store") {
            self.no_store = true;
        } else if is("only-if-cached") {
            self.only_if_cached = true;
        } else if is("max-age") {
            least(&mut self.max_age, or_zero());
        } else if is("max-stale") {
            least(&mut self.max_stale, if argument.is_none() { Duration::MAX } else { or_zero() });
        } else if is("min-fresh") {
            let time = argument.and_then(seconds).unwrap_or(Duration::MAX);
            self.min_fresh = Some(self.min_fresh.map_or(time, |other| other.max(time)));
        }
    }
}

fn least(slot: &mut Option<Duration>, time: Duration) {
    *slot = Some(slot.map_or(time, |other| other.min(time)));
}

/// Splits a value at its commas, but for those within quotes.
fn directives(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (mut quoted, mut escaped) = (false, false);
    value.split(move |byte| {
        let ends = *byte == b',' && !quoted;
        match *byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ => {}
        }
        ends
    })
}

/// Delta-seconds, digits alone, bare or in quotes.
fn seconds(argument: &[u8]) -> Option<Duration> {
    let quoted = argument.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\""));
    let digits = quoted.unwrap_or(argument);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = std::str::from_utf8(digits).ok()?.parse().map_or(LONGEST, Duration::from_secs);
    Some(number.min(LONGEST))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(values: &[&str]) -> Wish {
        Wish::read(values.iter().map(|value| value.as_bytes()))
    }

    fn age(seconds: u64) -> Wish {
        Wish { max_age: Some(Duration::from_secs(seconds)), ..Wish::default() }
    }

    fn stale(time: Duration) -> Wish {
        Wish { max_stale: Some(time), ..Wish::default() }
    }

    fn min_fresh(time: Duration) -> Wish {
        Wish { min_fresh: Some(time), ..Wish::default() }
    }

    #[test]
    fn directives_are_read_in_any_case_and_form() {
        let no_cache = Wish { no_cache: true, ..Wish::default() };
        let both = Wish { no_cache: true, no_store: true, ..Wish::default() };
        for (values, wish) in [
            (&[][..], Wish::default()),
            (&["no-cache"], no_cache),
            (&["No-Cache"], no_cache),
            (&["no-cache=anything"], no_cache),
            (&["no-cache,no-store"], both),
            (&["no-cache", " , no-store ,"], both),
            (&["only-if-cached"], Wish { only_if_cached: true, ..Wish::default() }),
            (&["max-age=60"], age(60)),
            (&["MAX-AGE = 60"], age(60)),
            (&["max-age=\"60\""], age(60)),
            (&["max-stale"], stale(Duration::MAX)),
            (&["max-stale=5"], stale(Duration::from_secs(5))),
            (&["min-fresh=5"], min_fresh(Duration::from_secs(5))),
        ] {
            assert_eq!(read(values), wish, "{values:?}");
        }
    }

    #[test]
    fn unknown_directives_are_ignored_with_all_they_quote() {
        for value in
            ["", ",,,", "private", "no-cached", "xmax-age=0", "a=\"no-cache, max-age=0\"", "a=\"\\\", no-store\""]
        {
            assert_eq!(read(&[value]), Wish::default(), "{value}");
        }
        assert_eq!(read(&["a=\",\\\"\", max-age=7"]), age(7));
    }

    #[test]
    fn an_unreadable_number_is_the_strictest() {
        for argument in ["", "=", "=x", "=-1", "=+1", "=1.5", "=1 2", "=\"", "=\"\"", "=\"5", "=\u{662}"] {
            assert_eq!(read(&[&format!("max-age{argument}")]), age(0), "{argument}");
            assert_eq!(read(&[&format!("min-fresh{argument}")]), min_fresh(Duration::MAX), "{argument}");
            if !argument.is_empty() {
                assert_eq!(read(&[&format!("max-stale{argument}")]), stale(Duration::ZERO), "{argument}");
            }
        }
    }

    #[test]
    fn the_strictest_of_several_wins() {
        assert_eq!(read(&["max-age=9, max-age=3", "max-age=5"]), age(3));
        assert_eq!(read(&["max-stale", "max-stale=5"]), stale(Duration::from_secs(5)));
        assert_eq!(read(&["min-fresh=5, min-fresh=9, min-fresh=7"]), min_fresh(Duration::from_secs(9)));
    }

    #[test]
    fn numbers_beyond_2_to_31_are_taken_as_that() {
        for number in ["2147483649", "18446744073709551616", &"9".repeat(1_000)] {
            assert_eq!(read(&[&format!("max-age={number}")]), age(1 << 31), "{number}");
        }
        assert_eq!(read(&["max-age=00060"]), age(60));
    }

    #[test]
    fn who_may_not_wish_has_no_wish() {
        let wish = read(&["no-cache, no-store, max-age=0"]);
        assert_eq!(wish.if_allowed(true), wish);
        assert_eq!(wish.if_allowed(false), Wish::default());
    }

    proptest! {
        /// Values joined by a comma mean what they mean apart (RFC 9110, 5.3).
        #[test]
        fn joined_and_separate_headers_are_one(
            texts in proptest::collection::vec("(max-age=[0-9x]{0,3}|no-store|a=\"[,a]{0,3}\"|max-stale|[ a-z=]{0,4})", 0..6),
        ) {
            let separate: Vec<&str> = texts.iter().map(String::as_str).collect();
            prop_assert_eq!(read(&separate), read(&[&separate.join(",")]));
        }

        #[test]
        fn any_bytes_are_read(value in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = Wish::read([&value[..]]);
        }
    }
}
