//! The embedded backend: ONNX files in this process, run by tract on a bounded number of threads.
//!
//! The rule: the async runtime never computes, at most [`Compute::runs`] runs go on at once, and who
//! waits for one waits no longer than its deadline. A run that has begun cannot be stopped: it keeps
//! its place until it ends.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use prometheus_client::metrics::gauge::Gauge;
use spillway_core::inference::{Datatype, InferRequest, InferResponse, Parameters, Tensor};
use spillway_core::resource::Model;
use spillway_core::units::Name;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout_at;
use tokio_util::task::AbortOnDropHandle;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::{Factoid, GenericFactoid, ShapeFactoid};

use super::facts::{Facts, TensorFact};
use super::occupancy::Occupancy;
use super::{Backend, Call, ModelError, StreamAnswer, StreamRequest, for_caller};
use crate::metrics::Counted;

/// How many models may compute at once in this process, and how many requests may wait for a place.
#[derive(Debug)]
pub struct Compute {
    places: Arc<Semaphore>,
    waiting: Gauge,
    most_waiting: i64,
    occupancy: Occupancy,
}

impl Compute {
    /// One place for each core; more would only make every answer later.
    pub fn for_this_machine(waiting: Gauge) -> Arc<Self> {
        const WAITING_FOR_EACH: i64 = 128;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::new(cores, i64::try_from(cores).map_or(i64::MAX, |cores| cores * WAITING_FOR_EACH), waiting)
    }

    /// What fallbacks get: one place, so that they take little from the models that they stand in for, and
    /// none of theirs, so that those cannot keep them from answering.
    pub fn for_fallbacks(waiting: Gauge) -> Arc<Self> {
        Self::new(1, 8, waiting)
    }

    /// `waiting` shows how many wait.
    pub fn new(runs: usize, most_waiting: i64, waiting: Gauge) -> Arc<Self> {
        Arc::new(Self {
            places: Arc::new(Semaphore::new(runs)),
            waiting,
            most_waiting,
            occupancy: Occupancy::of_places(runs),
        })
    }

    /// Requests that compute or wait to, for each place, on average over the last second or so.
    pub fn load(&self) -> f64 {
        self.occupancy.load()
    }

    async fn run<T: Send + 'static>(
        &self,
        deadline: Instant,
        work: impl FnOnce() -> Result<T, ModelError> + Send + 'static,
    ) -> Result<T, ModelError> {
        let inside = self.occupancy.enter();
        let place = match Arc::clone(&self.places).try_acquire_owned() {
            Ok(place) => place,
            Err(_) => self.wait(deadline).await?,
        };
        // Not begun at all if its caller goes before a thread is free.
        let running = AbortOnDropHandle::new(tokio::task::spawn_blocking(move || {
            let _until_the_end = (place, inside);
            if Instant::now() >= deadline { Err(ModelError::DeadlineExceeded) } else { work() }
        }));
        match timeout_at(deadline.into(), running).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(fault)) => Err(ModelError::Failed(if fault.is_panic() {
                "the model panicked".into()
            } else {
                "the run was stopped".into()
            })),
            Err(_) => Err(ModelError::DeadlineExceeded),
        }
    }

    async fn wait(&self, deadline: Instant) -> Result<tokio::sync::OwnedSemaphorePermit, ModelError> {
        // Left also when the waiting request is cancelled.
        let _waiting = Counted::new(&self.waiting);
        if self.waiting.get() > self.most_waiting {
            return Err(ModelError::Refused("too many requests wait for the embedded backend".into()));
        }
        let place = timeout_at(deadline.into(), Arc::clone(&self.places).acquire_owned()).await;
        place.map_err(|_| ModelError::DeadlineExceeded)?.map_err(|_| ModelError::Unavailable("stopping".into()))
    }
}

/// One model: each of its versions loaded and optimised.
#[derive(Debug)]
pub struct Onnx {
    plans: BTreeMap<Name, Arc<Plan>>,
    compute: Arc<Compute>,
}

#[derive(Debug)]
struct Plan {
    runnable: Arc<TypedRunnableModel>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

#[derive(Debug)]
struct Port {
    name: String,
    datatype: Datatype,
    shape: Vec<i64>,
}

/// A model file cannot be served. The operator's fault; nothing to retry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    #[error("version '{version}': the file {file} cannot be read as an ONNX model: {problem}")]
    File { version: Name, file: String, problem: String },
    #[error(
        "version '{version}': {what} '{name}' is {datatype}, which the embedded backend cannot pass; use the backend triton"
    )]
    Datatype { version: Name, what: &'static str, name: String, datatype: String },
    #[error("loading was stopped")]
    Stopped,
}

