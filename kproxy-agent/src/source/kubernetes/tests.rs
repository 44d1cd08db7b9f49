use proptest::prelude::*;
use serde_json::{Value, json};

use super::backoff::Backoff;
use super::fake_api::FakeApi;
use super::*;
use crate::model::objects::Family;
use crate::model::{Model, NodeConfig};
use crate::servers::{Health, Moment};
use crate::source::PresentProblems;

/// As by default, but in a hurry.
fn quick() -> Timing {
    let ms = Duration::from_millis;
    Timing {
        backoff: Backoff { first: ms(5), longest: ms(50) },
        answer: ms(2_000),
        confirm: ms(20),
        short_lived: ms(10),
        settled: ms(20),
        optional: ms(200),
        ..Timing::default()
    }
}

pub(super) fn service(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"}})
}

pub(super) fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
}

/// A source and what came out of it.
pub(super) struct Client {
    source: Source,
    pub(super) model: Model,
    /// Problems of model and source, in the order in which they were told.
    pub(super) announced: Vec<String>,
    pub(super) watches: BTreeMap<&'static str, Option<std::time::Instant>>,
    /// By kind and name, with the version.
    objects: BTreeMap<(Kind, String), String>,
    pub(super) problems: PresentProblems,
    changes: usize,
    flushes: usize,
    pub(super) synced: bool,
    all_pods: bool,
}

impl Client {
    pub(super) async fn of(urls: &[String]) -> Self {
        let urls: Vec<_> = urls.iter().map(String::as_str).collect();
        let servers = servers::testing::servers("http://127.0.0.1:1", &urls).await;
        Client {
            source: start(Arc::new(servers), "node-a".to_owned(), quick()),
            model: Model::new(NodeConfig {
                node_name: "node-a".to_owned(),
                has_netns_cookies: true,
                ..NodeConfig::default()
            }),
            announced: Vec::new(),
            watches: BTreeMap::new(),
            objects: BTreeMap::new(),
            problems: PresentProblems::default(),
            changes: 0,
            flushes: 0,
            synced: false,
            all_pods: false,
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Synced => self.synced = true,
            Event::Flush => {
                self.flushes += 1;
                let update = self.model.recompute();
                self.announced.extend(update.new_problems.iter().map(ToString::to_string));
            }
            Event::Problem(problem) => {
                if !problem.resolved {
                    self.announced.push(format!("{}: {}", problem.place, problem.what));
                }
                self.problems.note(problem);
            }
            Event::Watch(WatchState { plural, lost }) => drop(self.watches.insert(plural, lost)),
            Event::Change(change) => {
                self.model.apply(change.clone());
                if matches!(change, Change::AllPods) {
                    self.all_pods = true;
                    return;
                }
                self.changes += 1;
                let (key, metadata) = match change {
                    Change::Service(key, object) => {
                        ((Kind::Service, key.name), object.map(|object| object.metadata))
                    }
                    Change::EndpointSlice(key, object) => {
                        ((Kind::EndpointSlice, key.name), object.map(|object| object.metadata))
                    }
                    Change::Node(object) => {
                        ((Kind::Node, String::new()), object.map(|object| object.metadata))
                    }
                    Change::ServiceCidr(name, object) => {
                        ((Kind::ServiceCidr, name), object.map(|object| object.metadata))
                    }
                    Change::Pod(key, object) => ((Kind::Pod, key.name), object.map(|object| object.metadata)),
                    other => panic!("no change of a source: {other:?}"),
                };
                match metadata {
                    Some(metadata) => {
                        let version = metadata.get().and_then(|metadata| metadata.resource_version.text());
                        self.objects.insert(key, version.unwrap_or_default().to_owned());
                    }
                    None => assert!(self.objects.remove(&key).is_some(), "{key:?} was never there"),
                }
            }
        }
    }

