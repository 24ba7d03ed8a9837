//! Feast on the Redis that the sidecar's look-ups use: in process, as a model server's own Python would ask it,
//! and its Python feature server over HTTP.
//!
//! Rows, fields and values are those of [`super::lookup`]; `tests/bench/feast` holds what Feast is set up with.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::lookup::{FIELDS, Measured, ROWS, WARM_UP, entity, value};
use crate::bench::process;
use crate::harness::ports;
use crate::harness::run_folder::RunFolder;

const GROUP: &str = "site";
/// No look-up takes so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// A repository with all rows in the online store, and who looks them up in process.
pub struct Feast {
    pub version: String,
    program: Child,
    answers: BufReader<ChildStdout>,
    folder: PathBuf,
}

impl Feast {
    /// Writes all rows into the Redis at this address.
    pub fn prepare(run: &RunFolder, redis: SocketAddr) -> Result<Self> {
        let folder = run.join("feast");
        std::fs::create_dir_all(&folder)?;
        let source = crate::root().join("tests/bench/feast");
        std::fs::copy(source.join("definitions.py"), folder.join("definitions.py"))?;
        let settings = std::fs::read_to_string(source.join("feature_store.yaml"))?;
        let settings = settings.replace("{{redis_port}}", &redis.port().to_string());
        std::fs::write(folder.join("feature_store.yaml"), settings)?;
        let tools = std::env::var_os("SPILLWAY_TOOLS").map_or_else(|| crate::root().join(".tools"), PathBuf::from);
        let python = tools.join("feast/bin/python");
        ensure!(python.exists(), "there is no Feast; run tests/servers/install.sh feast");
        let mut program = Command::new(python)
            .arg(source.join("lookups.py"))
            .arg(&folder)
            .arg(ROWS.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(folder.join("lookups.log"))?)
            .spawn()?;
        let answers = BufReader::new(program.stdout.take().context("there is no output")?);
        let mut feast = Self { version: String::new(), program, answers, folder };
        let ready = feast.answer()?;
        feast.version = ready["ready"].as_str().context("Feast names no version")?.to_owned();
        Ok(feast)
    }

    /// `get_online_features(…).to_dict()`, one after the other.
    pub fn measure(&mut self, entities: usize, measure: Duration) -> Result<Measured> {
        let asked = json!({ "entities": entities, "seconds": measure.as_secs_f64() });
        writeln!(self.program.stdin.as_mut().context("there is no input")?, "{asked}")?;
        let told = self.answer()?;
        let number = |name: &str| told[name].as_f64().with_context(|| format!("no {name} in {told}"));
        Ok(Measured { p50_us: number("p50_us")?, p99_us: number("p99_us")?, cpu_us: number("cpu_us")? })
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let log = self.folder.join("lookups.log");
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        serde_json::from_str(&line).with_context(|| format!("Feast's look-ups ended: {}", said()))
    }

    /// Its feature server over the same repository.
    pub fn serve(&self) -> Result<FeatureServer> {
        FeatureServer::start(&self.folder)
    }
}

