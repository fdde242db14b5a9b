//! Which workloads to recreate next, so that running pods follow the database: under a budget, once for each change, and
//! never again if the new pods are out of sync too. The requests are in converge/, which also tells the time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::str::FromStr;
use std::time::Duration;

/// How long a workload that is recreated may have no pod at all before it counts as gone. A Job waits up to six minutes
/// before it replaces a pod.
const REPLACEMENT_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// How long a failure is remembered while the workload has no pod at all.
const FAILURE_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// Pause before a recreation that could not be requested is tried again.
const POSTPONEMENT: Duration = Duration::from_secs(10);

/// Limits on recreation.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Limit on the workspaces that are recreated at once.
    pub max_unavailable: usize,
    /// Limit on the workloads whose recreation begins within a minute.
    pub per_minute: usize,
    /// How long a recreation may take.
    pub timeout: Duration,
}

/// The time of the day, in UTC, at which workloads may be recreated, such as `22:00-06:00`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The first second of the day in it.
    from: u32,
    /// The first second of the day after it; less than `from` if midnight is in it.
    to: u32,
}

impl Window {
    /// Reports whether a second of the day is in it.
    #[must_use]
    pub const fn contains(self, second: u32) -> bool {
        if self.from < self.to {
            self.from <= second && second < self.to
        } else {
            self.from <= second || second < self.to
        }
    }
}

impl FromStr for Window {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        fn second(text: &str) -> Option<u32> {
            let (hour, minute) = text.split_once(':')?;
            let (hour, minute): (u32, u32) = (hour.parse().ok()?, minute.parse().ok()?);
            (hour < 24 && minute < 60).then_some(hour * 3600 + minute * 60)
        }
        let times = text.split_once('-');
        let times = times.and_then(|(from, to)| Some((second(from)?, second(to)?)));
        match times {
            Some((from, to)) if from != to => Ok(Self { from, to }),
            _ => Err("expected two different times of the day in UTC, such as 22:00-06:00"),
        }
    }
}

/// Why a workload with a pod that is out of sync is not recreated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// An annotation of the workload or pod says so.
    Paused,
    /// No controller would recreate the pod.
    Bare,
    /// The kubelet would restart the static pod unchanged.
    Static,
    /// The webhook would refuse the new pod.
    Refused,
}

impl Obstacle {
    /// Every obstacle.
    pub const ALL: [Self; 4] = [Self::Paused, Self::Bare, Self::Static, Self::Refused];

    /// Returns the name in metrics and messages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::Bare => "bare",
            Self::Static => "static",
            Self::Refused => "refused",
        }
    }
}

/// A pod of a workload.
#[derive(Clone, Debug)]
pub struct PodState {
    /// Whether its env does not match.
    pub is_drifted: bool,
    /// Whether it is ready.
    pub is_ready: bool,
    /// When its template was last restarted, as of its creation.
    pub restarted_at: Option<String>,
    /// Distinguishes the states of the row with which it was compared.
    pub fingerprint: u64,
}

/// A workload, or a pod without one, that has a pod which is out of sync or is being recreated.
#[derive(Clone, Debug, Default)]
pub struct Workload {
    /// The workspace of its pods.
    pub workspace: String,
    /// Its pods by uid.
    pub pods: BTreeMap<String, PodState>,
    /// Why it is not recreated.
    pub obstacle: Option<Obstacle>,
}

impl Workload {
    /// Reports whether one of its pods is out of sync.
    #[must_use]
    pub fn is_drifted(&self) -> bool {
        self.pods.values().any(|pod| pod.is_drifted)
    }

    /// Returns the state of the workspace's row: that with which its last pod was compared.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let last = self.pods.last_key_value();
        last.map_or(0, |(_, pod)| pod.fingerprint)
    }
}

/// How a recreation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A new pod is out of sync too: recreating it again would not help.
    OutOfSyncAgain,
    /// Old pods are still there, or no new one is ready.
    TimedOut,
}

