//! Admission webhook that sets the environment variables of workspace pods to match their LLM billing mode.
//!
//! Imports point one way:
//! `main` → [`cli`] → [`converge`] → [`server`] → [`audit`] → [`database`], [`cluster`] → [`metrics`] → [`core`].
//! The core decides (identify, resolve, plan, patch) without IO, async or HTTP. The other modules execute its lookups
//! and send its responses. `tests/integration/boundary.rs` enforces that and rejects import cycles.

pub mod audit;
pub mod cli;
pub mod cluster;
pub mod converge;
pub mod core;
pub mod database;
pub mod metrics;
pub mod server;
pub mod telemetry;
