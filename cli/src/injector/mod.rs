//! What breaks things for drills, and mends them: in `spillway dev`, and on the machines of a deployment.
//!
//! The rule: faults live on a lease of [`Lease::LIFE`]. When nobody renews it, they are taken away here, whatever
//! became of the drill; what cannot be mended at once is tried again until it is, and until then there is no other
//! drill. A drill is injected whole or not at all, and there is one at a time.
//!
//! * [`relay`]: links that can be refused, slow or silent. [`source`]: which process is at the other end of one.
//! * [`service`]: what is asked of it. Whom it lets in is said by [`crate::dev`] and by [`node`].
//! * [`node`]: `spillway injector`. [`settings`]: its settings. [`host`]: the processes that they name.

mod host;
pub mod node;
pub mod relay;
pub mod service;
pub mod settings;
mod source;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use parking_lot::Mutex;
use spillway_core::drill::{Act, Denied, Lease, LeaseId};

use relay::{Links, Mode, Rule};

/// How soon after its end a lease's faults are gone.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What `spillway injector` is called with.
pub use settings::InjectorSettings;

/// The processes that can be broken. Names are those of drills, such as `eu-west/gateway`. No call waits for what it
/// began.
pub trait Processes: Send + Sync {
    fn names(&self) -> Vec<String>;
    /// None: it does not run, or was killed.
    fn pid(&self, name: &str) -> Option<u32>;
    /// It dies at once, and stays dead until [`Processes::start`].
    fn kill(&self, name: &str) -> Result<()>;
    /// It stands still until [`Processes::resume`].
    fn pause(&self, name: &str) -> Result<()>;
    fn resume(&self, name: &str) -> Result<()>;
    /// Begins to start one that was killed, until it runs. One that runs stays as it is.
    fn start(&self, name: &str) -> Result<()>;
    /// Those that can be told apart when they come through a link.
    fn callers(&self) -> Vec<String> {
        self.names()
    }
    /// Who it is that came from there to a link. Blocks.
    fn caller(&self, from: SocketAddr, to: SocketAddr) -> Option<String> {
        let running = self.names().into_iter().filter_map(|name| Some((self.pid(&name)?, name)));
        source::process_of(from, to, &running.collect::<Vec<_>>())
    }
}

/// One fault, with names instead of patterns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub act: Act,
    pub on: Vec<String>,
    pub from: Vec<String>,
}

