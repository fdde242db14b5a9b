//! The Kubernetes API as a client: how to reach it, and how its errors read. What is asked of it is the business
//! of those who ask.

use kube::{Client, Config};
use thiserror::Error;

/// What went wrong, in the API server's words where it has any. They name objects, and never what is in them.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// Neither a service account nor a kubeconfig tells where the API server is.
    #[error("no cluster is known here; mount a service account's token, or set KUBECONFIG ({0})")]
    Unknown(String),
    /// Somebody else changed the object meanwhile.
    #[error("the object was changed meanwhile: {0}")]
    Conflict(String),
    /// The API server refuses the request.
    #[error("the API server refuses: {0}")]
    Refused(String),
    /// The API server cannot be asked.
    #[error("the API server cannot be asked: {0}")]
    Unreachable(String),
}

impl From<kube::Error> for ClusterError {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 409 => Self::Conflict(status.message),
            kube::Error::Api(status) => Self::Refused(status.message),
            // Its text has its causes in it.
            error => Self::Unreachable(error.to_string()),
        }
    }
}

/// A client for the cluster that the environment tells of: a service account's token, else `KUBECONFIG`.
///
/// # Errors
/// [`ClusterError::Unknown`] and [`ClusterError::Unreachable`]
pub async fn connect() -> Result<Client, ClusterError> {
    let config = Config::infer()
        .await
        .map_err(|error| ClusterError::Unknown(error.to_string()))?;
    Ok(Client::try_from(config)?)
}
