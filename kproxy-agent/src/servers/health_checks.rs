//! What a `healthCheckNodePort` answers: kube-proxy's `service_health.go`, as values.

use std::collections::BTreeMap;

use crate::{model::objects::Family, wanted::ServiceKey};

/// A Service of type LoadBalancer with externalTrafficPolicy Local: what its `healthCheckNodePort` tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthCheck {
    /// Whose port it is.
    pub service: ServiceKey,
    /// For each family of the Service: how many distinct addresses of ready endpoints are on this node. A
    /// family that is not here is not listened on.
    pub local_endpoints: BTreeMap<Family, u32>,
}

/// The answer to one request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthCheckAnswer {
    /// 200 or 503.
    pub is_ok: bool,
    /// The header `X-Load-Balancing-Endpoint-Weight`.
    pub weight: u32,
    /// JSON.
    pub body: String,
}

impl HealthCheck {
    /// The answer on a listener of `family`. `is_proxy_healthy` as on `/livez`.
    pub fn answer(&self, family: Family, is_proxy_healthy: bool) -> HealthCheckAnswer {
        let weight = self.local_endpoints.get(&family).copied().unwrap_or(0);
        let quoted = |name: &str| serde_json::Value::from(name).to_string();
        let body = format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": {},\n\t\t\"name\": {}\n\t}},\n\t\"localEndpoints\": {weight},\n\
             \t\"serviceProxyHealthy\": {is_proxy_healthy}\n}}",
            quoted(&self.service.namespace),
            quoted(&self.service.name),
        );
        HealthCheckAnswer { is_ok: weight > 0 && is_proxy_healthy, weight, body }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_that_of_kube_proxy() {
        let check = HealthCheck {
            service: ServiceKey { namespace: "default".into(), name: "web".into() },
            local_endpoints: [(Family::V4, 2), (Family::V6, 0)].into(),
        };
        let answer = check.answer(Family::V4, true);
        assert_eq!((answer.is_ok, answer.weight), (true, 2));
        assert_eq!(
            answer.body,
            "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\
             \t\"serviceProxyHealthy\": true\n}"
        );
        let answer = check.answer(Family::V4, false);
        assert_eq!((answer.is_ok, answer.weight), (false, 2));
        assert!(answer.body.ends_with("\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": false\n}"));
        let answer = check.answer(Family::V6, true);
        assert_eq!((answer.is_ok, answer.weight), (false, 0));
        let value: serde_json::Value = serde_json::from_str(&answer.body).expect("JSON");
        assert_eq!(value["localEndpoints"], 0);
    }
}
