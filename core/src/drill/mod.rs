//! Drills: a fault on purpose, under guard, and how long it took to get over it.
//!
//! The rule: nothing is broken that the rest could not bear, what is broken mends itself when nobody watches, and
//! the figures come from what clients saw. What reacts to the fault is what reacts every day: no process knows that it
//! is a drill.
//!
//! In reading order:
//!
//! * [`definition`]: what an operator writes; [`fault`]: what is done to whom; [`builtin`]: drills that come along.
//! * [`preflight`]: why a drill must not begin now.
//! * [`course`]: one run, from the preflight to its report. [`guard`]: what ends it early.
//! * [`lease`]: the faults' hold on life, kept by whoever injects. [`notice`]: what everybody is told of a drill.
//! * [`record`]: from observations to [`timeline`] marks and counts.
//! * [`report`]: the figures, judged; [`text`] and [`picture`] show them. [`history`]: the last ten runs.

pub mod builtin;
pub mod course;
pub mod definition;
pub mod fault;
pub mod guard;
pub mod history;
pub mod lease;
pub mod notice;
pub mod picture;
pub mod preflight;
pub mod record;
pub mod report;
pub mod text;
pub mod timeline;

pub use course::{Course, End, Event, Order, Stage};
pub use definition::{Drill, Expected, Heartbeat, Load, Objectives};
pub use fault::{Act, Fault, Names};
pub use guard::{Breach, Guards, Sample};
pub use history::Past;
pub use lease::{Denied, Lease, LeaseId};
pub use notice::{Announced, Board, Notice};
pub use preflight::{Announcement, Refusal, Situation, choose_target, preflight};
pub use record::{Recorder, Request, Sight};
pub use report::{Outcome, Report};
pub use timeline::{Mark, Timeline};
