//! Who may hold a connection to a sidecar, for how long, and how much of it.

mod support;

use std::time::Duration;

use hyper::body::{Bytes, Frame};
use spillway_core::inference::{InferRequest, Parameters};
use spillway_core::units::TrustDomain;
use spillway_proto::inference::ServerLiveRequest;
use spillway_runtime::authority::Authority;
use spillway_runtime::oip;
use support::fp32;
use support::pod::{Client, GATEWAY, Pod, code, joined_model, resources};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status};
use tower::{Service, ServiceExt};
