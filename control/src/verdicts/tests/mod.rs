//! Vantages and regions in virtual time, and a real store.

mod figures;
mod leaders;
mod orders;
mod regions;
mod reports;
mod world;
