//! Elections in any order, on a real file: starts, ends, leaders that were paused and do not know what happened since.

use proptest::prelude::*;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::*;
use crate::store::{StoreSettings, Write};

const NODES: usize = 3;
const SOON: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A process starts with the file, in place of its own one before, if that runs.
    Start(usize),
    /// It drains.
    Stop(usize),
    /// It looks whether it leads, and is paused before it writes.
    Pause(usize),
    /// It goes on, and writes by what it knew.
    Write(usize),
    /// Two go on at the same time.
    Race(usize, usize),
    /// One that leads no more is given the time to hear of it.
    Notice(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = || 0..NODES;
    let step = prop_oneof![
        2 => node().prop_map(Step::Start),
        1 => node().prop_map(Step::Stop),
        3 => node().prop_map(Step::Pause),
        3 => node().prop_map(Step::Write),
        2 => (node(), node()).prop_map(|(one, other)| Step::Race(one, other)),
        1 => node().prop_map(Step::Notice),
    ];
    proptest::collection::vec(step, 1..24)
}

struct Process {
    store: Store,
    leading: Arc<Leading>,
    drain: Drain,
    task: JoinHandle<()>,
    /// What it knew when it was paused.
    knew: Option<Fence>,
}

impl Process {
    async fn start(folder: &TempDir, node: usize) -> Self {
        let file = StoreSettings::Sqlite(folder.path().join("control.db"));
        let store = Store::open(&file).await.unwrap();
        let name = Name::parse(&format!("c-{node}")).unwrap();
        let leading = Leading::new(store.clone(), name, "127.0.0.1:1".into(), Audit::off(), &Metrics::new("test"));
        let drain = Drain::new(Duration::from_secs(1));
        let task = tokio::spawn(leading.clone().run(drain.clone()));
        let mut fences = leading.fences();
        tokio::time::timeout(SOON, fences.wait_for(Option::is_some)).await.expect("it is elected").unwrap();
        Self { store, leading, drain, task, knew: None }
    }

    async fn stop(self) {
        self.drain.start();
        tokio::time::timeout(SOON, self.task).await.expect("it ends").unwrap();
        assert_eq!(self.leading.fence(), None);
    }

    /// The epoch that it wrote in. None: it knew of none, or was refused.
    async fn write(&self) -> Option<u64> {
        let fence = self.knew.clone()?;
        let write = Write::Put("plan".into(), fence.epoch.to_be_bytes().to_vec().into());
        match self.store.commit(&fence, &[], vec![write]).await {
            Ok(_) => Some(fence.epoch),
            Err(StoreError::Fenced(epoch)) => {
                assert_eq!(epoch, fence.epoch);
                None
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// What happened, and what must hold of it.
struct World {
    folder: TempDir,
    processes: [Option<Process>; NODES],
    /// Of the last election: who won it, and which one it was. None: whoever won it has ended.
    newest: Option<(usize, u64)>,
    epoch: u64,
}

impl World {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), processes: [const { None }; NODES], newest: None, epoch: 0 }
    }

    async fn step(&mut self, step: Step) {
        match step {
            Step::Start(node) => {
                // It was killed, if it ran: nothing of it is asked.
                if let Some(before) = self.processes[node].take() {
                    before.task.abort();
                }
                let process = Process::start(&self.folder, node).await;
                let epoch = process.leading.fence().expect("it leads").epoch;
                assert!(epoch > self.epoch, "{epoch} after {}", self.epoch);
                (self.epoch, self.newest) = (epoch, Some((node, epoch)));
                self.processes[node] = Some(process);
            }
            Step::Stop(node) => {
                if let Some(process) = self.processes[node].take() {
                    process.stop().await;
                    self.newest.take_if(|(leader, _)| *leader == node);
                }
            }
            Step::Pause(node) => {
                if let Some(process) = &mut self.processes[node] {
                    process.knew = process.leading.fence();
                }
            }
            Step::Write(node) => {
                if let Some(process) = &self.processes[node] {
                    self.check(node, process.write().await);
                }
            }
            Step::Race(one, other) => {
                if let (Some(first), Some(second)) = (&self.processes[one], &self.processes[other]) {
                    let (first, second) = tokio::join!(first.write(), second.write());
                    self.check(one, first);
                    self.check(other, second);
                }
            }
            Step::Notice(node) => {
                if let Some(process) = &self.processes[node]
                    && self.newest.is_none_or(|(leader, _)| leader != node)
                {
                    let mut fences = process.leading.fences();
                    tokio::time::timeout(SOON, fences.wait_for(Option::is_none))
                        .await
                        .expect("it hears of it")
                        .unwrap();
                    assert_eq!(process.leading.fence(), None);
                }
            }
        }
    }

    /// Only what the last election's winner wrote was taken.
    fn check(&self, node: usize, wrote: Option<u64>) {
        if let Some(epoch) = wrote {
            assert_eq!(self.newest, Some((node, epoch)), "a past leader's write was taken");
        }
        let process = self.processes[node].as_ref().expect("it wrote");
        let knew = process.knew.as_ref().map(|fence| (node, fence.epoch));
        if knew.is_some() && knew == self.newest {
            assert!(wrote.is_some(), "the leader's write was refused");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn only_the_last_elections_winner_writes(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let mut world = World::new();
            for step in steps {
                world.step(step).await;
            }
        });
    }
}
