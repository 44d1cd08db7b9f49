//! From an error of the client to what happened, to what, and what to do.

use std::error::Error;
use std::fmt::Write;
use std::io;
use std::time::Duration;

use kube::core::Status;

use super::servers::Origin;
use crate::source::problem::{ProblemKind, SourceProblem};

/// Why a list or a watch ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum WatchError {
    /// The client says so.
    #[error("{0}")]
    Client(#[from] kube::Error),
    /// An error event in the stream.
    #[error("{}", .0.message)]
    Event(Box<Status>),
    /// Nothing came.
    #[error("no answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// The answer is not as the API says.
    #[error("{0}")]
    Protocol(&'static str),
}

/// What an error means for what is done next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Meaning {
    /// The version to go on from is too old: list again.
    Expired,
    /// The server does not do streaming lists: list in pages.
    NoStreamingList,
    /// The server cannot be reached or does not work: try the next one.
    Unreachable,
    /// The certificate has another name.
    WrongName,
    /// The server said no, or something else that another server would say too.
    Refused,
}

/// The kind of resource that a trouble is about, as RBAC writes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resource {
    /// Empty for the core group.
    pub(super) group: &'static str,
    /// Like `endpointslices`.
    pub(super) plural: &'static str,
}

impl WatchError {
    /// What to do about it.
    pub(super) fn meaning(&self) -> Meaning {
        match self {
            WatchError::Silent(_) => Meaning::Unreachable,
            WatchError::Protocol(_) => Meaning::Refused,
            _ => match self.status() {
                Some(status) if status.code == 410 => Meaning::Expired,
                // Where the feature is unknown or off, the server finds the request invalid.
                Some(status) if matches!(status.code, 400 | 422) => Meaning::NoStreamingList,
                Some(status) if status.code >= 500 => Meaning::Unreachable,
                Some(_) => Meaning::Refused,
                None if is_wrong_name(&self.chain()) => Meaning::WrongName,
                None => Meaning::Unreachable,
            },
        }
    }

    /// Whether the API does not have the resource.
    pub(super) fn is_not_found(&self) -> bool {
        self.status().is_some_and(|status| status.code == 404)
    }

    /// Whether RBAC does not allow it.
    pub(super) fn is_forbidden(&self) -> bool {
        self.status().is_some_and(|status| status.code == 403)
    }

    /// Whether going on from another version may help: the server answered, and it is not about who we are.
    pub(super) fn may_be_version(&self) -> bool {
        self.status().is_some_and(|status| !matches!(status.code, 401 | 403 | 429))
    }

    /// The problem, in words. `url` is the server's.
    pub(super) fn problem(&self, resource: Resource, url: &str, origin: Origin) -> SourceProblem {
        let plural = resource.plural;
        let server = format!("API server {url}");
        let Some(status) = self.status() else {
            return self.connection_problem(resource, server, origin);
        };
        let message = status.message.trim();
        match status.code {
            401 => SourceProblem::new(
                ProblemKind::Authentication,
                server,
                format!("it does not accept our credentials (401 {message})"),
                "renew the token or client certificate of the kubeconfig or ServiceAccount",
            ),
            403 => SourceProblem::new(
                ProblemKind::Authorization,
                plural,
                format!("the API server does not let us list and watch {plural} (403 {message})"),
                format!(
                    "add to the ClusterRole: apiGroups: [{:?}], resources: [{plural:?}], verbs: [\"list\", \"watch\"]",
                    resource.group
                ),
            ),
            404 => SourceProblem::new(
                ProblemKind::ApiMissing,
                plural,
                format!("the API server has no {plural} in {}", resource.group_name()),
                "use a Kubernetes version that has them; what depends on them is not served",
            ),
            429 => SourceProblem::new(
                ProblemKind::ApiError,
                server,
                format!("it has too much to do (429 {message})"),
                "nothing is to be done here: it is tried again",
            ),
            code => SourceProblem::new(
                ProblemKind::ApiError,
                plural,
                format!("listing or watching {plural} failed ({code} {message})"),
                "look into the API server's log; it is tried again",
            ),
        }
    }

    fn connection_problem(&self, resource: Resource, server: String, origin: Origin) -> SourceProblem {
        let chain = self.chain();
        if let WatchError::Protocol(what) = self {
            let mend = "look whether something else answers there";
            return SourceProblem::new(
                ProblemKind::ApiError,
                resource.plural,
                format!("{server}: {what}"),
                mend,
            );
        }
        if is_tls(&chain) {
            let mend = if is_wrong_name(&chain) {
                "give an address or name that its certificate has, or tls-server-name in the kubeconfig"
            } else if chain.contains("UnknownIssuer") || chain.contains("BadSignature") {
                "the certificate-authority of the kubeconfig (or of the ServiceAccount) must be the one that signed it"
            } else if chain.contains("Expired") || chain.contains("NotValidYet") {
                "renew the certificate, and look at the clocks"
            } else {
                "look whether it speaks TLS, and which client certificates it wants"
            };
            return SourceProblem::new(
                ProblemKind::Tls,
                server,
                format!("TLS with it failed: {chain}"),
                mend,
            );
        }
        if matches!(self, WatchError::Client(kube::Error::Auth(_))) {
            let mend = "correct the user of the kubeconfig: its token file or its exec plugin";
            let what = format!("credentials for it cannot be had: {chain}");
            return SourceProblem::new(ProblemKind::Authentication, server, what, mend);
        }
        let mend = match (origin, self.io_kind()) {
            (Origin::InCluster, _) => {
                "this is a service address, which nothing may serve on this node yet: give the addresses of the API \
                 servers themselves with --api-server"
            }
            (_, Some(io::ErrorKind::ConnectionRefused)) => "look whether it runs and listens on this port",
            _ => "look whether this node reaches it: address, port, routes, firewall",
        };
        SourceProblem::new(ProblemKind::Connection, server, format!("it cannot be reached: {chain}"), mend)
    }