impl Onnx {
    /// Loads `<models>/<name>/<version>/model.onnx` for every version of the manifest.
    pub async fn load(
        models: &Path,
        name: &Name,
        manifest: &Arc<Model>,
        compute: &Arc<Compute>,
    ) -> Result<Self, LoadError> {
        let (folder, manifest) = (models.join(name.as_str()), Arc::clone(manifest));
        let load = move || {
            let plan = |version: &Name| {
                let file = folder.join(version.as_str()).join("model.onnx");
                Ok((version.clone(), Arc::new(Plan::load(&file, version, &manifest)?)))
            };
            manifest.versions.iter().map(plan).collect::<Result<BTreeMap<_, _>, LoadError>>()
        };
        let plans = tokio::task::spawn_blocking(load).await.map_err(|_| LoadError::Stopped)??;
        Ok(Self { plans, compute: Arc::clone(compute) })
    }

    fn plan(&self, version: &str) -> Result<&Arc<Plan>, ModelError> {
        self.plans.get(version).ok_or_else(|| ModelError::Unavailable(format!("version '{version}' is not loaded")))
    }
}

#[async_trait]
impl Backend for Onnx {
    async fn facts(&self, version: &Name, _deadline: Instant) -> Result<Facts, ModelError> {
        let plan = self.plan(version.as_str())?;
        let facts = |ports: &[Port]| ports.iter().map(Port::fact).collect();
        Ok(Facts { inputs: facts(&plan.inputs), outputs: facts(&plan.outputs), inputs_are_required: true })
    }

    async fn ready(&self, version: &Name, _deadline: Instant) -> Result<(), ModelError> {
        self.plan(version.as_str()).map(|_| ())
    }

    async fn infer(&self, request: &InferRequest, call: &Call) -> Result<InferResponse, ModelError> {
        let plan = Arc::clone(self.plan(&request.version)?);
        let request = request.clone();
        self.compute.run(call.deadline, move || plan.run(request)).await
    }

    /// Answers each request once, in order.
    async fn stream(
        &self,
        mut requests: mpsc::Receiver<StreamRequest>,
        answers: mpsc::Sender<StreamAnswer>,
        call: &Call,
    ) -> Result<(), ModelError> {
        while let Some(StreamRequest { key, request, deadline }) = requests.recv().await {
            let call = Call { deadline: deadline.min(call.deadline), ..call.clone() };
            let answer = self.infer(&request, &call).await;
            if answers.send(StreamAnswer { key, answer, last: true }).await.is_err() {
                break;
            }
        }
        Ok(())
    }
}

impl Plan {
    fn load(file: &Path, version: &Name, manifest: &Model) -> Result<Self, LoadError> {
        let fault = |problem: TractError| LoadError::File {
            version: version.clone(),
            file: file.display().to_string(),
            problem: format!("{problem:#}"),
        };
        let mut model = onnx().model_for_path(file).map_err(fault)?;
        let inputs = model.input_outlets().map_err(fault)?.to_vec();
        let input_names: Vec<String> = inputs.iter().map(|outlet| model.node(outlet.node).name.clone()).collect();
        let outputs = model.output_outlets().map_err(fault)?.to_vec();
        let output_names: Vec<String> = outputs
            .iter()
            .map(|outlet| {
                model.outlet_label(*outlet).map_or_else(|| model.node(outlet.node).name.clone(), str::to_owned)
            })
            .collect();
        for (index, name) in input_names.iter().enumerate() {
            let fact = named_sizes(&model, index, name, manifest).map_err(fault)?;
            model.set_input_fact(index, fact).map_err(fault)?;
        }
        let model = model.into_optimized().map_err(fault)?;
        let ports = |what, names: &[String], fact: &dyn Fn(usize) -> TractResult<TypedFact>| {
            let port = |(index, name): (usize, &String)| {
                let fact = fact(index).map_err(fault)?;
                let datatype = ours(fact.datum_type).ok_or_else(|| LoadError::Datatype {
                    version: version.clone(),
                    what,
                    name: name.clone(),
                    datatype: format!("{:?}", fact.datum_type),
                })?;
                let shape = fact.shape.iter().map(|size| size.as_i64().unwrap_or(-1)).collect();
                Ok(Port { name: name.clone(), datatype, shape })
            };
            names.iter().enumerate().map(port).collect::<Result<Vec<_>, LoadError>>()
        };
        let inputs = ports("input", &input_names, &|index| model.input_fact(index).cloned())?;
        let outputs = ports("output", &output_names, &|index| model.output_fact(index).cloned())?;
        Ok(Self { runnable: model.into_runnable().map_err(fault)?, inputs, outputs })
    }

