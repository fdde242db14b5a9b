//! What the project assumes of a Kubernetes API server, shown on a real one: docs/kubernetes.md has the list. It runs
//! where `KUBEBUILDER_ASSETS` names a folder with `etcd`, `kube-apiserver` and perhaps `kube-controller-manager`; else
//! it says once that it was skipped. Each test has a control plane of its own, on loopback.

#![expect(
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed, and says so"
)]

mod admission;
mod creation;
mod operation;
mod world;
