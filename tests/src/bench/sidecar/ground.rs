//! What a sidecar is measured on: one core for what is measured, one for who asks and who answers; a region with
//! one pod; calls of the model `phishing` whose answers are known.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use prost::Message;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite::TLS13_AES_128_GCM_SHA256};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use spillway_proto::inference::ModelInferResponse;
use spillway_runtime::tls::IdentitySettings;

use crate::bench::message::{frame, unframed};
use crate::bench::process::{self, Process};
use crate::harness::inference::{Asked, Case, TOLERANCE, message};
use crate::harness::region::Region;

#[derive(Clone, Copy, Debug)]
pub struct Cores {
    /// For what is measured.
    pub edge: usize,
    /// For the load and the model server.
    pub load: usize,
}

impl Cores {
    pub fn of_this_machine() -> Result<Self> {
        let [edge, load, ..] = process::cores()?[..] else {
            bail!("the bench needs two cores: one for what is measured, one for the load");
        };
        Ok(Self { edge, load })
    }
}

/// A region with one pod whose gateway has one thread, not started yet.
pub fn region(name: &str) -> Region {
    let mut region = Region::new(name);
    region.set_pods(1);
    region.gateway_settings = "threads: 1\n".into();
    // Longer than any run: what is in memory stays there.
    region.features = region.features.replace("memory: 64MiB", "memory: { size: 64MiB, keep: 1h }");
    region.issue("gateway-0", "region/eu-west/gateway/gateway-0", LIFE);
    // Judged for each request, and never reached.
    let limit = "\n  limits: [{ name: requests, per: tenant, rate: 1000000/s }]";
    region.edit(
        "tenants.yaml",
        "spec: { description: Uses the model }",
        &format!("spec:\n  description: Uses the model{limit}"),
    );
    region
}

const LIFE: std::time::Duration = std::time::Duration::from_secs(3_600);

/// The bench's own model server, in a process of its own on the load's core.
pub fn model_server(region: &Region, cores: Cores) -> Result<(Process, SocketAddr)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("model-server");
    let (process, line) = Process::start(&mut command, &[cores.load], &region.folder.join("model-server.log"))?;
    let listening: serde_json::Value = serde_json::from_str(&line)?;
    let address = listening["listening"].as_str().context("the model server does not say where it listens")?;
    Ok((process, address.parse()?))
}

/// What the load dials with: HTTP/2, and one cipher suite, so that all servers speak the same.
pub fn dial_as(identity: &IdentitySettings) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(&identity.trust_bundle)? {
        roots.add(root?)?;
    }
    let chain = CertificateDer::pem_file_iter(&identity.certificate)?.collect::<Result<_, _>>()?;
    let suites = vec![TLS13_AES_128_GCM_SHA256];
    let provider = CryptoProvider { cipher_suites: suites, ..aws_lc_rs::default_provider() };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(&identity.key)?)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// A call for each case, by the entity whose features are known.
pub fn by_entity(cases: &[Case]) -> Vec<Bytes> {
    cases.iter().map(|case| frame(&message(&Asked::Entity(&case.entity)))).collect()
}

/// A call for each case, with the client's own features.
pub fn by_features(cases: &[Case]) -> Vec<Bytes> {
    cases.iter().map(|case| frame(&message(&Asked::RawFeatures(std::slice::from_ref(case))))).collect()
}

/// Whether an answer is the score of this case.
pub fn check_score(answer: &[u8], case: &Case) -> Result<()> {
    let message = unframed(answer).context("no whole gRPC message")?;
    let answer = ModelInferResponse::decode(message)?;
    let [output] = &answer.outputs[..] else { bail!("expected one output: {answer:?}") };
    ensure!(output.name == "score" && output.datatype == "FP32" && output.shape == [1, 1], "no score: {output:?}");
    let [raw] = &answer.raw_output_contents[..] else { bail!("expected one raw output: {answer:?}") };
    let score = f32::from_le_bytes(raw[..].try_into().context("expected one FP32")?);
    ensure!((score - case.score).abs() <= TOLERANCE, "{case:?} got {score}");
    Ok(())
}

/// One thread on the load's core, where calls are made.
pub fn on_load_core<T>(cores: Cores, work: impl Future<Output = Result<T>>) -> Result<T> {
    process::on_cores(&[cores.load], || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        tokio::task::LocalSet::new().block_on(&runtime, work)
    })?
}

/// Starts processes on the core of what is measured.
pub fn on_edge_core<T>(cores: Cores, start: impl Future<Output = T>) -> Result<T> {
    process::on_cores(&[cores.edge], || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(start))
    })?
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;
    use spillway_proto::inference::model_infer_response::InferOutputTensor;

    use super::*;
    use crate::harness::inference::cases;

    #[test]
    fn only_the_score_of_the_case_passes() {
        let case = cases().remove(0);
        let answer = |score: f32| {
            let mut raw = bytes::BytesMut::new();
            raw.put_f32_le(score);
            let output = InferOutputTensor {
                name: "score".into(),
                datatype: "FP32".into(),
                shape: vec![1, 1],
                ..Default::default()
            };
            frame(&ModelInferResponse {
                outputs: vec![output],
                raw_output_contents: vec![raw.freeze()],
                ..Default::default()
            })
        };
        assert!(check_score(&answer(case.score), &case).is_ok());
        assert!(check_score(&answer(case.score + 1e-3), &case).is_err());
        assert!(check_score(&frame(&ModelInferResponse::default()), &case).is_err());
        assert!(check_score(b"", &case).is_err());
    }
}
