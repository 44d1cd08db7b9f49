//! Properties of the model over random histories: the way to a state does not matter, a second and naive
//! reading of the rules allows the same backends, and no input makes it panic.

#[path = "model_properties/affine.rs"]
mod affine;
#[path = "model_properties/connects.rs"]
mod connects;
#[path = "model_properties/decision.rs"]
mod decision;
#[path = "model_properties/generate.rs"]
mod generate;
#[path = "model_properties/kernel.rs"]
mod kernel;
#[path = "model_properties/large.rs"]
mod large;
#[path = "support/map_fds.rs"]
mod map_fds;
#[path = "model_properties/naive.rs"]
mod naive;
#[path = "model_properties/opted_out.rs"]
mod opted_out;
#[path = "support/test_object.rs"]
mod test_object;
#[path = "model_properties/verdict.rs"]
mod verdict;

use std::collections::{BTreeMap, BTreeSet};

use generate::World;
use kproxy::model::objects::Family;
use kproxy::model::{Model, NodeConfig, Problem, Update, WantedHealthCheck, WantedNode};
use kproxy::wanted::{ServiceKey, WantedFrontend, WantedOptOuts, WantedPort, WantedService, WantedSide};
use kproxy_common::{Address, FrontendKey, FrontendKind, Mode, Options};
use proptest::prelude::*;

fn runs(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(runs(10_000))]

    /// Incremental equals from scratch, after any sequence of events, in any order; and whoever follows the
    /// updates knows what the model knows.
    #[test]
    fn the_way_does_not_matter(
        config in generate::config(),
        steps in prop::collection::vec((generate::event(), any::<bool>()), 1..40),
        seed in any::<usize>(),
    ) {
        let mut known = Known::new(config.clone());
        let mut world = World::default();
        for (event, is_recomputed) in steps {
            known.model.apply(event.change());
            world.apply(event);
            if is_recomputed {
                known.follow()?;
            }
        }
        known.follow()?;
        prop_assert_eq!(known.model.recompute(), Update::default(), "nothing changed, nothing to say");

        let mut fresh = Known::new(config.clone());
        for change in world.changes(seed) {
            fresh.model.apply(change);
        }
        fresh.follow()?;
        prop_assert_eq!(&known.services, &fresh.services);
        prop_assert_eq!(&known.health_checks, &fresh.health_checks);
        prop_assert_eq!(&known.node, &fresh.node);
        prop_assert_eq!(&known.opt_outs, &fresh.opt_outs);
        prop_assert_eq!(&known.opt_outs.pods, &naive::opt_outs(&config, &world));
        prop_assert_eq!(&known.problems, &fresh.problems);
    }

    /// Every frontend leads to exactly the backends that the naive reading allows, masks whom it masks, and
    /// lets in whom it lets in.
    #[test]
    fn the_naive_reading_agrees(
        config in generate::config(),
        events in prop::collection::vec(generate::event(), 1..25),
        seed in any::<usize>(),
    ) {
        let mut world = World::default();
        events.into_iter().for_each(|event| world.apply(event));
        let mut known = Known::new(config.clone());
        for change in world.changes(seed) {
            known.model.apply(change);
        }
        known.follow()?;
        let mut expected = naive::frontends(&config, &world);
        for service in known.services.values() {
            for (port, frontend) in service.ports.iter().flat_map(|port| port.frontends.iter().map(move |f| (port, f))) {
                let naive = expected.remove(&frontend.key);
                let Some(naive) = naive else {
                    return Err(TestCaseError::fail(format!("nobody should have {:?}", frontend.key)));
                };
                prop_assert_eq!(&service.key, &naive.service, "{:?}", frontend.key);
                prop_assert_eq!(frontend.kind, naive.kind, "{:?}", frontend.key);
                prop_assert_eq!(side(&frontend.inside, port), naive.inside, "inside {:?}", frontend.key);
                prop_assert_eq!(side(&frontend.outside, port), naive.outside, "outside {:?}", frontend.key);
                prop_assert_eq!(port.affinity_timeout, naive.affinity_timeout, "{:?}", frontend.key);
                let (asks, host) = (Options::SOURCE_RANGES, Options::HOST_IN_RANGES);
                let is_host_let_in = frontend.inside.options & (asks | host) != asks;
                prop_assert_eq!(is_host_let_in, naive.lets_host_in, "{:?} from the host", frontend.key);
                let serving: BTreeSet<_> = port.backends.iter().map(|b| (b.address, b.port)).collect();
                prop_assert_eq!(serving.len(), port.backends.len(), "each backend once");
                prop_assert_eq!(serving, naive.serving, "{:?}", frontend.key);
                for client in naive::sample_clients(&frontend.key) {
                    let is_let_in = is_let_in(frontend, &client);
                    prop_assert_eq!(is_let_in, (naive.lets_in)(&client), "{:?} from {}", frontend.key, client);
                }
            }
        }
        prop_assert!(expected.is_empty(), "missing: {:?}", expected.keys());
        let told = |check: &WantedHealthCheck| {
            let counts = check.local_endpoints.iter().map(|(family, count)| (*family == Family::V4, *count));
            (check.port, counts.collect())
        };
        let answered: BTreeMap<_, naive::HealthCheck> =
            known.health_checks.iter().map(|(key, check)| (key.clone(), told(check))).collect();
        prop_assert_eq!(answered, naive::health_checks(&config, &world));
    }
}

