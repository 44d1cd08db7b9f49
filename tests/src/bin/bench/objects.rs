//! Services and EndpointSlices as a folder holds them.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use anyhow::Result;
use kproxy_lab::Manifests;

/// Endpoints of each Service.
pub const ENDPOINTS: u8 = 10;
/// The port of every Service.
pub const PORT: u16 = 80;
/// The port of every endpoint.
pub const TARGET: u16 = 8080;

/// How many Services a file holds, or slices.
const A_FILE: usize = 1_000;

/// Writes `services` Services with these endpoints, each Service and each slice as the API server prints them.
pub fn write(folder: &Manifests, services: usize, endpoints: &[Ipv4Addr]) -> Result<()> {
    let numbers: Vec<usize> = (0..services).collect();
    for (file, numbers) in numbers.chunks(A_FILE).enumerate() {
        let text: String = numbers.iter().map(|number| service(*number)).collect();
        folder.write(&format!("services-{file:03}.yaml"), &text)?;
        let others = numbers.iter().filter(|number| **number != 0);
        let text: String = others.map(|number| slice(*number, endpoints)).collect();
        folder.write(&format!("slices-{file:03}.yaml"), &text)?;
    }
    write_first_slice(folder, endpoints)
}

/// Writes the slice of the first Service, which has a file of its own.
pub fn write_first_slice(folder: &Manifests, endpoints: &[Ipv4Addr]) -> Result<()> {
    folder.write("slice-of-the-first.yaml", &slice(0, endpoints))
}

/// The ClusterIP of a Service.
pub fn cluster_ip(number: usize) -> Ipv4Addr {
    let [.., high, low] = (number + 1).to_be_bytes();
    Ipv4Addr::new(10, 96, high, low)
}

fn name(number: usize) -> String {
    format!("service-{number:05}")
}

fn service(number: usize) -> String {
    let (name, ip) = (name(number), cluster_ip(number));
    format!(
        "---
apiVersion: v1
kind: Service
metadata:
  creationTimestamp: \"2026-01-01T00:00:00Z\"
  labels:
    app: {name}
  name: {name}
  namespace: bench
  resourceVersion: \"{number}\"
  uid: 00000000-0000-4000-8000-{number:012}
spec:
  clusterIP: {ip}
  clusterIPs:
  - {ip}
  internalTrafficPolicy: Cluster
  ipFamilies:
  - IPv4
  ipFamilyPolicy: SingleStack
  ports:
  - name: http
    port: {PORT}
    protocol: TCP
    targetPort: {TARGET}
  selector:
    app: {name}
  sessionAffinity: None
  type: ClusterIP
status:
  loadBalancer: {{}}
"
    )
}

fn slice(number: usize, endpoints: &[Ipv4Addr]) -> String {
    let name = name(number);
    let mut text = format!(
        "---
addressType: IPv4
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  creationTimestamp: \"2026-01-01T00:00:00Z\"
  labels:
    app: {name}
    endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io
    kubernetes.io/service-name: {name}
  name: {name}-abcde
  namespace: bench
  resourceVersion: \"{number}\"
  uid: 00000000-0000-4000-9000-{number:012}
ports:
- name: http
  port: {TARGET}
  protocol: TCP
endpoints:
"
    );
    for (index, address) in endpoints.iter().enumerate() {
        // Writing into a string does not fail.
        let _ = write!(
            text,
            "- addresses:
  - {address}
  conditions:
    ready: true
    serving: true
    terminating: false
  nodeName: node-{index}
  targetRef:
    kind: Pod
    name: {name}-{index}
    namespace: bench
    uid: 00000000-0000-4000-a000-{number:010}{index:02}
"
        );
    }
    text
}
