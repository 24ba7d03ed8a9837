use proptest::prelude::*;

use super::*;
use crate::feature::key::RowKey;
use crate::resource::{Consistency, FieldDefinition, Scope};
use std::collections::HashMap;
use std::time::Duration;

const NOW: i64 = 1_800_000_000_000_000;

fn group(version: u16, fields: &[(&str, Datatype)]) -> FeatureGroup {
    let field = |(name, datatype): &(&str, Datatype)| FieldDefinition {
        name: Name::parse(name).unwrap(),
        datatype: *datatype,
        default: None,
    };
    FeatureGroup {
        scope: Scope::Shared,
        schema_version: version,
        fields: fields.iter().map(field).collect(),
        fresh_for: Duration::from_secs(60),
        retain_for: Duration::from_secs(3_600),
        consistency: Consistency::LocalOne,
    }
}

fn all_datatypes() -> Vec<(&'static str, Datatype)> {
    let fixed = |datatype: &Datatype| !matches!(datatype, Datatype::Bytes | Datatype::Fp16 | Datatype::Bf16);
    Datatype::ALL.into_iter().filter(fixed).map(|datatype| (datatype.name(), datatype)).collect()
}

fn value_of(datatype: Datatype, seed: u64) -> FieldValue {
    match datatype {
        Datatype::Bool => FieldValue::Bool(seed % 2 == 1),
        Datatype::Int8 => FieldValue::Int(i64::from(seed as i8)),
        Datatype::Int16 => FieldValue::Int(i64::from(seed as i16)),
        Datatype::Int32 => FieldValue::Int(i64::from(seed as i32)),
        Datatype::Int64 => FieldValue::Int(seed as i64),
        Datatype::Uint8 => FieldValue::Uint(u64::from(seed as u8)),
        Datatype::Uint16 => FieldValue::Uint(u64::from(seed as u16)),
        Datatype::Uint32 => FieldValue::Uint(u64::from(seed as u32)),
        Datatype::Uint64 => FieldValue::Uint(seed),
        Datatype::Fp32 => FieldValue::Float(f64::from(seed as f32)),
        _ => FieldValue::Float(seed as f64 / 3.0),
    }
}

#[test]
fn the_stored_form_is_fixed() {
    let layout = Layout::of(&group(2, &[("a", Datatype::Int16), ("b", Datatype::Fp32)]));
    let row = layout.encode(NOW, &[Some(FieldValue::Int(-2)), None]).unwrap();
    let mut expected = vec![0xF1, 0, 2];
    expected.extend(layout.fingerprint.to_be_bytes());
    expected.extend(NOW.to_be_bytes());
    expected.extend([0b10, 0xFE, 0xFF, 0, 0, 0, 0]);
    assert_eq!(row.bytes()[..], expected);
    // Python: xxhash.xxh3_64_intdigest over the version (u16 LE), then name and datatype behind u64 LE lengths.
    assert_eq!(layout.fingerprint, 0x379B_A80D_391D_E55D);
}

#[test]
fn the_fingerprint_tells_names_types_order_and_version_apart() {
    let base = Layout::of(&group(1, &[("ab", Datatype::Int8), ("c", Datatype::Int8)])).fingerprint;
    for other in [
        group(2, &[("ab", Datatype::Int8), ("c", Datatype::Int8)]),
        group(1, &[("c", Datatype::Int8), ("ab", Datatype::Int8)]),
        group(1, &[("a", Datatype::Int8), ("bc", Datatype::Int8)]),
        group(1, &[("ab", Datatype::Uint8), ("c", Datatype::Int8)]),
        group(1, &[("ab", Datatype::Int8)]),
    ] {
        assert_ne!(Layout::of(&other).fingerprint, base);
    }
}

#[test]
fn bytes_of_another_schema_length_or_format_are_missing_with_a_reason() {
    let layout = Layout::of(&group(1, &[("a", Datatype::Int32)]));
    let newer = Layout::of(&group(2, &[("a", Datatype::Int32)]));
    let row = layout.encode(NOW, &[Some(FieldValue::Int(7))]).unwrap();
    let bytes = row.bytes().clone();
    assert_eq!(layout.decode(bytes.clone(), NOW), Ok(Stored::Row(row.clone())));
    assert_eq!(newer.decode(bytes.clone(), NOW), Err(Missing::Schema));
    assert_eq!(newer.field(&row, 0), None, "a row is read by its own layout only");
    assert_eq!(layout.decode(bytes.slice(..bytes.len() - 1), NOW), Err(Missing::Length));
    assert_eq!(layout.decode([&bytes[..], b"x"].concat().into(), NOW), Err(Missing::Length));
    assert_eq!(layout.decode(Bytes::new(), NOW), Err(Missing::Length));
    assert_eq!(layout.decode(Bytes::from(vec![0x7F; 64]), NOW), Err(Missing::Event));
    assert_eq!(layout.decode([b"\x00", &bytes[1..]].concat().into(), NOW), Err(Missing::Format));
    assert_eq!(layout.decode(bytes, NOW - 6_000_000), Err(Missing::Event), "from the future");
}

