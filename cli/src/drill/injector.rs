//! The way to who breaks things.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use spillway_core::drill::Act;
use spillway_proto::drill as proto;
use spillway_proto::drill::fault::Act as ActCode;
use spillway_proto::drill::injector_client::InjectorClient;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::dev::injector::Fault;

/// Of one call: killing and restarting takes a moment.
const CALL: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(2);

/// An injector. Cheap to clone.
#[derive(Clone)]
pub struct Remote {
    client: InjectorClient<Channel>,
    secret: MetadataValue<Ascii>,
}

/// Why it did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The lease is over, and its faults are gone.
    #[error("the lease is over")]
    Over,
    /// It refused, or could not be reached; a retry may help with the latter.
    #[error("{0}")]
    Failed(String),
}

impl Remote {
    /// By the file that the injector wrote. Connects with the first call.
    pub async fn open(file: &Path) -> Result<Self> {
        let told = || format!("{}: the injector of `spillway dev` writes it", file.display());
        let text = tokio::fs::read(file).await.with_context(told)?;
        let json: Value = serde_json::from_slice(&text).with_context(told)?;
        let address: SocketAddr = json["address"].as_str().and_then(|text| text.parse().ok()).with_context(told)?;
        let secret = json["secret"].as_str().with_context(told)?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?.connect_timeout(CONNECT).timeout(CALL);
        let client = InjectorClient::new(endpoint.connect_lazy());
        Ok(Self { client, secret: format!("Bearer {secret}").parse().with_context(told)? })
    }

    /// Whom it can break, and which drill runs.
    pub async fn reach(&self) -> Result<proto::ReachResponse, RemoteError> {
        let answer = self.client.clone().reach(self.signed(proto::ReachRequest {})).await;
        answer.map(tonic::Response::into_inner).map_err(|status| failed(&status))
    }

    pub async fn inject(&self, lease: u64, drill: &str, faults: &[Fault]) -> Result<(), RemoteError> {
        let faults = faults.iter().map(message).collect();
        let request = proto::InjectRequest { lease, drill: drill.to_owned(), faults };
        self.client.clone().inject(self.signed(request)).await.map(drop).map_err(|status| failed(&status))
    }

    pub async fn renew(&self, lease: u64) -> Result<(), RemoteError> {
        let answer = self.client.clone().renew(self.signed(proto::LeaseRequest { lease })).await;
        answer.map(drop).map_err(|status| failed(&status))
    }

    /// The faults are gone when it returns.
    pub async fn remove(&self, lease: u64) -> Result<(), RemoteError> {
        let answer = self.client.clone().remove(self.signed(proto::LeaseRequest { lease })).await;
        answer.map(drop).map_err(|status| failed(&status))
    }

    fn signed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.secret.clone());
        request
    }
}

fn failed(status: &Status) -> RemoteError {
    match status.code() {
        Code::NotFound => RemoteError::Over,
        _ => RemoteError::Failed(status.message().to_owned()),
    }
}

fn message(fault: &Fault) -> proto::Fault {
    let (act, delay) = match fault.act {
        Act::Kill => (ActCode::Kill, Duration::ZERO),
        Act::Pause => (ActCode::Pause, Duration::ZERO),
        Act::Refuse => (ActCode::Refuse, Duration::ZERO),
        Act::Delay(delay) => (ActCode::Delay, delay),
        Act::Drop => (ActCode::Drop, Duration::ZERO),
    };
    proto::Fault {
        act: act.into(),
        on: fault.on.clone(),
        from: fault.from.clone(),
        delay_ms: u32::try_from(delay.as_millis()).unwrap_or(u32::MAX),
    }
}
