//! What kube-proxy measures about the objects themselves, kept up with the model's updates: how long a change of
//! endpoints takes from its cause to the maps, and how many Service ports have a policy Local and nothing here.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use k8s_openapi::jiff::Timestamp;
use kproxy_common::{FrontendKind, Mode};

use crate::{
    api::EndpointSlice,
    model::objects::Family,
    servers::PolicySide,
    wanted::{ServiceKey, WantedPort, WantedService},
};

/// When the controller noticed what made it change the slice (`EndpointsLastChangeTriggerTime`).
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Changes of endpoints that the maps do not hold yet, and when their causes were.
#[derive(Debug)]
pub struct Programming {
    /// Causes from before this are not measured: the agent was not there.
    start: SystemTime,
    waiting: BTreeMap<ServiceKey, Vec<(Family, SystemTime)>>,
}

impl Programming {
    /// Of an agent that starts at `start`.
    pub fn new(start: SystemTime) -> Self {
        Self { start, waiting: BTreeMap::new() }
    }

    /// A change that is to be written.
    pub fn wait(&mut self, trigger: Trigger) {
        let Trigger { service, family, at } = trigger;
        if at > self.start {
            self.waiting.entry(service).or_default().push((family, at));
        }
    }

    /// The maps hold what `is_written` says: the causes of the changes that are in force now.
    pub fn written(&mut self, is_written: impl Fn(&ServiceKey) -> bool) -> Vec<(Family, SystemTime)> {
        self.waiting.extract_if(.., |service, _| is_written(service)).flat_map(|(_, times)| times).collect()
    }

    /// What is not in force after so long is not measured any more: a Service that cannot be written must not gather
    /// the times of all its changes.
    pub fn forget(&mut self, now: SystemTime) {
        const LONGEST: Duration = Duration::from_secs(600);
        for times in self.waiting.values_mut() {
            times.retain(|(_, triggered)| now.duration_since(*triggered).unwrap_or_default() < LONGEST);
        }
        self.waiting.retain(|_, times| !times.is_empty());
    }
}

/// What made a controller change a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trigger {
    service: ServiceKey,
    family: Family,
    at: SystemTime,
}

impl Trigger {
    /// Of a slice that came or changed, where it says so. What went has the time of the change before.
    pub fn of(namespace: &str, slice: &EndpointSlice) -> Option<Self> {
        let metadata = slice.metadata.get()?;
        let name = metadata.labels.get()?.get(SERVICE_NAME)?.text()?.to_owned();
        // What is no time is left out, as by kube-proxy.
        let at: Timestamp = metadata.annotations.get()?.get(TRIGGER_TIME)?.text()?.parse().ok()?;
        let family = match slice.address_type.text()? {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            _ => return None,
        };
        let service = ServiceKey { namespace: namespace.to_owned(), name };
        Some(Self { service, family, at: at.into() })
    }
}

/// How many Service ports of each family have endpoints, none of them here, and a traffic policy of Local.
#[derive(Default, Debug)]
pub struct NoLocalEndpoints {
    /// Only those that have any.
    services: BTreeMap<ServiceKey, Counts>,
    sums: Counts,
}

type Counts = BTreeMap<(Side, Family), usize>;

/// [`PolicySide`], in an order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Side {
    Internal,
    External,
}

impl NoLocalEndpoints {
    /// Takes in the Services that changed.
    pub fn note<'a>(
        &mut self,
        services: impl IntoIterator<Item = (&'a ServiceKey, &'a Option<WantedService>)>,
    ) {
        for (key, wanted) in services {
            for (which, count) in self.services.remove(key).unwrap_or_default() {
                *self.sums.entry(which).or_default() -= count;
            }
            let counts = wanted.as_ref().map(counts).unwrap_or_default();
            for (which, count) in &counts {
                *self.sums.entry(*which).or_default() += count;
            }
            if !counts.is_empty() {
                self.services.insert(key.clone(), counts);
            }
        }
    }

    /// All four numbers.
    pub fn sums(&self) -> impl Iterator<Item = (PolicySide, Family, usize)> {
        let sides = [(Side::Internal, PolicySide::Internal), (Side::External, PolicySide::External)];
        let all = sides.into_iter().flat_map(|side| Family::ALL.map(|family| (side, family)));
        all.map(|((side, policy), family)| {
            (policy, family, self.sums.get(&(side, family)).copied().unwrap_or(0))
        })
    }
}

fn counts(service: &WantedService) -> Counts {
    let mut counts = Counts::new();
    for port in &service.ports {
        for side in [Side::Internal, Side::External] {
            if let Some(family) = family_without(port, side) {
                *counts.entry((side, family)).or_default() += 1;
            }
        }
    }
    counts
}

