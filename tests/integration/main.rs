//! One test binary. `core_*` ask the library in process, so that mutants are tried in seconds; all others
//! ask the real program. Each file's head says what belongs in it.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed, and says so"
)]

mod audit;
mod boundary;
mod chart;
mod check;
mod configuration;
mod contract;
mod core_contract;
mod core_properties;
mod core_recorded;
mod database;
mod docs;
mod drain;
mod faults;
mod hostile;
mod http;
mod metrics;
mod readme;
mod recorded;
mod redaction;
mod review;
mod secret;
mod soak;
mod tls;
mod traces;
mod validate;
mod workspace;
