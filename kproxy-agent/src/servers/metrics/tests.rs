use kproxy_common::Reason;

use super::*;
use crate::servers::readings::ServiceCounters;

const START: SystemTime = SystemTime::UNIX_EPOCH;

#[test]
fn names_and_labels_are_those_of_kube_proxy() {
    let metrics = metrics();
    for family in Family::ALL {
        metrics.sync_took(family, SyncKind::Full, Duration::from_millis(3));
        metrics.sync_took(family, SyncKind::Partial, Duration::from_micros(500));
        metrics.programmed(family, START, START + Duration::from_secs(2));
        metrics.flows_reconciled(family, Duration::from_millis(1), 4);
        metrics.no_local_endpoints(PolicySide::Internal, family, 1);
        metrics.no_local_endpoints(PolicySide::External, family, 2);
        metrics.written(family, START + Duration::from_millis(1500));
    }
    metrics.changes_seen(Changed::Services, 5);
    metrics.changes_seen(Changed::Endpoints, 6);
    metrics.changes_pending(Changed::Services, 7);
    metrics.changes_pending(Changed::Endpoints, 8);
    metrics.healthz_answered(200);
    metrics.livez_answered(503);
    let text = metrics.exposition().unwrap();
    // As kube-proxy 1.36 in nftables mode writes them.
    for line in [
        "# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram",
        r#"kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"} 2"#,
        r#"kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="0.001",ip_family="IPv6"} 1"#,
        r#"kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="0.004",ip_family="IPv6"} 2"#,
        r#"kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="16.384",ip_family="IPv6"} 2"#,
        r#"kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv6"} 1"#,
        r#"kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family="IPv6"} 1"#,
        "# TYPE kubeproxy_sync_proxy_rules_last_timestamp_seconds gauge",
        r#"kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"} 1.5"#,
        r#"kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv4"} 0.0"#,
        r#"kubeproxy_network_programming_duration_seconds_bucket{le="0.5",ip_family="IPv4"} 0"#,
        r#"kubeproxy_network_programming_duration_seconds_bucket{le="1",ip_family="IPv4"} 0"#,
        r#"kubeproxy_network_programming_duration_seconds_bucket{le="2",ip_family="IPv4"} 1"#,
        r#"kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family="IPv4"} 1"#,
        "# TYPE kubeproxy_conntrack_reconciler_deleted_entries_total counter",
        r#"kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family="IPv4"} 4"#,
        "# TYPE kubeproxy_sync_proxy_rules_no_local_endpoints_total gauge",
        r#"kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv6",traffic_policy="internal"} 1"#,
        r#"kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv6",traffic_policy="external"} 2"#,
        "# TYPE kubeproxy_sync_proxy_rules_service_changes_total counter",
        "kubeproxy_sync_proxy_rules_service_changes_total 5",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 6",
        "# TYPE kubeproxy_sync_proxy_rules_service_changes_pending gauge",
        "kubeproxy_sync_proxy_rules_service_changes_pending 7",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending 8",
        r#"kubeproxy_proxy_healthz_total{code="200"} 1"#,
        r#"kubeproxy_proxy_livez_total{code="503"} 1"#,
    ] {
        assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
    }
}

#[test]
fn buckets_are_those_of_kube_proxy() {
    let metrics = metrics();
    metrics.sync_took(Family::V4, SyncKind::Partial, Duration::ZERO);
    // Clocks differ: it is not counted as less than nothing.
    metrics.programmed(Family::V4, START + Duration::from_secs(9), START);
    let text = metrics.exposition().unwrap();
    let bounds = |name: &str| {
        let start = format!("kubeproxy_{name}_bucket{{le=\"");
        let bounds = text.lines().filter_map(|line| line.strip_prefix(&start)?.split('"').next());
        bounds.map(str::to_owned).collect::<Vec<_>>()
    };
    let powers = (0..15).map(|n| f64::from(1 << n) / 1000.0).map(|bound| bound.to_string());
    assert_eq!(
        bounds("sync_proxy_rules_duration_seconds"),
        powers.chain(["+Inf".into()]).collect::<Vec<_>>()
    );
    let programming = bounds("network_programming_duration_seconds");
    let (first, last) = (&programming[..4], &programming[programming.len() - 9..]);
    assert_eq!((first, programming.len()), (&["0.25", "0.5", "1", "2"].map(String::from)[..], 81));
    assert_eq!(last, ["115", "120", "150", "180", "210", "240", "270", "300", "+Inf"]);
    assert!(
        text.contains("kubeproxy_network_programming_duration_seconds_sum{ip_family=\"IPv4\"} 0.0\n"),
        "{text}"
    );
}

