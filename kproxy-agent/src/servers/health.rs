//! Whether the agent keeps up with what it is told, and whether its node may be given traffic: kube-proxy's
//! rules (`pkg/proxy/healthcheck`), as values. No clock: every call says when it is.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use k8s_openapi::jiff::{self, Timestamp};
use serde::{Serialize, Serializer};

use crate::{api::Node, model::objects::Family};

/// How long a change may wait unwritten (twice kube-proxy's `syncPeriod` of 30 s), and how long a kind of object
/// may be without a working watch.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// The taint that the cluster autoscaler puts on a node that it is about to delete.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Go's zero time, which kube-proxy shows for a write that never was.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// A point in time on both clocks: what waits is measured by the one that never jumps, what is shown is the
/// wall's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moment {
    /// On the monotonic clock.
    pub instant: Instant,
    /// On the wall.
    pub wall: SystemTime,
}

impl Moment {
    /// Now, on both clocks.
    pub fn now() -> Self {
        Self { instant: Instant::now(), wall: SystemTime::now() }
    }
}

/// What is known about the agent's health.
#[derive(Clone, Debug)]
pub struct Health {
    families: BTreeMap<Family, FamilyHealth>,
    node_eligible: bool,
    is_in_force: bool,
    /// Kinds of objects that have no working watch, and since when.
    lost_watches: BTreeMap<&'static str, Moment>,
}

#[derive(Clone, Copy, Debug)]
struct FamilyHealth {
    last_updated: SystemTime,
    /// Since when a change has been waiting; `None`: all is written.
    waiting_since: Option<Instant>,
}

/// What `/healthz` and `/livez` answer. The field names and their order are kube-proxy's.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthReport {
    /// When the latest write was made; when all is well, now.
    #[serde(serialize_with = "go_time_or_never")]
    pub last_updated: Option<SystemTime>,
    /// When this was asked.
    #[serde(serialize_with = "go_time")]
    pub current_time: SystemTime,
    /// Whether the node may be given traffic; left out on `/livez`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_eligible: Option<bool>,
    /// Whether no change waits too long in any family.
    pub healthy: bool,
    /// The same for each family: by `IPv4` and `IPv6`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub status: BTreeMap<&'static str, FamilyReport>,
    /// Why the node is not ready, where that is not for a change that waits or for the node: kproxy's own. Never
    /// on `/livez`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
}

/// The health of one family.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FamilyReport {
    /// When the latest write was made.
    #[serde(serialize_with = "go_time")]
    pub last_updated: SystemTime,
    /// Whether no change waits too long.
    pub healthy: bool,
}

impl Health {
    /// An agent that starts serving these families: healthy, as one that has just written, but not ready.
    pub fn new(families: impl IntoIterator<Item = Family>, now: Moment) -> Self {
        let start = FamilyHealth { last_updated: now.wall, waiting_since: None };
        Self {
            families: families.into_iter().map(|family| (family, start)).collect(),
            node_eligible: false,
            is_in_force: false,
            lost_watches: BTreeMap::new(),
        }
    }

    /// The first full lists are in force: written, and the programs attached.
    pub fn in_force(&mut self) {
        self.is_in_force = true;
    }

    /// Since when there has been no working watch of a kind of object (`services`); `None`: there is one, or none
    /// is needed.
    pub fn watch_is(&mut self, plural: &'static str, lost: Option<Moment>) {
        match lost {
            Some(since) => self.lost_watches.insert(plural, since),
            None => self.lost_watches.remove(plural),
        };
    }

    /// A change came that is to be written. The oldest one that waits is what counts.
    pub fn queued(&mut self, family: Family, now: Moment) {
        let health = self.family(family, now);
        health.waiting_since.get_or_insert(now.instant);
    }

    /// Everything that waited is written.
    pub fn written(&mut self, family: Family, now: Moment) {
        *self.family(family, now) = FamilyHealth { last_updated: now.wall, waiting_since: None };
    }

    /// A write failed, so something waits: from now on, unless something did before.
    pub fn write_failed(&mut self, family: Family, now: Moment) {
        self.queued(family, now);
    }

