//! A tensor of 1 MiB from the client through gateway and sidecar to a model server, beside two Envoys in a row.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use spillway_figures::Goal;
use spillway_proto::inference::model_infer_request::InferInputTensor;
use spillway_proto::inference::{ModelInferRequest, ModelInferResponse};

use crate::bench::message::{frame, unframed};
use crate::bench::peers::envoy_version;
use crate::bench::process;
use crate::bench::results::{Results, figure, verdict};
use crate::bench::sidecar::callers::{Callers, Window, Work};
use crate::bench::sidecar::envoy::{self, Place};
use crate::bench::sidecar::ground::{self, Cores};
use crate::bench::sidecar::model_server::{TENSOR, TENSOR_COLUMNS, TENSOR_INPUT, TENSOR_OUTPUT, checksum};
use crate::bench::sidecar::{Extent, turns};
use crate::bench::statistics::median;

const CONNECTIONS: usize = 2;
/// Calls in flight on each connection.
const STREAMS: usize = 2;
/// Different tensors that are sent in turn.
const TENSORS: u32 = 4;
/// CPU of both hops for each call, ours to Envoy's.
const GOAL: Goal = Goal::AtMost(0.6);
/// By reading the code, held against `perf record --call-graph dwarf` of both processes.
const COPIES: &str = "\
Copies of each byte of the tensor in user space, beside decryption (both hops) and encryption (the gateway), which are done in place, and the kernel's two\n\
a hop. Gateway, 4: out of the TLS record into rustls' queue, from there into h2's buffer, into the whole body, whose size the message's prefix says, into\n\
the TLS record that is sent. Sidecar, 3: into rustls' queue, into h2's buffer, into the message that tonic collects; its tensors go to the model server\n\
from there. Decoding, checking and joining copy nothing: a tensor stays a slice of the message that brought it.";
const MODEL: &str = "
---
apiVersion: spillway/v1
kind: Model
metadata: { name: tensor }
spec:
  pools: [scorers]
  versions: [\"1\"]
  backend: triton
  deadline: 5s
  routing: { policy: least_request }
  inputs: [{ name: values, datatype: FP32, shape: [-1, 262144] }]
  outputs: [{ name: sum, datatype: UINT64, shape: [-1, 1] }]
";

struct Subject {
    title: String,
    callers: Callers,
    /// The hop next to the client, then the one next to the model server.
    pids: [u32; 2],
}

pub fn run(extent: &Extent, results: &mut Results) -> Result<()> {
    let cores = Cores::of_this_machine()?;
    let mut region = ground::region("bench-tensor");
    let (_model_server, model_server) = ground::model_server(&region, cores)?;
    region.use_triton(model_server);
    region.resources.get_mut("model.yaml").context("there is no model")?.push_str(MODEL);
    region.edit("tenants.yaml", r#"models: ["phishing"]"#, r#"models: ["phishing", "tensor"]"#);
    ground::on_edge_core(cores, async {
        region.start_sidecars().await;
        region.start_gateway().await;
    })?;
    let inner = envoy::start(Place::Sidecar, &region, model_server, cores.edge)?;
    let outer = envoy::start(Place::Gateway, &region, inner.address, cores.edge)?;
    let version = envoy_version()?;
    results.peer("Envoy", &version);
    let [gateway, sidecar] = [region.gateway(), region.sidecars.first().context("there is no sidecar")?];
    let pids = [u32::try_from(gateway.pid().as_raw())?, u32::try_from(sidecar.pid().as_raw())?];
    let tls = ground::dial_as(&region.identity("acme"))?;
    ground::on_load_core(cores, async {
        let connect = async |address| Callers::connect(address, &tls, CONNECTIONS, work()).await;
        let subjects = [
            Subject { title: "Spillway".into(), callers: connect(gateway.address).await?, pids },
            Subject {
                title: format!("Envoy {version}"),
                callers: connect(outer.address).await?,
                pids: [outer.pid, inner.pid],
            },
        ];
        let mut found: Vec<Vec<Turn>> = subjects.iter().map(|_| Vec::new()).collect();
        for turn in turns(subjects.len(), extent.repetitions) {
            let Subject { title, callers, pids } = &subjects[turn];
            let window = callers.closed(STREAMS, extent, pids).await.with_context(|| title.clone())?;
            let resident = process::resident(pids[0])? + process::resident(pids[1])?;
            found[turn].push(Turn { window, resident });
        }
        report(extent, &subjects, &found, results)
    })
}

struct Turn {
    window: Window,
    /// Of both hops, bytes.
    resident: u64,
}

fn work() -> Work {
    let tensors: Vec<Bytes> = (0..TENSORS).map(tensor).collect();
    let sums: Vec<u64> = tensors.iter().map(|tensor| checksum(tensor)).collect();
    let bodies = tensors.into_iter().map(|tensor| {
        frame(&ModelInferRequest {
            model_name: TENSOR.into(),
            inputs: vec![InferInputTensor {
                name: TENSOR_INPUT.into(),
                datatype: "FP32".into(),
                shape: vec![1, TENSOR_COLUMNS as i64],
                ..InferInputTensor::default()
            }],
            raw_input_contents: vec![tensor],
            ..ModelInferRequest::default()
        })
    });
    Work { bodies: bodies.collect(), check: Box::new(move |at, _, answer| check_sum(answer, sums[at])) }
}

fn tensor(number: u32) -> Bytes {
    let mut raw = BytesMut::with_capacity(TENSOR_COLUMNS * size_of::<f32>());
    for column in 0..TENSOR_COLUMNS {
        raw.put_f32_le(number as f32 + column as f32 / 8.0);
    }
    raw.freeze()
}

fn check_sum(answer: &[u8], expected: u64) -> Result<()> {
    let message = unframed(answer).context("no whole gRPC message")?;
    let answer = ModelInferResponse::decode(message)?;
    let [output] = &answer.outputs[..] else { bail!("expected one output: {answer:?}") };
    let [raw] = &answer.raw_output_contents[..] else { bail!("expected one raw output: {answer:?}") };
    let sum = u64::from_le_bytes(raw[..].try_into().context("expected one UINT64")?);
    ensure!(output.name == TENSOR_OUTPUT && sum == expected, "the tensor's sum is {sum} in place of {expected}");
    Ok(())
}

fn report(extent: &Extent, subjects: &[Subject], found: &[Vec<Turn>], results: &mut Results) -> Result<()> {
    let mut text = format!(
        "## A tensor of 1 MiB through both hops\n\n\
         `ModelInfer` with one FP32 tensor of 1 MiB as raw contents, answered with its checksum: client, mTLS h2, gateway, mTLS h2, sidecar, plain h2, model\n\
         server; or two Envoys in the places of gateway and sidecar, which check the callers' SPIFFE ids, keep a rate limit and log as these do. Both hops\n\
         share one core, load and model server have the other. {CONNECTIONS} connections with {STREAMS} calls in flight each; {} turns of {} s each, interleaved.\n\
         Median [95 % interval].\n\n\
         | | CPU µs/call, both hops | first hop | second hop | calls/s | p50 ms | p99 ms | memory MiB |\n|---|---|---|---|---|---|---|---|\n",
        extent.repetitions,
        extent.measure.as_secs_f64(),
    );
    let cpu = |turns: &[Turn]| turns.iter().map(|turn| turn.window.cpu_us()).collect::<Vec<f64>>();
    for (Subject { title, .. }, turns) in subjects.iter().zip(found) {
        let value = |of: &dyn Fn(&Turn) -> f64| median(&turns.iter().map(of).collect::<Vec<f64>>()).value;
        results.sample("tensor", title, "cpu", "us", &cpu(turns));
        writeln!(
            text,
            "| {title} | {:.0} | {:.0} | {:.0} | {:.0} | {:.2} | {:.2} | {:.0} |",
            median(&cpu(turns)),
            value(&|turn| turn.window.cpu_us_of(0)),
            value(&|turn| turn.window.cpu_us_of(1)),
            value(&|turn| turn.window.per_second()),
            value(&|turn| turn.window.quantile_us(0.5) / 1e3),
            value(&|turn| turn.window.quantile_us(0.99) / 1e3),
            value(&|turn| turn.resident as f64 / f64::from(1 << 20)),
        )?;
        let name = if title == "Spillway" { "cpu_us" } else { "envoy_cpu_us" };
        figure(&format!("speed.tensor.{name}"), median(&cpu(turns)).value, "us", Goal::None);
    }
    if let [ours, theirs] = found {
        let ratios: Vec<f64> = cpu(ours).iter().zip(cpu(theirs)).map(|(ours, theirs)| ours / theirs).collect();
        let ratio = median(&ratios);
        figure("speed.tensor.cpu_ratio_envoy", ratio.value, "ratio", GOAL);
        let verdict = verdict(ratio.value, GOAL);
        writeln!(text, "\nRatio of CPU per call, Spillway to Envoy: **{ratio}**; goal at most 0.6: {verdict}.")?;
    }
    write!(text, "\n{COPIES}")?;
    results.add(text.trim_end().to_owned());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_has_one_mebibyte_and_no_two_are_the_same() {
        assert_eq!(tensor(0).len(), 1 << 20);
        let sums: std::collections::BTreeSet<u64> = (0..TENSORS).map(|number| checksum(&tensor(number))).collect();
        assert_eq!(sums.len(), TENSORS as usize);
        assert!(MODEL.contains(&format!("shape: [-1, {TENSOR_COLUMNS}]")) && MODEL.contains(TENSOR_OUTPUT));
    }
}
