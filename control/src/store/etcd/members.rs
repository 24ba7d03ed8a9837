//! The members of the cluster, and the one that is asked first.
//!
//! The rule: each member has its own connection, which is made anew, with the certificates of now, after anything
//! went wrong with it. Who answered last is asked first.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use spillway_runtime::tls::IdentitySettings;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

use super::super::{DEADLINE, StoreError};
use super::EtcdSettings;

/// One member may take so long before the next is asked.
const ATTEMPT: Duration = Duration::from_millis(600);
/// etcd ends connections that ask more often than every 5 s (`--grpc-keepalive-min-time`).
const KEEP_ALIVE: Duration = Duration::from_secs(6);

#[derive(Debug)]
pub struct Members {
    identity: IdentitySettings,
    /// A key of ours, to ask for when any answer will do.
    key: String,
    members: Vec<Member>,
    /// Index of who answered last.
    preferred: AtomicUsize,
}

struct Member {
    endpoint: String,
    client: Mutex<Option<Client>>,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.endpoint)
    }
}

impl Members {
    pub fn new(settings: &EtcdSettings, key: String) -> Self {
        let member = |endpoint: &String| Member { endpoint: endpoint.clone(), client: Mutex::default() };
        let members = settings.endpoints.iter().map(member).collect();
        Self { identity: settings.identity.clone(), key, members, preferred: AtomicUsize::new(0) }
    }

    /// Whether the files can be read now. Blocks on the file system.
    pub fn check_identity(&self) -> std::io::Result<()> {
        read(&self.identity).map(drop)
    }

    /// Asks one member after the other until one answers, within the deadline. It may be asked twice.
    pub async fn read<T, F>(&self, call: impl Fn(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        Ok(self.read_until(Instant::now() + DEADLINE, call).await?.1)
    }

    /// The answer, and who gave it.
    async fn read_until<T, F>(&self, deadline: Instant, call: impl Fn(Client) -> F) -> Result<(usize, T), StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let first = self.preferred.load(Ordering::Relaxed);
        let mut problem = None;
        for index in (0..self.members.len()).map(|more| (first + more) % self.members.len()) {
            let until = deadline.min(Instant::now() + ATTEMPT);
            if until <= Instant::now() {
                break;
            }
            match self.ask(index, until, &call).await {
                Ok(answer) => return Ok((index, answer)),
                Err(error) => problem = Some(error),
            }
        }
        Err(problem.unwrap_or_else(|| StoreError::Unavailable("there was no time left".into())))
    }

    /// Sends this once, to a member that has just answered a question to the whole cluster.
    pub async fn write<T, F>(&self, call: impl FnOnce(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let deadline = Instant::now() + DEADLINE;
        // A linearizable read, which a member without a quorum does not answer.
        let question = |client: Client| async move { client.kv_client().get(self.key.clone(), None).await };
        let (index, _) = self.read_until(deadline, question).await?;
        self.ask(index, deadline, call).await
    }

    async fn ask<T, F>(&self, index: usize, until: Instant, call: impl FnOnce(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let asked = async { call(self.client(index).await?).await };
        let problem: Box<dyn std::error::Error + Send + Sync> = match timeout_at(until, asked).await {
            Ok(Ok(answer)) => {
                self.preferred.store(index, Ordering::Relaxed);
                return Ok(answer);
            }
            Ok(Err(error)) => error.into(),
            Err(late) => late.into(),
        };
        self.forget(index).await;
        Err(StoreError::Unavailable(problem))
    }

    /// The connection to some member for a stream: that of the preferred one.
    pub async fn preferred(&self) -> (usize, Result<Client, Error>) {
        let index = self.preferred.load(Ordering::Relaxed);
        (index, self.client(index).await)
    }

    /// A stream of this member has ended: another one is asked first.
    pub async fn failed(&self, index: usize) {
        let next = (index + 1) % self.members.len();
        let _ = self.preferred.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
        self.forget(index).await;
    }

    async fn forget(&self, index: usize) {
        *self.members[index].client.lock().await = None;
    }

    async fn client(&self, index: usize) -> Result<Client, Error> {
        let Member { endpoint, client } = &self.members[index];
        let mut client = client.lock().await;
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        let identity = self.identity.clone();
        let files = tokio::task::spawn_blocking(move || read(&identity)).await.map_err(std::io::Error::other)??;
        let [certificate, key, authority] = files;
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(authority))
            .identity(Identity::from_pem(certificate, key));
        let options = ConnectOptions::new()
            .with_tls(tls)
            .with_connect_timeout(ATTEMPT)
            .with_keep_alive(KEEP_ALIVE, DEADLINE)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        // Connects with the first call.
        let made = Client::connect([endpoint], Some(options)).await?;
        *client = Some(made.clone());
        Ok(made)
    }
}

fn read(identity: &IdentitySettings) -> std::io::Result<[Vec<u8>; 3]> {
    let read = |path: &std::path::Path| {
        std::fs::read(path).map_err(|error| std::io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    };
    Ok([read(&identity.certificate)?, read(&identity.key)?, read(&identity.trust_bundle)?])
}
