//! The rules' figures.
//!
//! ```yaml
//! health:
//!   profile: standard          # or dev: back within a minute, the next region may go after a minute
//!   probes: {interval: 5s, timeout: 2s, failures: 3}
//!   slow: {over: 1%, for: 5m}  # of requests that take more than 100 ms
//!   errors: {over: 5%, for: 3m}
//!   samples: 200
//!   hold: 10m
//!   holdDown: 5m
//!   clean: 12
//!   step: 60s
//! ```

use std::time::Duration;

use spillway_core::health::{FleetSettings, ProbeSettings, SoftSettings, VerdictSettings};
use spillway_core::units::Percent;
use spillway_runtime::settings::{Field, Fields, FromNode, count, positive, read_optional};

/// How regions are judged. Each field's default is core's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HealthSettings {
    pub verdict: VerdictSettings,
    pub soft: SoftSettings,
    pub fleet: FleetSettings,
}

impl HealthSettings {
    /// `profile: dev`.
    pub fn dev() -> Self {
        Self { fleet: FleetSettings::dev(), ..Self::default() }
    }
}

impl FromNode for HealthSettings {
    fn from_node(field: &Field<'_>) -> Option<Self> {
        let fields = field.map();
        let profile = fields.optional("profile");
        let mut settings = match profile {
            Some(field) => field.choice(&[("standard", Self::default as fn() -> Self), ("dev", Self::dev)])?(),
            None => Self::default(),
        };
        let probes = read_optional(&fields, "probes", |field| read_probes(field, settings.verdict.clone()));
        let SoftSettings { slow, slow_for, errors, errors_for, samples, .. } = settings.soft;
        let slow = read_rule(&fields, "slow", (slow, slow_for));
        let errors = read_rule(&fields, "errors", (errors, errors_for));
        let samples = read_count(&fields, "samples", samples, 1_000_000);
        let hold = positive(&fields, "hold", settings.fleet.hold);
        let region = &settings.fleet.region;
        let hold_down = positive(&fields, "holdDown", region.hold_down);
        let clean = read_count(&fields, "clean", region.clean.into(), 1_000);
        let step_for = positive(&fields, "step", region.step_for);
        fields.finish();
        if let Some(verdict) = probes? {
            settings.verdict = verdict;
        }
        (settings.soft.slow, settings.soft.slow_for) = slow?;
        (settings.soft.errors, settings.soft.errors_for) = errors?;
        settings.soft.samples = samples?;
        settings.fleet.hold = hold?;
        let region = &mut settings.fleet.region;
        region.hold_down = hold_down?;
        region.longest_hold_down = region.longest_hold_down.max(region.hold_down);
        region.clean = u32::try_from(clean?).ok()?;
        region.step_for = step_for?;
        Some(settings)
    }
}

fn read_probes(field: &Field<'_>, mut settings: VerdictSettings) -> Option<VerdictSettings> {
    let fields = field.map();
    let probe = &mut settings.probe;
    let interval = positive(&fields, "interval", probe.interval);
    let timeout = positive(&fields, "timeout", probe.timeout);
    let failures = read_count(&fields, "failures", probe.failures.into(), 100);
    fields.finish();
    (probe.interval, probe.timeout) = (interval?, timeout?);
    probe.failures = u32::try_from(failures?).ok()?;
    probe.urgent = probe.urgent.min(probe.interval);
    probe.stale_after = ProbeSettings::stale_after(probe.interval);
    if probe.timeout > probe.interval {
        field.fault("the timeout is longer than the interval");
        return None;
    }
    Some(settings)
}

fn read_rule(fields: &Fields<'_>, name: &'static str, default: (f64, Duration)) -> Option<(f64, Duration)> {
    let read = |field: &Field<'_>| {
        let fields = field.map();
        let over = fields.optional("over").map_or(Some(default.0), |field| Some(field.parse(Percent::parse)?.ratio()));
        let time = positive(&fields, "for", default.1);
        fields.finish();
        Some((over?, time?))
    };
    read_optional(fields, name, read).map(|rule| rule.unwrap_or(default))
}

fn read_count(fields: &Fields<'_>, name: &'static str, default: u64, most: i64) -> Option<u64> {
    count(fields, name, usize::try_from(default).ok()?, most).and_then(|count| u64::try_from(count).ok())
}

#[cfg(test)]
mod tests {
    use spillway_runtime::settings::parse;

    use super::*;

    #[test]
    fn what_is_not_said_is_cores_default() {
        assert_eq!(parse::<HealthSettings>("{}").unwrap(), HealthSettings::default());
        assert_eq!(parse::<HealthSettings>("profile: dev").unwrap(), HealthSettings::dev());
        let text = "probes: {interval: 1s, timeout: 500ms, failures: 2}\nslow: {for: 1m}\nerrors: {over: 10%}\n\
                    samples: 50\nhold: 1m\nholdDown: 1h\nclean: 3\nstep: 10s";
        let settings = parse::<HealthSettings>(text).unwrap();
        let (probe, region) = (&settings.verdict.probe, &settings.fleet.region);
        assert_eq!((probe.interval, probe.failures), (Duration::from_secs(1), 2));
        assert_eq!((probe.urgent, probe.stale_after), (Duration::from_secs(1), Duration::from_secs(15)));
        assert_eq!((settings.soft.slow, settings.soft.slow_for), (0.01, Duration::from_secs(60)));
        assert_eq!((settings.soft.errors, settings.soft.samples), (0.1, 50));
        assert_eq!(
            (region.hold_down, region.longest_hold_down),
            (Duration::from_secs(3_600), Duration::from_secs(3_600))
        );
        assert_eq!((region.clean, region.step_for), (3, Duration::from_secs(10)));
    }

    /// Gateways and DNS nodes have no such settings: they go on to report every 5 s.
    #[test]
    fn nothing_is_stale_before_three_intervals_of_the_slowest_vantage() {
        for (interval, seconds) in [("100ms", 15), ("5s", 15), ("10s", 30)] {
            let text = format!("probes: {{interval: {interval}, timeout: 100ms}}");
            let settings = parse::<HealthSettings>(&text).unwrap();
            assert_eq!(settings.verdict.probe.stale_after, Duration::from_secs(seconds), "{interval}");
        }
    }

    #[test]
    fn each_wrong_figure_is_named() {
        for (text, fault) in [
            ("profile: fast", "profile"),
            ("probes: {interval: 1s, timeout: 2s}", "probes: the timeout is longer"),
            ("probes: {failures: 0}", "probes.failures"),
            ("slow: {over: 2}", "slow.over"),
            ("errors: {for: 0s}", "errors.for"),
            ("clean: 0", "clean"),
            ("ramp: 1m", "ramp"),
        ] {
            let faults = parse::<HealthSettings>(text).unwrap_err();
            assert!(faults.iter().any(|found| found.to_string().contains(fault)), "{text}: {faults:?}");
        }
    }
}