/// Why nothing was injected.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("there is no {what} '{name}'")]
    Unknown { what: &'static str, name: String },
    #[error("'{0}' could not be broken; what was is being mended")]
    Failed(String, #[source] anyhow::Error),
}

/// Shared as an `Arc`; [`Injector::tend`] must run.
pub struct Injector {
    processes: Arc<dyn Processes>,
    links: Arc<Links>,
    began: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lease: Lease,
    drill: String,
    /// What there is to mend.
    broken: Vec<Broken>,
}

enum Broken {
    Killed(String),
    Paused(String),
    Links,
}

impl Injector {
    pub fn new(processes: Arc<dyn Processes>, links: Arc<Links>) -> Arc<Self> {
        Arc::new(Self { processes, links, began: Instant::now(), state: Mutex::default() })
    }

    /// Takes away the faults of leases that are over, until dropped.
    pub async fn tend(self: Arc<Self>) {
        loop {
            self.mend_if_over();
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    pub fn processes(&self) -> Vec<String> {
        self.processes.names()
    }

    pub fn links(&self) -> Vec<String> {
        self.links.names()
    }

    /// The drill that runs.
    pub fn drill(&self) -> Option<String> {
        let state = self.state.lock();
        (!state.lease.is_free()).then(|| state.drill.clone())
    }

    /// Begins a lease and injects. What is left of the lease.
    pub fn inject(&self, id: LeaseId, drill: &str, faults: &[Fault]) -> Result<Duration, InjectError> {
        self.check(faults)?;
        let mut state = self.state.lock();
        state.lease.grant(id, self.began.elapsed())?;
        drill.clone_into(&mut state.drill);
        eprintln!("drill {drill}: injecting");
        let broken = faults.iter().try_for_each(|fault| self.break_one(fault, &mut state));
        if let Err((name, problem)) = broken {
            state.lease.give_back(id);
            self.mend(&mut state);
            return Err(InjectError::Failed(name, problem));
        }
        Ok(state.lease.left(self.began.elapsed()))
    }

    /// What is left of the lease then.
    pub fn renew(&self, id: LeaseId) -> Result<Duration, Denied> {
        let mut state = self.state.lock();
        let now = self.began.elapsed();
        state.lease.renew(id, now)?;
        Ok(state.lease.left(now))
    }

    /// Ends a lease. Whether nothing of it is left.
    pub fn remove(&self, id: LeaseId) -> bool {
        let mut state = self.state.lock();
        state.lease.give_back(id);
        if state.lease.is_held_by_another(id) {
            return true;
        }
        self.mend(&mut state);
        state.lease.is_free()
    }

    /// Takes all faults away, whoever holds their lease.
    pub fn end(&self) -> bool {
        let mut state = self.state.lock();
        state.lease.expire(Duration::MAX);
        self.mend(&mut state);
        state.lease.is_free()
    }

    fn mend_if_over(&self) {
        let mut state = self.state.lock();
        if state.lease.expire(self.began.elapsed()) {
            self.mend(&mut state);
        }
    }

    fn check(&self, faults: &[Fault]) -> Result<(), InjectError> {
        let (processes, links, callers) = (self.processes(), self.links(), self.processes.callers());
        for fault in faults {
            let (on, what) = if fault.act.is_of_links() { (&links, "link") } else { (&processes, "process") };
            for (names, known, what) in [(&fault.on, on, what), (&fault.from, &callers, "caller")] {
                if let Some(name) = names.iter().find(|name| !known.contains(name)) {
                    return Err(InjectError::Unknown { what, name: name.clone() });
                }
            }
        }
        Ok(())
    }

    fn break_one(&self, fault: &Fault, state: &mut State) -> Result<(), (String, anyhow::Error)> {
        for name in &fault.on {
            let done = match fault.act {
                // Noted before: what failed half-way is mended too.
                Act::Kill => {
                    state.broken.push(Broken::Killed(name.clone()));
                    self.processes.kill(name)
                }
                Act::Pause => {
                    state.broken.push(Broken::Paused(name.clone()));
                    self.processes.pause(name)
                }
                Act::Refuse | Act::Delay(_) | Act::Drop => {
                    state.broken.push(Broken::Links);
                    let mode = match fault.act {
                        Act::Delay(delay) => Mode::Delay(delay),
                        Act::Drop => Mode::Drop,
                        Act::Refuse | Act::Kill | Act::Pause => Mode::Refuse,
                    };
                    self.links.add_rule(name, Rule { mode, from: fault.from.clone() });
                    Ok(())
                }
            };
            done.map_err(|problem| (name.clone(), problem))?;
        }
        Ok(())
    }

    /// Mends what it can, and ends the lease when all is mended.
    fn mend(&self, state: &mut State) {
        if state.lease.is_free() {
            return;
        }
        state.broken.retain(|broken| {
            let (name, mended) = match broken {
                Broken::Killed(name) => {
                    let runs = |()| self.processes.pid(name).is_some();
                    (name.as_str(), self.processes.start(name).map(runs))
                }
                Broken::Paused(name) => (name.as_str(), self.processes.resume(name).map(|()| true)),
                Broken::Links => {
                    self.links.clear();
                    ("links", Ok(true))
                }
            };
            let told = |problem: &_| eprintln!("{name} could not be mended, to be tried again: {problem:#}");
            !mended.inspect_err(told).unwrap_or(false)
        });
        if state.broken.is_empty() {
            eprintln!("drill {}: all faults removed", state.drill);
            state.lease.ended();
        }
    }
}

#[cfg(test)]
mod tests;
