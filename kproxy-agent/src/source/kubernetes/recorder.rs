//! Writes Events to the API server in use.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{GroupVersionKind, Status};
use kube::{Api, Client};
use serde_json::json;

use super::Connection;
use super::servers::Servers;
use crate::events::{Notice, Outcome, Scope};
use crate::model::{ObjectKind, ObjectRef};

/// Who reports.
const CONTROLLER: &str = "kproxy";

/// How long the API server may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Where Events on what has no namespace go.
const DEFAULT_NAMESPACE: &str = "default";

/// How long the name of an Event may be (a DNS subdomain), and `reportingInstance`.
const MAX_NAME: usize = 253;
const MAX_INSTANCE: usize = 128;

/// Writes Events on behalf of this node's agent.
pub struct Recorder {
    servers: Arc<Servers>,
    node_name: String,
}

impl Recorder {
    /// By this connection.
    pub fn new(connection: &Connection, node_name: &str) -> Self {
        Self { servers: Arc::clone(&connection.0), node_name: node_name.to_owned() }
    }

    /// Writes an Event.
    ///
    /// Its name follows from what it says: what all agents of a cluster have to say about an object is one Event, not one
    /// from each, and a restart repeats none.
    pub async fn record(&self, notice: &Notice) -> Outcome {
        // Which server is in use is decided by the watches, which notice an outage anyway.
        let client = self.servers.attempt().client;
        match tokio::time::timeout(TIMEOUT, self.write(client, notice)).await {
            Ok(outcome) => outcome,
            Err(_) => Outcome::Later(format!("no answer within {} s", TIMEOUT.as_secs())),
        }
    }

    async fn write(&self, client: Client, notice: &Notice) -> Outcome {
        let uid = match uid(&client, &notice.object).await {
            Ok(Some(uid)) => uid,
            Ok(None) => return Outcome::NoObject,
            Err(error) => return outcome_of(&error),
        };
        let event = event(notice, &uid, &self.node_name, Timestamp::now());
        let name = event.metadata.name.clone().unwrap_or_default();
        let events = Api::<Event>::namespaced(client, namespace(&notice.object));
        match events.create(&PostParams::default(), &event).await {
            Ok(_) => Outcome::Written,
            Err(kube::Error::Api(status)) if status.code == 409 => {
                if notice.count < 2 {
                    return Outcome::Written;
                }
                let series =
                    EventSeries { count: notice.count, last_observed_time: MicroTime(Timestamp::now()) };
                let patch = Patch::Merge(json!({ "series": series }));
                match events.patch(&name, &PatchParams::default(), &patch).await {
                    Ok(_) => Outcome::Written,
                    Err(error) => outcome_of(&error),
                }
            }
            Err(error) => outcome_of(&error),
        }
    }
}

/// The UID of an object, without which `kubectl describe` does not show its Events; `None` if it is not there.
/// Listed by name rather than read: that is what the watches are allowed to do anyway.
async fn uid(client: &Client, object: &ObjectRef) -> Result<Option<String>, kube::Error> {
    let (group, version, plural) = resource(object.kind);
    let kind = GroupVersionKind::gvk(group, version, &object.kind.to_string());
    let resource = ApiResource::from_gvk_with_plural(&kind, plural);
    let api: Api<DynamicObject> = if object.namespace.is_empty() {
        Api::all_with(client.clone(), &resource)
    } else {
        Api::namespaced_with(client.clone(), &object.namespace, &resource)
    };
    let by_name = ListParams::default().fields(&format!("metadata.name={}", object.name)).limit(1);
    let found = api.list_metadata(&by_name).await?;
    Ok(found.items.into_iter().next().and_then(|object| object.metadata.uid))
}

fn resource(kind: ObjectKind) -> (&'static str, &'static str, &'static str) {
    match kind {
        ObjectKind::Service => ("", "v1", "services"),
        ObjectKind::EndpointSlice => ("discovery.k8s.io", "v1", "endpointslices"),
        ObjectKind::Node => ("", "v1", "nodes"),
        ObjectKind::Pod => ("", "v1", "pods"),
        ObjectKind::ServiceCidr => ("networking.k8s.io", "v1", "servicecidrs"),
    }
}

fn namespace(object: &ObjectRef) -> &str {
    if object.namespace.is_empty() { DEFAULT_NAMESPACE } else { &object.namespace }
}

