//! The decisions: which workspace a pod belongs to, which mode it has, what its env must become.
//!
//! Nothing here does IO, waits, logs, reads a clock or knows HTTP; what must be fetched is returned as a
//! value ([`workspace::Identity::LookUp`]) for an edge to fetch. The order of use is the order of a
//! request: [`admission::decode`], [`workspace::identify`], [`mode::resolve`], [`plan::plan`], [`patch::patch`].

#![warn(clippy::indexing_slicing)]

pub mod admission;
pub mod audit;
mod compact;
pub mod env;
pub mod json;
pub mod mode;
pub mod patch;
pub mod plan;
pub mod pod;
pub mod policy;
pub mod proxy;
pub mod refusal;
pub mod vendor_keys;
pub mod warning;
pub mod workload;
pub mod workspace;
