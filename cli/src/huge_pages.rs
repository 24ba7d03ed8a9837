//! Transparent huge pages: what is large has them, what idles has none.
//!
//! The allocator asks for them always, and one byte in use takes 2 MiB: most of what an idle process would have. So gateways,
//! sidecars, control and DNS nodes begin without (prctl(2), PR_SET_THP_DISABLE), and allow them where something large waits.
//! Whoever starts other programs leaves it alone, since they inherit it.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStringExt as _;

use anyhow::Result;
use nix::sys::prctl::{get_thp_disable, set_thp_disable};
use nix::unistd::execv;

/// What was allocated before `main` lies in two of them already. In this program started anew, as the same process, it does
/// not: so this ends here, but in the new start (execve(2) keeps what prctl set) and where a start is not possible.
pub fn begin_without() {
    if get_thp_disable() == Ok(false) && set_thp_disable(true).is_ok() {
        let _ = start_anew();
    }
}

/// What is allocated from now on may lie in them.
pub fn allow_if(large: bool) {
    if large {
        // A kernel that has none refuses, which is as good.
        let _ = set_thp_disable(false);
    }
}

fn start_anew() -> Result<Infallible> {
    let text = |text: OsString| CString::new(text.into_vec());
    let program = text(std::env::current_exe()?.into_os_string())?;
    let arguments = std::env::args_os().map(text).collect::<Result<Vec<_>, _>>()?;
    Ok(execv(&program, &arguments)?)
}