    /// The own Node as it is now. After its deletion the last one seen counts, so there is no call for that.
    pub fn node_seen(&mut self, node: &Node) {
        self.node_eligible = is_eligible(node);
    }

    /// Whether no change waits too long in any family: what `/livez` and the Services' health checks go by.
    pub fn is_healthy(&self, now: Moment) -> bool {
        self.families.values().all(|family| family.is_healthy(now))
    }

    /// The answer of `/livez`.
    pub fn livez(&self, now: Moment) -> HealthReport {
        let healthy = self.is_healthy(now);
        let last_written = self.families.values().map(|family| family.last_updated).max();
        HealthReport {
            last_updated: if healthy { Some(now.wall) } else { last_written },
            current_time: now.wall,
            node_eligible: None,
            healthy,
            status: self
                .families
                .iter()
                .map(|(family, health)| (family.text(), health.report(now)))
                .collect(),
            reasons: Vec::new(),
        }
    }

    /// The answer of `/readyz`: as `/healthz`, whatever becomes of the node.
    pub fn readyz(&self, now: Moment) -> HealthReport {
        let mut report = self.livez(now);
        report.reasons = self.reasons(now);
        self.date(&mut report);
        report
    }

    /// The answer of `/healthz`.
    pub fn healthz(&self, now: Moment) -> HealthReport {
        let mut report = self.livez(now);
        report.node_eligible = Some(self.node_eligible);
        report.reasons = self.reasons(now);
        self.date(&mut report);
        report
    }

    /// Only what is well was updated just now.
    fn date(&self, report: &mut HealthReport) {
        if !report.is_ok() {
            report.last_updated = self.families.values().map(|family| family.last_updated).max();
        }
    }

    fn reasons(&self, now: Moment) -> Vec<String> {
        let loading =
            "the first full lists of Services and EndpointSlices are not in force yet; why, is in the log";
        let loading = (!self.is_in_force).then(|| loading.to_owned());
        let is_long = |since: &Moment| now.instant.saturating_duration_since(since.instant) >= TIMEOUT;
        let lost = self.lost_watches.iter().filter(|(_, since)| is_long(since)).map(|(plural, since)| {
            let since =
                wall_time(since.wall).map_or_else(|_| String::new(), |time| format!(" since {time:.0}"));
            format!("there is no working watch of {plural}{since}: changes are not seen; why, is in the log")
        });
        loading.into_iter().chain(lost).collect()
    }

    fn family(&mut self, family: Family, now: Moment) -> &mut FamilyHealth {
        self.families.entry(family).or_insert(FamilyHealth { last_updated: now.wall, waiting_since: None })
    }
}

impl FamilyHealth {
    fn is_healthy(&self, now: Moment) -> bool {
        self.waiting_since.is_none_or(|since| now.instant.saturating_duration_since(since) < TIMEOUT)
    }

    fn report(&self, now: Moment) -> FamilyReport {
        FamilyReport { last_updated: self.last_updated, healthy: self.is_healthy(now) }
    }
}

impl HealthReport {
    /// Whether the status is 200; else it is 503.
    pub fn is_ok(&self) -> bool {
        self.healthy && self.node_eligible != Some(false) && self.reasons.is_empty()
    }
}

/// Whether a load balancer may send traffic to the node: it is neither being deleted nor about to be.
fn is_eligible(node: &Node) -> bool {
    let is_being_deleted = node.metadata.get().is_some_and(|metadata| metadata.deletion_timestamp.is_there());
    let taints = node.spec.get().and_then(|spec| spec.taints.get()).into_iter().flatten();
    let mut keys = taints.filter_map(|taint| taint.get()?.key.text());
    !is_being_deleted && keys.all(|key| key != TO_BE_DELETED)
}

/// RFC 3339 with as many digits of the second as it takes, as Go's `time.Time` is written in JSON.
fn go_time<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let timestamp = wall_time(*time).map_err(serde::ser::Error::custom)?;
    serializer.collect_str(&timestamp)
}

/// A clock that stands before 1970 shows 1970.
fn wall_time(time: SystemTime) -> Result<Timestamp, jiff::Error> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_nanosecond(i128::try_from(since.as_nanos()).unwrap_or(i128::MAX))
}

