//! Admission webhook that makes every workspace pod's LLM billing env true.
//!
//! Imports point one way: `main` → [`cli`] → [`server`] → [`audit`] → [`database`], [`cluster`] → [`metrics`] → [`core`].
//! The core decides (identify, resolve, plan, patch) and knows no IO, no async and no HTTP; everything
//! else fetches what the core asks for and carries out what it answers.
//! `tests/integration/boundary.rs` holds that line, and fails if files import each other in a circle.

pub mod audit;
pub mod cli;
pub mod cluster;
pub mod core;
pub mod database;
pub mod metrics;
pub mod server;
pub mod telemetry;
