//! What is applied to a cluster: kproxy's manifests as a user edits them, a real kube-proxy, cluster DNS.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::cluster::node::DNS_V4;
use crate::cluster::read;

/// The pods of all nodes; see [`crate::NodeSpec::new`].
const POD_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/48";

/// kproxy's manifests, with the edits of a ConfigMap that they ask for.
pub fn kproxy(manifests: &Path, api_server: &str) -> Result<String> {
    let config = read(&manifests.join("configmap.yaml"))?;
    let config = replace(&config, "KPROXY_API_SERVER: ", api_server)?;
    // All that a full node runs is in this group of its own.
    let config = replace(&config, "KPROXY_CGROUP_ROOT: ", "/host/sys/fs/cgroup/v2/host")?;
    let config = format!("{config}  KPROXY_CLUSTER_CIDR: \"{POD_CIDRS}\"\n");
    let rest = ["rbac.yaml", "daemonset.yaml"].map(|name| read(&manifests.join(name)));
    let [rbac, daemon_set] = rest;
    Ok([config, rbac?, daemon_set?].join("\n---\n"))
}

/// Sets the value of a key that stands once, at the beginning of a line.
fn replace(text: &str, key: &str, value: &str) -> Result<String> {
    let mut found = 0;
    let lines: Vec<String> = text
        .lines()
        .map(|line| {
            let start = line.trim_start();
            if !start.starts_with(key) {
                return line.to_owned();
            }
            found += 1;
            format!("{}{key}\"{value}\"", &line[..line.len() - start.len()])
        })
        .collect();
    ensure!(found == 1, "the ConfigMap has {key}{found} times");
    Ok(lines.join("\n") + "\n")
}

/// A real kube-proxy, as kubeadm installs it, that leaves the machine's own parameters alone.
pub fn kube_proxy(api_server: &str) -> String {
    format!(
        r#"apiVersion: v1
kind: ServiceAccount
metadata: {{name: kube-proxy, namespace: kube-system}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: kube-proxy}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:node-proxier"}}
subjects: [{{kind: ServiceAccount, name: kube-proxy, namespace: kube-system}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: kube-proxy, namespace: kube-system}}
data:
  config.yaml: |
    apiVersion: kubeproxy.config.k8s.io/v1alpha1
    kind: KubeProxyConfiguration
    mode: nftables
    clusterCIDR: {POD_CIDRS}
    clientConnection: {{kubeconfig: /etc/kube-proxy/access.yaml}}
    conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
    oomScoreAdj: 0
    healthzBindAddress: 0.0.0.0:10256
    metricsBindAddress: 127.0.0.1:10249
  access.yaml: |
    apiVersion: v1
    kind: Config
    clusters:
    - name: c
      cluster:
        server: {api_server}
        certificate-authority: /var/run/secrets/kubernetes.io/serviceaccount/ca.crt
    users: [{{name: u, user: {{tokenFile: /var/run/secrets/kubernetes.io/serviceaccount/token}}}}]
    contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
    current-context: x
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: kube-proxy, namespace: kube-system, labels: {{app.kubernetes.io/name: kube-proxy}}}}
spec:
  selector: {{matchLabels: {{k8s-app: kube-proxy}}}}
  template:
    metadata: {{labels: {{k8s-app: kube-proxy, app.kubernetes.io/name: kube-proxy}}}}
    spec:
      serviceAccountName: kube-proxy
      priorityClassName: system-node-critical
      hostNetwork: true
      tolerations: [{{operator: Exists}}]
      containers:
      - name: kube-proxy
        image: kproxy.test/kube-proxy:test
        args: ["--config=/etc/kube-proxy/config.yaml", "--hostname-override=$(NODE_NAME)"]
        env: [{{name: NODE_NAME, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}]
        readinessProbe: {{httpGet: {{path: /healthz, port: 10256}}}}
        securityContext: {{capabilities: {{add: [NET_ADMIN, NET_RAW]}}}}
        volumeMounts: [{{name: config, mountPath: /etc/kube-proxy}}]
      volumes: [{{name: config, configMap: {{name: kube-proxy}}}}]
"#
    )
}

/// CoreDNS, as clusters have it: two pods behind the Service `kube-dns`, of both families.
pub fn dns(image: &str) -> String {
    format!(
        r#"apiVersion: v1
kind: ServiceAccount
metadata: {{name: coredns, namespace: kube-system}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: "system:coredns"}}
rules:
- {{apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}}
- {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: "system:coredns"}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:coredns"}}
subjects: [{{kind: ServiceAccount, name: coredns, namespace: kube-system}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: coredns, namespace: kube-system}}
data:
  Corefile: |
    .:53 {{
        errors
        health
        ready
        kubernetes cluster.local in-addr.arpa ip6.arpa {{
            pods insecure
        }}
        cache 5
    }}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: coredns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  replicas: 2
  selector: {{matchLabels: {{k8s-app: kube-dns}}}}
  template:
    metadata: {{labels: {{k8s-app: kube-dns}}}}
    spec:
      serviceAccountName: coredns
      priorityClassName: system-cluster-critical
      dnsPolicy: Default
      tolerations: [{{operator: Exists}}]
      containers:
      - name: coredns
        image: {image}
        args: ["-conf", "/etc/coredns/Corefile"]
        readinessProbe: {{httpGet: {{path: /ready, port: 8181}}, periodSeconds: 2}}
        volumeMounts: [{{name: config, mountPath: /etc/coredns, readOnly: true}}]
      volumes: [{{name: config, configMap: {{name: coredns}}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  clusterIP: {DNS_V4}
  ipFamilyPolicy: PreferDualStack
  selector: {{k8s-app: kube-dns}}
  ports:
  - {{name: dns, port: 53, protocol: UDP}}
  - {{name: dns-tcp, port: 53, protocol: TCP}}
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifests_are_edited_where_they_ask_for_it() {
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
        let text = kproxy(&manifests, "https://192.0.2.2:6443").unwrap();
        assert!(text.contains("\n  KPROXY_API_SERVER: \"https://192.0.2.2:6443\"\n"), "{text}");
        assert!(!text.contains("192.0.2.1:6443"), "{text}");
        assert!(text.contains("kind: DaemonSet"), "{text}");
        assert!(replace("a: 1\na: 2\n", "a: ", "3").is_err());
    }
}
