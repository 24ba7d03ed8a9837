//! Which regions get traffic, and how much of what is planned for them.
//!
//! In the order in which evidence becomes weight:
//!
//! * [`probe`]: what one vantage knows of one gateway.
//! * [`verdict`]: what all vantages together say of a region.
//! * [`soft`]: whether a region that answers does so too slowly or too badly.
//! * [`region`]: how a region goes out and comes back.
//! * [`fleet`]: which region may go, so that never all of them do.

pub mod fleet;
pub mod probe;
pub mod region;
pub mod soft;
pub mod verdict;

#[cfg(test)]
mod scenario_tests;
#[cfg(test)]
mod simulation_tests;
#[cfg(test)]
mod virtual_world;

pub use fleet::{Event, Fleet, FleetSettings, Order, Records, Refused, Standing, What, Withheld};
pub use probe::{Outcome, Pair, ProbeSettings, Schedule, Seen};
pub use region::{Cause, Move, Phase, Pin, Record, Region, RegionSettings, Why, Word};
pub use soft::{Quality, Sample, SoftSettings, Watch};
pub use verdict::{Board, Evidence, Gateway, Judgement, Noted, Vantage, VerdictSettings, View};