proptest! {
    #![proptest_config(runs(1_000))]

    /// Wild values, of any text and number, make no panic, and nothing that the tables could not hold.
    #[test]
    fn wild_objects_are_survived(
        config in generate::config(),
        events in prop::collection::vec(prop_oneof![generate::wild_event(), generate::event()], 1..20),
    ) {
        let mut known = Known::new(config);
        for event in events {
            known.model.apply(event.change());
            known.follow()?;
            known.check_tables()?;
        }
    }
}

/// More endpoints than a block can count: what fits is served, and the rest is named.
#[test]
fn what_does_not_fit_is_named() {
    let mut known = Known::new(NodeConfig { node_name: "node-a".to_owned(), ..NodeConfig::default() });
    for event in generate::service_with_endpoints(70_000) {
        known.model.apply(event.change());
    }
    known.follow().unwrap();
    known.check_tables().unwrap();
    let port = &known.services.values().next().unwrap().ports[0];
    assert_eq!(port.backends.len(), usize::from(u16::MAX));
    assert_eq!(port.frontends[0].inside.count, u16::MAX);
    let problem = known.problems.first().unwrap();
    assert!(problem.message.contains(&format!("{}", 70_000 - usize::from(u16::MAX))), "{problem}");
}

/// A model, and what one knows who follows its updates.
struct Known {
    model: Model,
    services: BTreeMap<ServiceKey, WantedService>,
    health_checks: BTreeMap<ServiceKey, WantedHealthCheck>,
    node: Option<WantedNode>,
    opt_outs: WantedOptOuts,
    problems: BTreeSet<Problem>,
}

impl Known {
    fn new(config: NodeConfig) -> Self {
        Self {
            model: Model::new(config),
            services: BTreeMap::new(),
            health_checks: BTreeMap::new(),
            node: None,
            opt_outs: WantedOptOuts::default(),
            problems: BTreeSet::new(),
        }
    }