    fn status(&self) -> Option<&Status> {
        match self {
            WatchError::Client(kube::Error::Api(status)) | WatchError::Event(status) => Some(status),
            _ => None,
        }
    }

    /// What each error of the chain adds, from the outermost to the first cause.
    fn chain(&self) -> String {
        let mut text = String::new();
        let mut last = String::new();
        // These say nothing but that their cause happened.
        let is_wrapper =
            matches!(self, WatchError::Client(kube::Error::Service(_) | kube::Error::HyperError(_)));
        for error in self.causes().skip(if is_wrapper { 2 } else { 0 }) {
            let message = error.to_string();
            // Many errors repeat the text of their cause.
            if !last.contains(&message) {
                let separator = if text.is_empty() { "" } else { ": " };
                // Writing to a String does not fail.
                let _ = write!(text, "{separator}{message}");
            }
            last = message;
        }
        text
    }

    fn io_kind(&self) -> Option<io::ErrorKind> {
        self.causes().filter_map(|error| error.downcast_ref::<io::Error>()).map(io::Error::kind).last()
    }

    fn causes(&self) -> impl Iterator<Item = &(dyn Error + 'static)> {
        let first: &(dyn Error + 'static) = self;
        std::iter::successors(Some(first), |error: &&(dyn Error + 'static)| (*error).source())
    }
}

impl Resource {
    fn group_name(self) -> &'static str {
        if self.group.is_empty() { "v1" } else { self.group }
    }
}

/// Of rustls only the text is to be had: its types are not among our dependencies.
fn is_tls(chain: &str) -> bool {
    ["certificate", "received fatal alert", "InvalidContentType", "corrupt message"]
        .into_iter()
        .any(|sign| chain.contains(sign))
}

fn is_wrong_name(chain: &str) -> bool {
    chain.contains("certificate not valid for name") || chain.contains("NotValidForName")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLICES: Resource = Resource { group: "discovery.k8s.io", plural: "endpointslices" };

    fn refused_by_status(code: u16) -> WatchError {
        let status = Status { code, message: "no".to_owned(), ..Status::failure("no", "Reason") };
        WatchError::Client(kube::Error::Api(Box::new(status)))
    }

    fn by_io(kind: io::ErrorKind, text: &str) -> WatchError {
        WatchError::Client(kube::Error::Service(Box::new(io::Error::new(kind, text.to_owned()))))
    }

    #[test]
    fn every_error_has_its_meaning_and_its_mend() {
        for (error, meaning, kind, mend) in [
            (refused_by_status(401), Meaning::Refused, ProblemKind::Authentication, "renew the token"),
            (
                refused_by_status(403),
                Meaning::Refused,
                ProblemKind::Authorization,
                r#"apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"], verbs: ["list", "watch"]"#,
            ),
            (refused_by_status(404), Meaning::Refused, ProblemKind::ApiMissing, "version"),
            (refused_by_status(410), Meaning::Expired, ProblemKind::ApiError, "tried again"),
            (refused_by_status(422), Meaning::NoStreamingList, ProblemKind::ApiError, "tried again"),
            (refused_by_status(429), Meaning::Refused, ProblemKind::ApiError, "tried again"),
            (refused_by_status(503), Meaning::Unreachable, ProblemKind::ApiError, "log"),
            (
                by_io(io::ErrorKind::ConnectionRefused, "refused"),
                Meaning::Unreachable,
                ProblemKind::Connection,
                "runs",
            ),
            (
                by_io(io::ErrorKind::TimedOut, "timed out"),
                Meaning::Unreachable,
                ProblemKind::Connection,
                "firewall",
            ),
            (
                by_io(io::ErrorKind::InvalidData, "invalid peer certificate: UnknownIssuer"),
                Meaning::Unreachable,
                ProblemKind::Tls,
                "certificate-authority",
            ),
            (
                by_io(
                    io::ErrorKind::InvalidData,
                    "invalid peer certificate: certificate not valid for name \"x\"",
                ),
                Meaning::WrongName,
                ProblemKind::Tls,
                "tls-server-name",
            ),
            (
                WatchError::Silent(Duration::from_secs(9)),
                Meaning::Unreachable,
                ProblemKind::Connection,
                "firewall",
            ),
            (WatchError::Protocol("odd"), Meaning::Refused, ProblemKind::ApiError, "something else"),
        ] {
            let problem = error.problem(SLICES, "https://192.0.2.1/", Origin::Kubeconfig);
            assert_eq!((error.meaning(), problem.kind), (meaning, kind), "{error}");
            assert!(problem.mend.contains(mend), "{}", problem.mend);
        }
    }

    #[test]
    fn at_a_service_address_the_mend_is_another_address() {
        let error = by_io(io::ErrorKind::TimedOut, "timed out");
        let problem = error.problem(SLICES, "https://10.96.0.1/", Origin::InCluster);
        assert!(problem.mend.contains("--api-server"), "{}", problem.mend);
    }
}
