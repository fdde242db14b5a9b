//! Tests against a real Kubernetes API server; docs/kubernetes.md lists the assumptions they check. They need
//! `KUBEBUILDER_ASSETS`, a folder with `etcd`, `kube-apiserver` and, for workloads, `kube-controller-manager`; without
//! it they are skipped with one message. Each test starts its own control plane on loopback.

#![expect(
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed, and says so"
)]

mod admission;
mod converge;
mod creation;
mod operation;
mod world;
