//! Which listeners there are for `healthCheckNodePort`s: one for each port and each address that answers
//! NodePorts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use super::{
    State,
    listen::{Bind, Listening, News, RETRY, listen},
    routes,
};
use crate::{model::objects::Family, wanted::ServiceKey};

/// A `healthCheckNodePort` that cannot be listened on. It is tried again every five seconds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListenFailure {
    /// Whose port it is.
    pub service: ServiceKey,
    /// Where.
    pub address: SocketAddr,
    /// Why not.
    pub error: String,
}

/// What is told about listeners.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ListenNews {
    /// It cannot be bound; told once as long as the reason stays the same.
    Failed(ListenFailure),
    /// What had failed works now, or is not wanted any more.
    Recovered(ListenFailure),
}

/// Keeps a listener open for every `healthCheckNodePort`; all are closed when this is dropped.
pub struct HealthCheckListeners {
    state: State,
    open: BTreeMap<SocketAddr, Listening>,
    tell: Tell,
    retry: Duration,
}

/// All `healthCheckNodePort`s, and the families that each is answered over.
pub type HealthCheckPorts = BTreeMap<u16, BTreeSet<Family>>;

type Tell = Arc<dyn Fn(ListenNews) + Send + Sync>;

impl HealthCheckListeners {
    /// None yet. What cannot be listened on is logged and told to `tell`: kube-proxy makes it an Event
    /// `FailedToStartServiceHealthcheck` of the Service.
    pub fn new(state: State, tell: impl Fn(ListenNews) + Send + Sync + 'static) -> Self {
        Self { state, open: BTreeMap::new(), tell: Arc::new(tell), retry: RETRY }
    }

    /// These are all ports, and all addresses that answer NodePorts (the unspecified one of a family stands for all
    /// of it). What they answer is the state's: [`State::set_health_check`]. Must be called in a tokio runtime.
    ///
    /// Returns when what is closed can be bound by others; what cannot be bound is tried in the background.
    pub async fn sync(&mut self, ports: &HealthCheckPorts, addresses: &BTreeSet<IpAddr>) {
        let wanted = wanted(ports, addresses);
        for (address, listening) in self.open.extract_if(.., |address, _| !wanted.contains(address)) {
            listening.close().await;
            recovered(&self.state, address, &self.tell);
        }
        for address in wanted {
            self.open.entry(address).or_insert_with(|| {
                let router = routes::health_check(&self.state, address.port(), family(&address.ip()));
                let report = reporter(self.state.clone(), address, Arc::clone(&self.tell));
                listen(Bind::OneFamily(address), router, self.retry, report)
            });
        }
    }
}

impl fmt::Debug for HealthCheckListeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthCheckListeners").field("open", &self.open).finish_non_exhaustive()
    }
}

/// Where to listen.
fn wanted(ports: &HealthCheckPorts, addresses: &BTreeSet<IpAddr>) -> BTreeSet<SocketAddr> {
    let on_port = |(port, families): (&u16, &BTreeSet<Family>)| {
        let of_service = |ip: &&IpAddr| families.contains(&family(ip)) && !is_link_local(ip);
        let port = *port;
        addresses.iter().filter(of_service).map(move |ip| SocketAddr::new(*ip, port)).collect::<Vec<_>>()
    };
    ports.iter().flat_map(on_port).collect()
}

