//! The form of a result in Redis.
//!
//! The rule: what Redis holds is a stranger's word. A value of another version, with another checksum or
//! for another key is no result.
//!
//! ```text
//! 1   version: 1
//! 16  sequence: the feature changes that it knows of, decimal; 0 where it depends on no row
//! 16  mark: the last purge that it knows of, decimal
//! 8   checksum: XXH3 of what is behind it, seeded by that of what is before it
//! 8   milliseconds from when the model made it to the end of its freshness
//! 8   age of its features when it was made, in milliseconds; the least number where it says none
//! 1   length of the model's version, and the version
//! 4   length of the key's material, and the material
//!     the `ModelInferResponse` without its id
//! ```
//! Numbers are little-endian; the two decimal ones are read by `look.lua` too. There is no time of day in
//! it: how long it is fresh is what Redis keeps it for, so that no clocks are compared.

use bytes::{Buf, Bytes};
use http::HeaderValue;
use std::time::Duration;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::entry::{Entry, Made};

/// Longer values are not put into Redis.
pub const MOST: usize = 64 << 10;

const VERSION: u8 = 1;
const DECIMAL: usize = 16;
const HEAD: usize = 1 + 2 * DECIMAL;
const NO_AGE: i64 = i64::MIN;

/// A result out of Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub sequence: u64,
    pub mark: u64,
    /// From when it was made to the end of its freshness.
    pub whole: Duration,
    pub made: Made,
    pub material: Bytes,
    pub message: Bytes,
}

/// `None`: it is too long, or does not say its version.
pub fn encode(entry: &Entry, sequence: u64) -> Option<Bytes> {
    let version = entry.made.model_version.as_ref()?.as_bytes();
    let material = &entry.key.material;
    let length = HEAD + 3 * 8 + 1 + version.len() + 4 + material.len() + entry.message.len();
    if length > MOST {
        return None;
    }
    let mut value = Vec::with_capacity(length);
    value.push(VERSION);
    for number in [sequence, entry.mark] {
        value.extend_from_slice(decimal(number)?.as_bytes());
    }
    value.extend_from_slice(&[0; 8]);
    let whole = entry.times.fresh_until.saturating_sub(entry.times.stored);
    value.extend_from_slice(&u64::try_from(whole.as_millis()).ok()?.to_le_bytes());
    value.extend_from_slice(&entry.made.feature_age_ms.unwrap_or(NO_AGE).to_le_bytes());
    value.push(u8::try_from(version.len()).ok()?);
    value.extend_from_slice(version);
    value.extend_from_slice(&u32::try_from(material.len()).ok()?.to_le_bytes());
    value.extend_from_slice(material);
    value.extend_from_slice(&entry.message);
    let sum = checksum(&value)?;
    value.get_mut(HEAD..HEAD + 8)?.copy_from_slice(&sum.to_le_bytes());
    Some(value.into())
}

pub fn decode(value: &Bytes) -> Option<Stored> {
    let mut rest = value.clone();
    if value.len() > MOST || rest.try_get_u8().ok()? != VERSION {
        return None;
    }
    let mut number = || -> Option<u64> {
        let digits = take(&mut rest, DECIMAL)?;
        if !digits.iter().all(u8::is_ascii_digit) {
            return None;
        }
        std::str::from_utf8(&digits).ok()?.parse().ok()
    };
    let (sequence, mark) = (number()?, number()?);
    if rest.try_get_u64_le().ok()? != checksum(value)? {
        return None;
    }
    let whole = Duration::from_millis(rest.try_get_u64_le().ok()?);
    let feature_age_ms = Some(rest.try_get_i64_le().ok()?).filter(|age| *age != NO_AGE);
    let length = rest.try_get_u8().ok()?;
    let version = HeaderValue::from_maybe_shared(take(&mut rest, length.into())?).ok()?;
    let length = usize::try_from(rest.try_get_u32_le().ok()?).ok()?;
    let material = take(&mut rest, length)?;
    let made = Made { model_version: Some(version), degraded: None, feature_age_ms, region: None };
    Some(Stored { sequence, mark, whole, made, material, message: rest })
}

/// A number as `look.lua` compares it; `None` above what 16 digits, and a Lua number, can say.
fn decimal(number: u64) -> Option<String> {
    (number <= 1 << 53).then(|| format!("{number:016}"))
}

fn checksum(value: &[u8]) -> Option<u64> {
    let (head, rest) = value.split_at_checked(HEAD)?;
    Some(xxh3_64_with_seed(rest.get(8..)?, xxh3_64(head)))
}

fn take(from: &mut Bytes, length: usize) -> Option<Bytes> {
    (length <= from.len()).then(|| from.split_to(length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::entry;

    fn some() -> Entry {
        let mut entry = entry("k", Bytes::from_static(b"the answer"));
        entry.mark = 1_700_000_000_000_000;
        entry.made.feature_age_ms = Some(-3);
        entry
    }

    #[test]
    fn what_is_put_in_comes_out() {
        let entry = some();
        let stored = decode(&encode(&entry, 77).unwrap()).unwrap();
        assert_eq!((stored.sequence, stored.mark), (77, entry.mark));
        assert_eq!(stored.whole, entry.times.fresh_until - entry.times.stored);
        assert_eq!((&stored.material, &stored.message), (&entry.key.material, &entry.message));
        assert_eq!(stored.made, entry.made);
        let silent = Entry { made: Made { feature_age_ms: None, ..entry.made.clone() }, ..some() };
        assert_eq!(decode(&encode(&silent, 0).unwrap()).unwrap().made.feature_age_ms, None);
    }

    #[test]
    fn wrong_bytes_are_no_result() {
        let value = encode(&some(), 77).unwrap();
        for at in 0..value.len() {
            let mut changed = value.to_vec();
            changed[at] ^= 1;
            assert_eq!(decode(&changed.into()), None, "byte {at}");
            assert_eq!(decode(&value.slice(..at)), None, "cut at {at}");
        }
        for garbage in [&b""[..], b"1", b"garbage", &[1; 33], &[1; 200]] {
            assert_eq!(decode(&Bytes::from_static(garbage)), None);
        }
        assert_eq!(decode(&[&value[..], b"more"].concat().into()), None);
    }

    #[test]
    fn what_is_too_long_or_cannot_be_compared_is_not_put_in() {
        let long = Entry { message: vec![7; MOST].into(), ..some() };
        assert_eq!(encode(&long, 1), None);
        assert_eq!(encode(&some(), u64::MAX), None);
        let silent = Entry { made: Made::default(), ..some() };
        assert_eq!(encode(&silent, 1), None);
    }
}
