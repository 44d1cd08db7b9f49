use std::net::{IpAddr, TcpListener};

use serde_json::{Value, json};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

use super::{
    testing::{get, request, state},
    *,
};

const ANY_PORT: &str = "127.0.0.1:0";

#[tokio::test]
async fn healthz_and_livez_answer_as_kube_proxy_does() {
    let state = state();
    let mut server = serve_healthz(&state, ANY_PORT.parse().unwrap(), |_, _| {});
    let address = server.address().await;

    let response = get(address, "/healthz").await;
    assert_eq!(response.status, 503, "the node was never seen: {}", response.body);
    state.node_seen(&Node::default());
    for path in ["/healthz", "/readyz"] {
        let response = get(address, path).await;
        assert_eq!(response.status, 503, "nothing is in force: {}", response.body);
        assert!(response.body.contains("the first full lists"), "{}", response.body);
    }
    assert_eq!(get(address, "/livez").await.status, 200);
    state.in_force();
    assert_eq!(get(address, "/readyz").await.status, 200);
    let response = get(address, "/healthz").await;
    assert_eq!(response.status, 200, "{}", response.body);
    assert_eq!(response.header("content-type"), Some("application/json"));
    assert_eq!(response.header("x-content-type-options"), Some("nosniff"));
    let body: Value = serde_json::from_str(&response.body).unwrap();
    assert_eq!((&body["healthy"], &body["nodeEligible"]), (&Value::from(true), &Value::from(true)));
    assert_eq!(body["lastUpdated"], body["currentTime"]);
    assert_eq!(body["status"]["IPv6"]["healthy"], true);

    // A node that is about to go gets no more traffic, but nobody restarts its agent for that.
    let node = json!({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}});
    state.node_seen(&serde_json::from_value(node).unwrap());
    assert_eq!(get(address, "/healthz").await.status, 503);
    let response = get(address, "/livez").await;
    assert_eq!(response.status, 200);
    assert!(!response.body.contains("nodeEligible"), "{}", response.body);
    assert_eq!(request(address, "POST", "/livez").await.status, 200, "methods do not matter");
    let response = request(address, "HEAD", "/livez").await;
    assert_eq!((response.status, response.body.as_str()), (200, ""));

    let response = get(address, "/metrics").await;
    assert_eq!((response.status, response.body.as_str()), (404, "404 page not found\n"));
    let metrics = state.metrics().exposition().unwrap();
    for line in [
        r#"kubeproxy_proxy_healthz_total{code="200"} 1"#,
        r#"kubeproxy_proxy_healthz_total{code="503"} 3"#,
        r#"kubeproxy_proxy_livez_total{code="200"} 4"#,
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
}

#[tokio::test]
async fn a_change_that_waits_for_a_minute_is_told_everywhere() {
    let state = state();
    state.node_seen(&Node::default());
    state.in_force();
    let mut server = serve_healthz(&state, ANY_PORT.parse().unwrap(), |_, _| {});
    let address = server.address().await;
    let service = ServiceKey { namespace: "default".into(), name: "web".into() };
    state.set_health_check(1, Some(HealthCheck { service, local_endpoints: [(Family::V4, 1)].into() }));
    let check = || state.health_check(1, Family::V4, Moment::now()).expect("the port has a Service");
    assert!(check().is_ok);

    // Time is given with each call, so a minute ago can be now.
    let now = Moment::now();
    let minute_ago = Moment { instant: now.instant - TIMEOUT, wall: now.wall - TIMEOUT };
    state.queued(Family::V6, minute_ago);
    for path in ["/healthz", "/livez"] {
        let response = get(address, path).await;
        let body: Value = serde_json::from_str(&response.body).unwrap();
        assert_eq!((response.status, &body["healthy"]), (503, &Value::from(false)), "{path}");
        let of_family = |family: &str| body["status"][family]["healthy"].clone();
        assert_eq!((of_family("IPv4"), of_family("IPv6")), (Value::from(true), Value::from(false)));
    }
    assert!(!check().is_ok && check().body.contains("\"serviceProxyHealthy\": false"));
    state.written(Family::V6, Moment::now());
    assert_eq!(get(address, "/healthz").await.status, 200);
    assert!(check().is_ok);
}

#[tokio::test]
async fn the_metrics_server_says_what_runs_and_how_it_fares() {
    let state = state();
    state.write_failed(Family::V4, Moment::now());
    let mut server = serve_metrics(&state, ANY_PORT.parse().unwrap(), |_, _| {});
    let address = server.address().await;

    let response = get(address, "/proxyMode").await;
    assert_eq!((response.status, response.body.as_str()), (200, "kproxy"));
    assert_eq!(response.header("content-type"), Some("text/plain; charset=utf-8"));
    let response = get(address, "/healthz").await;
    assert_eq!((response.status, response.body.as_str()), (200, "ok"));
    let response = get(address, "/configz").await;
    let body: Value = serde_json::from_str(&response.body).unwrap();
    assert_eq!(body["kubeproxy.config.k8s.io"]["hostnameOverride"], "a");
    assert_eq!(response.header("content-type"), Some("application/json"));

    let response = get(address, "/metrics").await;
    assert_eq!(response.status, 200);
    assert_eq!(response.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    for line in [
        r#"kproxy_verdicts_total{reason="no-endpoints"} 7"#,
        r#"kproxy_sync_proxy_rules_sync_failures_total{ip_family="IPv4"} 1"#,
    ] {
        assert!(response.body.lines().any(|found| found == line), "no {line} in\n{}", response.body);
    }
    assert_eq!(get(address, "/livez").await.status, 404);
}

#[tokio::test]
async fn the_unspecified_address_means_both_families() {
    for text in ["0.0.0.0:0", "[::]:0"] {
        let mut server = serve_healthz(&state(), text.parse().unwrap(), |_, _| {});
        let port = server.address().await.port();
        for ip in ["127.0.0.1", "::1"] {
            let address = SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port);
            assert_eq!(get(address, "/livez").await.status, 200, "{text} asked at {address}");
        }
    }
}

#[tokio::test]
async fn what_listens_lets_its_port_go() {
    let mut server = serve_healthz(&state(), ANY_PORT.parse().unwrap(), |_, _| {});
    let address = server.address().await;
    let mut idle = TcpStream::connect(address).await.unwrap();
    server.close().await;
    assert!(TcpListener::bind(address).is_ok(), "the port is free again");
    assert_eq!(idle.read(&mut [0]).await.unwrap(), 0, "connections without a request end");
}

#[tokio::test]
async fn a_server_without_an_address_is_none() {
    let off = BindAddress::healthz("").unwrap();
    assert!(Servers::start(&state(), off, off, |_, _| {})._listening.is_empty());
}
