//! `spillway features load`: rows of a CSV or JSON lines file into a feature group.
//!
//! Every row is written whole or not at all. Writes are idempotent (the last event time wins), so a
//! load that was cut off goes on where it was, and one that is repeated changes nothing.

mod rows;

use std::io::{BufRead, BufReader, Seek};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use spillway_proto::feature::feature_service_client::FeatureServiceClient;
use spillway_proto::feature::{PutRequest, PutResponse, Row};
use spillway_runtime::file::write_atomic;
use tonic::transport::Channel;

use super::sidecar::{Connection, Target};
use rows::{Format, Numbered, Reader};

/// How long a store may be away before a load gives up; it goes on there when it is started again.
const PATIENCE: Duration = Duration::from_secs(30);

const UNCONFIRMED: &str = "warning: rows that are not confirmed are kept, but a process of the region did not say in time that it has \
                           dropped what they overwrote, or Redis could not be reached: answers may still be made of the old values \
                           for a while. Load the file again to have it confirmed.";

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Load a file: its columns are `entity`, `event_time` and the group's fields
    Load {
        #[command(flatten)]
        load: Load,
        #[command(flatten)]
        target: Target,
    },
}

/// What is loaded, and how.
#[derive(clap::Args)]
#[group(skip)]
pub struct Load {
    /// The feature group
    #[arg(short, long)]
    pub group: String,
    /// FILE.csv with a header line, or FILE.jsonl with one object a line; event_time is RFC 3339 or Unix microseconds
    pub file: PathBuf,
    /// The tenant whose entities they are, for groups of scope `tenant`
    #[arg(long, default_value = "")]
    pub tenant: String,
    /// Rows in one request
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub batch: u16,
    /// Begin at the first row, also where an earlier load of this file was cut off
    #[arg(long)]
    pub restart: bool,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Action::Load { load, target } = &arguments.action;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(load.run(&target.connection()?))?;
    eprintln!("{outcome}");
    if outcome.unconfirmed > 0 {
        eprintln!("{UNCONFIRMED}");
    }
    Ok(if outcome.refused == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What became of the rows of a file, an earlier load that was cut off included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Rows that the store holds now, or holds a later event of.
    pub written: u64,
    /// Rows past the group's `retainFor`: there was nothing to keep.
    pub expired: u64,
    pub refused: u64,
    /// Of those written: the region did not confirm that nobody gives their old values.
    pub unconfirmed: u64,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} rows written, {} refused", self.written, self.refused)?;
        if self.expired > 0 {
            write!(f, ", {} not kept: past the group's retainFor", self.expired)?;
        }
        if self.unconfirmed > 0 {
            write!(f, ", {} not confirmed", self.unconfirmed)?;
        }
        Ok(())
    }
}

impl std::ops::AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.written += other.written;
        self.expired += other.expired;
        self.refused += other.refused;
        self.unconfirmed += other.unconfirmed;
    }
}

impl Load {
    pub async fn run(&self, sidecar: &Connection) -> Result<Outcome> {
        let format = Format::of(&self.file)?;
        let mut file =
            std::fs::File::open(&self.file).with_context(|| format!("cannot open {}", self.file.display()))?;
        let size = file.metadata()?.len();
        let progress = Progress::of(self, size)?;
        let (from, outcome) = if self.restart { Default::default() } else { progress.read()? };
        let header = format.header(&mut BufReader::new(&file))?;
        file.seek(std::io::SeekFrom::Start(from.byte.max(header.bytes)))?;
        if from.byte > 0 {
            eprintln!("going on after line {} of an earlier load (--restart begins anew): {outcome}", from.line);
        }
        let client = FeatureServiceClient::new(sidecar.connect().await?);
        let mut reader = Reader::new(BufReader::new(file), header, from, self.group.clone(), self.tenant.clone());
        self.send_all(&mut reader, client, &progress, outcome, size).await
    }

