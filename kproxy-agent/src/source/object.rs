//! An object of one of the kinds that are read, and its key.

use std::fmt;

use crate::api::{self, EndpointSlice, Field, Metadata, Node, Pod, Service, ServiceCidr, Text};
use crate::model::Change;
use crate::wanted::ServiceKey;

/// The kinds that are read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Kind {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
    Pod,
}

impl Kind {
    /// The kind that an `apiVersion` and a `kind` name; `None` for all that are not read.
    pub(super) fn from_type(api_version: &str, kind: &str) -> Option<Self> {
        match (api_version, kind) {
            ("v1", "Service") => Some(Kind::Service),
            ("discovery.k8s.io/v1", "EndpointSlice") => Some(Kind::EndpointSlice),
            ("v1", "Node") => Some(Kind::Node),
            ("networking.k8s.io/v1", "ServiceCIDR") => Some(Kind::ServiceCidr),
            ("v1", "Pod") => Some(Kind::Pod),
            _ => None,
        }
    }

    /// As Kubernetes writes it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Node => "Node",
            Kind::ServiceCidr => "ServiceCIDR",
            Kind::Pod => "Pod",
        }
    }

    /// The key of an object of this kind; a namespace that is not given is `default`, as kubectl has it. `None`
    /// without a name, or with a namespace that is no text.
    pub(super) fn key(self, name: &Field<Text>, namespace: &Field<Text>) -> Option<ObjectKey> {
        let name = name.text().filter(|name| !name.is_empty())?.to_owned();
        let namespace = match (self, namespace) {
            (Kind::Node | Kind::ServiceCidr, _) => "",
            (_, Field::Absent) => "default",
            (_, Field::Is(namespace)) if namespace.is_empty() => "default",
            (_, Field::Is(namespace)) => namespace,
            // Any could be meant.
            (_, Field::Mistyped(_)) => return None,
        };
        Some(ObjectKey { kind: self, namespace: namespace.to_owned(), name })
    }
}

/// Which object, among all kinds.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct ObjectKey {
    pub(super) kind: Kind,
    /// Empty for kinds that have no namespace.
    pub(super) namespace: String,
    pub(super) name: String,
}

impl ObjectKey {
    /// The change that says that this object is gone.
    pub(super) fn gone(&self) -> Change {
        match self.kind {
            Kind::Service => Change::Service(self.service_key(), None),
            Kind::EndpointSlice => Change::EndpointSlice(self.service_key(), None),
            Kind::Node => Change::Node(None),
            Kind::ServiceCidr => Change::ServiceCidr(self.name.clone(), None),
            Kind::Pod => Change::Pod(self.service_key(), None),
        }
    }

    fn service_key(&self) -> ServiceKey {
        ServiceKey { namespace: self.namespace.clone(), name: self.name.clone() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        match self.namespace.as_str() {
            "" => write!(f, " {}", self.name),
            namespace => write!(f, " {namespace}/{}", self.name),
        }
    }
}

/// An object as it was read. Boxed: the kinds differ much in size, and all of them travel in one queue.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Object {
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    Node(Box<Node>),
    ServiceCidr(Box<ServiceCidr>),
    Pod(Box<Pod>),
}

/// An object of which nothing can be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Unreadable {
    /// Which it is, where even that can be told.
    pub(super) key: Option<ObjectKey>,
    /// `metadata.resourceVersion`, where it can be told.
    pub(super) version: Option<String>,
    /// Why not, and where.
    pub(super) why: String,
}

impl Object {
    /// Reads an object of this kind by `read`, which reads YAML or JSON into the type that it is asked for.
    pub(super) fn read_by<R: Read>(kind: Kind, read: R) -> Result<Self, R::Error> {
        Ok(match kind {
            Kind::Service => Object::Service(read.read()?),
            Kind::EndpointSlice => Object::EndpointSlice(read.read()?),
            Kind::Node => Object::Node(read.read()?),
            Kind::ServiceCidr => Object::ServiceCidr(read.read()?),
            Kind::Pod => Object::Pod(read.read()?),
        })
    }

    /// Reads an object of this kind from its JSON, with its key. It has to be an object with a name; whatever
    /// else it holds is for the model to judge.
    pub(super) fn from_json(kind: Kind, text: &str) -> Result<(ObjectKey, Self), Unreadable> {
        let unreadable = |why: String| {
            let identified = serde_json::from_str::<api::Identified>(text).unwrap_or_default();
            let metadata = identified.metadata.get().cloned().unwrap_or_default();
            Unreadable {
                key: kind.key(&metadata.name, &metadata.namespace),
                version: version(&metadata.resource_version),
                why,
            }
        };
        let object = Object::read_by(kind, Json(text)).map_err(|error| unreadable(error.to_string()))?;
        match object.key() {
            Some(key) => Ok((key, object)),
            None => {
                Err(unreadable("it has no metadata.name, or a metadata.namespace that is no text".to_owned()))
            }
        }
    }