#[test]
fn values_that_do_not_fit_are_refused() {
    for (datatype, value) in [
        (Datatype::Int8, FieldValue::Int(128)),
        (Datatype::Uint8, FieldValue::Int(-1)),
        (Datatype::Int64, FieldValue::Uint(u64::MAX)),
        (Datatype::Fp32, FieldValue::Float(1e39)),
        (Datatype::Fp32, FieldValue::Int((1 << 24) + 1)),
        (Datatype::Fp64, FieldValue::Float(f64::NAN)),
        (Datatype::Fp64, FieldValue::Bool(true)),
        (Datatype::Bool, FieldValue::Int(1)),
        (Datatype::Int32, FieldValue::Float(1.0)),
        (Datatype::Bytes, FieldValue::Int(1)),
    ] {
        let layout = Layout::of(&group(1, &[("a", datatype)]));
        assert!(layout.encode(NOW, &[Some(value)]).is_err(), "{datatype} {value:?}");
    }
    let layout = Layout::of(&group(1, &[("a", Datatype::Fp64)]));
    assert!(layout.encode(NOW, &[]).is_err());
    assert!(layout.encode(NOW, &[Some(FieldValue::Int(3))]).is_ok());
}

/// One event of an operation sequence: entity, time, value or deletion.
fn events() -> impl Strategy<Value = Vec<(u8, i64, Option<i8>)>> {
    proptest::collection::vec((0_u8..3, 1_i64..6, proptest::option::of(any::<i8>())), 1..24)
}

proptest! {
    #[test]
    fn rows_round_trip(seeds in proptest::collection::vec(proptest::option::of(any::<u64>()), 11)) {
        let fields = all_datatypes();
        prop_assert_eq!(fields.len(), 11);
        let layout = Layout::of(&group(3, &fields));
        let values: Vec<_> =
            fields.iter().zip(&seeds).map(|((_, datatype), seed)| seed.map(|seed| value_of(*datatype, seed))).collect();
        let row = layout.encode(NOW, &values).unwrap();
        let read = layout.decode(row.bytes().clone(), NOW).unwrap();
        prop_assert_eq!(&read, &Stored::Row(row.clone()));
        prop_assert_eq!(row.event_us(), NOW);
        for (index, value) in values.iter().enumerate() {
            prop_assert_eq!(layout.value(&row, index), *value);
        }
    }

    #[test]
    fn random_bytes_never_panic_and_never_become_values(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let layout = Layout::of(&group(1, &all_datatypes()));
        prop_assert!(!matches!(layout.decode(bytes.into(), NOW), Ok(Stored::Row(_))), "a random fingerprint never fits");
    }

    #[test]
    fn damaged_headers_never_panic(at in 0_usize..19, byte in any::<u8>(), cut in 0_usize..80) {
        let layout = Layout::of(&group(1, &all_datatypes()));
        let mut bytes = layout.encode(NOW, &[None; 11]).unwrap().bytes().to_vec();
        bytes[at] = byte;
        bytes.truncate(cut);
        if let Ok(Stored::Row(row)) = layout.decode(bytes.into(), NOW) {
            for index in 0..12 {
                prop_assert_eq!(layout.value(&row, index), None);
            }
        }
    }

    #[test]
    fn the_last_event_wins_under_any_order_and_duplication(
        (events, shuffled) in events().prop_flat_map(|events| {
            let twice: Vec<_> = events.iter().chain(&events).copied().collect();
            (Just(events), Just(twice).prop_shuffle())
        }),
    ) {
        let layout = Layout::of(&group(1, &[("a", Datatype::Int8)]));
        let site = Name::parse("site").unwrap();
        let stored = |time: i64, value: Option<i8>| match value {
            Some(value) => Stored::Row(layout.encode(time, &[Some(FieldValue::Int(value.into()))]).unwrap()),
            None => Stored::Deleted { event_us: time },
        };
        let replay = |events: &[(u8, i64, Option<i8>)]| {
            let mut tier: HashMap<RowKey, Stored> = HashMap::new();
            for (entity, time, value) in events {
                let key = RowKey::new(Scope::Shared, "", &[*entity], &site).unwrap();
                let new = stored(*time, *value);
                if tier.get(&key).is_none_or(|old| new.supersedes(old)) {
                    tier.insert(key, new);
                }
            }
            tier
        };
        let end = replay(&events);
        prop_assert_eq!(&end, &replay(&shuffled));
        for (entity, time, _) in events {
            let key = RowKey::new(Scope::Shared, "", &[entity], &site).unwrap();
            prop_assert!(end[&key].event_us() >= time);
        }
    }
}
