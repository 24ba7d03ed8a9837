//! `spillway pki`: the folder of an authority, leaves by hand, and how one root follows another.
//!
//! A folder is made here and used by `spillway dev`, by tests, and by the control plane, which issues in a deployment.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use spillway_core::identity::{Role, SpiffeId, TrustDomain};
use spillway_core::units::parse_duration;
use spillway_proto::control::rotate_request::Act;
use spillway_proto::control::{RotateRequest, Rotation};
use spillway_runtime::audit::Timestamp;
use spillway_runtime::authority::{Authority, LeafRequest};

use crate::authority::ask;
use crate::control::Target;

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
    /// Make a new intermediate under the folder's root, whose key must be there
    Intermediate {
        /// The folder of the authority
        dir: PathBuf,
    },
    /// Replace the root that the control plane signs under: show where that is, begin, or withdraw
    Rotate(Rotate),
    /// Issue a leaf certificate: NAME.pem (the chain) and NAME.key into the folder
    Issue(Issue),
}

#[derive(clap::Args)]
struct Rotate {
    /// Begin: trust the next root now, sign under it after the notice. First digits of its SHA-256, or none for the only
    /// other root in the control nodes' folders
    #[arg(long, value_name = "ROOT", num_args = 0..=1, default_missing_value = "", conflicts_with = "withdraw")]
    to: Option<String>,
    /// Trust the announced root no more
    #[arg(long)]
    withdraw: bool,
    #[command(flatten)]
    target: Target,
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
        Action::Intermediate { dir } => {
            Authority::load(dir)?.with_new_intermediate()?.save(dir)?;
            eprintln!("{}: intermediate.pem and its key are new", dir.display());
        }
        Action::Rotate(rotate) => show(&rotate_roots(rotate)?),
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

fn rotate_roots(rotate: &Rotate) -> Result<Rotation> {
    let act = match (&rotate.to, rotate.withdraw) {
        (Some(_), _) => Act::Announce,
        (None, true) => Act::Withdraw,
        (None, false) => Act::Show,
    };
    let request = RotateRequest { act: act.into(), root: rotate.to.clone().unwrap_or_default() };
    ask(&rotate.target, |mut client| {
        let request = request.clone();
        async move { client.rotate(request).await }
    })
}

fn show(rotation: &Rotation) {
    println!("stage  {}", rotation.stage);
    println!("signs  {}", rotation.signs);
    if !rotation.other.is_empty() {
        let next =
            Timestamp::from(SystemTime::UNIX_EPOCH + Duration::from_millis(rotation.next_stage_unix_ms.max(0) as u64));
        println!("other  {}\nnext   {next}", rotation.other);
    }
    for root in &rotation.ready {
        println!("ready  {root}");
    }
}

fn last_part(id: &SpiffeId) -> String {
    match &id.role {
        Role::Gateway { name, .. }
        | Role::Control { name, .. }
        | Role::Dns { name, .. }
        | Role::Injector { name, .. }
        | Role::Loader { name, .. }
        | Role::Client { name, .. }
        | Role::Operator { name } => name.to_string(),
        Role::Sidecar { pod, .. } => pod.to_string(),
    }
}

fn parse_life(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}
