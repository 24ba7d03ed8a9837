//! One gateway's state, as tables. What they are made from is `/config` of its admin port.

use std::net::SocketAddr;

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use super::super::Form;
use crate::admin::get;

/// As text or JSON: `ready`, `failing`, and `/config`.
pub fn shown(admin: SocketAddr, form: Form) -> Result<String> {
    let config = get(admin, "/config")?.good()?;
    if config.get("name").is_none() {
        bail!("what answers at {admin} is no gateway");
    }
    // Its status says the same as its text.
    let ready = get(admin, "/readyz")?.json();
    Ok(match form {
        Form::Json => {
            format!("{:#}\n", json!({ "ready": ready["ready"], "failing": ready["failing"], "config": config }))
        }
        Form::Text => tables(&config, &ready),
    })
}

fn tables(config: &Value, ready: &Value) -> String {
    let failing = members(&ready["failing"]).map(|(name, why)| format!("{name}: {}", word(why)));
    let failing: Vec<String> = failing.collect();
    let ready = if failing.is_empty() { "ready".to_owned() } else { format!("not ready ({})", failing.join("; ")) };
    let (name, region) = (word(&config["name"]), word(&config["region"]));
    let mut text =
        format!("gateway {name} of region {region}, snapshot {}: {ready}\n", word(&config["snapshotVersion"]));
    for part in [pods(config), models(config), limits(config), gates(config), degradation(config), cache(config)] {
        if !part.is_empty() {
            text.push('\n');
            text.push_str(&part);
        }
    }
    text
}

fn pods(config: &Value) -> String {
    let mut rows = Vec::new();
    for (pool, view) in members(&config["pods"]) {
        for (pod, view) in members(&view["pods"]) {
            let standing = match (view["why"].as_str(), view["forMs"].as_u64()) {
                (Some(why), Some(time)) => format!("{} ({why}, {time} ms)", word(&view["standing"])),
                (Some(why), None) => format!("{} ({why})", word(&view["standing"])),
                (None, _) => word(&view["standing"]),
            };
            let load = view["load"]["utilisation"].as_f64().map(|share| format!("{:.0} %", share * 100.0));
            let load = load.or_else(|| view["load"]["requests"].as_u64().map(|count| format!("{count} requests")));
            let breakers = members(&view["breakers"]).map(|(model, breaker)| {
                let time = breaker["forMs"].as_u64().map(|time| format!(" {time} ms")).unwrap_or_default();
                format!("{model} {}{time}", word(&breaker["state"]))
            });
            let breakers: Vec<String> = breakers.collect();
            rows.push(vec![
                format!("{pool}/{pod}"),
                word(&view["address"]),
                standing,
                word(&view["health"]),
                of(&view["inFlight"], &view["limit"]),
                format!("{:.0} %", view["failing"].as_f64().unwrap_or(0.0) * 100.0),
                load.unwrap_or_else(|| "-".into()),
                if breakers.is_empty() { "closed".to_owned() } else { breakers.join(", ") },
            ]);
        }
    }
    let panic = members(&config["pods"]).filter(|(_, view)| view["panic"] == true);
    let panic: String =
        panic.map(|(pool, _)| format!("pool {pool} is in panic: too many of its pods are out\n")).collect();
    table(&["POD", "ADDRESS", "STANDING", "CHECKS", "IN FLIGHT", "FAILING", "LOAD", "BREAKERS"], rows) + &panic
}

fn models(config: &Value) -> String {
    let mut rows = Vec::new();
    for (pool, view) in members(&config["pods"]) {
        for (model, lane) in members(&view["models"]) {
            let ring =
                if lane["policy"] == "ring" { format!("ring of {}", view["ringPods"]) } else { word(&lane["policy"]) };
            let milliseconds = |name: &str| format!("{:.1}", lane[name].as_f64().unwrap_or(0.0) / 1e3);
            rows.push(vec![
                model.clone(),
                pool.clone(),
                ring,
                word(&lane["hotEntities"]),
                format!("{:.0}", lane["budgetLeft"].as_f64().unwrap_or(0.0)),
                word(&lane["answers"]),
                milliseconds("p50Us"),
                milliseconds("p95Us"),
                milliseconds("p99Us"),
            ]);
        }
    }
    table(&["MODEL", "POOL", "ROUTING", "HOT", "RETRIES LEFT", "ANSWERS", "P50 MS", "P95 MS", "P99 MS"], rows)
}

