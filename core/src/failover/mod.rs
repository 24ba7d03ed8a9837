//! Where traffic goes while a region cannot take all that was planned for it.
//!
//! The rule: each answer comes from the same pure functions, in the control plane, in DNS nodes and in gateways.
//! So whoever has the last plan and its own view of health goes on alone, and there is always an answer.
//!
//! In reading order:
//!
//! * [`weights`]: what counts as a weight, a share and a rate; weights that nobody may act on.
//! * [`demand`]: how much is asked of all regions together.
//! * [`plan`]: how much of it each region gets, and what is shed.
//! * [`mod@answer`]: the addresses that DNS gives a client.
//! * [`residence`]: where a gateway without local capacity may send a request. [`spare`]: what the plan leaves there for it.
//! * [`passage`]: what it tells that region's gateway.

pub mod answer;
pub mod demand;
pub mod passage;
pub mod plan;
mod rendezvous;
pub mod residence;
pub mod spare;
pub mod weights;

pub use answer::{Answer, AnswerSettings, Site, Standing, Subnet, answer};
pub use demand::Demand;
pub use passage::{Arrival, NoPassage, Passage};
pub use plan::{Act, Allotment, Basis, Override, Plan, Region, Shed, Terms, Traffic, UnfitPlan};
pub use residence::{MayLeave, NoPeer, Peer, Stranded, peers_for, unfit};
pub use spare::{Spare, spare};
pub use weights::{UnfitWeights, check_weights};
