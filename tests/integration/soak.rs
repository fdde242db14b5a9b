//! All at once and for longer: two instances behind a real proxy, asked without a break, while at random
//! times certificates are replaced, the database restarts and instances are rolled over.
//!
//! A few seconds in each run of the tests; `scripts/soak` makes it as long as one likes.

use std::fs;
use std::time::{Duration, Instant};

use test_support::PROXY;
use test_support::haproxy::{Haproxy, Slot};
use test_support::load::{Asker, Tally, schema};
use test_support::postgres::{Cluster, Postgres};
use test_support::program::{Authority, Webhook, wait_for};

/// Says how long, in seconds.
const SECONDS: &str = "SOAK_SECONDS";
/// Memory that the instance which is never rolled over may gain from the first fifth of the time on, in KiB.
const MAX_GAINED: u64 = 8 * 1024;

/// Numbers that look random, the same in each run: a linear congruential generator.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

#[test]
fn through_swaps_restarts_and_drains_at_random_times_no_answer_is_wrong_or_missing() {
    let seconds = std::env::var(SECONDS).map_or(10, |seconds| seconds.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds);
    let cluster = Cluster::start();
    let postgres = Postgres::on(&cluster, &schema());
    let url = postgres.url_by(cluster.port());
    let authority = Authority::generate();
    let slots = [Slot::free(), Slot::free()];
    let start = |slot: Slot| slot.start(&authority, PROXY, &url);
    let mut instances = slots.map(start);
    let proxy = Haproxy::before(&slots);
    let asker = |client| Asker {
        client,
        port: proxy.port,
        on_error: "platform_managed",
    };
    let gets_traffic = |instance: &Webhook| {
        wait_for("the proxy has seen that it is ready", || {
            asker(authority.client()).ask(&mut Tally::default());
            instance.log().contains("\"admission\"").then_some(())
        });
    };
    instances.iter().for_each(gets_traffic);

    let mut numbers = Numbers(2026);
    let mut warmed_up = None;
    let [steady, rolled] = &mut instances;
    let mut counts = [0; 3];
    asker(authority.client()).ask_during(&format!("soak of {seconds} s"), 4, || {
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(500 + numbers.below(2000)));
            let event = numbers.below(3);
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
                        ["--mode=fast", "--mode=immediate"][usize::from(numbers.below(2) == 1)];
                    cluster.pg_ctl(&["restart", mode]);
                }
                _ => {
                    rolled.signal("TERM");
                    assert_eq!(rolled.wait().code(), Some(0));
                    *rolled = start(slots[1]);
                    gets_traffic(rolled);
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
    assert!(after < before + MAX_GAINED, "{before} {after}");
}