impl Failure {
    /// Returns the name in metrics and messages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OutOfSyncAgain => "out_of_sync_again",
            Self::TimedOut => "timed_out",
        }
    }
}

/// One recreation of a workload.
#[derive(Clone, Debug)]
struct Attempt {
    workspace: String,
    fingerprint: u64,
    /// The pods at its beginning. Those that were out of sync are to be replaced.
    before: BTreeMap<String, PodState>,
    begun: Duration,
    /// The time that a rollout restart has set in the workload's template.
    restarted_at: Option<String>,
    /// Whether the row has been written since.
    is_disturbed: bool,
    /// Since when the workload has had no pod.
    absent_since: Option<Duration>,
    failure: Option<Failure>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Running,
    Succeeded,
    Failed(Failure),
}

/// What to do now. Workloads are named by their keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// The workloads to recreate.
    pub begin: Vec<String>,
    /// The workloads whose recreation has just succeeded.
    pub succeeded: Vec<String>,
    /// The workloads whose recreation has just failed.
    pub failed: Vec<(String, Failure)>,
    /// The number of workloads that wait for the budget or the window.
    pub waiting: usize,
    /// The number of workloads that are being recreated.
    pub running: usize,
    /// The number of workloads whose recreation failed, and that are still out of sync.
    pub stuck: usize,
}

/// The recreations so far. Time is passed in, counted from any start.
#[derive(Debug)]
pub struct Converger {
    budget: Budget,
    attempts: BTreeMap<String, Attempt>,
    /// Until when the workloads wait whose recreation could not be requested.
    postponed: BTreeMap<String, Duration>,
    /// When the recreations of the last minute began.
    recent: VecDeque<Duration>,
}

impl Converger {
    /// Returns a converger that has recreated nothing.
    #[must_use]
    pub const fn new(budget: Budget) -> Self {
        Self {
            budget,
            attempts: BTreeMap::new(),
            postponed: BTreeMap::new(),
            recent: VecDeque::new(),
        }
    }

    /// Decides about the workloads, by their keys. Nothing begins outside the window.
    pub fn step(
        &mut self,
        now: Duration,
        is_open: bool,
        workloads: &BTreeMap<String, Workload>,
    ) -> Step {
        let mut step = Step::default();
        self.forget(now, workloads);
        self.postponed.retain(|_, until| now < *until);
        self.attempts.retain(|key, attempt| {
            let (Some(workload), None) = (workloads.get(key), attempt.failure) else {
                return true;
            };
            attempt.add_late(workload);
            match attempt.progress(workload, now, self.budget.timeout) {
                Progress::Running => true,
                Progress::Succeeded => {
                    step.succeeded.push(key.clone());
                    false
                }
                // The pod may be from a moment at which the row was another one.
                Progress::Failed(Failure::OutOfSyncAgain) if attempt.is_disturbed => false,
                Progress::Failed(failure) => {
                    step.failed.push((key.clone(), failure));
                    attempt.failure = Some(failure);
                    true
                }
            }
        });
        let is_old = |begun: &Duration| now.saturating_sub(*begun) >= Duration::from_secs(60);
        while self.recent.front().is_some_and(is_old) {
            self.recent.pop_front();
        }
        for (key, workload) in workloads {
            if let Some(attempt) = self.attempts.get(key) {
                step.stuck += usize::from(attempt.failure.is_some());
                continue;
            }
            if !workload.is_drifted() || workload.obstacle.is_some() {
                continue;
            }
            let is_postponed = self.postponed.contains_key(key);
            if !is_open || is_postponed || !self.has_room(&workload.workspace) {
                step.waiting += 1;
                continue;
            }
            self.recent.push_back(now);
            let attempt = Attempt {
                workspace: workload.workspace.clone(),
                fingerprint: workload.fingerprint(),
                before: workload.pods.clone(),
                begun: now,
                restarted_at: None,
                is_disturbed: false,
                absent_since: None,
                failure: None,
            };
            self.attempts.insert(key.clone(), attempt);
            step.begin.push(key.clone());
        }
        step.running = self.running().count();
        step
    }

