//! The named tasks that run for the life of the process. Each task's code lives in its own module.

use std::collections::HashMap;
use std::future::{Future, pending};
use std::io;

use thiserror::Error;
use tokio::task::{Id, JoinSet};

/// The name of the task that accepts connections and ends when all of them are drained.
pub(super) const WEBHOOK_LISTENER: &str = "webhook listener";

/// Why a task ended before the process did.
#[derive(Debug, Error)]
pub(super) enum TaskError {
    /// The task returned.
    #[error("the task {0:?} ended unexpectedly")]
    Ended(&'static str),
    /// The task returned an error.
    #[error("the task {0:?} failed")]
    Failed(&'static str, #[source] io::Error),
    /// The task panicked. The panic message is on stderr.
    #[error("the task {0:?} panicked; its message is on stderr above")]
    Panicked(&'static str),
}

impl TaskError {
    /// Reports whether the task is [`WEBHOOK_LISTENER`].
    pub(super) fn is_of_listener(&self) -> bool {
        let (Self::Ended(name) | Self::Failed(name, _) | Self::Panicked(name)) = self;
        *name == WEBHOOK_LISTENER
    }
}

/// The running tasks, aborted on drop.
#[derive(Default)]
pub(super) struct Tasks {
    set: JoinSet<io::Result<()>>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    /// Starts a task.
    pub(super) fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = io::Result<()>> + Send + 'static,
    ) {
        let id = self.set.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Starts a task that never ends.
    pub(super) fn spawn_endless(
        &mut self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.spawn(name, async {
            task.await;
            Ok(())
        });
    }

    /// Waits until a task ends. Never returns if no task is left.
    pub(super) async fn ended(&mut self) -> TaskError {
        let name = |id: Id| self.names.get(&id).copied().unwrap_or("unnamed");
        match self.set.join_next_with_id().await {
            None => pending().await,
            Some(Ok((id, Ok(())))) => TaskError::Ended(name(id)),
            Some(Ok((id, Err(error)))) => TaskError::Failed(name(id), error),
            Some(Err(error)) => TaskError::Panicked(name(error.id())),
        }
    }

    /// Aborts all tasks and waits until they have ended.
    pub(super) async fn shutdown(mut self) {
        self.set.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::chain;

    #[tokio::test]
    async fn ended_names_the_task_and_the_cause() {
        let mut tasks = Tasks::default();
        tasks.spawn_endless("endless", pending());
        tasks.spawn_endless("short", async {});
        assert_eq!(chain(&tasks.ended().await), "the task \"short\" ended unexpectedly");
        tasks.spawn("listener", async { Err(io::Error::other("closed")) });
        let error = tasks.ended().await;
        assert_eq!(chain(&error), "the task \"listener\" failed: closed");
        tasks.spawn_endless("broken", async { panic!("on purpose") });
        assert_eq!(
            chain(&tasks.ended().await),
            "the task \"broken\" panicked; its message is on stderr above"
        );
        tasks.shutdown().await;
    }
}
