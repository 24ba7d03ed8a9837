//! `spillway explain`: what a request would meet at a live gateway, and why. The gateway does not send it, and
//! changes nothing.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Form;
use crate::admin::{Post, Target, encoded, post};

/// Bytes of a request: no gateway takes more.
const MOST: u64 = 64 << 20;
/// Headers that belong to the exchange with the admin port.
const OURS: [&str; 6] = ["host", "content-length", "transfer-encoding", "connection", "expect", "x-spillway-admin"];

#[derive(clap::Args)]
#[command(
    disable_version_flag = true,
    after_help = "Example:\n  spillway explain --admin 127.0.0.1:9901 --tenant acme --client web --model phishing request.json\n\n\
    Each line is one step of the request: what is decided, and why. A request that would be refused is explained, too: \
    the exit code says only whether there is an explanation."
)]
pub struct Arguments {
    /// The REST request's body; `-`, or nothing, for standard input
    #[arg(value_name = "FILE")]
    request: Option<PathBuf>,
    /// Who would ask, as its certificate says: spiffe://TRUST-DOMAIN/tenant/NAME/client/NAME
    #[arg(long = "as", value_name = "SPIFFE_ID", required_unless_present = "tenant", conflicts_with = "tenant")]
    id: Option<String>,
    /// Instead of --as: its tenant, in the gateway's own trust domain
    #[arg(long, value_name = "NAME", requires = "client")]
    tenant: Option<String>,
    /// The client's name within its tenant
    #[arg(long, value_name = "NAME", requires = "tenant")]
    client: Option<String>,
    /// The model that it would ask
    #[arg(long, value_name = "NAME")]
    model: String,
    /// The model's version; else its default
    #[arg(long, value_name = "NAME")]
    version: Option<String>,
    /// Where it would come from, for models whose pods are found by the client's address
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,
    /// A header of the request, such as 'x-request-timeout-ms: 50'
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// text: for people; json: as the gateway says it
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Form,
    #[command(flatten)]
    gateway: Target,
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("expected 'name: value'")?;
    let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if name.is_empty() || !name.bytes().all(plain) {
        return Err("that is no header's name".into());
    }
    if OURS.contains(&name.as_str()) {
        return Err(format!("'{name}' belongs to the exchange with the admin port"));
    }
    if value.chars().any(char::is_control) {
        return Err("the value has control characters".into());
    }
    Ok((name, value.to_owned()))
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let body = read(arguments)?;
    let address = arguments.address.map(|address| address.to_string());
    let asked = [
        ("as", arguments.id.as_ref()),
        ("tenant", arguments.tenant.as_ref()),
        ("client", arguments.client.as_ref()),
        ("model", Some(&arguments.model)),
        ("version", arguments.version.as_ref()),
        ("address", address.as_ref()),
    ];
    let query: Vec<String> =
        asked.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", encoded(value?)))).collect();
    let path = format!("/explain?{}", query.join("&"));
    let asked = Post { word: "explain", headers: &arguments.headers, body: &body };
    let told = post(arguments.gateway.address()?, &path, &asked)?.good()?;
    if arguments.output == Form::Json {
        println!("{told:#}");
    } else {
        for (step, text) in lines(&told) {
            println!("{step:<13}{text}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn read(arguments: &Arguments) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    let file = arguments.request.as_ref().filter(|path| path.as_os_str() != "-");
    match file {
        Some(path) => {
            let shown = path.display();
            let file = File::open(path).with_context(|| format!("{shown}"))?;
            file.take(MOST + 1).read_to_end(&mut body).with_context(|| format!("{shown}"))?;
        }
        None if arguments.request.is_none() && std::io::stdin().is_terminal() => {
            bail!("which request? name a file with its body, or give it on standard input");
        }
        None => {
            std::io::stdin().take(MOST + 1).read_to_end(&mut body).context("standard input")?;
        }
    }
    if body.len() as u64 > MOST {
        bail!("the request has more than {MOST} bytes; no gateway takes it");
    }
    Ok(body)
}

/// Says a part of an explanation.
type Words = fn(&Value) -> String;

/// Each step in a line, the outcome first. What a gateway does not tell is left out.
fn lines(told: &Value) -> Vec<(&'static str, String)> {
    let steps: [(&'static str, Words); 10] = [
        ("caller", caller),
        ("access", access),
        ("model", |model| format!("{}, version {}", text(&model["name"]), text(&model["version"]))),
        ("request", request),
        ("class", class),
        ("deadline", deadline),
        ("cache", cache),
        ("degradation", degradation),
        ("gate", gate),
        ("pod", pod),
    ];
    let mut lines = vec![("outcome", outcome(&told["outcome"]))];
    lines.push((
        "gateway",
        format!("{} of region {}, snapshot {}", text(&told["gateway"]), text(&told["region"]), told["snapshot"]),
    ));
    for (step, words) in steps {
        if let Some(part) = told.get(step) {
            lines.push((step, words(part)));
        }
        if step == "class" {
            lines.extend(told["limits"].as_array().into_iter().flatten().map(|told| ("limit", limit(told))));
        }
    }
    if let Some(peers) = told.get("peers") {
        lines.push(("spill-over", spill_over(peers)));
        lines.extend(peers["regions"].as_array().into_iter().flatten().map(|peer| ("peer", self::peer(peer))));
    }
    lines
}

/// Where it would go if this region could not answer it.
fn spill_over(peers: &Value) -> String {
    let to: Vec<&str> = peers["to"].as_array().into_iter().flatten().map(text).collect();
    let may = match &peers["mayLeave"] {
        Value::Bool(true) => "the tenant's mayLeaveRegion: true".to_owned(),
        Value::Array(regions) => {
            format!("the tenant's mayLeaveRegion: {}", regions.iter().map(text).collect::<Vec<_>>().join(", "))
        }
        _ => "the tenant's mayLeaveRegion: false".to_owned(),
    };
    let why = match text(&peers["none"]) {
        "alone" => "no other region has gateways",
        "residence" => "the tenant may leave to none of the others",
        "not-served" => "no region that the tenant may go to serves the model",
        "unhealthy" => "no such region takes traffic and can be reached",
        "full" => "no such region has room",
        "deadline" => "no such region could answer in time",
        other => other,
    };
    match (&to[..], peers["cause"].as_str()) {
        ([], _) => format!("to none: {why}; {may}"),
        ([first, then @ ..], cause) => {
            let then = if then.is_empty() { String::new() } else { format!(", then {}", then.join(", ")) };
            let when = cause.map_or_else(|| "would go".to_owned(), |cause| format!("goes now ({cause})"));
            format!("{when} to {first}{then}, one hop over mTLS with the client's identity signed; {may}")
        }
    }
}

fn peer(peer: &Value) -> String {
    let fit = match peer["unfit"].as_str() {
        None => "may have it".to_owned(),
        Some("residence") => "not: the tenant may not leave to it".to_owned(),
        Some("not-served") => "not: no pool there serves the model".to_owned(),
        Some("unhealthy") => "not: it takes no traffic, or cannot be reached".to_owned(),
        Some("full") => "not: it has no room".to_owned(),
        Some("deadline") => "not: too far for the deadline".to_owned(),
        Some(other) => format!("not: {other}"),
    };
    let away = peer["roundTripUs"].as_u64().map_or_else(|| "unknown way".to_owned(), |us| format!("{} away", time(us)));
    let room = peer["headroom"]
        .as_f64()
        .map_or_else(|| "room not known".to_owned(), |room| format!("room for {:.0}/s", room.max(0.0)));
    format!(
        "{}: {fit}; cost {}, {away}, {room}, {} of {} gateways to be reached",
        text(&peer["region"]),
        peer["cost"],
        peer["reachable"],
        peer["gateways"]
    )
}

fn outcome(outcome: &Value) -> String {
    let level = outcome["level"].as_u64().map(|level| format!(", degraded to level {level}")).unwrap_or_default();
    let why = text(&outcome["why"]);
    match text(&outcome["from"]) {
        "refused" => format!("refused: {} {}: {why}", outcome["status"], text(&outcome["code"])),
        "cache" => format!("answered from the cache: {why}"),
        "call" => format!("answered by a call that is under way: {why}"),
        "gateway" => format!("answered by the gateway itself{level}: {why}"),
        "peer" => format!("sent to another region{level}: {why}"),
        _ => format!("sent{level}: {why}"),
    }
}

fn caller(caller: &Value) -> String {
    match caller["tenant"].as_str() {
        Some(tenant) => {
            format!("client {} of tenant {tenant}, {}", text(&caller["client"]), text(&caller["id"]))
        }
        None => text(&caller["id"]).to_owned(),
    }
}

fn access(access: &Value) -> String {
    let others = access["others"].as_array().into_iter().flatten().map(|other| {
        let unfit: Vec<&str> = other["unfit"].as_array().into_iter().flatten().map(text).collect();
        format!("{} (not for this {})", text(&other["policy"]), unfit.join(", "))
    });
    if access["allowed"] == true {
        let by: Vec<&str> = access["by"].as_array().into_iter().flatten().map(text).collect();
        return format!("allowed by policy {}", by.join(", "));
    }
    let others: Vec<String> = others.collect();
    match (others.is_empty(), access["leftOut"].as_u64().unwrap_or(0)) {
        (true, _) => "denied: no policy names the tenant".to_owned(),
        (false, 0) => format!("denied: none that names the tenant fits: {}", others.join("; ")),
        (false, more) => format!("denied: none that names the tenant fits: {}; and {more} more", others.join("; ")),
    }
}

fn request(request: &Value) -> String {
    let about = match request["entities"].as_u64() {
        Some(0) => "no entity".to_owned(),
        Some(1) => "1 entity".to_owned(),
        _ => format!("{} entities", request["entities"]),
    };
    format!("about {about}, {} bytes of inputs", request["inputBytes"])
}

fn class(class: &Value) -> String {
    let from = if class["from"] == "priority" { "the request's priority" } else { "the tenant's default" };
    format!("{}: {from}; the tenant may have up to {}", text(&class["class"]), text(&class["highest"]))
}

fn limit(limit: &Value) -> String {
    let cost = &limit["cost"];
    let says = if limit["passes"] == true {
        format!("passes at {cost}, {} left then", limit["remaining"])
    } else if let Some(after) = limit["retryAfterMs"].as_u64() {
        format!("refuses {cost}, {} left; again in {}", limit["remaining"], time(after.saturating_mul(1_000)))
    } else {
        format!("refuses {cost}: more than it ever holds")
    };
    let share = limit.get("share").map(|share| {
        let standing = text(&share["standing"]);
        format!("; this gateway's share of the region's quota: {}/s ({standing})", share["rate"])
    });
    format!("{} (per {}): {says}{}", text(&limit["limit"]), text(&limit["per"]), share.unwrap_or_default())
}

fn deadline(deadline: &Value) -> String {
    let from = match text(&deadline["from"]) {
        "timeout" => "the request's parameter timeout",
        "deadline" => "the model's deadline; the request asks for none",
        "maxDeadline" => "the model's maxDeadline; the request asks for more",
        header => return format!("{}: the header {header}", time(deadline["us"].as_u64().unwrap_or(0))),
    };
    format!("{}: {from}", time(deadline["us"].as_u64().unwrap_or(0)))
}

fn cache(cache: &Value) -> String {
    let mut said = match text(&cache["finds"]) {
        "off" => return "none: the model is not cached".to_owned(),
        "guard" => return "not asked: it does not pay for this tenant and model now".to_owned(),
        "uncacheable" => format!("not asked: the request cannot be cached ({})", text(&cache["why"])),
        "deaf" => "not asked: feature changes are not heard from Redis now".to_owned(),
        "fresh" => "hit".to_owned(),
        "stale" => "hit, stale: given, and replaced in the background".to_owned(),
        "refused" => "there, but not as the request's cache-control wants it".to_owned(),
        "if-error" => "stale: given only if the model fails".to_owned(),
        _ => "miss".to_owned(),
    };
    if let (Some(age), Some(ttl)) = (cache["ageMs"].as_u64(), cache["ttl"].as_i64()) {
        said += &format!("; {} old, fresh for {ttl} s", time(age.saturating_mul(1_000)));
    }
    if cache["waits"] == true {
        said += "; waits for the same call of another request";
    }
    if cache["asksRegion"] == true {
        said += " here; the region's Redis is asked next";
    }
    if cache["ignoresCacheControl"] == true {
        said += "; the tenant's cache-control is not honoured";
    }
    if let Some(key) = cache["key"].as_str() {
        said += &format!("; key {key}");
    }
    said
}

fn degradation(degradation: &Value) -> String {
    let reason = degradation["reason"].as_str().map(|reason| format!(" ({reason})")).unwrap_or_default();
    let allowed: Vec<String> =
        degradation["allowed"].as_array().into_iter().flatten().map(ToString::to_string).collect();
    let allowed = if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") };
    format!("level {}{reason}; allowed: {allowed}", degradation["level"])
}

fn gate(gate: &Value) -> String {
    let would = match text(&gate["would"]) {
        "enter" => "enters".to_owned(),
        "wait" => "waits".to_owned(),
        why => format!("refuses: {why}"),
    };
    let shed = gate["letIn"].as_f64().filter(|share| *share < 1.0);
    let shed = shed.map(|share| format!("; lets in {:.0} % of such requests", share * 100.0)).unwrap_or_default();
    let room = &gate["ofPool"]["room"];
    let room = if room.is_null() { "?".to_owned() } else { room.to_string() };
    format!(
        "{would}; {} of {} places of the model taken, {} wait; {} of {room} of pool {} taken, {} wait{shed}",
        gate["inFlight"],
        gate["mostInFlight"],
        gate["waiting"],
        gate["ofPool"]["inFlight"],
        text(&gate["pool"]),
        gate["ofPool"]["waiting"],
    )
}

fn pod(pod: &Value) -> String {
    match pod["none"].as_str() {
        Some("full") => return "none: all that may take it have as many calls as they can".to_owned(),
        Some("no-pool") => return "none: no pool of this region serves the model".to_owned(),
        Some(_) => return "none is left".to_owned(),
        None => {}
    }
    let by = text(&pod["placedBy"]);
    let why = match text(&pod["reason"]) {
        "owner" => format!("the first on the ring for its {by}"),
        "successor" => format!("the next on the ring for its {by}: those before it are out"),
        "bounded" => format!("further on the ring for its {by}: one before it is over its bound"),
        "spread" => format!("its {by} is hot, and spread over several"),
        "less_loaded" => "the less loaded of two by chance".to_owned(),
        "turn" => "its turn".to_owned(),
        "only_one" => "no other can be taken".to_owned(),
        "panic" => "no pod is known to be well".to_owned(),
        other => other.to_owned(),
    };
    let then: Vec<&str> = pod["then"].as_array().into_iter().flatten().map(text).collect();
    let then = if then.is_empty() { String::new() } else { format!("; then {}", then.join(", ")) };
    let unplaced = pod["policy"] == "source_address" && pod["placedBy"].is_null();
    let hint = if unplaced { "; with --address it is the client's" } else { "" };
    let chance = if pod["byChance"] == true { "; the next may get another" } else { "" };
    format!(
        "{} at {}, by {}: {why}{then}{chance}{hint}",
        text(&pod["pod"]),
        text(&pod["address"]),
        text(&pod["policy"])
    )
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

fn time(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{} ms", us as f64 / 1e3),
        _ => format!("{} s", (us / 1_000) as f64 / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_names_and_values_and_never_the_exchanges_own() {
        assert_eq!(header("X-Request-Timeout-Ms:50 "), Ok(("x-request-timeout-ms".into(), "50".into())));
        assert_eq!(header("a: b: c"), Ok(("a".into(), "b: c".into())));
        for bad in ["a", ": b", "a b: c", "a: b\r\nhost: c", "Host: b", "content-length: 1", "x-spillway-admin: drain"]
        {
            assert!(header(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn times_are_short() {
        assert_eq!([time(7), time(1_500), time(2_000_000), time(58_123_456)], ["7 us", "1.5 ms", "2 s", "58.123 s"]);
    }
}