/// Link-local addresses mean nothing without an interface, cannot be bound so, and no load balancer is behind
/// them.
fn is_link_local(ip: &IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

fn family(ip: &IpAddr) -> Family {
    if ip.is_ipv4() { Family::V4 } else { Family::V6 }
}

fn reporter(state: State, address: SocketAddr, tell: Tell) -> impl Fn(News<'_>) + Send + 'static {
    move |news| {
        let Some(service) = state.health_check_service(address.port()) else {
            return;
        };
        match news {
            News::Failed(error) => {
                tracing::error!(
                    "cannot answer the load balancer's health checks of Service {service}: healthCheckNodePort \
                     {address}: {error}. Free that port; it is tried again every {} s",
                    RETRY.as_secs()
                );
                // Another reason than before, perhaps.
                recovered(&state, address, &tell);
                let failure = ListenFailure { service, address, error: error.to_string() };
                state.set_unbound(failure.clone());
                tell(ListenNews::Failed(failure));
            }
            News::Listening(_) => {
                tracing::debug!("health checks of Service {service} are answered on {address}");
                recovered(&state, address, &tell);
            }
        }
    }
}

fn recovered(state: &State, address: SocketAddr, tell: &Tell) {
    if let Some(failure) = state.take_unbound(address) {
        tell(ListenNews::Recovered(failure));
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use tokio::sync::mpsc;

    use super::*;
    use crate::servers::{
        HealthCheck,
        testing::{Response, get, state},
    };

    #[test]
    fn one_listener_for_each_port_and_address_of_the_services_families() {
        let ports = BTreeMap::from([(31000, Family::ALL.into()), (31001, [Family::V6].into())]);
        let ips = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "fe80::1"];
        let addresses = ips.map(|ip| ip.parse().unwrap()).into();
        let expected = ["192.0.2.1:31000", "192.0.2.2:31000", "[2001:db8::1]:31000", "[2001:db8::1]:31001"];
        assert_eq!(wanted(&ports, &addresses), expected.map(|address| address.parse().unwrap()).into());
        assert_eq!(wanted(&ports, &BTreeSet::new()), BTreeSet::new());
    }

    #[tokio::test]
    async fn load_balancers_are_answered_for_each_family_apart() {
        let (state, port) = (state(), free_port());
        let mut listeners = HealthCheckListeners::new(state.clone(), |failure| panic!("{failure:?}"));
        let addresses = loopback();
        let counts = [(Family::V4, 2), (Family::V6, 0)];
        state.set_health_check(port, check("web", &counts));
        listeners.sync(&[(port, Family::ALL.into())].into(), &addresses).await;
        let v4 = open(&mut listeners, 0).await;
        let response = get(v4, "/anything?at=all").await;
        assert_eq!(response.status, 200);
        assert_eq!(response.header("x-load-balancing-endpoint-weight"), Some("2"));
        assert_eq!(response.header("content-type"), Some("application/json"));
        assert_eq!(response.header("x-content-type-options"), Some("nosniff"));
        let body = "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\
                    \t\"serviceProxyHealthy\": true\n}";
        assert_eq!(response.body, body);
        let v6 = open(&mut listeners, 1).await;
        let Response { status, .. } = get(v6, "/").await;
        assert_eq!((status, v6.is_ipv6()), (503, true));

        state.set_health_check(port, check("web", &[(Family::V4, 0)]));
        listeners.sync(&[(port, [Family::V4].into())].into(), &addresses).await;
        let response = get(v4, "/").await;
        assert_eq!((response.status, response.header("x-load-balancing-endpoint-weight")), (503, Some("0")));
        assert!(TcpListener::bind(v6).is_ok(), "the family that the Service does not have is let go");

        listeners.sync(&BTreeMap::new(), &addresses).await;
        assert!(TcpListener::bind(v4).is_ok(), "the port is let go");
    }

    #[tokio::test]
    async fn a_port_that_changes_hands_stays_open() {
        let (state, port) = (state(), free_port());
        let mut listeners = HealthCheckListeners::new(state.clone(), |failure| panic!("{failure:?}"));
        let addresses = loopback();
        let ports = [(port, [Family::V4].into())].into();
        state.set_health_check(port, check("old", &[(Family::V4, 1)]));
        listeners.sync(&ports, &addresses).await;
        let address = open(&mut listeners, 0).await;
        state.set_health_check(port, check("new", &[(Family::V4, 1)]));
        listeners.sync(&ports, &addresses).await;
        let response = get(address, "/").await;
        assert!(response.body.contains("\"name\": \"new\""), "{}", response.body);
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_told_once_and_tried_until_it_is_free() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let (told, mut failures) = mpsc::unbounded_channel();
        let state = state();
        let mut listeners = HealthCheckListeners::new(state.clone(), move |news| told.send(news).unwrap());
        listeners.retry = Duration::from_millis(5);
        let addresses = BTreeSet::from([address.ip()]);
        state.set_health_check(address.port(), check("web", &[(Family::V4, 1)]));
        listeners.sync(&[(address.port(), [Family::V4].into())].into(), &addresses).await;
        let news = failures.recv().await.expect("it is told");
        let ListenNews::Failed(failure) = news else { panic!("{news:?}") };
        assert_eq!((failure.service.to_string(), failure.address), ("default/web".to_owned(), address));
        assert!(failure.error.contains("in use"), "{failure:?}");
        let unbound =
            |count| format!("kproxy_problems{{kind=\"health-check-node-port\",origin=\"server\"}} {count}\n");
        assert!(state.metrics().exposition().unwrap().contains(&unbound(1)));
        // Time for some more attempts, none of which is to be told.
        tokio::time::sleep(listeners.retry * 10).await;
        drop(taken);
        assert_eq!(open(&mut listeners, 0).await, address);
        assert_eq!(get(address, "/").await.status, 200);
        assert_eq!(failures.try_recv(), Ok(ListenNews::Recovered(failure)), "it was told before");
        assert!(failures.try_recv().is_err());
        assert!(state.metrics().exposition().unwrap().contains(&unbound(0)));
    }

    fn check(name: &str, local_endpoints: &[(Family, u32)]) -> Option<HealthCheck> {
        let service = ServiceKey { namespace: "default".into(), name: name.into() };
        Some(HealthCheck { service, local_endpoints: local_endpoints.iter().copied().collect() })
    }

    fn loopback() -> BTreeSet<IpAddr> {
        ["127.0.0.1", "::1"].map(|ip| ip.parse().unwrap()).into()
    }

    /// A port that was free a moment ago, in both families.
    fn free_port() -> u16 {
        loop {
            let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = v4.local_addr().unwrap().port();
            if TcpListener::bind(("::1", port)).is_ok() {
                return port;
            }
        }
    }

    /// Waits until the listener at this place, by address, is open.
    async fn open(listeners: &mut HealthCheckListeners, place: usize) -> SocketAddr {
        listeners.open.values_mut().nth(place).expect("it is wanted").address().await
    }
}