fn event(notice: &Notice, uid: &str, node_name: &str, now: Timestamp) -> Event {
    let Notice { object, reason, note, count: _ } = notice;
    let (group, version, _) = resource(object.kind);
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    // On every node the same, where all nodes see the same.
    let node = match reason.scope() {
        Scope::Cluster => "",
        Scope::Node => node_name,
    };
    let hash = hash(&[uid, reason.text(), note, node]);
    let suffix = format!(".{hash:016x}");
    let name = &object.name[..object.name.floor_char_boundary(MAX_NAME - suffix.len())];
    let instance = format!("{CONTROLLER}-{node_name}");
    let not_namespaced = object.namespace.is_empty();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}{suffix}", name.trim_end_matches(['.', '-']))),
            namespace: Some(namespace(object).to_owned()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(instance[..instance.floor_char_boundary(MAX_INSTANCE)].to_owned()),
        action: Some(reason.action().to_owned()),
        reason: Some(reason.text().to_owned()),
        type_: Some("Warning".to_owned()),
        note: Some(note.clone()),
        regarding: Some(ObjectReference {
            api_version: Some(api_version),
            kind: Some(object.kind.to_string()),
            namespace: (!not_namespaced).then(|| object.namespace.clone()),
            name: Some(object.name.clone()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        }),
        ..Event::default()
    }
}

/// FNV-1a: the same on every node and in every version, which the standard library's hashes do not promise.
fn hash(texts: &[&str]) -> u64 {
    let bytes = texts.iter().flat_map(|text| text.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn outcome_of(error: &kube::Error) -> Outcome {
    let kube::Error::Api(status) = error else { return Outcome::Later(error.to_string()) };
    match status.code {
        // Its namespace is gone, or going.
        404 => Outcome::NoObject,
        403 if is_terminating(status) => Outcome::NoObject,
        401 | 403 => Outcome::Forbidden(status.message.clone()),
        429 | 500.. => Outcome::Later(status.message.clone()),
        _ => Outcome::Refused(status.message.clone()),
    }
}

fn is_terminating(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::EventReason;
    use crate::wanted::ServiceKey;

    fn notice(name: &str, reason: EventReason) -> Notice {
        let key = ServiceKey { namespace: "shop".into(), name: name.into() };
        Notice { object: ObjectRef::service(&key), reason, note: "spec.ports[0]: no".into(), count: 1 }
    }

    #[test]
    fn all_agents_say_the_same_thing_in_one_event() {
        let name = |notice: &Notice, uid: &str, node: &str| {
            event(notice, uid, node, Timestamp::UNIX_EPOCH).metadata.name.expect("it has a name")
        };
        let shared = notice("web", EventReason::InvalidValue);
        assert_eq!(name(&shared, "u", "node-a"), name(&shared, "u", "node-b"));
        assert_ne!(name(&shared, "u", "node-a"), name(&shared, "v", "node-a"), "made anew");
        let local = notice("web", EventReason::FailedToStartServiceHealthcheck);
        assert_ne!(name(&local, "u", "node-a"), name(&local, "u", "node-b"));
        assert!(name(&shared, "u", "a").starts_with("web."), "{}", name(&shared, "u", "a"));
    }

    #[test]
    fn names_fit() {
        let long = notice(&format!("{}.b{}", "a".repeat(235), "c".repeat(17)), EventReason::InvalidValue);
        let event = event(&long, "u", &"n".repeat(253), Timestamp::UNIX_EPOCH);
        let name = event.metadata.name.expect("it has a name");
        assert!(name.len() <= MAX_NAME && !name.contains(".."), "{name}");
        assert_eq!(event.reporting_instance.map(|instance| instance.len()), Some(MAX_INSTANCE));
        let regarding = event.regarding.expect("it is about something");
        assert_eq!(regarding.name.as_deref(), Some(&*long.object.name));
    }

    #[test]
    fn what_has_no_namespace_has_its_events_in_default() {
        let notice = Notice {
            object: ObjectRef::node("node-a"),
            ..notice("", EventReason::FailedToStartMetricServer)
        };
        let event = event(&notice, "u", "node-a", Timestamp::UNIX_EPOCH);
        assert_eq!(event.metadata.namespace.as_deref(), Some("default"));
        let regarding = event.regarding.expect("it is about something");
        assert_eq!((regarding.kind.as_deref(), regarding.namespace), (Some("Node"), None));
    }
}
