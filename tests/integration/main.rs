//! One test binary. `core_*` tests call the library in process, which keeps mutation testing fast; all others run the
//! real program. Each file's head says what belongs in it.

#![expect(clippy::unwrap_used, reason = "a failed expectation fails the test")]

mod audit;
mod boundary;
mod catalogue;
mod chart;
mod check;
mod columns;
mod configuration;
mod contract;
mod converge;
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
