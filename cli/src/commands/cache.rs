//! `spillway cache purge`: drops results before their time.

use std::process::ExitCode;

use anyhow::Result;

use crate::admin::{Post, Target, encoded, post};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Drop cached results: at this gateway at once, at the region's others within moments
    Purge(Purge),
}

#[derive(clap::Args)]
struct Purge {
    #[command(flatten)]
    gateway: Target,
    #[command(flatten)]
    what: What,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct What {
    /// Every result of a model
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Every result about an entity, of any model and tenant
    #[arg(long, value_name = "ID")]
    entity: Option<String>,
    /// Every result of a tenant
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Action::Purge(Purge { gateway, what }) = &arguments.action;
    let all = [("model", &what.model), ("entity", &what.entity), ("tenant", &what.tenant)];
    let query = all.into_iter().find_map(|(name, value)| Some(format!("{name}={}", encoded(value.as_ref()?))));
    let asked = Post { word: "purge", ..Post::default() };
    let purged = post(gateway.address()?, &format!("/cache/purge?{}", query.unwrap_or_default()), &asked)?.good()?;
    println!("results purged: {}, bytes: {}", purged["entries"], purged["bytes"]);
    if purged["region"] == false {
        eprintln!("Redis could not be told: the region's other gateways keep theirs; purge again when it is back");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
