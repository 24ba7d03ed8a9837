//! The way to the control plane, mutually authenticated, and what is said when it refuses.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use spillway_core::identity::ExpectedPeer;
use spillway_proto::control::intent_client::IntentClient;
use spillway_runtime::dial::dial;
use spillway_runtime::tls::{IdentitySettings, Workload};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

/// How long one control node may take to be reached before the next is tried.
const REACH: Duration = Duration::from_secs(3);
/// How long it may take to answer.
const ANSWER: Duration = Duration::from_secs(60);

pub type Client = IntentClient<Channel>;

/// Which control plane, and who is asking.
#[derive(clap::Args)]
#[command(next_help_heading = "Control plane")]
pub struct Target {
    /// Control nodes; the first that can be reached is asked
    #[arg(long, value_name = "HOST:PORT,...", env = "SPILLWAY_CONTROL", value_delimiter = ',')]
    control: Vec<String>,
    /// What `spillway dev` runs out of this folder (.dev), instead of all else here
    #[arg(long, value_name = "FOLDER", num_args = 0..=1, require_equals = true, default_missing_value = ".dev")]
    pub dev: Option<PathBuf>,
    /// An operator's certificate.pem, key.pem and trust-bundle.pem
    #[arg(long, value_name = "FOLDER", env = "SPILLWAY_IDENTITY")]
    identity: Option<PathBuf>,
    /// Instead of --identity: the operator's certificate chain, PEM
    #[arg(long, value_name = "FILE", env = "SPILLWAY_CERTIFICATE")]
    certificate: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", env = "SPILLWAY_KEY")]
    key: Option<PathBuf>,
    /// The roots to trust, PEM
    #[arg(long, value_name = "FILE", env = "SPILLWAY_TRUST_BUNDLE")]
    trust_bundle: Option<PathBuf>,
}

impl Target {
    /// One control node, asked by this identity.
    pub fn at(server: String, identity: IdentitySettings) -> Self {
        let IdentitySettings { certificate, key, trust_bundle } = identity;
        let [certificate, key, trust_bundle] = [certificate, key, trust_bundle].map(Some);
        Self { control: vec![server], dev: None, identity: None, certificate, key, trust_bundle }
    }

    /// The control nodes, in the order in which they are tried.
    pub fn servers(&self) -> Result<Vec<String>> {
        match &self.dev {
            Some(folder) => crate::dev::control(folder),
            None if self.control.is_empty() => bail!(
                "which control plane? --control HOST:PORT (or SPILLWAY_CONTROL), or --dev for what `spillway dev` runs"
            ),
            None => Ok(self.control.clone()),
        }
    }

    /// Asks one question, or has one thing done.
    pub fn ask<T>(&self, work: impl AsyncFnOnce(Client) -> Result<T>) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { work(self.client().await?).await })
    }

    pub async fn client(&self) -> Result<Client> {
        let servers = self.servers()?;
        let workload = Workload::load(&self.identity()?).context("our identity")?;
        let expected = ExpectedPeer::ControlOf { trust_domain: workload.id().trust_domain };
        let mut problem = None;
        for server in &servers {
            match dial(&workload, expected.clone(), server, REACH).await {
                Ok(channel) => return Ok(IntentClient::new(channel).max_decoding_message_size(usize::MAX)),
                Err(error) => {
                    let error = anyhow!(error).context(format!("the control node {server}"));
                    if servers.len() > 1 {
                        eprintln!("spillway: {error:#}");
                    }
                    problem = Some(error);
                }
            }
        }
        Err(problem.unwrap_or_else(|| anyhow!("no control node is named")))
    }

    /// The files of who is asking.
    pub fn identity(&self) -> Result<IdentitySettings> {
        if let Some(folder) = &self.dev {
            return Ok(crate::dev::operator(folder));
        }
        let file = |given: &Option<PathBuf>, name: &str| {
            given.clone().or_else(|| self.identity.as_ref().map(|folder| folder.join(name)))
        };
        let certificate = file(&self.certificate, "certificate.pem");
        let key = file(&self.key, "key.pem");
        let trust_bundle = file(&self.trust_bundle, "trust-bundle.pem");
        let (Some(certificate), Some(key), Some(trust_bundle)) = (certificate, key, trust_bundle) else {
            bail!(
                "who asks? --identity, or all of --certificate, --key and --trust-bundle: `spillway pki issue` makes an operator's"
            );
        };
        Ok(IdentitySettings { certificate, key, trust_bundle })
    }
}

/// A request that is answered in time or not at all.
pub fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ANSWER);
    request
}

/// The answer, or what an operator can do about the refusal.
pub fn answer<T>(answer: Result<Response<T>, Status>) -> Result<T> {
    let status = match answer {
        Ok(response) => return Ok(response.into_inner()),
        Err(status) => status,
    };
    let word = status.metadata().get("spillway-error").and_then(|word| word.to_str().ok()).unwrap_or_default();
    let advice = match word {
        "unsafe" => "; if that is meant, say so with --confirm-empty KIND/NAME",
        "not-expected-version" => "; somebody was faster: look at `spillway history` and what changed",
        "not-leading" | "leader-unreachable" | "store-unavailable" => {
            "; nothing is known to be changed: look at `spillway history`, and try again"
        }
        "not-an-operator" => {
            "; control nodes name operators in their settings, and `spillway pki issue` makes a certificate"
        }
        "nothing-applied" => "; begin with `spillway apply -f PATH`",
        "drill-runs" => "; `spillway status` shows it",
        "no-such-override" => "; `spillway override list` shows those that hold",
        "no-such-version" => "; `spillway history` shows those that are kept",
        _ => "",
    };
    let text = status.message();
    match status.code() {
        // Not the control plane's own words.
        Code::Unavailable | Code::Unknown | Code::Cancelled if word.is_empty() => {
            Err(anyhow!("the connection to the control plane broke: {text}; whether it was done is not known"))
        }
        Code::Unimplemented => Err(anyhow!("the control node does not know this command: it is another version")),
        Code::DeadlineExceeded => {
            Err(anyhow!("the control plane did not answer in time; whether it was done is not known"))
        }
        _ => Err(anyhow!("the control plane says: {text}{advice}")),
    }
}