    async fn send_all(
        &self,
        reader: &mut Reader<impl BufRead>,
        mut client: FeatureServiceClient<Channel>,
        progress: &Progress,
        mut outcome: Outcome,
        size: u64,
    ) -> Result<Outcome> {
        let bar = ProgressBar::new(size);
        bar.set_style(ProgressStyle::with_template("{bar:40} {percent:>3} %  {bytes_per_sec}  {msg}")?);
        loop {
            let mut batch = Vec::with_capacity(self.batch.into());
            while batch.len() < self.batch.into()
                && let Some(row) = reader.next_row()?
            {
                match row {
                    Ok(row) => batch.push(row),
                    Err(refusal) => {
                        outcome.refused += 1;
                        bar.suspend(|| eprintln!("{}:{refusal}", self.file.display()));
                    }
                }
            }
            if batch.is_empty() {
                break;
            }
            let of_batch = put(&mut client, batch, |line, reason| {
                bar.suspend(|| eprintln!("{}:{line}: {reason}", self.file.display()));
            });
            outcome += of_batch.await?;
            progress.write(reader.position(), &outcome)?;
            bar.set_position(reader.position().byte);
            bar.set_message(format!("{} rows", outcome.written));
        }
        bar.finish_and_clear();
        progress.remove()?;
        Ok(outcome)
    }
}

/// Writes a batch; rows that the service refuses are taken out and the others sent again.
async fn put(
    client: &mut FeatureServiceClient<Channel>,
    mut batch: Vec<Numbered<Row>>,
    mut tell: impl FnMut(u64, &str),
) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    while !batch.is_empty() {
        let rows: Vec<Row> = batch.iter().map(|row| row.row.clone()).collect();
        let PutResponse { written, rejections, confirmed } = put_patiently(client, PutRequest { rows }).await?;
        if rejections.is_empty() {
            outcome.written = written.into();
            outcome.unconfirmed = if confirmed { 0 } else { outcome.written };
            outcome.expired = (batch.len() as u64).saturating_sub(outcome.written);
            break;
        }
        let mut indexes: Vec<usize> = Vec::new();
        for rejection in rejections {
            let index = usize::try_from(rejection.row)?;
            let Some(row) = batch.get(index) else { bail!("the sidecar rejected a row that was not sent") };
            tell(row.line, &rejection.reason);
            indexes.push(index);
        }
        indexes.sort_unstable();
        indexes.dedup();
        outcome.refused += indexes.len() as u64;
        for index in indexes.into_iter().rev() {
            batch.remove(index);
        }
    }
    Ok(outcome)
}

/// One request, again and again for a while where the store cannot be reached: writes are idempotent.
async fn put_patiently(client: &mut FeatureServiceClient<Channel>, request: PutRequest) -> Result<PutResponse> {
    let began = Instant::now();
    let mut pause = Duration::from_millis(100);
    loop {
        match client.put(request.clone()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) if status.code() == tonic::Code::Unavailable && began.elapsed() < PATIENCE => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(2));
            }
            Err(status) => bail!("the sidecar did not take the rows: {} ({:?})", status.message(), status.code()),
        }
    }
}

/// Where a load stands in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    pub byte: u64,
    pub line: u64,
}

/// The file beside the loaded one that says how far a load came, and what became of the rows until there. It holds only for the same group,
/// tenant and file length and time of change.
struct Progress {
    path: PathBuf,
    key: String,
}

impl Progress {
    fn of(load: &Load, size: u64) -> Result<Self> {
        let changed = load.file.metadata()?.modified()?.duration_since(std::time::UNIX_EPOCH)?.as_nanos();
        let mut path = load.file.as_os_str().to_owned();
        path.push(format!(".{}.progress", load.group));
        Ok(Self { path: path.into(), key: format!("{}/{}/{size}/{changed}", load.group, load.tenant) })
    }

    fn read(&self) -> Result<(Position, Outcome)> {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Default::default()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", self.path.display())),
        };
        let fields: Vec<&str> = text.split_whitespace().collect();
        Ok(match fields[..] {
            [key, byte, line, written, expired, refused, unconfirmed] if key == self.key => (
                Position { byte: byte.parse()?, line: line.parse()? },
                Outcome {
                    written: written.parse()?,
                    expired: expired.parse()?,
                    refused: refused.parse()?,
                    unconfirmed: unconfirmed.parse()?,
                },
            ),
            _ => Default::default(),
        })
    }

    fn write(&self, at: Position, outcome: &Outcome) -> Result<()> {
        let Outcome { written, expired, refused, unconfirmed } = outcome;
        let text = format!("{} {} {} {written} {expired} {refused} {unconfirmed}\n", self.key, at.byte, at.line);
        write_atomic(&self.path, text.as_bytes(), 0o644)
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn remove(&self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }
}
