//! The decisions: which workspace a pod belongs to, which mode it has, and how its env must change.
//!
//! Nothing here does IO, waits, logs, reads a clock or knows HTTP. [`decision`] runs the steps in order: identify,
//! look up, resolve, plan. It returns the lookup as a value for the caller to execute; [`patch`] and [`response`] then
//! write the decision as the admission response.

#![warn(clippy::indexing_slicing)]

pub mod admission;
pub mod audit;
pub mod catalogue;
mod compact_json;
pub mod converge;
pub mod decision;
pub mod env;
pub mod identity;
pub mod json;
pub mod patch;
pub mod placeholders;
pub mod plan;
pub mod pod;
pub mod policy;
pub mod policy_file;
pub mod proxy;
pub mod refusal;
pub mod resolution;
pub mod response;
pub mod restrictions;
mod template;
pub mod variables;
pub mod warning;
pub mod workload;
