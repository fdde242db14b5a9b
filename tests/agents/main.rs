//! Real SDKs, each with the env that the webhook's answer gives its pod, in a network namespace where every name resolves
//! to a recorder, against LiteLLM as the metered proxy. scripts/check runs them. command_line.rs does the same with the
//! agent programs; the results are in docs/agents.md.
//!
//! - [`cases`]: what a pod's author writes, and what the kubelet makes of it
//! - [`matrix`]: each program in each case
//! - [`programs`]: how each SDK is started
//! - [`world`]: the namespace, the recorder and the proxy

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a failed expectation fails the test"
)]

mod cases;
mod matrix;
mod programs;
mod world;

use matrix::{assert_metered, matrix};
use programs::{anthropic_sdks, openai_sdks};
use world::{World, in_namespace};

#[test]
fn anthropic_sdks_stay_on_the_meter() {
    in_namespace("anthropic_sdks_stay_on_the_meter", || {
        assert_metered(&matrix(&World::start(), &anthropic_sdks()));
    });
}

#[test]
fn openai_sdks_stay_on_the_meter() {
    in_namespace("openai_sdks_stay_on_the_meter", || {
        assert_metered(&matrix(&World::start(), &openai_sdks()));
    });
}
