//! `/configz`: with which configuration this agent runs.

use serde::Serialize;
use serde_json::{Map, Value};

/// What of kube-proxy's configuration has a meaning here, by its names.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KubeProxyConfiguration {
    /// `--node-name`.
    pub hostname_override: String,
    /// `--healthz-bind-address`, empty without a server.
    pub healthz_bind_address: String,
    /// `--metrics-bind-address`, empty without a server.
    pub metrics_bind_address: String,
    /// `--cluster-cidr`, comma-separated.
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: String,
    /// `--nodeport-addresses`.
    pub node_port_addresses: Vec<String>,
}

/// The body of `/configz`. `own` is what only kproxy has; it stands under `kproxy`.
pub fn configz(configuration: &KubeProxyConfiguration, own: Value) -> Result<String, serde_json::Error> {
    let mut fields = Map::new();
    fields.insert("kind".into(), "KubeProxyConfiguration".into());
    fields.insert("apiVersion".into(), "kubeproxy.config.k8s.io/v1alpha1".into());
    fields.insert("mode".into(), super::PROXY_MODE.into());
    if let Value::Object(given) = serde_json::to_value(configuration)? {
        fields.extend(given);
    }
    let body =
        Map::from_iter([("kproxy".to_owned(), own), ("kubeproxy.config.k8s.io".to_owned(), fields.into())]);
    serde_json::to_string(&body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_like_that_of_kube_proxy() {
        let configuration = KubeProxyConfiguration {
            hostname_override: "a".into(),
            healthz_bind_address: "0.0.0.0:10256".into(),
            cluster_cidr: "10.244.0.0/16".into(),
            node_port_addresses: vec!["primary".into()],
            ..KubeProxyConfiguration::default()
        };
        let body = configz(&configuration, serde_json::json!({"passThroughDefault": true})).unwrap();
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(
            body,
            serde_json::json!({
                "kproxy": {"passThroughDefault": true},
                "kubeproxy.config.k8s.io": {
                    "kind": "KubeProxyConfiguration",
                    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                    "mode": "kproxy",
                    "hostnameOverride": "a",
                    "healthzBindAddress": "0.0.0.0:10256",
                    "metricsBindAddress": "",
                    "clusterCIDR": "10.244.0.0/16",
                    "nodePortAddresses": ["primary"],
                },
            })
        );
    }
}