    /// The key of the object; `None` without a name.
    pub(super) fn key(&self) -> Option<ObjectKey> {
        let metadata = self.metadata()?;
        self.kind().key(&metadata.name, &metadata.namespace)
    }

    /// Of which kind it is.
    pub(super) fn kind(&self) -> Kind {
        match self {
            Object::Service(_) => Kind::Service,
            Object::EndpointSlice(_) => Kind::EndpointSlice,
            Object::Node(_) => Kind::Node,
            Object::ServiceCidr(_) => Kind::ServiceCidr,
            Object::Pod(_) => Kind::Pod,
        }
    }

    /// `metadata.resourceVersion`, if it is one.
    pub(super) fn version(&self) -> Option<String> {
        version(&self.metadata()?.resource_version)
    }

    fn metadata(&self) -> Option<&Metadata> {
        match self {
            Object::Service(object) => object.metadata.get(),
            Object::EndpointSlice(object) => object.metadata.get(),
            Object::Node(object) => object.metadata.get(),
            Object::ServiceCidr(object) => object.metadata.get(),
            Object::Pod(object) => object.metadata.get(),
        }
    }

    /// The change that says that this is how the object is now. `key` is its own, which is not made twice.
    pub(super) fn change(self, key: &ObjectKey) -> Change {
        match self {
            Object::Service(object) => Change::Service(key.service_key(), Some(object)),
            Object::EndpointSlice(object) => Change::EndpointSlice(key.service_key(), Some(object)),
            Object::Node(object) => Change::Node(Some(object)),
            Object::ServiceCidr(object) => Change::ServiceCidr(key.name.clone(), Some(object)),
            Object::Pod(object) => Change::Pod(key.service_key(), Some(object)),
        }
    }
}

/// Reads one text into any type, once.
pub(super) trait Read {
    type Error;

    fn read<T: serde::de::DeserializeOwned>(self) -> Result<T, Self::Error>;
}

/// JSON, as [`Read`] wants it.
struct Json<'a>(&'a str);

impl Read for Json<'_> {
    type Error = serde_json::Error;

    fn read<T: serde::de::DeserializeOwned>(self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.0)
    }
}

/// A version to go on from: a decimal number, as all of them are. What else an object may claim to be one must
/// not become a request.
pub(super) fn version(written: &Field<Text>) -> Option<String> {
    const LONGEST: usize = "18446744073709551615".len();
    let is_version =
        |text: &&str| (1..=LONGEST).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    written.text().filter(is_version).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_is_not_given_is_default() {
        let (key, _) = Object::from_json(Kind::Service, r#"{"metadata": {"name": "web"}}"#).expect("a name");
        assert_eq!(key.to_string(), "Service default/web");
        let (key, _) = Object::from_json(Kind::Node, r#"{"metadata": {"name": "a", "namespace": "b"}}"#)
            .expect("a name");
        assert_eq!(key.to_string(), "Node a");
    }

    #[test]
    fn of_what_cannot_be_read_is_told_which_it_is_and_its_version() {
        let text = r#"{"metadata": {"name": "web", "labels": {"a": 1e999}, "resourceVersion": "7"}}"#;
        let unreadable = Object::from_json(Kind::Service, text).expect_err("no number is so large");
        assert_eq!(unreadable.key.map(|key| key.to_string()).as_deref(), Some("Service default/web"));
        assert_eq!(unreadable.version.as_deref(), Some("7"));
        for text in ["null", "[]", "{}", r#"{"metadata": null}"#, r#"{"metadata": {"name": 7}}"#, "{"] {
            let unreadable = Object::from_json(Kind::Service, text).expect_err(text);
            assert_eq!((unreadable.key, unreadable.version), (None, None), "{text}");
        }
    }

    #[test]
    fn a_version_is_a_number() {
        let written = |text: &str| version(&Field::Is(text.into()));
        assert_eq!(written("12").as_deref(), Some("12"));
        for odd in ["", "-1", "1 ", "a", "1&watch=false", "184467440737095516150"] {
            assert_eq!(written(odd), None, "{odd:?}");
        }
        assert_eq!(version(&Field::Absent), None);
    }
}
