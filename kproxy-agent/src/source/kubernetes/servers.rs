//! Which API servers there are, which one is in use, and by what name its certificate is checked.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

// The http crate, of which kube and axum use the same version.
use axum::http::Uri;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

/// A server that does not answer is given up after this, and the next one is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a cluster's API server is called in its certificate, whatever its address is (kubeadm and managed
/// clusters alike).
const IN_CLUSTER_NAME: &str = "kubernetes.default.svc";

/// Where the token of a pod's ServiceAccount is.
const TOKEN_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// How to reach the API servers.
#[derive(Clone, Default, Debug)]
pub struct ConnectionSettings {
    /// `--kubeconfig`: used before all else.
    pub kubeconfig: Option<PathBuf>,
    /// `--api-server`: replace the server of the configuration, whose credentials and CA are kept.
    pub api_servers: Vec<String>,
}

/// There is no way to an API server.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Nothing says where it is.
    #[error(
        "no API server is known: kproxy does not run in a pod, and neither --kubeconfig, KUBECONFIG nor \
         ~/.kube/config names one; give one of them, or --manifests for a folder with objects"
    )]
    Nowhere(#[source] KubeconfigError),
    /// The kubeconfig cannot be used.
    #[error("the kubeconfig {} cannot be used; correct it or --kubeconfig", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: KubeconfigError,
    },
    /// The configuration that every pod has cannot be used.
    #[error(
        "this is a pod, but its ServiceAccount cannot be used; mount its token (automountServiceAccountToken) or \
         give --kubeconfig"
    )]
    InCluster(#[source] kube::config::InClusterError),
    /// `--api-server` has something else than a URL.
    #[error("--api-server {url}: {why}; it must be like https://192.0.2.10:6443")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// Certificates, keys or tokens cannot be used.
    #[error("no connection to {url} can be made with the credentials of the configuration; correct them")]
    Credentials {
        /// The server.
        url: String,
        /// Why.
        source: Box<kube::Error>,
    },
}

/// The servers, of which one is in use.
pub(super) struct Servers {
    servers: Vec<Server>,
    /// Where the configuration comes from.
    origin: Origin,
    /// The index of the one in use.
    current: Mutex<usize>,
}

struct Server {
    url: String,
    config: Config,
    /// Names that its certificate may have; `None`: the host of its URL.
    names: Vec<Option<String>>,
    state: Mutex<ServerState>,
}

struct ServerState {
    /// Index of the name in use.
    name: usize,
    client: Client,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    Kubeconfig,
    /// A pod's, with the service address of the API server.
    InCluster,
    /// A pod's, or only `--api-server`, with addresses of its own.
    Given,
}

/// The server in use, for one try.
pub(super) struct Attempt {
    index: usize,
    name: usize,
    pub(super) client: Client,
}

impl Servers {
    /// From `--kubeconfig`, the pod, `KUBECONFIG` or `~/.kube/config`, in this order.
    pub(super) async fn new(settings: &ConnectionSettings) -> Result<Self, ConfigError> {
        let urls = settings.api_servers.iter().map(|url| parse_url(url)).collect::<Result<Vec<_>, _>>()?;
        let (mut config, origin) = find_config(settings, urls.first()).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        // The watches wait and try again themselves, at the next server.
        config.default_retry = false;
        if origin == Origin::InCluster {
            tracing::warn!(
                url = %config.cluster_url,
                "the API server is dialled at its service address, which another proxy must serve on this node; \
                 give the addresses of the API servers themselves with --api-server"
            );
        }
        let original = config.cluster_url.host().unwrap_or_default().to_owned();
        let urls = if urls.is_empty() { vec![config.cluster_url.clone()] } else { urls };
        let mut servers = Vec::new();
        for url in urls {
            let host = url.host().unwrap_or_default();
            let names = certificate_names(host, &original, config.tls_server_name.as_deref());
            let mut config = config.clone();
            config.cluster_url = url;
            servers.push(Server::new(config, names)?);
        }
        Ok(Servers { servers, origin, current: Mutex::new(0) })
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.servers.len()
    }

    /// Where the configuration comes from.
    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// The one to try now.
    pub(super) fn attempt(&self) -> Attempt {
        let index = *lock(&self.current);
        let state = lock(&self.servers[index].state);
        Attempt { index, name: state.name, client: state.client.clone() }
    }