    pub(super) async fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds(self) {
            match tokio::time::timeout_at(deadline, self.source.next()).await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => panic!("the source ended while waiting for: {what}"),
                Err(_) => panic!("not seen in 20 s: {what}; problems: {:?}", self.problems),
            }
        }
    }

    /// Takes what comes within the time.
    pub(super) async fn wait(&mut self, millis: u64) {
        let deadline = Instant::now() + Duration::from_millis(millis);
        while let Ok(Some(event)) = tokio::time::timeout_at(deadline, self.source.next()).await {
            self.take(event);
        }
    }

    pub(super) fn of_kind(&self, kind: Kind) -> BTreeMap<String, String> {
        let of = self.objects.iter().filter(|((of, _), _)| *of == kind);
        of.map(|((_, name), version)| (name.clone(), version.clone())).collect()
    }

    fn kinds(&self) -> Vec<(ProblemKind, usize)> {
        self.problems.count_by_kind().into_iter().collect()
    }
}

pub(super) fn url(api: &FakeApi) -> String {
    format!("http://{}", api.address)
}

#[tokio::test]
async fn all_kinds_are_listed_and_watched_with_their_selectors() {
    for no_streaming in [false, true] {
        let api = FakeApi::start().await;
        api.state().no_streaming = no_streaming;
        for number in 0..1200 {
            api.put("services", service(&format!("s{number}")));
        }
        let slice = json!({"addressType": "IPv4", "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                           "endpoints": [], "metadata": {"name": "s0-1", "namespace": "default"}});
        api.put("endpointslices", slice);
        api.put("nodes", node("node-a"));
        api.put("servicecidrs", json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}}));
        let pod =
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"}});
        api.put("pods", pod);
        let mut client = Client::of(&[url(&api)]).await;
        client.until("the first lists", |client| client.synced).await;
        assert_eq!((client.changes, client.objects.len(), client.kinds()), (1204, 1204, vec![]));
        assert!(client.all_pods);
        client.until("the flush after it", |client| client.flushes == 1).await;

        api.put("services", service("s1"));
        api.delete("endpointslices", "s0-1");
        client.until("a watch event of each", |client| client.changes == 1206).await;
        assert_eq!(client.of_kind(Kind::Service), api.names("services"));
        assert_eq!(client.of_kind(Kind::EndpointSlice), BTreeMap::new());
        client.until("a flush for them", |client| client.flushes >= 2).await;

        let requests = api.state().requests.clone();
        let has = |path: &str, parts: &[&str]| {
            requests
                .iter()
                .any(|request| request.starts_with(path) && parts.iter().all(|part| request.contains(part)))
        };
        let list = if no_streaming { "limit=500" } else { "sendInitialEvents=true" };
        assert!(has("/api/v1/services?", &[list]), "{requests:?}");
        assert_eq!(has("/api/v1/services?", &["continue=1000"]), no_streaming, "{requests:?}");
        let label = "labelSelector=%21service.kubernetes.io%2Fheadless";
        assert!(has("/apis/discovery.k8s.io/v1/endpointslices?", &[list, label]), "{requests:?}");
        assert!(has("/api/v1/nodes?", &[list, "fieldSelector=metadata.name%3Dnode-a"]), "{requests:?}");
        assert!(has("/apis/networking.k8s.io/v1/servicecidrs?", &[list]), "{requests:?}");
        assert!(has("/api/v1/pods?", &[list, "fieldSelector=spec.nodeName%3Dnode-a"]), "{requests:?}");
    }
}

