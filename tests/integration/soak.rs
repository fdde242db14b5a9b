//! Soak test: two instances behind a real proxy under constant load, while certificates are replaced, the database
//! restarts and instances are rolled over at random times.
//!
//! It takes ten seconds by default. `scripts/soak` sets another duration; memory is compared from a minute on.

use std::fs;
use std::time::{Duration, Instant};

use test_support::PROXY;
use test_support::haproxy::{Haproxy, Slot};
use test_support::load::{LoadClient, Tally, schema};
use test_support::postgres::{Cluster, Postgres};
use test_support::program::{Authority, Webhook, wait_for};

/// Environment variable with the duration in seconds.
const SECONDS: &str = "SOAK_SECONDS";
/// Limit in KiB on memory growth, after the first fifth of the time, of the instance that is never rolled over.
const MAX_MEMORY_GROWTH: u64 = 8 * 1024;

/// A linear congruential generator, so that each run has the same sequence.
struct Generator(u64);

impl Generator {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

#[test]
fn random_faults_leave_no_answer_wrong_or_missing() {
    let seconds = std::env::var(SECONDS).map_or(10, |seconds| seconds.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds);
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let url = postgres.url_via(cluster.port());
    let authority = Authority::generate();
    let slots = [Slot::free(), Slot::free()];
    let start = |slot: Slot| slot.start(&authority, PROXY, &url);
    let mut instances = slots.map(start);
    let proxy = Haproxy::start(&slots);
    let load_client = |client| LoadClient {
        client,
        port: proxy.port,
        on_error: "platform_managed",
    };
    let wait_for_traffic = |instance: &Webhook| {
        wait_for("the proxy sends it requests", || {
            load_client(authority.client()).admit(&mut Tally::default());
            instance.log().contains("\"admission\"").then_some(())
        });
    };
    instances.iter().for_each(wait_for_traffic);

    let mut generator = Generator(2026);
    let mut warmed_up = None;
    let [steady, rolled] = &mut instances;
    let mut counts = [0; 3];
    load_client(authority.client()).run_during(&format!("soak of {seconds} s"), 4, || {
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(500 + generator.below(2000)));
            let event = generator.below(3);
            match event {
                0 => {
                    let (certificate, key) = authority.issue("localhost");
                    for instance in [&*steady, &*rolled] {
                        let file = |name| instance.folder.path().join(name);
                        fs::write(file("tls.key"), &key).unwrap();
                        fs::write(file("tls.crt"), &certificate).unwrap();
                    }
                }
                1 => {
                    let mode =
                        ["--mode=fast", "--mode=immediate"][usize::from(generator.below(2) == 1)];
                    cluster.pg_ctl(&["restart", mode]);
                }
                _ => {
                    rolled.signal("TERM");
                    assert_eq!(rolled.wait().code(), Some(0));
                    *rolled = start(slots[1]);
                    wait_for_traffic(rolled);
                }
            }
            counts[usize::try_from(event).unwrap()] += 1;
            if warmed_up.is_none()
                && end - Instant::now().min(end) < Duration::from_secs(seconds) * 4 / 5
            {
                warmed_up = Some(steady.memory());
            }
        }
    });
    let (before, after) = (warmed_up.unwrap(), steady.memory());
    let [swaps, restarts, drains] = counts;
    println!(
        "{swaps} certificate swaps, {restarts} database restarts, {drains} drains; memory {before} KiB after a fifth of the time, {after} KiB at the end"
    );
    if seconds >= 60 {
        assert!(after < before + MAX_MEMORY_GROWTH, "{before} {after}");
    }
}
