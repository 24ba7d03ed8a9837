//! What breaks things in `spillway dev` for drills, and mends them.
//!
//! The rule: faults live on a lease of [`Lease::LIFE`]. When nobody renews it, they are taken away here, whatever
//! became of the drill; what cannot be mended at once is tried again until it is. A drill is injected whole or not at
//! all, and there is one at a time.
//!
//! * [`relay`]: links that can be refused, slow or silent. [`source`]: which process is at the other end of one.
//! * [`service`]: who may ask, over loopback.

pub mod relay;
pub mod service;
mod source;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use parking_lot::Mutex;
use spillway_core::drill::{Act, Denied, Lease, LeaseId};

use relay::{Links, Mode, Rule};

/// How soon after its end a lease's faults are gone.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The processes that can be broken. Names are those of drills, such as `eu-west/gateway`. No call waits for what it
/// began.
pub trait Processes: Send + Sync {
    fn names(&self) -> Vec<String>;
    /// None: it does not run.
    fn pid(&self, name: &str) -> Option<u32>;
    /// It dies at once, and stays dead until [`Processes::start`].
    fn kill(&self, name: &str) -> Result<()>;
    /// It stands still until [`Processes::resume`].
    fn pause(&self, name: &str) -> Result<()>;
    fn resume(&self, name: &str) -> Result<()>;
    /// Begins to start one that was killed. One that runs stays as it is.
    fn start(&self, name: &str) -> Result<()>;
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
    #[error("'{0}' could not be broken; what was is mended")]
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

    fn mend_if_over(&self) {
        let mut state = self.state.lock();
        if state.lease.expire(self.began.elapsed()) {
            self.mend(&mut state);
        }
    }

    fn check(&self, faults: &[Fault]) -> Result<(), InjectError> {
        let (processes, links) = (self.processes(), self.links());
        for fault in faults {
            let (on, what) = if fault.act.is_of_links() { (&links, "link") } else { (&processes, "process") };
            for (names, known, what) in [(&fault.on, on, what), (&fault.from, &processes, "process")] {
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
            let (name, done) = match broken {
                Broken::Killed(name) => (name.as_str(), self.processes.start(name)),
                Broken::Paused(name) => (name.as_str(), self.processes.resume(name)),
                Broken::Links => {
                    self.links.clear();
                    ("links", Ok(()))
                }
            };
            done.inspect_err(|problem| eprintln!("{name} could not be mended, to be tried again: {problem:#}")).is_err()
        });
        if state.broken.is_empty() {
            eprintln!("drill {}: all faults removed", state.drill);
            state.lease.ended();
        }
    }
}

#[cfg(test)]
mod tests;