#[test]
fn our_own_are_there_before_anything_happens() {
    let text = metrics().exposition().unwrap();
    for line in [
        r#"kproxy_sync_proxy_rules_sync_failures_total{ip_family="IPv4"} 0"#,
        r#"kproxy_sync_proxy_rules_cleanup_failures_total{ip_family="IPv6"} 0"#,
        r#"kproxy_service_connections_total{namespace="default",service="web",port="http"} 33"#,
        r#"kproxy_service_pass_through_connections_total{namespace="default",service="web",port="http"} 4"#,
        r#"kproxy_service_connections_total{namespace="kube-system",service="dns",port=""} 5"#,
        r#"kproxy_verdicts_total{reason="no-endpoints"} 6"#,
        r#"kproxy_verdicts_total{reason="pass-through"} 4"#,
    ] {
        assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "line {line:?} in\n{text}");
    }
}

#[test]
fn maps_are_counted_one_by_one() {
    let metrics = metrics();
    metrics.map_fill("frontend", 10, 65_536);
    metrics.map_fill("frontend", 11, 65_536);
    metrics.map_writes("frontend", 2, 0);
    metrics.map_writes("frontend", 3, 1);
    metrics.drift("backend", 2);
    metrics.write_failed(Family::V6);
    metrics.cleanup_failed(Family::V6);
    let text = metrics.exposition().unwrap();
    for line in [
        r#"kproxy_map_entries{map="frontend"} 11"#,
        r#"kproxy_map_capacity_entries{map="frontend"} 65536"#,
        r#"kproxy_map_writes_total{map="frontend"} 5"#,
        r#"kproxy_map_write_failures_total{map="frontend"} 1"#,
        r#"kproxy_map_drift_total{map="backend"} 2"#,
        r#"kproxy_sync_proxy_rules_sync_failures_total{ip_family="IPv6"} 1"#,
        r#"kproxy_sync_proxy_rules_cleanup_failures_total{ip_family="IPv6"} 1"#,
    ] {
        assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
    }
}

#[test]
fn problems_come_and_go() {
    let metrics = metrics();
    metrics.problems(ProblemOrigin::Model, [("address", 2), ("duplicate", 1)]);
    metrics.problems(ProblemOrigin::Source, [("duplicate", 5)]);
    metrics.problems(ProblemOrigin::Model, [("duplicate", 3)]);
    let text = metrics.exposition().unwrap();
    for line in [
        r#"kproxy_problems{kind="address",origin="model"} 0"#,
        r#"kproxy_problems{kind="duplicate",origin="model"} 3"#,
        r#"kproxy_problems{kind="duplicate",origin="source"} 5"#,
    ] {
        assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
    }
}

#[test]
fn what_cannot_be_read_is_missing_and_the_rest_is_there() {
    let unreadable = Readings {
        services: Box::new(|| anyhow::bail!("the map is gone")),
        verdicts: Box::new(|| Ok(vec![(Reason::NoEndpoints, 1)])),
    };
    let text = Metrics::new(Family::ALL, START, unreadable).exposition().unwrap();
    assert!(!text.contains("kproxy_service_connections"), "{text}");
    assert!(text.contains("kproxy_verdicts_total{reason=\"no-endpoints\"} 1\n"), "{text}");
    assert!(text.contains("kubeproxy_sync_proxy_rules_service_changes_total 0\n"), "{text}");
}

/// Metrics whose readings say always the same.
fn metrics() -> Metrics {
    let counters = |namespace: &str, name: &str, port: &str, connections, pass_through| ServiceCounters {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        port: port.to_owned(),
        connections,
        pass_through,
    };
    let readings = Readings {
        services: Box::new(move || {
            Ok(vec![
                counters("kube-system", "dns", "", 5, 0),
                counters("default", "web", "http", 3, 4),
                counters("default", "web", "http", 30, 0),
            ])
        }),
        verdicts: Box::new(|| Ok(vec![(Reason::PassThrough, 4), (Reason::NoEndpoints, 6)])),
    };
    Metrics::new(Family::ALL, START, readings)
}
