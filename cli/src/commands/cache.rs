//! `spillway cache purge`: sends results away before their time.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Result;

use crate::admin::{Post, encoded, post};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Send results away: of a gateway at once, of the region's others within moments
    Purge(Purge),
}

#[derive(clap::Args)]
struct Purge {
    /// The admin port of a gateway, from its own machine
    #[arg(long, value_name = "ADDRESS")]
    admin: SocketAddr,
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
    let Action::Purge(Purge { admin, what }) = &arguments.action;
    let all = [("model", &what.model), ("entity", &what.entity), ("tenant", &what.tenant)];
    let query = all.into_iter().find_map(|(name, value)| Some(format!("{name}={}", encoded(value.as_ref()?))));
    let asked = Post { word: "purge", ..Post::default() };
    let purged = post(*admin, &format!("/cache/purge?{}", query.unwrap_or_default()), &asked)?.good()?;
    println!("{} results purged, {} bytes", purged["entries"], purged["bytes"]);
    if purged["region"] == false {
        eprintln!("Redis could not be told: the region's other gateways keep theirs; purge again when it is back");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