    /// The URL that was tried.
    pub(super) fn url(&self, attempt: &Attempt) -> &str {
        &self.servers[attempt.index].url
    }

    /// This one could not be reached: the next one is to be tried. Watches fail together; only the first to say
    /// so moves on.
    pub(super) fn unreachable(&self, attempt: &Attempt) {
        let mut current = lock(&self.current);
        if *current == attempt.index {
            *current = (attempt.index + 1) % self.servers.len();
        }
    }

    /// The certificate has another name than was asked for. Returns whether there is another one to try with
    /// this server.
    pub(super) fn wrong_name(&self, attempt: &Attempt) -> bool {
        let server = &self.servers[attempt.index];
        let mut state = lock(&server.state);
        if state.name != attempt.name {
            return true;
        }
        let Some(name) = server.names.get(attempt.name + 1) else { return false };
        match server.client(name.as_deref()) {
            Ok(client) => {
                *state = ServerState { name: attempt.name + 1, client };
                true
            }
            Err(_) => false,
        }
    }
}

impl Server {
    fn new(config: Config, names: Vec<Option<String>>) -> Result<Self, ConfigError> {
        let url = config.cluster_url.to_string();
        let client = make_client(&config, names.first().and_then(Option::as_deref))?;
        Ok(Server { url, config, names, state: Mutex::new(ServerState { name: 0, client }) })
    }

    fn client(&self, name: Option<&str>) -> Result<Client, ConfigError> {
        make_client(&self.config, name)
    }
}

fn make_client(config: &Config, name: Option<&str>) -> Result<Client, ConfigError> {
    let mut config = config.clone();
    config.tls_server_name = name.map(ToOwned::to_owned);
    let url = config.cluster_url.to_string();
    Client::try_from(config).map_err(|source| ConfigError::Credentials { url, source: Box::new(source) })
}

async fn find_config(
    settings: &ConnectionSettings,
    first_server: Option<&Uri>,
) -> Result<(Config, Origin), ConfigError> {
    let options = KubeConfigOptions::default();
    if let Some(path) = &settings.kubeconfig {
        let unusable = |source| ConfigError::Kubeconfig { path: path.clone(), source };
        let kubeconfig = Kubeconfig::read_from(path).map_err(unusable)?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(unusable)?;
        return Ok((config, Origin::Kubeconfig));
    }
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() && std::path::Path::new(TOKEN_FILE).exists() {
        let config = Config::incluster_env().map_err(ConfigError::InCluster)?;
        let origin = if first_server.is_some() { Origin::Given } else { Origin::InCluster };
        return Ok((config, origin));
    }
    match (Config::from_kubeconfig(&options).await, first_server) {
        (Ok(config), _) => Ok((config, Origin::Kubeconfig)),
        // As kubectl --server without a kubeconfig: no credentials.
        (Err(_), Some(url)) => Ok((Config::new(url.clone()), Origin::Given)),
        (Err(source), None) => Err(ConfigError::Nowhere(source)),
    }
}

/// The names to ask the certificate for, one after the other: a certificate need not name every address that
/// its server has, but the name by which the configuration knows the server is one that the same CA vouches
/// for. A name that the configuration gives is the only one.
fn certificate_names(host: &str, original: &str, configured: Option<&str>) -> Vec<Option<String>> {
    if let Some(name) = configured {
        return vec![Some(name.to_owned())];
    }
    let mut names = vec![None];
    for name in [original, IN_CLUSTER_NAME] {
        let name = name.trim_start_matches('[').trim_end_matches(']');
        if !name.is_empty() && name != host && !names.iter().any(|known| known.as_deref() == Some(name)) {
            names.push(Some(name.to_owned()));
        }
    }
    names
}

/// A server as it is given: `https://` may be left out.
fn parse_url(text: &str) -> Result<Uri, ConfigError> {
    let wrong = |why: &str| ConfigError::Url { url: text.to_owned(), why: why.to_owned() };
    let url = text.trim();
    let url = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
    let url: Uri = url.parse().map_err(|error| wrong(&format!("it is no URL ({error})")))?;
    if !matches!(url.scheme_str(), Some("https" | "http")) {
        return Err(wrong("only https and http are spoken"));
    }
    if url.host().is_none_or(str::is_empty) {
        return Err(wrong("it names no host"));
    }
    if url.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(wrong("credentials do not belong into it"));
    }
    if url.query().is_some() {
        return Err(wrong("it has a query"));
    }
    Ok(url)
}

