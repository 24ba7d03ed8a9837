//! The injector as a gRPC service on loopback.
//!
//! The rule: whoever asks shows the secret of this run, which lies in a file that only the owner of the folder can read
//! (mode 0600). So a drill needs what killing the processes by hand would need too: to be the same user. Nothing is
//! answered without it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use spillway_core::drill::{Act, Denied, LeaseId};
use spillway_proto::drill as proto;
use spillway_proto::drill::fault::Act as ActCode;
use spillway_proto::drill::injector_server::{Injector as Service, InjectorServer};
use spillway_runtime::file::write_atomic;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use super::{Fault, InjectError, Injector};

/// Where address and secret are, in the folder of `spillway dev`.
pub const FILE: &str = "injector.json";
/// What a fault can name at most; a region has fewer processes.
const MOST_NAMES: usize = 1_024;

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
    let service = InjectorServer::with_interceptor(Asked(injector), check);
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

struct Asked(Arc<Injector>);

#[tonic::async_trait]
impl Service for Asked {
    async fn reach(&self, _: Request<proto::ReachRequest>) -> Result<Response<proto::ReachResponse>, Status> {
        let (processes, links) = (self.0.processes(), self.0.links());
        let drill = self.0.drill().unwrap_or_default();
        Ok(Response::new(proto::ReachResponse { processes, links, drill }))
    }

    async fn inject(&self, request: Request<proto::InjectRequest>) -> Result<Response<proto::Held>, Status> {
        let proto::InjectRequest { lease, drill, faults } = request.into_inner();
        let faults: Vec<Fault> = faults.into_iter().map(fault).collect::<Result<_, _>>()?;
        if faults.iter().map(|fault| fault.on.len() + fault.from.len()).sum::<usize>() > MOST_NAMES {
            return Err(Status::invalid_argument(format!("more than {MOST_NAMES} names")));
        }
        let left = self.0.inject(LeaseId(lease), &drill, &faults).map_err(|error| match &error {
            InjectError::Denied(Denied::Busy) => Status::failed_precondition(error.to_string()),
            InjectError::Denied(Denied::Over) => Status::not_found(error.to_string()),
            InjectError::Unknown { .. } => Status::invalid_argument(error.to_string()),
            InjectError::Failed(_, why) => Status::internal(format!("{error}: {why:#}")),
        })?;
        Ok(Response::new(held(left)))
    }

    async fn renew(&self, request: Request<proto::LeaseRequest>) -> Result<Response<proto::Held>, Status> {
        let left = self.0.renew(LeaseId(request.into_inner().lease));
        left.map(|left| Response::new(held(left))).map_err(|denied| Status::not_found(denied.to_string()))
    }

    async fn remove(&self, request: Request<proto::LeaseRequest>) -> Result<Response<proto::RemoveResponse>, Status> {
        if self.0.remove(LeaseId(request.into_inner().lease)) {
            return Ok(Response::new(proto::RemoveResponse {}));
        }
        Err(Status::unavailable("something could not be mended yet; it is tried again"))
    }
}

fn held(left: Duration) -> proto::Held {
    proto::Held { left_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX) }
}

fn fault(fault: proto::Fault) -> Result<Fault, Status> {
    let act = match fault.act() {
        ActCode::Kill => Act::Kill,
        ActCode::Pause => Act::Pause,
        ActCode::Refuse => Act::Refuse,
        ActCode::Delay => Act::Delay(Duration::from_millis(fault.delay_ms.into())),
        ActCode::Drop => Act::Drop,
        ActCode::Unspecified => return Err(Status::invalid_argument("a fault says what is done")),
    };
    Ok(Fault { act, on: fault.on, from: fault.from })
}

/// In a time that does not tell where they differ.
fn is_same(shown: &[u8], expected: &[u8]) -> bool {
    let differs = shown.iter().zip(expected).fold(0, |differs, (one, other)| differs | (one ^ other));
    shown.len() == expected.len() && differs == 0
}
