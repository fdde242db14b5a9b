//! The serving certificate: loaded from files or from the replicas' shared Secret, renewed and reloaded.

pub(super) mod configuration;
pub mod rotation;
pub mod secret;
pub mod tls;
