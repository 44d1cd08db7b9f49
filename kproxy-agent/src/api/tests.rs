use serde_json::json;

use super::*;

fn service(value: serde_json::Value) -> Service {
    serde_json::from_str(&value.to_string()).expect("it is an object")
}

#[test]
fn every_field_takes_anything_and_costs_nothing_around_it() {
    for (odd, found) in [
        (json!(true), Found::Boolean),
        (json!(7), Found::Integer),
        (json!(7.5), Found::Number),
        (json!(u64::MAX), Found::Number),
        (json!([[1], {"a": null}]), Found::List),
        (json!({"a": [{}]}), Found::Object),
    ] {
        let read = service(json!({
            "metadata": {"name": odd, "labels": {"good": "g", "odd": odd}},
            "spec": {"type": odd, "clusterIPs": ["10.96.0.1", odd, null], "ports": [{"port": 80}]},
        }));
        let metadata = read.metadata.get().expect("metadata");
        assert_eq!(metadata.name, Field::Mistyped(found));
        let labels = metadata.labels.get().expect("labels");
        assert_eq!(labels.get("good"), Some(&Field::Is("g".into())));
        assert_eq!(labels.get("odd"), Some(&Field::Mistyped(found)));
        let spec = read.spec.get().expect("spec");
        assert_eq!(spec.type_, Field::Mistyped(found));
        let ips = spec.cluster_ips.get().expect("clusterIPs");
        assert_eq!(ips[..], [Field::Is("10.96.0.1".into()), Field::Mistyped(found), Field::Absent]);
        let ports = spec.ports.get().expect("ports");
        assert_eq!(ports[0].get().map(|port| port.port), Some(Field::Is(80)));
    }
    assert_eq!(service(json!({"spec": "text"})).spec, Field::Mistyped(Found::Text));
    assert_eq!(service(json!({"spec": null})), Service::default());
}

#[test]
fn what_is_not_read_may_be_anything() {
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    let text = format!(
        r#"{{"status": {{"conditions": {deep}, "loadBalancer": {deep}}}, "spec": {{"type": {deep}}},
            "more": 1e999, "and": "\ud800", "metadata": {{"name": "a", "managedFields": {deep}}}}}"#
    );
    let read: Service = serde_json::from_str(&text).expect("it is JSON");
    assert_eq!(read.metadata.get().and_then(Metadata::name), Some("a"));
    let status = read.status.get().expect("status");
    assert_eq!(status.load_balancer, Field::Mistyped(Found::List));
}

#[test]
fn a_key_that_stands_twice_counts_as_it_stands_last() {
    let read: Bare = serde_json::from_str(r#"{"metadata": 1, "metadata": {"name": 1, "name": "a"}}"#)
        .expect("it is an object");
    assert_eq!(read.metadata.get().and_then(Metadata::name), Some("a"));
}

#[test]
fn what_is_no_object_is_an_error() {
    for text in ["null", "7", "[]", "\"a\"", "{", ""] {
        assert!(serde_json::from_str::<Service>(text).is_err(), "{text}");
    }
}

#[test]
fn the_copy_that_kubectl_leaves_is_not_kept() {
    let read = service(json!({"metadata": {"annotations": {LAST_APPLIED: "{}", "a": "b"}}}));
    let annotations = read.metadata.get().and_then(|metadata| metadata.annotations.get()).expect("some");
    assert!(annotations.contains("a") && !annotations.contains(LAST_APPLIED));
}