impl Drop for Feast {
    fn drop(&mut self) {
        // It has ended, or is to end: both are what is wanted.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// `feast serve` with one worker. Each turn has a connection of its own: it closes one that is idle for seconds.
pub struct FeatureServer {
    address: SocketAddr,
    /// The master and its worker.
    pids: Vec<u32>,
    first: usize,
    /// Ends the server when its standard input ends, also when the bench was killed.
    guard: Child,
}

impl FeatureServer {
    fn start(folder: &Path) -> Result<Self> {
        let script = crate::root().join("tests/bench/feast/server.sh");
        let address = ports::local(ports::free());
        let guard = Command::new("setsid")
            .args(["bash", "-c", r#"read -r _; exec "$0" kill "$1""#])
            .args([script.as_path(), folder])
            .stdin(Stdio::piped())
            .spawn()
            .context("setsid and bash are needed")?;
        let mut guard = Guarded(Some(guard));
        let started = Command::new(&script)
            .arg("start")
            .arg(folder)
            .arg(address.port().to_string())
            .stdin(Stdio::null())
            .output()?;
        ensure!(started.status.success(), "server.sh: {}", String::from_utf8_lossy(&started.stderr));
        let master: u32 = std::fs::read_to_string(folder.join("feast.pid"))?.trim().parse()?;
        let pids = Self::with_worker(master)?;
        let guard = guard.0.take().context("the guard was taken")?;
        Ok(Self { address, pids, first: 0, guard })
    }

    fn connect(&self) -> Result<TcpStream> {
        let connection = TcpStream::connect(self.address)?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        Ok(connection)
    }

    /// The master and its worker, once that is there to answer: the master listens before.
    fn with_worker(master: u32) -> Result<Vec<u32>> {
        let end = Instant::now() + PATIENCE;
        loop {
            let children = std::fs::read_to_string(format!("/proc/{master}/task/{master}/children"))?;
            let children: Vec<u32> = children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
            if !children.is_empty() {
                return Ok([vec![master], children].concat());
            }
            ensure!(Instant::now() < end, "the feature server has no worker");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// `POST /get-online-features`, one after the other.
    pub fn measure(&mut self, entities: usize, measure: Duration) -> Result<Measured> {
        let mut connection = self.connect()?;
        let begin = Instant::now() + WARM_UP;
        while Instant::now() < begin {
            self.look_up(&mut connection, entities)?;
        }
        let before = self.cpu()?;
        let (start, mut nanos) = (Instant::now(), Vec::new());
        while start.elapsed() < measure {
            nanos.push(u32::try_from(self.look_up(&mut connection, entities)?.as_nanos()).unwrap_or(u32::MAX));
        }
        Measured::of(nanos, self.cpu()?.saturating_sub(before))
    }

    fn cpu(&self) -> Result<Duration> {
        self.pids.iter().map(|pid| process::cpu(*pid)).sum()
    }

    /// One checked look-up; its time without the check.
    fn look_up(&mut self, connection: &mut TcpStream, entities: usize) -> Result<Duration> {
        let rows = self.first..self.first + entities;
        self.first = (self.first + entities) % (ROWS - entities + 1);
        let asked = json!({
            "features": (0..FIELDS).map(|field| format!("{GROUP}:f{field}")).collect::<Vec<_>>(),
            "entities": { "site_id": rows.clone().map(entity).collect::<Vec<_>>() },
        });
        let body = asked.to_string();
        let request = format!(
            "POST /get-online-features HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        let start = Instant::now();
        connection.write_all(request.as_bytes())?;
        let answer = answer(connection)?;
        let took = start.elapsed();
        check(&serde_json::from_slice(&answer)?, rows)?;
        Ok(took)
    }
}

impl Drop for FeatureServer {
    fn drop(&mut self) {
        // Waiting closes the guard's standard input, upon which it kills the server.
        let _ = self.guard.wait();
    }
}

/// A guard that is nobody's yet.
struct Guarded(Option<Child>);

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(guard) = &mut self.0 {
            let _ = guard.wait();
        }
    }
}

/// The body of a 200 answer with a length.
fn answer(connection: &mut impl Read) -> Result<Vec<u8>> {
    let mut received = Vec::with_capacity(16 << 10);
    let mut more = |received: &mut Vec<u8>| -> Result<()> {
        let mut part = [0; 16 << 10];
        let count = connection.read(&mut part)?;
        ensure!(count > 0, "the feature server hung up");
        received.extend_from_slice(&part[..count]);
        Ok(())
    };
    let head = loop {
        if let Some(end) = received.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        more(&mut received)?;
    };
    let said = String::from_utf8_lossy(&received[..head]).to_ascii_lowercase();
    if !said.starts_with("http/1.1 200 ") {
        bail!("the feature server answers {said}");
    }
    let length = said.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse::<usize>().ok());
    let length = length.context("the feature server gives no length")?;
    while received.len() < head + length {
        more(&mut received)?;
    }
    Ok(received.split_off(head))
}

/// Every value of every row.
fn check(answer: &Value, rows: std::ops::Range<usize>) -> Result<()> {
    let names = answer["metadata"]["feature_names"].as_array().context("no names")?;
    for field in 0..FIELDS {
        let at = names.iter().position(|name| *name == format!("f{field}")).context("a field is missing")?;
        let right: Vec<f32> = rows.clone().map(|row| value(row, field)).collect();
        let found = &answer["results"][at];
        let values = found["values"].as_array().context("no values")?.iter();
        let values: Vec<f32> = values.filter_map(|value| Some(value.as_f64()? as f32)).collect();
        let present = found["statuses"].as_array().is_some_and(|all| all.iter().all(|status| *status == "PRESENT"));
        ensure!(present && values == right, "wrong values of f{field}: {found}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(change: impl FnOnce(&mut Value)) -> Value {
        let result = |field| {
            let values: Vec<f32> = (4..6).map(|row| value(row, field)).collect();
            json!({ "values": values, "statuses": ["PRESENT", "PRESENT"] })
        };
        let names: Vec<String> = (0..FIELDS).map(|field| format!("f{field}")).collect();
        let results: Vec<Value> = (0..FIELDS).map(result).collect();
        let mut told = json!({ "results": results, "metadata": { "feature_names": names } });
        change(&mut told);
        told
    }

    #[test]
    fn only_right_values_of_all_rows_pass() {
        assert!(check(&told(|_| {}), 4..6).is_ok());
        assert!(check(&told(|_| {}), 5..7).is_err());
        assert!(check(&told(|told| told["results"][3]["values"][1] = json!(null)), 4..6).is_err());
        assert!(check(&told(|told| told["results"][7]["values"][0] = json!(1)), 4..6).is_err());
        assert!(check(&told(|told| told["results"][0]["statuses"][0] = json!("NOT_FOUND")), 4..6).is_err());
    }

    #[test]
    fn an_answer_may_come_in_parts() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        for at in 1..whole.len() {
            let (first, rest) = whole.split_at(at);
            assert_eq!(answer(&mut first.chain(rest)).unwrap(), b"hello");
        }
        assert!(answer(&mut &b"HTTP/1.1 422 No\r\ncontent-length: 0\r\n\r\n"[..]).is_err());
        assert!(answer(&mut &whole[..30]).is_err());
    }
}
