//! The serving certificate: read from files or from the Secret that the replicas share, renewed, and reloaded.

pub mod rotation;
pub mod secret;
pub mod tls;
