//! The value of the key `plan`: the plan in force, and what the next leader must know of each region.

use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use spillway_core::health::{Cause, Phase, Record, Records, Why};
use spillway_core::units::Name;
use spillway_proto::control::SealedPlan;

/// As it is written. Fields are never given another meaning: leaders of two versions read each other's.
#[derive(Clone, PartialEq, Message)]
struct Encoded {
    #[prost(message, optional, tag = "1")]
    plan: Option<SealedPlan>,
    #[prost(message, repeated, tag = "2")]
    regions: Vec<EncodedRegion>,
    #[prost(uint64, tag = "3")]
    hold_ms: u64,
}

#[derive(Clone, PartialEq, Message)]
struct EncodedRegion {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    phase: String,
    /// Of the ramp.
    #[prost(uint32, tag = "3")]
    percent: u32,
    #[prost(string, tag = "4")]
    why: String,
    #[prost(uint64, tag = "5")]
    lasted_ms: u64,
    #[prost(uint32, tag = "6")]
    falls: u32,
}

/// A plan and its records.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored {
    pub(super) plan: SealedPlan,
    pub(super) records: Records,
}

const WHYS: [(Why, &str); 13] = [
    (Why::Planned, "planned"),
    (Why::Doubted, "doubted"),
    (Why::Verdict(Cause::Unreachable), "unreachable"),
    (Why::Verdict(Cause::Failing), "failing"),
    (Why::Verdict(Cause::Slow), "slow"),
    (Why::Calm, "calm"),
    (Why::HeldDown, "held-down"),
    (Why::Clean, "clean"),
    (Why::Climbed, "climbed"),
    (Why::Needed, "needed"),
    (Why::Last, "last"),
    (Why::Drained, "drained"),
    (Why::ForcedIn, "forced-in"),
];

pub(super) fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Up => "up",
        Phase::Suspect => "suspect",
        Phase::Down => "down",
        Phase::Probation => "probation",
        Phase::Ramp { .. } => "ramp",
    }
}

impl Stored {
    pub(super) fn encode(&self) -> Bytes {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let region = |(name, record): (&Name, &Record)| EncodedRegion {
            name: name.to_string(),
            phase: phase_word(record.phase).to_owned(),
            percent: if let Phase::Ramp { percent } = record.phase { percent.into() } else { 0 },
            why: WHYS.iter().find(|(why, _)| *why == record.why).map_or("", |(_, word)| word).to_owned(),
            lasted_ms: millis(record.lasted),
            falls: record.falls,
        };
        let regions = self.records.regions.iter().map(region).collect();
        let encoded = Encoded { plan: Some(self.plan.clone()), regions, hold_ms: millis(self.records.hold) };
        encoded.encode_to_vec().into()
    }

    /// None if it is unreadable as a whole. A region that cannot be read is new to the next leader.
    pub(super) fn decode(bytes: Bytes) -> Option<Self> {
        let Encoded { plan, regions, hold_ms } = Encoded::decode(bytes).ok()?;
        let regions = regions.iter().filter_map(read).collect();
        Some(Self { plan: plan?, records: Records { regions, hold: Duration::from_millis(hold_ms) } })
    }
}

fn read(region: &EncodedRegion) -> Option<(Name, Record)> {
    let phase = match region.phase.as_str() {
        "up" => Phase::Up,
        "suspect" => Phase::Suspect,
        "down" => Phase::Down,
        "probation" => Phase::Probation,
        "ramp" => Phase::Ramp { percent: u8::try_from(region.percent).ok()? },
        _ => return None,
    };
    let (why, _) = WHYS.into_iter().find(|(_, word)| *word == region.why)?;
    let record = Record { phase, why, lasted: Duration::from_millis(region.lasted_ms), falls: region.falls };
    Some((Name::parse(&region.name).ok()?, record))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> impl Strategy<Value = Record> {
        let phase = prop_oneof![
            Just(Phase::Up),
            Just(Phase::Suspect),
            Just(Phase::Down),
            Just(Phase::Probation),
            (0..=100_u8).prop_map(|percent| Phase::Ramp { percent }),
        ];
        (phase, 0..WHYS.len(), any::<u32>(), any::<u32>()).prop_map(|(phase, why, lasted, falls)| Record {
            phase,
            why: WHYS[why].0,
            lasted: Duration::from_millis(lasted.into()),
            falls,
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(records in proptest::collection::vec(record(), 0..5), hold: u32, plan: Vec<u8>) {
            let name = |index: usize| Name::parse(&format!("r{index}")).unwrap();
            let regions = records.into_iter().enumerate().map(|(index, record)| (name(index), record)).collect();
            let stored = Stored {
                plan: SealedPlan { plan: plan.into(), sha256: Bytes::new() },
                records: Records { regions, hold: Duration::from_millis(hold.into()) },
            };
            prop_assert_eq!(Stored::decode(stored.encode()), Some(stored));
        }

        #[test]
        fn no_bytes_are_a_panic(bytes: Vec<u8>) {
            let _ = Stored::decode(bytes.into());
        }
    }

    #[test]
    fn every_reason_has_one_word() {
        let words: std::collections::BTreeSet<&str> = WHYS.iter().map(|(_, word)| *word).collect();
        assert_eq!(words.len(), WHYS.len());
    }
}
