//! `spillway status`: all regions as the control plane sees them, or one gateway as its admin port shows it.

mod fleet;
mod gateway;

use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use super::Form;
use crate::admin;
use crate::control::Target;

/// Between two looks, with `--watch`.
const EVERY: Duration = Duration::from_secs(1);

/// Show all regions: verdicts, weights, nodes, overrides, a drill; or one gateway, by --admin or --region
#[derive(clap::Args)]
pub struct Arguments {
    /// Show the gateway with this admin port instead
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["control", "dev"])]
    admin: Option<String>,
    /// Show the gateway of this region of --dev instead
    #[arg(long, value_name = "NAME", requires = "dev")]
    region: Option<String>,
    /// text: for people; json: for programs
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Form,
    /// Show it again every second, until Ctrl-C
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    control: Target,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    loop {
        let text = shown(arguments);
        if !arguments.watch {
            print!("{}", text?);
            return Ok(ExitCode::SUCCESS);
        }
        // Who watches wants to see it come back, too.
        let text = text.unwrap_or_else(|error| format!("{error:#}\n"));
        let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        print!("{clear}{text}");
        std::io::stdout().flush()?;
        std::thread::sleep(EVERY);
    }
}

fn shown(arguments: &Arguments) -> Result<String> {
    let Arguments { control, admin, region, output, .. } = arguments;
    match (admin, region, &control.dev) {
        (Some(admin), ..) => gateway::shown(admin::address(admin)?, *output),
        (None, Some(region), Some(folder)) => {
            gateway::shown(admin::address(&crate::dev::admin(folder, Some(region))?)?, *output)
        }
        _ => fleet::shown(control, *output),
    }
}
