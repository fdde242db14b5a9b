//! Fuzz target: any bytes as a request body.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| test_support::fuzz::review(body));
