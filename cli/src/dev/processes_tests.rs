use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::injector::Processes as _;

/// Says that it listens, unless there is a file `broken` beside its settings.
const PROGRAM: &str = "#!/bin/sh
test -e \"${3%/*}/broken\" && exit 1
echo '\"listening\"'
exec sleep 600
";

struct Stand {
    folder: tempfile::TempDir,
    processes: Processes,
    handles: Arc<Handles>,
}

async fn stand() -> Stand {
    let folder = tempfile::tempdir().unwrap();
    let executable = folder.path().join("program");
    std::fs::write(&executable, PROGRAM).unwrap();
    std::fs::set_permissions(&executable, std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = folder.path().join("one.yaml");
    let program = Program { executable, name: "eu/one".into(), command: "gateway", config };
    let mut processes = Processes::default();
    let child = program.start().await.unwrap();
    processes.keep(program, child);
    let handles = processes.handles();
    Stand { folder, processes, handles }
}

impl Stand {
    fn pid(&self) -> Option<u32> {
        self.handles.pid("eu/one")
    }

    fn breaks(&self, broken: bool) {
        let file = self.folder.path().join("broken");
        if broken { std::fs::write(file, "").unwrap() } else { std::fs::remove_file(file).unwrap() }
    }

    async fn until(&self, what: &str, fact: impl Fn(Option<u32>) -> bool) {
        let until = async {
            while !fact(self.pid()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), until).await.unwrap_or_else(|_| panic!("{what}"));
    }
}

fn state(pid: u32) -> Option<char> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(") ")?.1.chars().next()
}

#[tokio::test]
async fn one_whose_restart_fails_is_tried_again_until_it_is_up() {
    let mut stand = stand().await;
    for killed_on_purpose in [true, false] {
        let before = stand.pid().unwrap();
        stand.breaks(true);
        if killed_on_purpose {
            stand.handles.kill("eu/one").unwrap();
            assert_eq!(stand.pid(), None, "from then on");
            stand.until("it dies", |_| state(before).is_none()).await;
            stand.handles.start("eu/one").unwrap();
        } else {
            kill(Pid::from_raw(before.try_into().unwrap()), Signal::SIGKILL).unwrap();
        }
        stand.until("it is gone", |pid| pid.is_none()).await;
        // The first try has failed by then.
        tokio::time::sleep(RESTART_AFTER + Duration::from_millis(500)).await;
        assert_eq!(stand.pid(), None);
        stand.breaks(false);
        stand.until("it is back", |pid| pid.is_some()).await;
        assert_ne!(stand.pid(), Some(before));
    }
    let last = stand.pid().unwrap();
    stand.processes.stop().await;
    assert_eq!(state(last), None);
}

#[tokio::test]
async fn one_that_is_killed_stays_dead_and_one_that_is_paused_stands_still() {
    let mut stand = stand().await;
    let first = stand.pid().unwrap();
    stand.handles.pause("eu/one").unwrap();
    stand.until("it stands still", |_| state(first) == Some('T')).await;
    stand.handles.resume("eu/one").unwrap();
    stand.until("it goes on", |_| state(first) == Some('S')).await;
    stand.handles.kill("eu/one").unwrap();
    stand.handles.pause("eu/one").unwrap();
    stand.until("it dies", |_| state(first).is_none()).await;
    tokio::time::sleep(RESTART_AFTER + Duration::from_millis(500)).await;
    assert_eq!(stand.pid(), None);
    stand.handles.start("eu/one").unwrap();
    stand.until("it is back", |pid| pid.is_some()).await;
    let second = stand.pid().unwrap();
    stand.handles.pause("eu/one").unwrap();
    stand.until("it stands still", |_| state(second) == Some('T')).await;
    stand.processes.stop().await;
    assert_eq!(state(second), None, "also one that stood still ends");
}