fn limits(config: &Value) -> String {
    let admission = &config["admission"];
    let mut rows = Vec::new();
    for (tenant, view) in members(&admission["tenants"]) {
        for limit in items(&view["limits"]) {
            let named = |of: String, left: String, share: String| {
                let rate = format!("{}/s {}", word(&limit["rate"]), word(&limit["of"]));
                vec![tenant.clone(), word(&limit["name"]), word(&limit["per"]), of, left, rate, share]
            };
            let buckets = items(&limit["buckets"]);
            if buckets.is_empty() {
                rows.push(named("-".into(), format!("of {}", word(&limit["burst"])), "-".into()));
            }
            for bucket in buckets {
                let model = bucket["model"].as_str().unwrap_or("-").to_owned();
                let share =
                    bucket.get("share").map(|share| format!("{}/s {}", word(&share["rate"]), word(&share["standing"])));
                rows.push(named(
                    model,
                    of(&bucket["remaining"], &bucket["burst"]),
                    share.unwrap_or_else(|| "-".into()),
                ));
            }
        }
    }
    let text = table(&["TENANT", "LIMIT", "PER", "MODEL", "LEFT", "RATE", "SHARE"], rows);
    let keys = admission["entityKeys"].as_u64().filter(|keys| *keys > 0);
    text + &keys.map(|keys| format!("{keys} entities have a bucket of their own\n")).unwrap_or_default()
}

fn gates(config: &Value) -> String {
    let admission = &config["admission"];
    let rows = members(&admission["models"]).map(|(model, gate)| {
        vec![
            model.clone(),
            of(&gate["inFlight"], &gate["mostInFlight"]),
            of(&gate["waiting"], &gate["mostWaiting"]),
            format!("{:.1}", gate["usualUs"].as_f64().unwrap_or(0.0) / 1e3),
        ]
    });
    let models = table(&["GATE OF MODEL", "PLACES", "WAITING", "USUALLY MS"], rows.collect());
    let rows = members(&admission["pools"]).map(|(pool, gate)| {
        let lets_in = format!("{:.1} of 4", gate["letsIn"].as_f64().unwrap_or(0.0));
        vec![pool.clone(), of(&gate["inFlight"], &gate["room"]), word(&gate["waiting"]), lets_in]
    });
    models + &table(&["GATE OF POOL", "PLACES", "WAITING", "CLASSES LET IN"], rows.collect())
}

fn degradation(config: &Value) -> String {
    let rows = members(&config["degradation"])
        .map(|(model, at)| vec![model.clone(), word(&at["level"]), at["reason"].as_str().unwrap_or("-").to_owned()]);
    table(&["DEGRADATION", "LEVEL", "REASON"], rows.collect())
}

fn cache(config: &Value) -> String {
    let results = &config["results"];
    if results.is_null() {
        return String::new();
    }
    let region = match (results["region"]["connected"].as_bool(), results["region"]["rests"].as_bool()) {
        (None, _) => "no Redis",
        (Some(true), Some(true)) => "Redis failed, and rests",
        (Some(true), _) => "Redis connected",
        (Some(false), _) => "Redis away",
    };
    let hears = match (results["features"]["channel"] == true, results["features"]["hears"] == true) {
        (false, _) => "have no channel",
        (true, true) => "are heard",
        (true, false) => "are not heard",
    };
    let mut text = format!(
        "cache: {} results, {}, calls under way: {}; {region}; feature changes {hears}\n",
        word(&results["entries"]),
        of(&results["bytes"], &results["capacity"]) + " bytes",
        word(&results["flights"]),
    );
    let rows = items(&results["models"]).iter().map(|model| {
        let call = format!("{:.1}", model["callUs"].as_f64().unwrap_or(0.0) / 1e3);
        vec![word(&model["model"]), of(&model["off"], &model["tenants"]), call]
    });
    text += &table(&["CACHED MODEL", "OFF FOR TENANTS", "CALL MS"], rows.collect());
    let rows = items(&results["tenants"]).iter().map(|tenant| vec![word(&tenant["tenant"]), word(&tenant["bytes"])]);
    text + &table(&["CACHE OF TENANT", "BYTES"], rows.collect())
}

/// Columns as wide as what is in them; nothing without rows.
fn table(heads: &[&str], rows: Vec<Vec<String>>) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let all = std::iter::once(heads.iter().map(ToString::to_string).collect()).chain(rows);
    let all: Vec<Vec<String>> = all.collect();
    let width = |column: usize| {
        all.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        line.trim_end().to_owned() + "\n"
    };
    all.iter().map(line).collect()
}

fn of(count: &Value, whole: &Value) -> String {
    format!("{} of {}", word(count), word(whole))
}

fn word(value: &Value) -> String {
    match value {
        Value::Null => "?".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}