    fn run(&self, mut request: InferRequest) -> Result<InferResponse, ModelError> {
        let mut values = TVec::new();
        for port in &self.inputs {
            let tensor = request.inputs.iter().position(|tensor| tensor.name == port.name);
            let tensor = tensor.map(|at| request.inputs.swap_remove(at));
            let tensor = tensor.ok_or_else(|| ModelError::Rejected(format!("input '{}' is missing", port.name)))?;
            values.push(port.value(&tensor)?.into_tvalue());
        }
        let results = self.runnable.run(values).map_err(|fault| ModelError::Failed(for_caller(&fault.to_string())))?;
        let asked = |name: &str| request.outputs.is_empty() || request.outputs.iter().any(|output| output.name == name);
        let outputs = self
            .outputs
            .iter()
            .zip(&results)
            .filter(|(port, _)| asked(&port.name))
            .map(|(port, value)| port.tensor(value));
        Ok(InferResponse {
            outputs: outputs.collect::<Result<_, _>>()?,
            model: request.model,
            version: request.version,
            id: request.id,
            parameters: Parameters::default(),
        })
    }
}

impl Port {
    fn fact(&self) -> TensorFact {
        TensorFact { name: self.name.clone(), datatype: self.datatype.name().into(), shape: self.shape.clone() }
    }

    /// The one copy into aligned memory that tract needs.
    fn value(&self, tensor: &Tensor) -> Result<tract_onnx::prelude::Tensor, ModelError> {
        let rejected = |problem: &str| ModelError::Rejected(format!("input '{}': {problem}", self.name));
        if tensor.datatype != self.datatype {
            return Err(rejected("another datatype than the model's"));
        }
        let shape: Option<Vec<usize>> = tensor.shape.iter().map(|&size| usize::try_from(size).ok()).collect();
        let shape = shape.ok_or_else(|| rejected("a size is negative"))?;
        let datum =
            theirs(self.datatype).ok_or_else(|| rejected("a datatype that the embedded backend cannot pass"))?;
        let mut value =
            tract_onnx::prelude::Tensor::zero_dt(datum, &shape).map_err(|_| rejected("the shape is not usable"))?;
        let bytes = value.as_bytes_mut();
        if bytes.len() != tensor.data.len() {
            return Err(rejected("shape and data differ in length"));
        }
        bytes.copy_from_slice(&tensor.data);
        if self.datatype == Datatype::Bool {
            // Any byte but 0 means true on the wire, but only 0 and 1 are booleans in memory.
            bytes.iter_mut().for_each(|byte| *byte = u8::from(*byte != 0));
        }
        Ok(value)
    }

    fn tensor(&self, value: &TValue) -> Result<Tensor, ModelError> {
        if ours(value.datum_type()) != Some(self.datatype) || !value.is_plain_ram() {
            return Err(ModelError::BadAnswer(format!("output '{}' is {:?}", self.name, value.datum_type())));
        }
        Ok(Tensor {
            name: self.name.clone(),
            datatype: self.datatype,
            shape: value.shape().iter().map(|&size| i64::try_from(size).unwrap_or(i64::MAX)).collect(),
            parameters: Parameters::default(),
            data: Bytes::copy_from_slice(value.as_bytes()),
        })
    }
}

/// An input's fact with a symbol for every size that the file leaves open, so that one plan serves all batch sizes.
///
/// Unnamed leading sizes share one symbol: they are the batch, which is the same for all inputs.
fn named_sizes(model: &InferenceModel, index: usize, name: &str, manifest: &Model) -> TractResult<InferenceFact> {
    let fact = model.input_fact(index)?.clone();
    let open = |axis: usize| {
        let symbol = if axis == 0 { "batch".to_owned() } else { format!("input{index}_axis{axis}") };
        TDim::from(model.symbols.sym(&symbol))
    };
    let sizes: Vec<Option<TDim>> = match fact.shape.rank().concretize() {
        Some(_) => fact.shape.dims().map(GenericFactoid::concretize).collect(),
        // The file names no shape at all: the manifest's word is all there is.
        None => manifest.input(name).map_or_else(Vec::new, |input| {
            input.tensor.shape.iter().map(|&size| (size >= 0).then(|| TDim::from(size))).collect()
        }),
    };
    let sizes =
        sizes.into_iter().enumerate().map(|(axis, size)| GenericFactoid::Only(size.unwrap_or_else(|| open(axis))));
    Ok(fact.with_shape(ShapeFactoid::closed(sizes.collect())))
}

