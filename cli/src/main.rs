//! `spillway`: the one binary. Parse, initialise, run.

mod admin;
mod authority;
mod commands;
mod control;
mod dev;
mod drill;
mod huge_pages;
mod injector;
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
    /// Run a DNS node for the service zone
    Dns(commands::process::Arguments),
    /// Check resources; compile them into a snapshot
    Check(commands::check::Arguments),
    /// Make resources the next version; what is in none of the files is removed
    Apply(commands::apply::Arguments),
    /// Show resources, of the current version or another
    Get(commands::intent::Get),
    /// Show the versions that are kept: when, by whom, why
    History(commands::intent::History),
    /// Make an old version's resources the next version
    Rollback(commands::intent::Rollback),
    /// Drain a region, weigh it, or force it in, for a while
    Override(commands::overrides::Arguments),
    /// Show regions, verdicts, weights, nodes, overrides, a drill; or one gateway
    Status(commands::status::Arguments),
    /// Tell what a request would meet at a gateway, without sending it
    Explain(Box<commands::explain::Arguments>),
    /// Break something on purpose, and measure how long it takes to get over it
    Drill(commands::drill::Arguments),
    /// Run the injector of a machine: what breaks its processes for drills
    Injector(commands::process::Arguments),
    /// Load features
    Features(commands::features::Arguments),
    /// Purge cached results
    Cache(commands::cache::Arguments),
    /// Make one-time tokens for first certificates
    Token(commands::token::Arguments),
    /// Make a trust domain and its certificates; replace its root
    Pki(commands::pki::Arguments),
    /// Check audit logs; show what the control plane's leaders recorded
    Audit(commands::audit::Arguments),
    /// Run three regions on this machine
    Dev(dev::Arguments),
}

fn main() -> std::process::ExitCode {
    spillway_runtime::tls::install_provider();
    let outcome = match Arguments::parse().command {
        Command::Gateway(arguments) => commands::process::gateway(&arguments),
        Command::Sidecar(arguments) => commands::process::sidecar(&arguments),
        Command::Control(arguments) => commands::process::control(&arguments),
        Command::Dns(arguments) => commands::process::dns(&arguments),
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
        Command::Drill(arguments) => commands::drill::run(&arguments),
        Command::Injector(arguments) => commands::process::injector(&arguments),
        Command::Pki(arguments) => commands::pki::run(&arguments),
        Command::Token(arguments) => commands::token::run(&arguments),
        Command::Features(arguments) => commands::features::run(&arguments),
        Command::Dev(arguments) => dev::run(&arguments),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("spillway: {error:#}");
        std::process::ExitCode::FAILURE
    })
}
