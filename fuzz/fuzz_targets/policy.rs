//! Fuzz target: any text as a policy file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| test_support::fuzz::policy(text));
