//! nginx as a peer, from the machine's package: a master, and the one worker that is measured.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Foreground, Proxy, READY_WITHIN, Running, Setting, free_address, said};

pub(super) fn start(setting: &Setting, folder: PathBuf) -> Result<Proxy> {
    ensure!(setting.threads == 1, "nginx is measured with one worker");
    let address = free_address()?;
    let port = address.port().to_string();
    let fingerprint = fingerprint(&setting.identities.folder().join("client.crt"))?;
    let config = setting.fill("nginx.conf", &folder, &[("port", &port), ("fingerprint", &fingerprint)])?;
    let config = config.to_string_lossy();
    // Until it has read its configuration it would write to the package's log.
    let log = folder.join("nginx.log");
    let arguments = ["-e", &log.to_string_lossy(), "-c", &config];
    let running = Foreground::start("nginx", &arguments, Stdio::null(), &log, &setting.cores, address)?;
    Ok(Proxy { address, pid: worker(running.id())?, folder, _running: Running::Foreground(running) })
}

/// SHA-1 over the certificate in lower case, as `$ssl_client_fingerprint` has it.
fn fingerprint(certificate: &Path) -> Result<String> {
    let mut command = Command::new("openssl");
    command.args(["x509", "-noout", "-fingerprint", "-sha1", "-in"]).arg(certificate);
    let output = command.output().context("openssl is needed")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // `sha1 Fingerprint=AB:CD:…`
    let (_, bytes) = text.trim().split_once('=').context("openssl names no fingerprint")?;
    Ok(bytes.replace(':', "").to_lowercase())
}

/// The master's one child, which it starts after it listens.
fn worker(master: u32) -> Result<u32> {
    let end = Instant::now() + READY_WITHIN;
    loop {
        let children = std::fs::read_to_string(format!("/proc/{master}/task/{master}/children"))?;
        let ids: Vec<u32> = children.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        match ids[..] {
            [worker] => return Ok(worker),
            [] => ensure!(Instant::now() < end, "nginx has no worker"),
            _ => bail!("nginx has more than one worker"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The version that the binary names: `nginx version: nginx/1.22.1`.
pub(super) fn version() -> Result<String> {
    let text = said("nginx", "-v")?;
    let version = text.trim().strip_prefix("nginx version: nginx/").and_then(|rest| rest.split(' ').next());
    Ok(version.context("nginx names no version")?.to_owned())
}