    /// Returns the keys of the workloads that are being recreated or failed.
    pub fn attempted(&self) -> impl Iterator<Item = &str> {
        self.attempts.keys().map(String::as_str)
    }

    /// Reports whether a workload is being recreated.
    #[must_use]
    pub fn is_running(&self, key: &str) -> bool {
        let attempt = self.attempts.get(key);
        attempt.is_some_and(|attempt| attempt.failure.is_none())
    }

    /// Records that the row of a workspace, or of any if `None`, has been written. A recreation that is running then is
    /// repeated if its new pods are out of sync.
    pub fn disturb(&mut self, workspace: Option<&str>) {
        for attempt in self.attempts.values_mut() {
            attempt.is_disturbed |=
                workspace.is_none_or(|own| own.eq_ignore_ascii_case(&attempt.workspace));
        }
    }

    /// Records the time that a rollout restart has set in the workload's template.
    pub fn restarted(&mut self, key: &str, restarted_at: Option<String>) {
        if let Some(attempt) = self.attempts.get_mut(key) {
            attempt.restarted_at = restarted_at;
        }
    }

    /// Takes over a recreation that another process has begun: the pods that are in sync are new ones.
    pub fn resume(&mut self, key: &str) {
        if let Some(attempt) = self.attempts.get_mut(key) {
            attempt.before.retain(|_, pod| pod.is_drifted);
        }
    }

    /// Undoes the beginning of a recreation that is not wanted after all.
    pub fn withdraw(&mut self, key: &str) {
        if self.attempts.remove(key).is_some() {
            self.recent.pop_back();
        }
    }

    /// Undoes the beginning of a recreation that could not be requested. It is tried again after a pause, so that it does
    /// not use up the rate.
    pub fn postpone(&mut self, now: Duration, key: &str) {
        self.attempts.remove(key);
        self.postponed.insert(key.to_owned(), now + POSTPONEMENT);
    }

    /// Forgets attempts for an earlier state of the row, those of workloads that are gone, and failures of workloads that
    /// are in sync now.
    fn forget(&mut self, now: Duration, workloads: &BTreeMap<String, Workload>) {
        self.attempts
            .retain(|key, attempt| match workloads.get(key) {
                Some(workload) => {
                    attempt.absent_since = None;
                    workload.fingerprint() == attempt.fingerprint
                        && (attempt.failure.is_none() || workload.is_drifted())
                }
                None => {
                    let limit = attempt
                        .failure
                        .map_or(REPLACEMENT_TIMEOUT, |_| FAILURE_TIMEOUT);
                    now.saturating_sub(*attempt.absent_since.get_or_insert(now)) < limit
                }
            });
    }

    fn running(&self) -> impl Iterator<Item = &Attempt> {
        let attempts = self.attempts.values();
        attempts.filter(|attempt| attempt.failure.is_none())
    }

    fn has_room(&self, workspace: &str) -> bool {
        let running: BTreeSet<&str> = self
            .running()
            .map(|attempt| attempt.workspace.as_str())
            .collect();
        let is_within_budget =
            running.contains(workspace) || running.len() < self.budget.max_unavailable;
        is_within_budget && self.recent.len() < self.budget.per_minute
    }
}

impl Attempt {
    /// Adds pods of an earlier template that were seen only after the beginning, as after a switch back and forth: the
    /// rollout replaces them too.
    fn add_late(&mut self, workload: &Workload) {
        if self.restarted_at.is_none() {
            return;
        }
        let late = workload.pods.iter();
        let late = late.filter(|(_, pod)| pod.is_drifted && pod.restarted_at != self.restarted_at);
        for (uid, pod) in late {
            self.before
                .entry(uid.clone())
                .or_insert_with(|| pod.clone());
        }
    }

