//! `spillway override`: an operator's order for a region, for a while.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use spillway_core::units::parse_duration;
use spillway_proto::control::r#override::Act;
use spillway_proto::control::{LiftOverrideRequest, Override, Overrides, StatusRequest};

use super::Form;
use super::intent::time;
use crate::control::{Target, answer, request};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Take a region out, while another one is healthy
    Drain(Order),
    /// Give a region this weight instead of its own
    Weight {
        /// 0 or more; only the proportions between regions count
        #[arg(long, value_name = "NUMBER")]
        to: f64,
        #[command(flatten)]
        order: Order,
    },
    /// Take a region back at once, and keep it in against the verdict
    ForceIn(Order),
    /// End a region's override now
    Lift {
        /// As in `spillway override list`
        region: String,
        #[command(flatten)]
        target: Target,
    },
    /// Show the overrides that hold
    List {
        /// text: for people; json: for programs
        #[arg(short, long, value_name = "FORM", default_value = "text")]
        output: Form,
        #[command(flatten)]
        target: Target,
    },
}

#[derive(clap::Args)]
struct Order {
    /// As in `spillway status`
    region: String,
    /// How long it holds: at most 7d, then it ends by itself
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_life)]
    life: Duration,
    /// Why, for those who see it
    #[arg(long, value_name = "TEXT")]
    reason: String,
    #[command(flatten)]
    target: Target,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.action {
        Action::Drain(order) => order.give(Act::Drain(true))?,
        Action::Weight { order, to } => order.give(Act::Weight(*to))?,
        Action::ForceIn(order) => order.give(Act::ForceIn(true))?,
        Action::Lift { region, target } => {
            let message = LiftOverrideRequest { region: region.clone() };
            let left = target.ask(async |mut client| answer(client.lift_override(request(message)).await))?;
            eprintln!("{region}: lifted");
            show(&left);
        }
        Action::List { output, target } => {
            let status = target.ask(async |mut client| answer(client.status(request(StatusRequest {})).await))?;
            let held = status.overrides.unwrap_or_default();
            if *output == Form::Json {
                let overrides: Vec<Value> = held.overrides.iter().map(as_json).collect();
                println!("{:#}", json!({ "overrides": overrides }));
            } else {
                show(&held);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Order {
    fn give(&self, act: Act) -> Result<()> {
        let until = SystemTime::now() + self.life;
        let since = until.duration_since(SystemTime::UNIX_EPOCH).context("this machine's clock is before 1970")?;
        let message = Override {
            region: self.region.clone(),
            act: Some(act),
            until_unix_ms: i64::try_from(since.as_millis()).context("--for is too long")?,
            reason: self.reason.clone(),
            author: String::new(),
        };
        let held = self.target.ask(async |mut client| answer(client.set_override(request(message)).await))?;
        show(&held);
        Ok(())
    }
}

fn show(held: &Overrides) {
    if held.overrides.is_empty() {
        eprintln!("no overrides hold");
    }
    for one in &held.overrides {
        let reason = one.reason.replace(|character: char| character.is_control(), " ");
        println!("{}: {} until {}, by {}: {reason}", one.region, act(one), time(one.until_unix_ms), one.author);
    }
}

fn act(held: &Override) -> String {
    match &held.act {
        Some(Act::Drain(_)) => "drain".into(),
        Some(Act::Weight(weight)) => format!("weight {weight}"),
        Some(Act::ForceIn(_)) => "force-in".into(),
        None => "?".into(),
    }
}

fn as_json(held: &Override) -> Value {
    json!({
        "region": held.region,
        "act": act(held),
        "until": time(held.until_unix_ms),
        "reason": held.reason,
        "author": held.author,
    })
}

fn parse_life(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}
