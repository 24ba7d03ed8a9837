//! The injector as a gRPC service. Who may ask is for an interceptor to say.

use std::sync::Arc;
use std::time::Duration;

use spillway_core::drill::{Act, Denied, LeaseId};
use spillway_proto::drill as proto;
use spillway_proto::drill::fault::Act as ActCode;
use spillway_proto::drill::injector_server::Injector as Service;
use spillway_runtime::audit::{Audit, Event, clipped};
use spillway_runtime::tls::Peer;
use tonic::{Request, Response, Status};

use super::{Fault, InjectError, Injector, LOOK_EVERY};

/// What a fault can name at most; a region has fewer processes.
const MOST_NAMES: usize = 1_024;
/// How long a removal is waited for: processes take a moment to start, and a caller waits for 10 s.
const MENDED_WITHIN: Duration = Duration::from_secs(8);

/// Answers whom an interceptor has let in.
pub struct Asked {
    injector: Arc<Injector>,
    audit: Audit,
}

impl Asked {
    pub fn new(injector: Arc<Injector>, audit: Audit) -> Self {
        Self { injector, audit }
    }
}

#[tonic::async_trait]
impl Service for Asked {
    async fn reach(&self, _: Request<proto::ReachRequest>) -> Result<Response<proto::ReachResponse>, Status> {
        let (processes, links) = (self.injector.processes(), self.injector.links());
        let drill = self.injector.drill().unwrap_or_default();
        Ok(Response::new(proto::ReachResponse { processes, links, drill }))
    }

    async fn inject(&self, request: Request<proto::InjectRequest>) -> Result<Response<proto::Held>, Status> {
        let author = request.extensions().get::<Arc<Peer>>().map(|peer| peer.id.to_string()).unwrap_or_default();
        let proto::InjectRequest { lease, drill, faults } = request.into_inner();
        let faults: Vec<Fault> = faults.into_iter().map(fault).collect::<Result<_, _>>()?;
        if faults.iter().map(|fault| fault.on.len() + fault.from.len()).sum::<usize>() > MOST_NAMES {
            return Err(Status::invalid_argument(format!("more than {MOST_NAMES} names")));
        }
        // What holds a process back from its supervisor may take a while, and links go on meanwhile.
        let (injector, name) = (self.injector.clone(), drill.clone());
        let injected = tokio::task::spawn_blocking(move || injector.inject(LeaseId(lease), &name, &faults)).await;
        let injected = injected.map_err(|lost| Status::internal(lost.to_string()))?;
        let left = injected.map_err(|error| match &error {
            InjectError::Denied(Denied::Busy) => Status::failed_precondition(error.to_string()),
            InjectError::Denied(Denied::Over) => Status::not_found(error.to_string()),
            InjectError::Unknown { .. } => Status::invalid_argument(error.to_string()),
            InjectError::Failed(_, why) => Status::internal(format!("{error}: {why:#}")),
        })?;
        self.audit.record(Event::DrillBegan { drill: clipped(&drill), target: None, author });
        Ok(Response::new(held(left)))
    }

    async fn renew(&self, request: Request<proto::LeaseRequest>) -> Result<Response<proto::Held>, Status> {
        let left = self.injector.renew(LeaseId(request.into_inner().lease));
        left.map(|left| Response::new(held(left))).map_err(|denied| Status::not_found(denied.to_string()))
    }

    async fn remove(&self, request: Request<proto::LeaseRequest>) -> Result<Response<proto::RemoveResponse>, Status> {
        let lease = LeaseId(request.into_inner().lease);
        let mended = async {
            while !self.injector.remove(lease) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        match tokio::time::timeout(MENDED_WITHIN, mended).await {
            Ok(()) => Ok(Response::new(proto::RemoveResponse {})),
            Err(_) => Err(Status::unavailable("something could not be mended yet; it is tried again")),
        }
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