    fn follow(&mut self) -> Result<(), TestCaseError> {
        let Update { services, health_checks, node, opt_outs, new_problems, gone_problems } =
            self.model.recompute();
        for (key, wanted) in services {
            prop_assert!(wanted.as_ref().is_none_or(|wanted| wanted.key == key));
            let before = match &wanted {
                Some(wanted) => self.services.insert(key.clone(), wanted.clone()),
                None => self.services.remove(&key),
            };
            prop_assert_ne!(&before, &wanted, "{} did not change", key);
        }
        for (key, check) in health_checks {
            let before = match &check {
                Some(check) => self.health_checks.insert(key.clone(), check.clone()),
                None => self.health_checks.remove(&key),
            };
            prop_assert_ne!(&before, &check, "the health check of {} did not change", key);
        }
        prop_assert!(
            self.model.health_checks().collect::<BTreeMap<_, _>>().into_iter().eq(&self.health_checks)
        );
        if let Some(node) = node {
            prop_assert_ne!(self.node.as_ref(), Some(&node));
            self.node = Some(node);
        }
        if let Some(opt_outs) = opt_outs {
            prop_assert_ne!(&self.opt_outs, &opt_outs);
            self.opt_outs = opt_outs;
        }
        prop_assert_eq!(&self.opt_outs, self.model.opt_outs());
        for problem in gone_problems {
            prop_assert!(self.problems.remove(&problem), "never came: {}", problem);
        }
        for problem in new_problems {
            prop_assert!(self.problems.insert(problem.clone()), "came twice: {}", problem);
        }
        prop_assert!(self.model.problems().all(|problem| self.problems.contains(problem)));
        let mut services: Vec<_> = self.model.services().collect();
        services.sort_by_key(|service| &service.key);
        prop_assert!(services.into_iter().eq(self.services.values()));
        Ok(())
    }

    /// What must be true of anything that goes into tables.
    fn check_tables(&self) -> Result<(), TestCaseError> {
        let mut frontends: BTreeSet<FrontendKey> = BTreeSet::new();
        let mut addresses: BTreeSet<Address> = BTreeSet::new();
        if let Some(node) = &self.node {
            addresses.extend(&node.node_port_addresses);
        }
        for service in self.services.values() {
            for (address, _) in &service.addresses {
                prop_assert!(addresses.insert(*address), "{} has two owners", address);
            }
            for port in &service.ports {
                prop_assert!(!port.frontends.is_empty());
                prop_assert!(usize::from(port.in_sets) <= port.backends.len());
                for frontend in &port.frontends {
                    prop_assert!(frontends.insert(frontend.key), "{:?} has two owners", frontend.key);
                    let is_node_port = frontend.key.is_node_port();
                    prop_assert_eq!(is_node_port, frontend.kind == FrontendKind::NodePort);
                    prop_assert_eq!(frontend.key.address().is_unspecified(), is_node_port);
                    let family = frontend.key.address().is_v4();
                    prop_assert!(port.backends.iter().all(|backend| backend.address.is_v4() == family));
                    for side in [&frontend.inside, &frontend.outside] {
                        prop_assert!(
                            side.offset.checked_add(side.count).is_some_and(|end| end <= port.in_sets)
                        );
                        prop_assert_eq!(side.mode == Mode::Forward && side.count == 0, false);
                    }
                    let is_restricted = frontend.inside.options & Options::SOURCE_RANGES != 0;
                    prop_assert_eq!(is_restricted, !frontend.source_ranges.is_empty());
                }
            }
        }
        Ok(())
    }
}

fn side(side: &WantedSide, port: &WantedPort) -> naive::Side {
    let run = usize::from(side.offset)..usize::from(side.offset) + usize::from(side.count);
    naive::Side {
        mode: side.mode,
        backends: port.backends[run].iter().map(|backend| (backend.address, backend.port)).collect(),
        masquerade: side.options
            & (Options::MASQUERADE | Options::MASQUERADE_REMOTE | Options::MASQUERADE_OFF_CLUSTER),
        affinity: side.options & Options::AFFINITY != 0,
        is_local: side.options & Options::LOCAL_SET != 0,
    }
}

fn is_let_in(frontend: &WantedFrontend, client: &Address) -> bool {
    frontend.inside.options & Options::SOURCE_RANGES == 0
        || frontend.source_ranges.iter().any(|range| range.contains(client))
}
