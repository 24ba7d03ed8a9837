//! `spillway`: the one binary. Parse, initialise, run.

mod admin;
mod commands;
mod control;
mod dev;
mod yaml;

use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Spillway, an inference edge: predictions by one name, within their deadline, while things fail.
#[derive(Parser)]
#[command(name = "spillway", version, propagate_version = true, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a regional gateway
    Gateway(commands::process::Arguments),
    /// Run the sidecar of one model pod
    Sidecar(commands::process::Arguments),
    /// Run a node of the control plane
    Control(commands::process::Arguments),
    /// Check resources; compile them into a snapshot
    Check(commands::check::Arguments),
    /// Make resources the next version of what the control plane pushes
    Apply(commands::apply::Arguments),
    /// Show the control plane's resources
    Get(commands::intent::Get),
    /// Show the versions that the control plane keeps
    History(commands::intent::History),
    /// Go back to an old version's resources
    Rollback(commands::intent::Rollback),
    /// Order something for a region, for a while
    Override(commands::overrides::Arguments),
    /// Check audit logs
    Audit(commands::audit::Arguments),
    /// Show a gateway's state: buckets, pods, breakers, cache, levels of degradation
    Status(commands::status::Arguments),
    /// Tell what a request would meet at a gateway, without sending it
    Explain(Box<commands::explain::Arguments>),
    /// Purge cached results
    Cache(commands::cache::Arguments),
    /// Make a trust domain and its certificates, for development
    Pki(commands::pki::Arguments),
    /// Load features
    Features(commands::features::Arguments),
    /// Run a whole region on this machine
    Dev(dev::Arguments),
}

fn main() -> std::process::ExitCode {
    spillway_runtime::tls::install_provider();
    let outcome = match Arguments::parse().command {
        Command::Gateway(arguments) => commands::process::gateway(&arguments),
        Command::Sidecar(arguments) => commands::process::sidecar(&arguments),
        Command::Control(arguments) => commands::process::control(&arguments),
        Command::Check(arguments) => commands::check::run(&arguments),
        Command::Apply(arguments) => commands::apply::run(&arguments),
        Command::Get(arguments) => commands::intent::get(&arguments),
        Command::History(arguments) => commands::intent::history(&arguments),
        Command::Rollback(arguments) => commands::intent::rollback(&arguments),
        Command::Override(arguments) => commands::overrides::run(&arguments),
        Command::Audit(arguments) => commands::audit::run(&arguments),
        Command::Status(arguments) => commands::status::run(&arguments),
        Command::Explain(arguments) => commands::explain::run(&arguments),
        Command::Cache(arguments) => commands::cache::run(&arguments),
        Command::Pki(arguments) => commands::pki::run(&arguments),
        Command::Features(arguments) => commands::features::run(&arguments),
        Command::Dev(arguments) => dev::run(&arguments),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("spillway: {error:#}");
        std::process::ExitCode::FAILURE
    })
}
