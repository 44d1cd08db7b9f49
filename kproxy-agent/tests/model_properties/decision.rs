//! The decision over planned tables, as they change, picks what the naive reading allows and gives its verdict; and
//! `kproxy explain` says so.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use kproxy::explain::{self, Ground, Hooks, Place, Planned, Query, ServicePort, Source};
use kproxy::maps::memory::Memory;
use kproxy::maps::{MapWriter, Reconciler};
use kproxy::model::{LeftOut, Model, NodeConfig, Update, parse};
use kproxy::plan::{Capacity, Tables, View};
use kproxy_common::{
    Address, Balance, Cidr, Client, ClientKind, Config, Connection, FrontendKey, MAX_CIDRS, Options,
    Protocol, Resolution, ServiceInfo, Side, TrafficPolicy, choose, resolve,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::affine;
use crate::generate::{self, Event, World};
use crate::naive::{self, Frontend};
use crate::runs;
use crate::verdict::{Affinity, Question, Verdict, is_masked, sent_unseen, verdict};

pub const CAPACITY: Capacity =
    Capacity { frontends: 128, backends: 1_024, addresses: 64, source_ranges: 256 };

/// Events that are written together, and questions asked then: with how many seconds before, and how the dice fall.
pub type Stage = (Vec<Event>, Vec<(Question, u64, u32)>);

proptest! {
    #![proptest_config(runs(10_000))]

    #[test]
    fn the_decision_picks_what_the_rules_allow(config in generate::config(), stages in vec(stage(), 1..4)) {
        check(&config, &stages)?;
    }
}

proptest! {
    #![proptest_config(runs(10_000))]

    #[test]
    fn clients_stay_and_leave_as_the_rules_allow(
        config in generate::config(),
        first in first_affine(),
        then in vec(affine(), 1..5),
    ) {
        let config = NodeConfig { node_addresses: vec![parse::ip("10.0.0.1").unwrap()], ..config };
        let stages: Vec<Stage> = std::iter::once(first).chain(then).collect();
        check(&config, &stages)?;
    }
}

fn check(config: &NodeConfig, stages: &[Stage]) -> Result<(), TestCaseError> {
    let mut history = History::in_memory(config);
    let written: Vec<Written> = stages.iter().map(|(events, _)| history.write(events)).collect();
    let mut affinity = Affinity::default();
    let mut now = 1_000;
    let mut view: Option<View<'_>> = None;
    for (written, (_, questions)) in written.iter().zip(stages) {
        let Written { tables, config: programs, world, frontends } = written;
        affinity.keep(frontends);
        let here = match view.take() {
            Some(view) => view.over(tables).with_config(*programs),
            None => View::new(tables, *programs),
        };
        for (question, seconds, pick) in questions {
            now += seconds;
            here.set_now(now * 1_000_000_000);
            ask(&here, config, (world, frontends), question, (*pick, now), &mut affinity)?;
        }
        view = Some(here);
    }
    match (written.last(), stages.last()) {
        (Some(last), Some((_, questions))) => explained(config, &history.model, last, questions),
        _ => Ok(()),
    }
}

pub fn first_affine() -> impl Strategy<Value = Stage> {
    (affine::first(), vec((affine::question(), 0_u64..50, any::<u32>()), 1..8))
}

pub fn affine() -> impl Strategy<Value = Stage> {
    (affine::events(), vec((affine::question(), 0_u64..50, any::<u32>()), 1..8))
}

pub fn stage() -> BoxedStrategy<Stage> {
    let asked = (question(), 0_u64..50, any::<u32>());
    (vec(generate::event(), 1..12), vec(asked, 1..16)).boxed()
}

fn question() -> impl Strategy<Value = Question> {
    let destinations = select(vec![
        "10.96.0.1",
        "10.96.0.1",
        "10.96.0.2",
        "10.96.0.3",
        "fd00:10:96::1",
        "fd00:10:96::2",
        "10.0.0.1",
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.9",
        "203.0.113.1",
        "203.0.113.1",
        "203.0.113.2",
        "2001:db8::9",
        "2001:db8::1",
        "127.0.0.1",
        "::1",
        "0.0.0.0",
        "::",
        "10.96.0.77",
        "10.97.0.1",
        "8.8.8.8",
    ]);
    // Few of each, so that clients come back.
    let clients = select(vec![
        ("10.244.0.9", "fd00:10:244::9"),
        ("10.1.2.3", "2001:db8:ffff::1"),
        ("203.0.113.1", "2001:db8::9"),
    ]);
    let behind = select(vec![ClientKind::Pod, ClientKind::Host, ClientKind::Outside, ClientKind::Outside]);
    let port = select(vec![80, 80, 80, 443, 30_080, 30_080, 30_081, 22]);
    let protocol = prop_oneof![8 => Just(Protocol::Tcp), 1 => Just(Protocol::Udp), 1 => Just(Protocol::Sctp)];
    (behind, clients, destinations, port, protocol).prop_map(
        |(behind, (v4, v6), destination, port, protocol)| {
            let destination = Address::from(destination.parse::<std::net::IpAddr>().unwrap());
            let client = parse::ip(if destination.is_v4() { v4 } else { v6 }).unwrap();
            Question { behind, client, destination, port, protocol }
        },
    )
}

/// One agent's model and tables.
pub struct History<W> {
    world: World,
    model: Model,
    reconciler: Reconciler,
    writer: W,
    now: SystemTime,
    is_first: bool,
}

/// What stood after a stage, and what should.
pub struct Written {
    pub tables: Tables,
    pub config: Config,
    world: World,
    frontends: BTreeMap<FrontendKey, Frontend>,
}

impl History<Memory> {
    /// An agent that starts on a node where nothing is.
    pub fn in_memory(config: &NodeConfig) -> Self {
        Self::over(config, Reconciler::new(Tables::new(CAPACITY)), Memory::new(CAPACITY))
    }
}

impl<W: MapWriter> History<W> {
    /// An agent that starts over what `reconciler` and `writer` hold.
    pub fn over(config: &NodeConfig, reconciler: Reconciler, writer: W) -> Self {
        Self {
            world: World::default(),
            model: Model::new(config.clone()),
            reconciler,
            writer,
            now: SystemTime::UNIX_EPOCH,
            is_first: true,
        }
    }

    pub fn writer(&mut self) -> &mut W {
        &mut self.writer
    }

    pub fn into_parts(self) -> (Reconciler, W) {
        (self.reconciler, self.writer)
    }

    /// Lets all of this happen, and writes what follows.
    pub fn write(&mut self, events: &[Event]) -> Written {
        self.now += Duration::from_secs(1);
        for event in events {
            self.model.apply(event.change());
            self.world.apply(event.clone());
        }
        let Update { services, node, .. } = self.model.recompute();
        if std::mem::take(&mut self.is_first) {
            let all = services.into_iter().filter_map(|(key, wanted)| Some((key, wanted?))).collect();
            self.reconciler.want_all(all, self.now);
        } else {
            self.reconciler.want(services, self.now);
        }
        if let Some(node) = node {
            self.reconciler.want_node_addresses(node.node_port_addresses, self.now);
        }
        let report = self.reconciler.run(&mut self.writer, self.now);
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        self.reconciler.settle(&mut self.writer, self.now);
        let table = |cidrs: &[Cidr]| {
            let mut table = [Cidr::NONE; MAX_CIDRS];
            table.iter_mut().zip(cidrs).for_each(|(place, cidr)| *place = *cidr);
            table
        };
        let node = self.model.wanted_node().expect("it was told");
        Written {
            tables: self.reconciler.tables().clone(),
            config: Config {
                loopback_node_ports: 1,
                service_cidrs: table(&node.service_cidrs),
                cluster_cidrs: table(&self.model.config().cluster_cidrs),
                ..Config::EMPTY
            },
            world: self.world.clone(),
            frontends: naive::frontends(self.model.config(), &self.world),
        }
    }
}

/// Asks the decision, with the dice as they fell.
fn ask(
    view: &View<'_>,
    config: &NodeConfig,
    (world, frontends): (&World, &BTreeMap<FrontendKey, Frontend>),
    question: &Question,
    (pick, now): (u32, u64),
    affinity: &mut Affinity,
) -> Result<(), TestCaseError> {
    let expected = verdict(config, world, frontends, question);
    let client = Client { kind: question.behind, address: question.client, netns_cookie: 0 };
    let Question { destination, port, protocol, .. } = *question;
    let resolution = resolve(view, &Connection { client, destination, port, protocol });
    match (resolution, expected) {
        (Resolution::Pass { .. }, Verdict::Pass)
        | (Resolution::Reject { .. }, Verdict::Reject)
        | (Resolution::Drop { .. }, Verdict::Drop) => {}
        (Resolution::Balance(balance), Verdict::Forward(frontend, allowed, is_local)) => {
            let choice = choose(view, &balance, &client, pick);
            let Some(choice) = choice else {
                return Err(TestCaseError::fail(format!("{question:?}: no backend of {allowed:?}")));
            };
            let picked = (choice.backend.address(), choice.backend.port());
            prop_assert!(allowed.contains(&picked), "{:?}: {:?} of {:?}", question, picked, allowed);
            let key = frontends.iter().find(|(_, other)| std::ptr::eq(*other, frontend));
            let key = key.expect("it is one of them").0;
            // Without affinity the same dice fall on this one.
            let free = Balance { side: without_affinity(&balance.side), ..balance };
            let dice = choose(view, &free, &client, pick).map(|choice| choice.backend);
            let dice = dice.map(|backend| (backend.address(), backend.port()));
            let stays = affinity.stays((key, frontend), (allowed, is_local), question.client, picked, now);
            let stays = stays.map_err(|what| TestCaseError::fail(format!("{question:?}: {what}")))?;
            prop_assert_eq!(Some(picked), stays.or(dice), "{:?}, stays {:?}", question, stays);
        }
        (resolution, expected) => {
            return Err(TestCaseError::fail(format!("{question:?}: {resolution:?}, not {expected:?}")));
        }
    }
    Ok(())
}

fn without_affinity(side: &Side) -> Side {
    Side::new(side.first_slot(), side.count(), side.mode(), side.options() & !Options::AFFINITY)
}

/// Asks `explain`, over tables that are new.
fn explained(
    config: &NodeConfig,
    model: &Model,
    written: &Written,
    questions: &[(Question, u64, u32)],
) -> Result<(), TestCaseError> {
    let hooks = Hooks { loopback_node_ports: true, host_sockets_only: false };
    let planned = Planned::new(model, hooks, CAPACITY);
    for (question, ..) in questions {
        let Question { behind, client, destination, port, protocol } = *question;
        let ground = Placed { planned: &planned, behind };
        let query = Query { from: client, to: destination, port, protocol };
        let answer = explain::explain(&ground, &query).expect("memory can be read");
        let rules =
            if (behind, protocol) == (ClientKind::Host, Protocol::Sctp) { sent_unseen } else { verdict };
        // What a socket asks of an unspecified address it asks of itself.
        let asked = match (behind, destination.is_unspecified(), destination.is_v4()) {
            (ClientKind::Outside, ..) | (_, false, _) => destination,
            (_, true, true) => parse_loopback("127.0.0.1"),
            (_, true, false) => parse_loopback("::1"),
        };
        let question = &Question { destination: asked, ..*question };
        let expected = rules(config, &written.world, &written.frontends, question);
        let (word, backends) = match expected {
            Verdict::Pass => ("pass", BTreeSet::new()),
            Verdict::Reject => ("reject", BTreeSet::new()),
            Verdict::Drop => ("drop", BTreeSet::new()),
            Verdict::Forward(frontend, allowed, _) => {
                prop_assert_eq!(answer.affinity.unwrap_or(0), frontend.affinity_timeout, "{:?}", question);
                let with_source = |at: &(Address, u16)| {
                    let is_local = frontend.here.contains(at);
                    let source = match is_masked(config, frontend, question, is_local) {
                        true => Source::Masked,
                        false => Source::Kept,
                    };
                    (*at, is_local, source)
                };
                ("forward", allowed.iter().map(with_source).collect())
            }
        };
        prop_assert_eq!(answer.verdict.word(), word, "{:?}: {:?}", question, answer);
        let said = answer.backends.iter();
        let said = said.map(|b| ((b.address.ip().into(), b.address.port()), b.local, b.source)).collect();
        prop_assert_eq!(backends, said, "{:?}: {:?}", question, answer);
        prop_assert!(!answer.rule.is_empty());
    }
    Ok(())
}

fn parse_loopback(text: &str) -> Address {
    text.parse::<std::net::IpAddr>().unwrap().into()
}

/// Tables as planned, and a client of whom it is known where it is.
struct Placed<'a> {
    planned: &'a Planned<'a>,
    behind: ClientKind,
}

impl Ground for Placed<'_> {
    fn tables(&self) -> impl kproxy_common::Tables {
        self.planned.tables()
    }

    fn info(&self, number: u32) -> Option<ServiceInfo> {
        self.planned.info(number)
    }

    fn frontends(&self) -> Vec<(FrontendKey, u32)> {
        self.planned.frontends()
    }

    fn place(&self, _: &Query) -> Place {
        Place { behind: self.behind, because: String::new(), netns_cookie: 0 }
    }

    fn left_out(&self, port: &ServicePort, set: TrafficPolicy) -> Option<Vec<LeftOut>> {
        self.planned.left_out(port, set)
    }

    fn check(&self) -> anyhow::Result<()> {
        self.planned.check()
    }
}