/// The family of a port that drops on this side. Without endpoints anywhere it would refuse, and with the policy
/// Cluster have some.
fn family_without(port: &WantedPort, side: Side) -> Option<Family> {
    let drops = port.frontends.iter().find(|frontend| match (side, frontend.kind) {
        (Side::Internal, FrontendKind::ClusterIp) => frontend.inside.mode == Mode::Drop,
        (Side::External, FrontendKind::ClusterIp) | (Side::Internal, _) => false,
        (Side::External, _) => frontend.outside.mode == Mode::Drop,
    });
    drops.map(|frontend| Family::of(&frontend.key.address()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::api::Service;
    use crate::model::{Change, Model, NodeConfig};

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(second)
    }

    fn slice(trigger: &str, address_type: &str) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {"labels": {SERVICE_NAME: "web"}, "annotations": {TRIGGER_TIME: trigger}},
            "addressType": address_type,
            "endpoints": [],
        }))
        .expect("a slice")
    }

    fn see(programming: &mut Programming, slice: &EndpointSlice) {
        Trigger::of("default", slice).into_iter().for_each(|trigger| programming.wait(trigger));
    }

    #[test]
    fn changes_are_measured_from_their_cause_until_they_are_written() {
        let mut programming = Programming::new(at(1_000));
        // Before the start, at it, after it with nanoseconds as controllers write them, in another zone, nonsense.
        for trigger in [
            "1970-01-01T00:16:39Z",
            "1970-01-01T00:16:40Z",
            "1970-01-01T00:16:41.500000001Z",
            "1970-01-01T01:16:42+01:00",
            "yesterday",
        ] {
            see(&mut programming, &slice(trigger, "IPv4"));
        }
        see(&mut programming, &slice("1970-01-01T00:16:43Z", "IPv6"));
        see(&mut programming, &slice("1970-01-01T00:16:43Z", "FQDN"));
        assert_eq!(programming.written(|_| false), []);
        let written = programming.written(|service| service.to_string() == "default/web");
        let second = Duration::new(1_001, 500_000_001);
        assert_eq!(
            written,
            [(Family::V4, SystemTime::UNIX_EPOCH + second), (Family::V4, at(1_002)), (Family::V6, at(1_003)),]
        );
        assert_eq!(programming.written(|_| true), [], "once");
    }

    #[test]
    fn what_is_never_written_is_forgotten() {
        let mut programming = Programming::new(at(0));
        see(&mut programming, &slice("1970-01-01T00:00:10Z", "IPv4"));
        programming.forget(at(609));
        assert_eq!(programming.waiting.len(), 1);
        programming.forget(at(610));
        assert!(programming.waiting.is_empty());
    }

    fn web(internal: &str, external: &str) -> Value {
        json!({
            "metadata": {"name": "web"},
            "spec": {
                "type": "NodePort",
                "clusterIPs": ["10.96.0.1", "fd00:10:96::1"],
                "internalTrafficPolicy": internal,
                "externalTrafficPolicy": external,
                "ports": [{"port": 80, "name": "a", "nodePort": 30080}, {"port": 81, "name": "b", "nodePort": 30081}],
            },
        })
    }

    #[test]
    fn ports_without_local_endpoints_are_counted_by_policy_and_family() {
        let key = |name: &str| ServiceKey { namespace: "default".into(), name: name.into() };
        let mut model = Model::new(NodeConfig { node_name: "node-a".into(), ..NodeConfig::default() });
        let mut counted = NoLocalEndpoints::default();
        let mut after = |service: Option<Value>, nodes: &[&str]| {
            let service = service
                .map(|service| Box::new(serde_json::from_value::<Service>(service).expect("a Service")));
            model.apply(Change::Service(key("web"), service));
            let endpoints: Vec<_> =
                nodes.iter().map(|node| json!({"addresses": ["10.244.1.1"], "nodeName": node})).collect();
            let slice: EndpointSlice = serde_json::from_value(json!({
                "metadata": {"labels": {SERVICE_NAME: "web"}},
                "addressType": "IPv4",
                "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}],
                "endpoints": endpoints,
            }))
            .expect("a slice");
            model.apply(Change::EndpointSlice(key("web-v4"), Some(Box::new(slice))));
            counted.note(&model.recompute().services);
            counted.sums().map(|(.., count)| count).collect::<Vec<_>>()
        };
        // Internal IPv4 and IPv6, external IPv4 and IPv6. IPv6 has no endpoint at all and refuses.
        assert_eq!(after(Some(web("Local", "Cluster")), &["node-b"]), [2, 0, 0, 0]);
        assert_eq!(after(Some(web("Local", "Local")), &["node-b"]), [2, 0, 2, 0]);
        assert_eq!(after(Some(web("Local", "Local")), &["node-a"]), [0, 0, 0, 0]);
        assert_eq!(after(Some(web("Cluster", "Local")), &["node-b"]), [0, 0, 2, 0]);
        assert_eq!(after(Some(web("Cluster", "Local")), &[]), [0, 0, 0, 0]);
        assert_eq!(after(Some(web("Cluster", "Local")), &["node-b"]), [0, 0, 2, 0]);
        assert_eq!(after(None, &["node-b"]), [0, 0, 0, 0]);
    }
}