/// As Kubernetes' conformance test writes it: a Service whose status has a condition without a time.
#[tokio::test]
async fn a_null_in_the_status_of_one_service_stops_nobody() {
    for (no_streaming, is_there_at_start) in [(false, false), (false, true), (true, false), (true, true)] {
        let api = FakeApi::start().await;
        api.state().no_streaming = no_streaming;
        api.put("nodes", node("node-a"));
        api.put("services", service("a"));
        let odd = || {
            let mut odd = service("odd");
            odd["status"]["conditions"] = json!([{
                "type": "StatusUpdate", "status": "True", "reason": "E2E", "message": "Set from e2e test",
                "lastTransitionTime": null,
            }]);
            odd
        };
        if is_there_at_start {
            api.put("services", odd());
        }
        let mut client = Client::of(&[url(&api)]).await;
        client.until("the first lists", |client| client.synced).await;
        if !is_there_at_start {
            api.put("services", odd());
        }
        api.put("services", service("b"));
        client.until("all Services", |client| client.of_kind(Kind::Service) == api.names("services")).await;
        assert_eq!(client.kinds(), []);
    }
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_without_a_list() {
    let api = FakeApi::start().await;
    api.put("nodes", node("node-a"));
    api.put("services", service("a"));
    let mut client = Client::of(&[url(&api)]).await;
    client.until("the first lists", |client| client.synced).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    api.end_watches();
    api.put("services", service("b"));
    api.delete("services", "a");
    client
        .until("what happened meanwhile", |client| client.of_kind(Kind::Service) == api.names("services"))
        .await;
    assert_eq!(client.kinds(), []);
    let requests = api.state().requests.clone();
    let lists = requests
        .iter()
        .filter(|request| request.contains("/services?") && request.contains("sendInitialEvents"));
    assert_eq!(lists.count(), 1, "{requests:?}");
}

#[tokio::test]
async fn after_a_gap_a_list_finds_what_came_and_went_and_nothing_else_is_sent() {
    let api = FakeApi::start().await;
    api.put("nodes", node("node-a"));
    for name in ["a", "b", "c"] {
        api.put("services", service(name));
    }
    let mut client = Client::of(&[url(&api)]).await;
    client.until("the first lists", |client| client.synced).await;
    api.state().refuse.insert("services".to_owned(), 503);
    api.end_watches();
    api.delete("services", "a");
    api.put("services", service("b"));
    api.put("services", service("d"));
    api.compact();
    let changes = client.changes;
    client.until("the trouble", |client| client.kinds() == [(ProblemKind::ApiError, 1)]).await;
    api.state().refuse.clear();
    client.until("the new list", |client| client.of_kind(Kind::Service) == api.names("services")).await;
    client.until("the end of the trouble", |client| client.kinds().is_empty()).await;
    assert_eq!(client.changes, changes + 3, "one went, one changed, one came; c was not sent again");
}

#[tokio::test]
async fn a_short_list_is_confirmed_before_anything_is_deleted() {
    let api = FakeApi::start().await;
    api.put("nodes", node("node-a"));
    for number in 0..30 {
        api.put("services", service(&format!("s{number}")));
    }
    let mut client = Client::of(&[url(&api)]).await;
    client.until("the first lists", |client| client.synced).await;
    // One list is empty: nothing happens but a trouble that passes. What came while the server refused is
    // forgotten by it, so that only a list can tell.
    api.state().refuse.insert("services".to_owned(), 500);
    api.end_watches();
    client.until("the refusal", |client| client.kinds() == [(ProblemKind::ApiError, 1)]).await;
    api.put("services", service("s30"));
    api.compact();
    api.state().short_lists.insert("services".to_owned(), 1);
    api.state().refuse.clear();
    client.until("the doubt", |client| client.kinds() == [(ProblemKind::ShortList, 1)]).await;
    client.until("its end", |client| client.kinds().is_empty()).await;
    assert_eq!(client.of_kind(Kind::Service).len(), 31);

    // Two lists agree.
    (0..25).for_each(|number| api.delete("services", &format!("s{number}")));
    api.compact();
    api.end_watches();
    client.until("the deletions", |client| client.of_kind(Kind::Service) == api.names("services")).await;
    assert_eq!(client.of_kind(Kind::Service).len(), 6);
}

#[tokio::test]
async fn what_is_not_allowed_is_named_and_what_is_not_necessary_is_done_without() {
    let api = FakeApi::start().await;
    api.put("nodes", node("node-a"));
    api.state().refuse = [("endpointslices", 403), ("servicecidrs", 404), ("pods", 403)]
        .map(|(what, code)| (what.to_owned(), code))
        .into();
    let mut client = Client::of(&[url(&api)]).await;
    let expected = [(ProblemKind::Authorization, 1), (ProblemKind::ApiMissing, 2)];
    client.until("all troubles", |client| client.kinds() == expected).await;
    client.wait(200).await;
    assert!(!client.synced, "without EndpointSlices there is no full list");
    let problem = client.problems.iter().find(|problem| problem.kind == ProblemKind::Authorization);
    assert!(
        problem.is_some_and(|problem| problem.mend.contains(r#"resources: ["endpointslices"]"#)),
        "{problem:?}"
    );

    api.state().refuse.remove("endpointslices");
    client.until("the lists", |client| client.synced).await;
    assert_eq!(client.kinds(), [(ProblemKind::ApiMissing, 2)]);
    let pods = client.problems.iter().find(|problem| problem.place == "pods").expect("it is said");
    assert!(pods.what.contains("kproxy.io/socket-hooks") && pods.mend.contains(r#"["pods"]"#), "{pods:?}");
    assert!(!client.all_pods, "nobody knows of Pods");
    api.state().refuse.clear();
    client.until("the APIs that came later", |client| client.kinds().is_empty() && client.all_pods).await;
}

#[tokio::test]
async fn a_kind_without_a_working_watch_makes_the_node_unready() {
    let api = FakeApi::start().await;
    api.put("nodes", node("node-a"));
    api.state().refuse.insert("servicecidrs".to_owned(), 404);
    let mut client = Client::of(&[url(&api)]).await;
    client.until("the first lists", |client| client.synced).await;
    let readyz = |client: &Client, at: Instant| {
        let now = Moment::now();
        let mut health = Health::new(Family::ALL, now);
        health.in_force();
        for (plural, lost) in &client.watches {
            health.watch_is(plural, lost.map(|instant| Moment { instant, ..now }));
        }
        health.readyz(Moment { instant: at.into_std(), ..now })
    };
    let day = Instant::now() + Duration::from_secs(86_400);
    assert!(readyz(&client, day).is_ok(), "what is not necessary is not waited for: {:?}", client.watches);

    // The server refuses; and it lets watches be opened, which then fail at once.
    for opens in [false, true] {
        if opens {
            api.state().failing_watches.insert("services".to_owned());
        } else {
            api.state().refuse.insert("services".to_owned(), 500);
        }
        api.end_watches();
        let lost = |client: &Client| client.watches.get("services").copied().flatten();
        client.until("the watch being lost", |client| lost(client).is_some()).await;
        let since = lost(&client);
        client.wait(300).await;
        assert_eq!(lost(&client), since, "no try that fails is a watch");
        let since = Instant::from_std(since.expect("it is lost"));
        assert!(readyz(&client, since + Duration::from_secs(59)).is_ok());
        let report = readyz(&client, since + Duration::from_secs(60));
        assert!(!report.is_ok());
        assert!(
            matches!(&report.reasons[..], [reason] if reason.contains("watch of services")),
            "{report:?}"
        );

        api.state().refuse.remove("services");
        api.state().failing_watches.clear();
        client.until("a watch that works", |client| lost(client).is_none()).await;
        assert!(readyz(&client, day).is_ok());
    }
    api.put("services", service("a"));
    client.until("what happens", |client| client.of_kind(Kind::Service) == api.names("services")).await;
}

#[tokio::test]
async fn the_next_server_is_tried_and_goes_on_where_the_first_was() {
    let dead = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port");
    let api = FakeApi::start().await;
    api.put("nodes", node("node-a"));
    api.put("services", service("a"));
    let mut client = Client::of(&[format!("http://{dead}"), url(&api)]).await;
    client.until("the first lists", |client| client.synced).await;
    assert_eq!((client.of_kind(Kind::Service).len(), client.kinds()), (1, vec![]));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_one_problem_with_a_mend() {
    let dead = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port");
    let mut client = Client::of(&[format!("http://{dead}")]).await;
    client.until("the trouble", |client| client.kinds() == [(ProblemKind::Connection, 1)]).await;
    client.wait(300).await;
    assert_eq!(
        client.kinds(),
        [(ProblemKind::Connection, 1)],
        "one, however many watches and tries there are"
    );
    let problem = client.problems.iter().next().expect("it is there").clone();
    assert!(problem.place.contains(&dead.to_string()), "{problem:?}");
    assert!(problem.mend.contains("runs and listens"), "{problem:?}");
    assert!(!client.synced && client.flushes == 0);
}

#[test]
fn the_own_node_is_waited_for_but_not_for_ever() {
    let mut merged = Merged::new("node-a".to_owned());
    let mut outgoing = Vec::new();
    for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr, Kind::Pod] {
        merged.take(Report::Listed(kind), &mut outgoing);
        merged.say_synced(&mut outgoing);
    }
    assert!(outgoing.is_empty(), "the list of Nodes was empty: it may be made yet");
    merged.waited = true;
    merged.say_synced(&mut outgoing);
    merged.say_synced(&mut outgoing);
    let missing =
        |event: &Event| matches!(event, Event::Problem(problem) if problem.kind == ProblemKind::NodeMissing);
    assert!(matches!(&outgoing[..], [problem, Event::Synced] if missing(problem)), "{outgoing:?}");

    merged.take(Report::Change(Change::Node(Some(Box::default()))), &mut outgoing);
    let resolved = |event: &Event| matches!(event, Event::Problem(problem) if problem.resolved);
    assert!(outgoing.iter().any(resolved), "{outgoing:?}");

    let mut merged = Merged::new("node-a".to_owned());
    merged.waited = true;
    merged.take(Report::Listed(Kind::Service), &mut outgoing);
    outgoing.clear();
    merged.say_synced(&mut outgoing);
    assert!(outgoing.is_empty(), "Services and EndpointSlices are waited for, however long it takes");
}

/// What happens to the API.
#[derive(Clone, Debug)]
enum Step {
    Put(u8),
    Delete(u8),
    EndWatches,
    Compact,
    Fail(u16),
    Recover,
    Streaming(bool),
    Pause,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..12_u8).prop_map(Step::Put),
        3 => (0..12_u8).prop_map(Step::Delete),
        1 => Just(Step::EndWatches),
        1 => Just(Step::Compact),
        1 => prop_oneof![Just(403), Just(410), Just(500), Just(401)].prop_map(Step::Fail),
        1 => Just(Step::Recover),
        1 => any::<bool>().prop_map(Step::Streaming),
        2 => Just(Step::Pause),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Whatever order of lists, events, gaps and failures there was: in the end the receiver has what the API has,
    /// and was never told of the end of something that it did not have (`Client::take`).
    #[test]
    fn any_history_ends_in_what_the_api_has(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let api = FakeApi::start().await;
            api.put("nodes", node("node-a"));
            let mut client = Client::of(&[url(&api)]).await;
            for step in steps {
                match step {
                    Step::Put(number) => api.put("services", service(&format!("s{number}"))),
                    Step::Delete(number) => api.delete("services", &format!("s{number}")),
                    Step::EndWatches => api.end_watches(),
                    Step::Compact => api.compact(),
                    Step::Fail(code) => drop(api.state().refuse.insert("services".to_owned(), code)),
                    Step::Recover => api.state().refuse.clear(),
                    Step::Streaming(works) => api.state().no_streaming = !works,
                    Step::Pause => client.wait(15).await,
                }
            }
            api.state().refuse.clear();
            client.until("what the API has", |client| {
                client.synced && client.of_kind(Kind::Service) == api.names("services") && client.kinds().is_empty()
            }).await;
        });
    }
}
