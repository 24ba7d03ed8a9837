//! How changes roll out, as a control node's settings say it.
//!
//! ```yaml
//! rollout:
//!   gather: 10s                # a new leader begins nothing before: nodes come back meanwhile
//!   canaryDwell: 30s
//!   regionDwell: 30s
//!   patience: 15s
//!   canaries: 2
//!   rollback: {canaryDwell: 1s, regionDwell: 1s, patience: 1500ms, canaries: 2}
//! ```

use std::time::Duration;

use spillway_core::rollout::{Pace, RolloutSettings};
use spillway_core::units::{InvalidUnit, parse_duration};
use spillway_runtime::settings::{Field, Fields, FromNode, read_optional};

/// Nobody waits longer for one stage.
const LONGEST: Duration = Duration::from_secs(24 * 3_600);
const MOST_CANARIES: i64 = 100;

#[derive(Clone, Debug, PartialEq)]
pub struct DistributionSettings {
    pub rollout: RolloutSettings,
    /// How long after it was elected a leader begins no change. Default 10 s: nodes rest for 5 s at most.
    pub gather: Duration,
}

impl Default for DistributionSettings {
    fn default() -> Self {
        Self { rollout: RolloutSettings::default(), gather: Duration::from_secs(10) }
    }
}

impl FromNode for DistributionSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let default = Self::default();
        let fields = field.map();
        let gather = time(&fields, "gather", default.gather);
        let ordinary = pace(&fields, &default.rollout.ordinary);
        let rollback = read_optional(&fields, "rollback", |field| {
            let fields = field.map();
            let pace = pace(&fields, &default.rollout.rollback);
            fields.finish();
            pace
        });
        fields.finish();
        let rollback = rollback?.unwrap_or(default.rollout.rollback);
        let rollout = RolloutSettings { ordinary: ordinary?, rollback, ..default.rollout };
        Some(Self { rollout, gather: gather? })
    }
}

fn pace(fields: &Fields<'_>, default: &Pace) -> Option<Pace> {
    let canary_dwell = time(fields, "canaryDwell", default.canary_dwell);
    let region_dwell = time(fields, "regionDwell", default.region_dwell);
    let patience = time(fields, "patience", default.patience);
    let canaries = match fields.optional("canaries") {
        Some(field) => field.number(1..=MOST_CANARIES).and_then(|count| u32::try_from(count).ok()),
        None => Some(default.canaries),
    };
    Some(Pace { canary_dwell: canary_dwell?, region_dwell: region_dwell?, patience: patience?, canaries: canaries? })
}

fn time(fields: &Fields<'_>, name: &'static str, default: Duration) -> Option<Duration> {
    let Some(field) = fields.optional(name) else { return Some(default) };
    field.parse(|text| match parse_duration(text)? {
        time if time <= LONGEST => Ok(time),
        _ => Err(InvalidUnit("at most 24h")),
    })
}

#[cfg(test)]
mod tests {
    use spillway_runtime::settings::parse;

    use super::*;

    #[test]
    fn what_is_absent_has_its_default_and_all_else_is_read() {
        assert_eq!(parse::<DistributionSettings>("{}").unwrap(), DistributionSettings::default());
        let text = "gather: 1s\ncanaryDwell: 2s\npatience: 3s\nrollback: {regionDwell: 500ms, canaries: 5}";
        let settings: DistributionSettings = parse(text).unwrap();
        let RolloutSettings { ordinary, rollback, .. } = settings.rollout;
        let [one, two, three] = [1, 2, 3].map(Duration::from_secs);
        assert_eq!((settings.gather, ordinary.canary_dwell, ordinary.patience), (one, two, three));
        assert_eq!((rollback.region_dwell, rollback.canary_dwell, rollback.canaries), (one / 2, one, 5));
        for bad in ["canaries: 0", "canaryDwell: 25h", "patience: 5", "rollback: {gather: 1s}", "more: 1"] {
            assert!(parse::<DistributionSettings>(bad).is_err(), "{bad}");
        }
    }
}
