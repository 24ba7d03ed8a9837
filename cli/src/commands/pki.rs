//! `spillway pki`: a trust domain for development. In a deployment the control plane issues certificates.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use spillway_core::identity::{Role, SpiffeId, TrustDomain};
use spillway_core::units::parse_duration;
use spillway_runtime::authority::{Authority, LeafRequest};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Make a root and an intermediate authority, and the trust bundle
    Init {
        /// The folder of the authority
        dir: PathBuf,
        /// The trust domain: a-z 0-9 . - _
        #[arg(long, default_value = "spillway.test")]
        trust_domain: String,
    },
    /// Issue a leaf certificate: NAME.pem (the chain) and NAME.key into the folder
    Issue(Issue),
}

#[derive(clap::Args)]
struct Issue {
    /// The folder of the authority
    dir: PathBuf,
    /// The one identity, such as spiffe://spillway.test/tenant/acme/client/web or
    /// spiffe://spillway.test/operator/alice
    id: String,
    /// Name of the two files [default: the last part of the id]
    #[arg(long)]
    name: Option<String>,
    /// A DNS name or address that clients dial; repeat for several. For gateways: unmodified clients verify it
    #[arg(long, value_name = "HOST")]
    dial: Vec<String>,
    /// How long it is valid
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = parse_life)]
    life: Duration,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.action {
        Action::Init { dir, trust_domain } => {
            let trust_domain = TrustDomain::parse(trust_domain).with_context(|| trust_domain.clone())?;
            if dir.join("root.key").exists() {
                bail!("{} holds an authority already; its certificates would become worthless", dir.display());
            }
            Authority::create(trust_domain)?.save(dir)?;
            eprintln!("{}: root.pem, intermediate.pem, their keys, trust-bundle.pem", dir.display());
        }
        Action::Issue(issue) => {
            let id = SpiffeId::parse(&issue.id).with_context(|| issue.id.clone())?;
            let name = issue.name.clone().unwrap_or_else(|| last_part(&id));
            if name.contains('/') || ["root", "intermediate", "trust-bundle"].contains(&name.as_str()) {
                bail!("--name {name}: expected a plain file name that is not one of the authority's own");
            }
            let mut request = LeafRequest::new(id, issue.life);
            for host in &issue.dial {
                match host.parse::<IpAddr>() {
                    Ok(address) => request.addresses.push(address),
                    Err(_) => request.dns_names.push(host.clone()),
                }
            }
            let leaf = Authority::load(&issue.dir)?.issue(&request)?;
            let at = |extension: &str| issue.dir.join(format!("{name}.{extension}"));
            leaf.save(at("pem"), at("key"))?;
            println!("{}\n{}", at("pem").display(), at("key").display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn last_part(id: &SpiffeId) -> String {
    match &id.role {
        Role::Gateway { name, .. }
        | Role::Control { name, .. }
        | Role::Client { name, .. }
        | Role::Operator { name } => name.to_string(),
        Role::Sidecar { pod, .. } => pod.to_string(),
    }
}

fn parse_life(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}