fn ours(datum: DatumType) -> Option<Datatype> {
    Some(match datum {
        DatumType::Bool => Datatype::Bool,
        DatumType::U8 => Datatype::Uint8,
        DatumType::U16 => Datatype::Uint16,
        DatumType::U32 => Datatype::Uint32,
        DatumType::U64 => Datatype::Uint64,
        DatumType::I8 => Datatype::Int8,
        DatumType::I16 => Datatype::Int16,
        DatumType::I32 => Datatype::Int32,
        DatumType::I64 => Datatype::Int64,
        DatumType::F32 => Datatype::Fp32,
        DatumType::F64 => Datatype::Fp64,
        _ => return None,
    })
}

fn theirs(datatype: Datatype) -> Option<DatumType> {
    Some(match datatype {
        Datatype::Bool => DatumType::Bool,
        Datatype::Uint8 => DatumType::U8,
        Datatype::Uint16 => DatumType::U16,
        Datatype::Uint32 => DatumType::U32,
        Datatype::Uint64 => DatumType::U64,
        Datatype::Int8 => DatumType::I8,
        Datatype::Int16 => DatumType::I16,
        Datatype::Int32 => DatumType::I32,
        Datatype::Int64 => DatumType::I64,
        Datatype::Fp32 => DatumType::F32,
        Datatype::Fp64 => DatumType::F64,
        Datatype::Fp16 | Datatype::Bf16 | Datatype::Bytes => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    /// A run that goes on until told; it has begun when this returns.
    async fn occupy(compute: &Arc<Compute>) -> (std::sync::mpsc::Sender<()>, tokio::task::JoinHandle<()>) {
        let (end, ended) = std::sync::mpsc::channel();
        let (begin, begun) = tokio::sync::oneshot::channel();
        let compute = Arc::clone(compute);
        let run = tokio::spawn(async move {
            let work = move || Ok((begin.send(()), ended.recv()));
            let _ = compute.run(far(), work).await;
        });
        begun.await.unwrap();
        (end, run)
    }

    #[test]
    fn t53_cancelled_work_is_not_computed_whether_it_waits_for_a_place_or_for_a_thread() {
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_time().build();
        runtime.unwrap().block_on(async {
            for places in [1, 2] {
                let compute = Compute::new(places, 1, Gauge::default());
                let (end, run) = occupy(&compute).await;
                let computed = Arc::new(AtomicUsize::new(0));
                let one = || {
                    let computed = Arc::clone(&computed);
                    compute.run(far(), move || Ok(computed.fetch_add(1, Ordering::SeqCst)))
                };
                for _ in 0..3 {
                    assert!(tokio::time::timeout(Duration::from_millis(10), one()).await.is_err());
                    assert_eq!(compute.waiting.get(), 0);
                }
                end.send(()).unwrap();
                run.await.unwrap();
                assert_eq!(one().await, Ok(0), "nobody computed before");
            }
        });
    }

    #[tokio::test]
    async fn fallbacks_compute_one_at_a_time_and_eight_wait() {
        let compute = Compute::for_fallbacks(Gauge::default());
        let (end, run) = occupy(&compute).await;
        let soon = Instant::now() + Duration::from_millis(50);
        let one = || compute.run(soon, || Ok(()));
        let ended = futures_util::future::join_all((0..9).map(|_| one())).await;
        let refused = ended.iter().filter(|end| matches!(end, Err(ModelError::Refused(_)))).count();
        let late = ended.iter().filter(|end| **end == Err(ModelError::DeadlineExceeded)).count();
        assert_eq!((refused, late), (1, 8));
        assert!(compute.load() > 0.0);
        end.send(()).unwrap();
        run.await.unwrap();
    }

    /// On the one thread of this test a run that computed there could never be told to end.
    #[tokio::test]
    async fn a_run_leaves_the_async_threads_free() {
        let compute = Compute::new(1, 0, Gauge::default());
        let (end, run) = occupy(&compute).await;
        tokio::task::yield_now().await;
        end.send(()).unwrap();
        run.await.unwrap();
    }
}
