//! The gRPC service: it only translates and calls.
//!
//! The same service stands on the node's port, where every caller has shown a certificate, and on the one for
//! newcomers, where none has: what a caller is follows from the [`Peer`] that the port put beside its request.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use spillway_core::authority::request::{Grant, Names};
use spillway_core::identity::SpiffeId;
use spillway_core::units::{DnsName, InvalidUnit};
use spillway_proto::control::authority_server::{Authority as AuthorityService, AuthorityServer};
use spillway_proto::control::rotate_request::Act;
use spillway_proto::control::{
    BundleRequest, CreateTokenRequest, CreateTokenResponse, IssueRequest, IssueResponse, RotateRequest, Rotation,
    TrustBundle,
};
use spillway_runtime::tls::Peer;
use tonic::{Request, Response, Status};

use super::{Authority, Caller, Refusal, unix_ms};

/// A request is a CSR and a token.
const MOST_BYTES: usize = 64 << 10;

#[derive(Clone, Debug)]
pub struct Service(Arc<Authority>);

impl Authority {
    /// For a port that puts an `Arc<Peer>` beside each request of a caller with a certificate, and its `SocketAddr`.
    pub fn service(self: &Arc<Self>) -> AuthorityServer<Service> {
        AuthorityServer::new(Service(self.clone())).max_decoding_message_size(MOST_BYTES)
    }
}

#[tonic::async_trait]
impl AuthorityService for Service {
    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<IssueResponse>, Status> {
        let caller = caller(&request);
        let outcome = self.0.issue(caller, request.get_ref()).await;
        self.answer(caller, "issue", outcome)
    }

    async fn bundle(&self, request: Request<BundleRequest>) -> Result<Response<TrustBundle>, Status> {
        let caller = caller(&request);
        let outcome = (|| {
            self.0.trusted(caller.peer.ok_or(Refusal::NoProof)?, SystemTime::now())?;
            Ok(TrustBundle { roots: self.0.bundle()? })
        })();
        self.answer(caller, "bundle", outcome)
    }

    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let caller = caller(&request);
        let outcome = async {
            let operator = self.0.operator(caller)?;
            let (grant, life) = order(request.get_ref())?;
            let (token, until) = self.0.create_token(operator, grant, life).await?;
            Ok(CreateTokenResponse { token, until_unix_ms: unix_ms(until) })
        };
        self.answer(caller, "create-token", outcome.await)
    }

    async fn rotate(&self, request: Request<RotateRequest>) -> Result<Response<Rotation>, Status> {
        let caller = caller(&request);
        let outcome = async {
            let operator = self.0.operator(caller)?;
            let RotateRequest { act, root } = request.get_ref();
            match Act::try_from(*act) {
                Ok(Act::Show) => {}
                Ok(Act::Announce) => self.0.announce(operator, root).await?,
                Ok(Act::Withdraw) => self.0.withdraw(operator).await?,
                Err(_) => return Err(Refusal::Argument("this act is not known".into())),
            }
            self.0.rotation()
        };
        self.answer(caller, "rotate", outcome.await)
    }
}

impl Service {
    fn answer<T>(
        &self,
        caller: Caller<'_>,
        action: &'static str,
        outcome: Result<T, Refusal>,
    ) -> Result<Response<T>, Status> {
        outcome.map(Response::new).map_err(|refusal| {
            self.0.refused(caller, action, &refusal);
            refusal.status()
        })
    }
}

impl Authority {
    fn rotation(&self) -> Result<Rotation, Refusal> {
        let roots = self.roots.load();
        let rotation = *roots.as_ref().ok_or(Refusal::NoSigner)?.rotation();
        Ok(Rotation {
            stage: rotation.stage.name().into(),
            signs: rotation.signs.to_string(),
            other: rotation.other().map(|root| root.to_string()).unwrap_or_default(),
            next_stage_unix_ms: rotation.next_stage(&self.pace()).map_or(0, unix_ms),
            ready: self.signers.load().roots().map(|root| root.to_string()).collect(),
        })
    }
}

fn caller<T>(request: &Request<T>) -> Caller<'_> {
    let extensions = request.extensions();
    Caller { peer: extensions.get::<Arc<Peer>>().map(|peer| &**peer), address: extensions.get::<SocketAddr>().copied() }
}

fn order(request: &CreateTokenRequest) -> Result<(Grant, Option<Duration>), Refusal> {
    const ADDRESS: InvalidUnit = InvalidUnit("an IP address");
    let CreateTokenRequest { id, dns_names, addresses, life_seconds } = request;
    let id = SpiffeId::parse(id).map_err(|error| Refusal::Argument(error.to_string()))?;
    let dns = dns_names.iter().map(|name| DnsName::host(name)).collect::<Result<BTreeSet<_>, _>>()?;
    let address = |text: &String| text.parse::<IpAddr>().map_err(|_| ADDRESS);
    let addresses = addresses.iter().map(address).collect::<Result<BTreeSet<_>, _>>()?;
    let life = (*life_seconds > 0).then(|| Duration::from_secs(*life_seconds));
    Ok((Grant { id, names: Names { dns, addresses } }, life))
}