    /// Returns how far the recreation is, by the workload's pods.
    fn progress(&self, workload: &Workload, now: Duration, timeout: Duration) -> Progress {
        let pods = workload.pods.iter();
        let mut new = pods.filter(|(uid, _)| !self.before.contains_key(*uid));
        let mut drifted = new.clone().filter(|(_, pod)| pod.is_drifted).peekable();
        let is_drifted = drifted.peek().is_some();
        // Compared with a later state of the row, it is no failure: that is another reason to recreate.
        if drifted.any(|(_, pod)| pod.fingerprint == self.fingerprint) {
            return Progress::Failed(Failure::OutOfSyncAgain);
        }
        let mut replaced = self.before.iter().filter(|(_, pod)| pod.is_drifted);
        let are_gone = replaced.all(|(uid, _)| !workload.pods.contains_key(uid));
        if are_gone && !is_drifted && new.any(|(_, pod)| pod.is_ready) {
            return Progress::Succeeded;
        }
        if now.saturating_sub(self.begun) >= timeout {
            return Progress::Failed(Failure::TimedOut);
        }
        Progress::Running
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget {
        max_unavailable: 2,
        per_minute: 3,
        timeout: Duration::from_secs(600),
    };

    fn workload(workspace: &str, fingerprint: u64, pods: &[(&str, bool)]) -> Workload {
        let pods = pods.iter();
        Workload {
            workspace: workspace.to_owned(),
            pods: pods
                .map(|(uid, is_drifted)| {
                    let pod = PodState {
                        is_drifted: *is_drifted,
                        is_ready: true,
                        restarted_at: None,
                        fingerprint,
                    };
                    ((*uid).to_owned(), pod)
                })
                .collect(),
            obstacle: None,
        }
    }

    fn workloads<const N: usize>(all: [(&str, Workload); N]) -> BTreeMap<String, Workload> {
        all.into_iter()
            .map(|(key, one)| (key.to_owned(), one))
            .collect()
    }

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn window_contains_the_times_between_its_ends() {
        let hour = |hour: u32| hour * 3600;
        for (text, inside, outside) in [
            ("22:00-06:00", [hour(22), hour(0), hour(6) - 1], [hour(22) - 1, hour(6), hour(12)]),
            ("06:00-22:30", [hour(6), hour(12), hour(22)], [hour(6) - 1, hour(23), hour(0)]),
        ] {
            let window: Window = text.parse().unwrap();
            assert!(inside.into_iter().all(|second| window.contains(second)), "{text}");
            assert!(!outside.into_iter().any(|second| window.contains(second)), "{text}");
        }
        for text in [
            "",
            "22:00",
            "22:00-24:00",
            "22-06",
            "22:60-06:00",
            "06:00-06:00",
            "a:b-c:d",
        ] {
            assert!(text.parse::<Window>().is_err(), "{text}");
        }
    }

    #[test]
    fn workspaces_begin_within_the_budget() {
        let mut converger = Converger::new(BUDGET);
        let mut all = workloads([
            ("a", workload("w1", 1, &[("a1", true)])),
            ("b", workload("w1", 1, &[("b1", true)])),
            ("c", workload("w2", 1, &[("c1", true)])),
            ("d", workload("w3", 1, &[("d1", true)])),
            ("e", workload("w4", 1, &[("e1", false)])),
        ]);
        let closed = converger.step(at(0), false, &all);
        assert_eq!((closed.begin.len(), closed.waiting), (0, 4));
        // Two workloads of one workspace count once; a third workspace is too many.
        let first = converger.step(at(0), true, &all);
        assert_eq!(first.begin, ["a", "b", "c"]);
        assert_eq!((first.waiting, first.running), (1, 3));
        all.insert("c".to_owned(), workload("w2", 1, &[("c2", false)]));
        let second = converger.step(at(1), true, &all);
        assert_eq!(second.succeeded, ["c"]);
        // The rate is used up until a minute after the first ones.
        assert_eq!((second.begin.len(), second.waiting), (0, 1));
        assert_eq!(converger.step(at(59), true, &all).begin.len(), 0);
        assert_eq!(converger.step(at(60), true, &all).begin, ["d"]);
    }

    #[test]
    fn workload_is_recreated_once_for_each_change() {
        let mut converger = Converger::new(BUDGET);
        let mut step = |seconds, workload: Workload| {
            converger.step(at(seconds), true, &workloads([("a", workload)]))
        };
        let old = [("a1", true), ("a2", true)];
        assert_eq!(step(0, workload("w", 1, &old)).begin, ["a"]);
        // The rollout is in progress.
        let during = step(1, workload("w", 1, &[("a2", true), ("a3", false)]));
        assert_eq!((during.begin.len(), during.running), (0, 1));
        assert_eq!(step(2, workload("w", 1, &[("a3", false)])).succeeded, ["a"]);
        assert_eq!(step(3, workload("w", 1, &[("a3", false)])), Step::default());
        // Switched back, and again during that rollout.
        assert_eq!(step(70, workload("w", 2, &[("a3", true)])).begin, ["a"]);
        let again = step(71, workload("w", 1, &[("a3", false), ("a4", true)]));
        assert_eq!(again.begin, ["a"]);
        let end = step(72, workload("w", 1, &[("a5", false)]));
        assert_eq!((end.succeeded, end.begin), (vec!["a".to_owned()], vec![]));
    }

    #[test]
    fn failed_recreation_is_not_repeated() {
        let mut converger = Converger::new(BUDGET);
        let mut step = |seconds, workload: Workload| {
            converger.step(at(seconds), true, &workloads([("a", workload)]))
        };
        assert_eq!(step(0, workload("w", 1, &[("a1", true)])).begin, ["a"]);
        let failed = step(1, workload("w", 1, &[("a2", true)]));
        assert_eq!(failed.failed, [("a".to_owned(), Failure::OutOfSyncAgain)]);
        assert_eq!((failed.stuck, failed.running), (1, 0));
        let later = step(1000, workload("w", 1, &[("a3", true)]));
        assert_eq!((later.begin.len(), later.failed.len(), later.stuck), (0, 0, 1));
        // Another change of the row is another reason.
        assert_eq!(step(1001, workload("w", 2, &[("a3", true)])).begin, ["a"]);
        // The new pod cannot start, and the old one stays.
        let stuck = [("a3", true), ("a4", false)];
        assert_eq!(step(1600, workload("w", 2, &stuck)).failed, []);
        let timed_out = step(1601, workload("w", 2, &stuck));
        assert_eq!(timed_out.failed, [("a".to_owned(), Failure::TimedOut)]);
        assert_eq!(step(9999, workload("w", 2, &stuck)).begin.len(), 0);
    }

    #[test]
    fn later_drift_is_another_reason() {
        let mut converger = Converger::new(BUDGET);
        let mut step = |seconds, pods: &[(&str, bool)]| {
            converger.step(at(seconds), true, &workloads([("a", workload("w", 1, pods))]))
        };
        // A pod that is in sync is not replaced.
        assert_eq!(step(0, &[("a1", true), ("a2", false)]).begin, ["a"]);
        assert_eq!(step(1, &[("a2", false), ("a3", false)]).succeeded, ["a"]);
        assert_eq!(step(2, &[("a2", false), ("a4", true)]).begin, ["a"]);
        // What failed is mended by hand.
        let failed = step(3, &[("a5", true)]);
        assert_eq!(failed.failed, [("a".to_owned(), Failure::OutOfSyncAgain)]);
        assert_eq!(step(4, &[("a6", false)]), Step::default());
        assert_eq!(step(61, &[("a7", true)]).begin, ["a"]);
    }

    #[test]
    fn recreation_succeeds_once_a_new_pod_is_ready() {
        let mut converger = Converger::new(BUDGET);
        let mut step = |seconds, pods: &[(&str, bool)], is_ready| {
            let mut workload = workload("w", 1, pods);
            workload
                .pods
                .values_mut()
                .for_each(|pod| pod.is_ready = is_ready);
            converger.step(at(seconds), true, &workloads([("a", workload)]))
        };
        assert_eq!(step(0, &[("a1", true)], true).begin, ["a"]);
        assert_eq!(step(1, &[("a2", false)], false).running, 1);
        assert_eq!(step(2, &[("a2", false)], true).succeeded, ["a"]);
    }

    #[test]
    fn pod_of_an_earlier_template_is_replaced_with_the_others() {
        let mut converger = Converger::new(BUDGET);
        assert_eq!(step_of(&mut converger, &[("a1", true)], None).begin, ["a"]);
        converger.restarted("a", Some("second".to_owned()));
        // Created by an earlier restart, and seen late.
        let late = step_of(&mut converger, &[("a1", true), ("a2", true)], Some("first"));
        assert_eq!((late.running, late.failed.len()), (1, 0));
        let replaced = step_of(&mut converger, &[("a3", false)], Some("second"));
        assert_eq!(replaced.succeeded, ["a"]);
        // A pod of the attempt's own template is not.
        assert_eq!(step_of(&mut converger, &[("a3", true)], Some("second")).begin, ["a"]);
        converger.restarted("a", Some("third".to_owned()));
        let again = step_of(&mut converger, &[("a4", true)], Some("third"));
        assert_eq!(again.failed, [("a".to_owned(), Failure::OutOfSyncAgain)]);
    }

    #[test]
    fn new_pod_compared_with_a_later_row_is_no_failure() {
        let mut converger = Converger::new(BUDGET);
        let before = workloads([("a", workload("w", 1, &[("a1", true), ("z", false)]))]);
        assert_eq!(converger.step(at(0), true, &before).begin, ["a"]);
        let mut switched = workload("w", 1, &[("a2", true), ("z", false)]);
        switched
            .pods
            .entry("a2".to_owned())
            .and_modify(|pod| pod.fingerprint = 2);
        let step = converger.step(at(1), true, &workloads([("a", switched)]));
        assert_eq!((step.running, step.failed, step.succeeded), (1, vec![], vec![]));
        // Once all pods are compared with that row, it begins again.
        let step =
            converger.step(at(2), true, &workloads([("a", workload("w", 2, &[("a2", true)]))]));
        assert_eq!(step.begin, ["a"]);
    }

    #[test]
    fn recreation_is_repeated_after_a_write_of_its_row() {
        let repeated = [(1, 0), (0, 1)];
        let failed = [(0, 1), (0, 0)];
        // the workspace whose row is written; how many begin and fail in each step
        for (workspace, expected) in [(Some("w"), repeated), (Some("v"), failed), (None, repeated)]
        {
            let mut converger = Converger::new(BUDGET);
            assert_eq!(step_of(&mut converger, &[("a1", true)], None).begin, ["a"]);
            converger.disturb(workspace);
            let steps = ["a2", "a3"].map(|uid| {
                let step = step_of(&mut converger, &[(uid, true)], None);
                (step.begin.len(), step.failed.len())
            });
            assert_eq!(steps, expected, "{workspace:?}");
        }
    }

    fn step_of(
        converger: &mut Converger,
        pods: &[(&str, bool)],
        restarted_at: Option<&str>,
    ) -> Step {
        let mut workload = workload("w", 1, pods);
        workload
            .pods
            .values_mut()
            .for_each(|pod| pod.restarted_at = restarted_at.map(str::to_owned));
        converger.step(at(0), true, &workloads([("a", workload)]))
    }

    #[test]
    fn attempt_outlasts_a_time_without_pods() {
        const MINUTE: u64 = 60;
        let drifted = workloads([("a", workload("w", 1, &[("a1", true)]))]);
        let again = workloads([("a", workload("w", 1, &[("a2", true)]))]);
        let none = BTreeMap::new();
        // The time without pods counts, and not that of the recreation.
        for (absent_from, again_at, is_remembered) in [
            (0, 9 * MINUTE, true),
            (9 * MINUTE, 18 * MINUTE, true),
            (0, 10 * MINUTE, false),
        ] {
            let budget = Budget {
                timeout: at(100 * MINUTE),
                ..BUDGET
            };
            let mut converger = Converger::new(budget);
            assert_eq!(converger.step(at(0), true, &drifted).begin, ["a"]);
            assert_eq!(converger.step(at(absent_from), true, &none).running, 1);
            let step = converger.step(at(again_at), true, &none);
            assert_eq!(step.running, usize::from(is_remembered));
            let step = converger.step(at(again_at), true, &again);
            assert_eq!(step.failed.len(), usize::from(is_remembered));
            assert_eq!(step.begin.len(), usize::from(!is_remembered));
        }
        // A failure is remembered for longer.
        for (minutes, is_remembered) in [(59, true), (60, false)] {
            let mut converger = Converger::new(BUDGET);
            converger.step(at(0), true, &drifted);
            assert_eq!(converger.step(at(1), true, &again).failed.len(), 1);
            converger.step(at(2), true, &none);
            converger.step(at(2 + minutes * MINUTE), true, &none);
            let step = converger.step(at(2 + minutes * MINUTE), true, &again);
            assert_eq!((step.stuck, step.begin.len()), if is_remembered { (1, 0) } else { (0, 1) });
        }
    }

    #[test]
    fn obstacle_prevents_recreation() {
        for obstacle in Obstacle::ALL {
            let mut converger = Converger::new(BUDGET);
            let mut blocked = workload("w", 1, &[("a1", true)]);
            blocked.obstacle = Some(obstacle);
            let step = converger.step(at(0), true, &workloads([("a", blocked)]));
            assert_eq!(step, Step::default(), "{}", obstacle.as_str());
        }
    }

    #[test]
    fn resumed_recreation_needs_no_further_pod() {
        for (resumes, expected) in [(true, vec!["a".to_owned()]), (false, vec![])] {
            let mut converger = Converger::new(BUDGET);
            let begun = workloads([("a", workload("w", 1, &[("a1", true), ("a2", false)]))]);
            assert_eq!(converger.step(at(0), true, &begun).begin, ["a"]);
            if resumes {
                converger.resume("a");
            }
            let ended = workloads([("a", workload("w", 1, &[("a2", false)]))]);
            assert_eq!(converger.step(at(1), true, &ended).succeeded, expected);
        }
    }

    #[test]
    fn postponed_workload_leaves_the_rate_to_others() {
        let mut converger = Converger::new(BUDGET);
        let mut all = workloads([("a", workload("w", 1, &[("a1", true)]))]);
        assert_eq!(converger.step(at(0), true, &all).begin, ["a"]);
        converger.postpone(at(0), "a");
        all.insert("b".to_owned(), workload("v", 1, &[("b1", true)]));
        let step = converger.step(at(9), true, &all);
        assert_eq!((step.begin, step.waiting), (vec!["b".to_owned()], 1));
        assert_eq!(converger.step(at(10), true, &all).begin, ["a"]);
        // What could not be requested counts towards the rate all the same.
        all.insert("c".to_owned(), workload("w", 1, &[("c1", true)]));
        assert_eq!(converger.step(at(11), true, &all).waiting, 1);
    }

    #[test]
    fn withdrawn_workload_does_not_count_towards_the_rate() {
        let mut converger = Converger::new(BUDGET);
        let all = workloads([("a", workload("w", 1, &[("a1", true)]))]);
        for seconds in 0..10 {
            assert_eq!(converger.step(at(seconds), true, &all).begin, ["a"]);
            assert!(converger.is_running("a"));
            converger.withdraw("a");
            assert!(!converger.is_running("a"));
        }
    }
}
