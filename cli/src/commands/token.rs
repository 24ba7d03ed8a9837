//! `spillway token`: one-time tokens, by which a machine gets its first certificate.

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use spillway_core::units::parse_duration;
use spillway_proto::control::CreateTokenRequest;

use crate::authority::ask;
use crate::control::Target;

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Make a token and print it; it is told once and kept nowhere
    Create(Create),
}

#[derive(clap::Args)]
struct Create {
    /// The identity that it is for, such as spiffe://spillway.test/region/eu/gateway/gw-0
    id: String,
    /// A DNS name that its certificates may carry; repeat for several
    #[arg(long, value_name = "NAME")]
    dns: Vec<String>,
    /// An IP address that they may carry; repeat for several
    #[arg(long, value_name = "IP")]
    address: Vec<IpAddr>,
    /// How long it may wait to be used, at most 24h
    #[arg(long = "for", value_name = "DURATION", default_value = "1h", value_parser = parse_life)]
    life: Duration,
    #[command(flatten)]
    target: Target,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Action::Create(create) = &arguments.action;
    let request = CreateTokenRequest {
        id: create.id.clone(),
        dns_names: create.dns.clone(),
        addresses: create.address.iter().map(ToString::to_string).collect(),
        life_seconds: create.life.as_secs().max(1),
    };
    let created = ask(&create.target, |mut client| {
        let request = request.clone();
        async move { client.create_token(request).await }
    })?;
    println!("{}", created.token);
    Ok(ExitCode::SUCCESS)
}

fn parse_life(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}
