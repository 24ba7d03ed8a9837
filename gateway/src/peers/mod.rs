//! Other regions: requests that are sent there when this one cannot answer them, and requests that come from there.
//!
//! The rule: a request crosses one border at most, within its deadline, where its tenant lets it; who answers is told.
//! Where to is core's ([`spillway_core::failover::peers_for`]); who is believed, too.
//!
//! ```text
//! here:  stranded --where to? nowhere--> it stays, and why is counted
//!          |  regions, the best first
//!          v
//!        a gateway of the region --not reached, or lost--> the next gateway, then the next region
//!          |                     --overloaded, refuses---> the next region; it rests for this model and class, or for
//!          |                                               this tenant alone if that is the reason
//!          |                     --failed, too late------> it stays
//!          +--an answer, or the client's own fault-------> given
//!
//! there: connection of a gateway --passage--> judged as its client --> limits are not asked again --> cache, gate, pods
//!                                --probe----> a model of tier 1 ----> gate, pods
//!                                --anything else-------------------> refused
//! ```
//!
//! * [`links`]: a thread's ways to the gateways of other regions. [`rests`]: regions that said they have no room.
//! * [`cause`]: why a request is stranded. [`spill`]: it is sent on; streams by [`crate::stream`]. [`attempt`]: one call to one gateway.
//! * [`places`]: how many are with other regions. [`concern`]: whom a refusal shuts a region to.
//! * [`visit`]: who comes from another region. [`probe`]: one that asks for the region itself.
//! * [`shed`]: what the plan has this region refuse. [`metrics`].

pub mod attempt;
pub mod cause;
pub mod concern;
pub mod links;
pub mod metrics;
pub mod places;
pub mod probe;
pub mod rests;
pub mod shed;
pub mod spill;
pub mod visit;
