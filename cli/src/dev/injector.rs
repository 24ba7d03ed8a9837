//! The injector of `spillway dev`, on loopback.
//!
//! The rule: whoever asks shows the secret of this run, which lies in a file that only the owner of the folder can read
//! (mode 0600). So a drill needs what killing the processes by hand would need too: to be the same user. Nothing is
//! answered without it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use spillway_proto::drill::injector_server::InjectorServer;
use spillway_runtime::audit::Audit;
use spillway_runtime::file::write_atomic;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Status};

use crate::injector::Injector;
use crate::injector::service::Asked;

/// Where address and secret are, in the folder of `spillway dev`.
pub const FILE: &str = "injector.json";

/// An injector that is served. Ended when dropped, and its file removed.
pub struct Serving {
    file: PathBuf,
    _tasks: JoinSet<()>,
}

/// Serves on a free port of loopback and writes [`FILE`] into the folder.
pub async fn serve(injector: Arc<Injector>, folder: &Path) -> Result<Serving> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("the injector finds no port")?;
    let address = listener.local_addr()?;
    let secret = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
    let file = folder.join(FILE);
    let content = json!({ "address": address.to_string(), "secret": secret }).to_string();
    write_atomic(&file, content.as_bytes(), 0o600).with_context(|| format!("cannot write {}", file.display()))?;
    let mut tasks = JoinSet::new();
    tasks.spawn(injector.clone().tend());
    let expected = format!("Bearer {secret}");
    let check = move |request: Request<()>| {
        let shown = request.metadata().get("authorization").map(|value| value.as_bytes()).unwrap_or_default();
        let equal = is_same(shown, expected.as_bytes());
        if equal { Ok(request) } else { Err(Status::unauthenticated("the secret of this run is needed")) }
    };
    let service = InjectorServer::with_interceptor(Asked::new(injector, Audit::off()), check);
    tasks.spawn(async move {
        let server = Server::builder().timeout(Duration::from_secs(30)).add_service(service);
        if let Err(problem) = server.serve_with_incoming(TcpIncoming::from(listener)).await {
            eprintln!("the injector ended: {problem}");
        }
    });
    Ok(Serving { file, _tasks: tasks })
}

impl Drop for Serving {
    fn drop(&mut self) {
        // The next run writes it anew.
        let _ = std::fs::remove_file(&self.file);
    }
}

/// In a time that does not tell where they differ.
fn is_same(shown: &[u8], expected: &[u8]) -> bool {
    let differs = shown.iter().zip(expected).fold(0, |differs, (one, other)| differs | (one ^ other));
    shown.len() == expected.len() && differs == 0
}