fn go_time_or_never<S: Serializer>(time: &Option<SystemTime>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => go_time(time, serializer),
        None => serializer.serialize_str(NEVER),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Seconds after a start at 2026-01-02T03:04:05Z.
    struct Clock(Moment);

    impl Clock {
        fn new() -> Self {
            Self(Moment {
                instant: Instant::now(),
                wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_323_045),
            })
        }

        fn at(&self, seconds: f64) -> Moment {
            let passed = Duration::from_secs_f64(seconds);
            Moment { instant: self.0.instant + passed, wall: self.0.wall + passed }
        }
    }

    fn node(taint: Option<&str>, is_deleted: bool) -> Node {
        let time = is_deleted.then_some("1970-01-01T00:00:00Z");
        let taints = taint.map(|key| json!([{"key": key}, null]));
        let node = json!({"metadata": {"deletionTimestamp": time}, "spec": {"taints": taints}});
        serde_json::from_value(node).expect("a Node")
    }

    /// One that serves what it was told.
    fn in_force(families: impl IntoIterator<Item = Family>, now: Moment) -> Health {
        let mut health = Health::new(families, now);
        health.in_force();
        health
    }

    #[test]
    fn until_the_first_lists_are_in_force_the_node_is_not_ready() {
        let clock = Clock::new();
        let mut health = Health::new(Family::ALL, clock.at(0.0));
        health.node_seen(&node(None, false));
        for report in [health.healthz(clock.at(1.0)), health.readyz(clock.at(1e6))] {
            assert!(!report.is_ok() && report.healthy, "{report:?}");
            assert!(report.reasons[0].contains("first full lists"), "{report:?}");
        }
        assert!(health.livez(clock.at(1e6)).is_ok(), "nobody restarts it for that");
        assert!(health.is_healthy(clock.at(1e6)));
        health.in_force();
        assert!(health.healthz(clock.at(1.0)).is_ok() && health.readyz(clock.at(1.0)).is_ok());
    }

    #[test]
    fn a_kind_may_be_without_a_watch_for_sixty_seconds() {
        let clock = Clock::new();
        let mut health = in_force(Family::ALL, clock.at(0.0));
        health.node_seen(&node(None, false));
        health.watch_is("services", Some(clock.at(100.0)));
        health.watch_is("pods", Some(clock.at(130.0)));
        assert!(health.healthz(clock.at(159.9)).is_ok() && health.readyz(clock.at(159.9)).is_ok());
        let report = health.healthz(clock.at(160.0));
        assert!(!report.is_ok() && report.healthy);
        assert_eq!(
            report.reasons,
            [
                "there is no working watch of services since 2026-01-02T03:05:45Z: changes are not seen; why, is \
              in the log"
            ]
        );
        let body = serde_json::to_string(&report).expect("it has a form");
        assert!(body.contains(r#""reasons":["there is no working watch of services"#), "{body}");
        assert!(!health.readyz(clock.at(160.0)).is_ok());
        assert!(health.livez(clock.at(1e6)).is_ok(), "a restart would mend nothing");
        assert_eq!(health.readyz(clock.at(190.0)).reasons.len(), 2);
        health.watch_is("services", None);
        health.watch_is("pods", None);
        assert!(health.healthz(clock.at(1e6)).is_ok());
    }

    #[test]
    fn what_becomes_of_the_node_does_not_make_the_agent_unready() {
        let clock = Clock::new();
        let health = in_force(Family::ALL, clock.at(0.0));
        assert!(health.readyz(clock.at(1.0)).is_ok() && !health.healthz(clock.at(1.0)).is_ok());
    }

    #[test]
    fn a_change_may_wait_for_sixty_seconds_from_the_oldest_on() {
        let clock = Clock::new();
        let mut health = in_force(Family::ALL, clock.at(0.0));
        assert!(health.is_healthy(clock.at(1e6)), "nothing waits");
        health.queued(Family::V6, clock.at(100.0));
        health.queued(Family::V6, clock.at(150.0));
        assert!(health.is_healthy(clock.at(159.999)));
        assert!(!health.is_healthy(clock.at(160.0)));
        health.written(Family::V4, clock.at(161.0));
        assert!(!health.is_healthy(clock.at(162.0)), "the other family is written");
        health.written(Family::V6, clock.at(163.0));
        assert!(health.is_healthy(clock.at(1e6)));
        health.queued(Family::V6, clock.at(200.0));
        assert!(health.is_healthy(clock.at(259.0)), "the earlier changes are written");
    }

    #[test]
    fn writes_that_fail_for_sixty_seconds_are_as_bad() {
        let clock = Clock::new();
        let mut health = in_force([Family::V4], clock.at(0.0));
        for second in 0..60 {
            health.write_failed(Family::V4, clock.at(f64::from(second)));
        }
        assert!(health.is_healthy(clock.at(59.9)));
        assert!(!health.is_healthy(clock.at(60.0)));
        health.written(Family::V4, clock.at(61.0));
        assert!(health.is_healthy(clock.at(61.0)));
    }

    #[test]
    fn a_wall_clock_that_jumps_makes_nobody_ill() {
        let clock = Clock::new();
        let mut health = in_force([Family::V4], clock.at(0.0));
        health.queued(Family::V4, clock.at(0.0));
        let jumped = Moment { instant: clock.at(1.0).instant, wall: clock.at(1e7).wall };
        assert!(health.is_healthy(jumped));
    }

    #[test]
    fn a_node_is_eligible_once_seen_unless_it_goes() {
        let clock = Clock::new();
        let mut health = in_force([Family::V4], clock.at(0.0));
        let eligible = |health: &mut Health| {
            let (healthz, livez) = (health.healthz(clock.at(1.0)), health.livez(clock.at(1.0)));
            assert!(healthz.healthy && livez.is_ok(), "the node is no part of that");
            assert_eq!((healthz.node_eligible, livez.node_eligible), (Some(healthz.is_ok()), None));
            healthz.is_ok()
        };
        assert!(!eligible(&mut health), "never seen");
        for (node, expected) in [
            (node(None, false), true),
            (node(Some("node.kubernetes.io/unschedulable"), false), true),
            (node(Some(TO_BE_DELETED), false), false),
            (Node::default(), true),
            (node(None, true), false),
        ] {
            health.node_seen(&node);
            assert_eq!(eligible(&mut health), expected, "{node:?}");
        }
    }

    #[test]
    fn bodies_are_those_of_kube_proxy() {
        let clock = Clock::new();
        let mut health = in_force(Family::ALL, clock.at(0.0));
        health.written(Family::V4, clock.at(1.5));
        let json = |report: HealthReport| serde_json::to_string(&report).expect("it has a form");
        assert_eq!(
            json(health.livez(clock.at(2.25))),
            r#"{"lastUpdated":"2026-01-02T03:04:07.25Z","currentTime":"2026-01-02T03:04:07.25Z","healthy":true,"status":{"IPv4":{"lastUpdated":"2026-01-02T03:04:06.5Z","healthy":true},"IPv6":{"lastUpdated":"2026-01-02T03:04:05Z","healthy":true}}}"#
        );
        assert_eq!(
            json(health.healthz(clock.at(2.25))),
            r#"{"lastUpdated":"2026-01-02T03:04:06.5Z","currentTime":"2026-01-02T03:04:07.25Z","nodeEligible":false,"healthy":true,"status":{"IPv4":{"lastUpdated":"2026-01-02T03:04:06.5Z","healthy":true},"IPv6":{"lastUpdated":"2026-01-02T03:04:05Z","healthy":true}}}"#
        );
        health.queued(Family::V6, clock.at(3.0));
        health.node_seen(&Node::default());
        assert_eq!(
            json(health.healthz(clock.at(64.0))),
            r#"{"lastUpdated":"2026-01-02T03:04:06.5Z","currentTime":"2026-01-02T03:05:09Z","nodeEligible":true,"healthy":false,"status":{"IPv4":{"lastUpdated":"2026-01-02T03:04:06.5Z","healthy":true},"IPv6":{"lastUpdated":"2026-01-02T03:04:05Z","healthy":false}}}"#
        );
        let nothing = in_force([], clock.at(0.0)).healthz(clock.at(0.0));
        assert_eq!(
            json(nothing),
            r#"{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"2026-01-02T03:04:05Z","nodeEligible":false,"healthy":true}"#
        );
    }
}