/// A lock whose holder cannot leave it half changed, even when it panics.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
pub(super) mod testing {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Servers with a kubeconfig of their own, which names `cluster`: the machine's is not read.
    pub(in crate::source::kubernetes) async fn servers(cluster: &str, urls: &[&str]) -> Servers {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kproxy-kubeconfig-{}-{number}", std::process::id()));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             clusters: [{{name: c, cluster: {{server: '{cluster}', insecure-skip-tls-verify: true}}}}]\n\
             users: [{{name: u, user: {{token: t}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
        );
        std::fs::write(&path, text).expect("the kubeconfig can be written");
        let api_servers = urls.iter().map(|&url| url.to_owned()).collect();
        let settings = ConnectionSettings { kubeconfig: Some(path.clone()), api_servers };
        let servers = Servers::new(&settings).await.expect("the settings are good");
        std::fs::remove_file(path).expect("the kubeconfig can be removed");
        servers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_given_as_a_url_or_less() {
        for (text, expected) in [
            ("https://192.0.2.1:6443", "https://192.0.2.1:6443/"),
            (" 192.0.2.1:6443 ", "https://192.0.2.1:6443/"),
            ("api.example.com", "https://api.example.com/"),
            ("http://[2001:db8::1]:8080", "http://[2001:db8::1]:8080/"),
            ("https://rancher.example.com/k8s/clusters/c-1", "https://rancher.example.com/k8s/clusters/c-1"),
        ] {
            assert_eq!(parse_url(text).expect(text).to_string(), expected);
        }
        for text in
            ["", "https://", "ftp://192.0.2.1", "a b", "https://u:p@192.0.2.1", "https://192.0.2.1/?x=1"]
        {
            assert!(matches!(parse_url(text), Err(ConfigError::Url { .. })), "{text}");
        }
    }

    #[test]
    fn the_certificate_is_asked_for_its_address_then_for_the_name_of_the_configuration() {
        let names = |host, original, configured| {
            let names = certificate_names(host, original, configured);
            names.into_iter().map(|name| name.unwrap_or_else(|| "its host".to_owned())).collect::<Vec<_>>()
        };
        assert_eq!(names("192.0.2.1", "api.example.com", Some("kept")), ["kept"]);
        assert_eq!(
            names("192.0.2.1", "api.example.com", None),
            ["its host", "api.example.com", "kubernetes.default.svc"]
        );
        assert_eq!(names("192.0.2.1", "192.0.2.1", None), ["its host", "kubernetes.default.svc"]);
        assert_eq!(
            names("192.0.2.1", "[2001:db8::1]", None),
            ["its host", "2001:db8::1", "kubernetes.default.svc"]
        );
    }

    #[tokio::test]
    async fn servers_are_tried_in_turn_and_only_the_first_to_fail_moves_on() {
        let servers = testing::servers("https://api.example.com:6443", &["192.0.2.1", "192.0.2.2"]).await;
        let (first, same) = (servers.attempt(), servers.attempt());
        assert_eq!(servers.url(&first), "https://192.0.2.1/");
        servers.unreachable(&first);
        servers.unreachable(&same);
        let second = servers.attempt();
        assert_eq!(servers.url(&second), "https://192.0.2.2/");
        servers.unreachable(&second);
        assert_eq!(servers.url(&servers.attempt()), "https://192.0.2.1/");

        // The names: the address, the configuration's, the cluster's, and then no more.
        let mut tried = 0;
        while servers.wrong_name(&servers.attempt()) {
            tried += 1;
        }
        assert_eq!(tried, 2);
        assert_eq!((servers.len(), servers.origin()), (2, Origin::Kubeconfig));
    }

    #[tokio::test]
    async fn without_api_server_the_configuration_names_it() {
        let servers = testing::servers("https://api.example.com:6443", &[]).await;
        assert_eq!(servers.url(&servers.attempt()), "https://api.example.com:6443/");
        let missing =
            ConnectionSettings { kubeconfig: Some("/nonexistent".into()), ..ConnectionSettings::default() };
        assert!(matches!(Servers::new(&missing).await, Err(ConfigError::Kubeconfig { .. })));
    }
}
