//! What fails, does not fit, or cannot be stored, and what becomes of the rest.

use super::*;

#[test]
fn nothing_is_lost_while_the_taker_fails() {
    let mut agent = Agent::new(CAPACITY);
    agent.change([("a", service("a", &[1], &[1])), ("b", service("b", &[2], &[2]))]);
    agent.memory.fail = Fail::Map("backend");
    let report = agent.try_change([("a", None), ("b", service("b", &[3], &[1, 2]))]);
    assert_eq!(report.failed.len(), 2, "{:?}", report.failed);
    assert!(agent.error("a").contains("default/b"), "{}", agent.error("a"));
    assert_eq!(agent.joined(frontend(1)).into_keys().collect::<Vec<_>>(), [pod(1)]);

    agent.memory.fail = Fail::Never;
    agent.now += Duration::from_secs(1);
    agent.reconciler.run(&mut agent.memory, agent.now);
    assert_eq!(agent.joined(frontend(1)).into_keys().collect::<Vec<_>>(), [pod(3)]);
    assert!(agent.reconciler.status().service(&name_of("a")).is_none());
}

#[test]
fn a_failed_service_is_retried_and_the_rest_is_served() {
    let mut agent = Agent::new(CAPACITY);
    // The second frontend cannot be inserted; in the order of writes that is the 8th.
    agent.memory.fail = Fail::Nth(9);
    let report = agent.try_change([("a", service("a", &[1], &[1])), ("b", service("b", &[2], &[2]))]);
    assert_eq!(report.failed.len(), 1, "{:?}", report.failed);
    assert_eq!(agent.memory.frontends().keys().copied().collect::<Vec<_>>(), [frontend(1)]);
    assert_eq!(agent.reconciler.status().next_try(), Some(agent.now + Duration::from_secs(1)));

    agent.now += Duration::from_secs(1);
    let report = agent.reconciler.run(&mut agent.memory, agent.now);
    assert!(report.failed.is_empty());
    agent.settle();
    assert_eq!(agent.memory.frontends().len(), 2);
    assert_eq!(agent.tables().free_numbers(), 6, "the number of the failed try is free again");
}

#[test]
fn what_does_not_fit_is_named_and_fits_when_something_goes() {
    let mut agent = Agent::new(Capacity { frontends: 2, backends: 5, ..CAPACITY });
    agent.change([("a", service("a", &[1, 2], &[1, 2]))]);
    let report = agent.try_change([("b", service("b", &[1], &[3])), ("c", service("c", &[1, 2, 3, 4], &[]))]);
    assert_eq!(report.failed.len(), 1, "a Service without frontends needs no room: {:?}", report.failed);
    let error = agent.error("b");
    assert!(error.contains("--max-frontends") && error.contains("0 of 2"), "{error}");

    agent.try_change([("a", service("a", &[1, 2, 3, 4], &[1]))]);
    let error = agent.error("a");
    assert!(error.contains("--max-backends") && error.contains("3 are free"), "{error}");
    assert_eq!(agent.joined(frontend(1)).len(), 2, "it stays as it was");

    let report = agent.try_change([("a", service("a", &[1, 2], &[1]))]);
    assert!(report.failed.is_empty());
    agent.settle();
    let report = agent.reconciler.run(&mut agent.memory, agent.now);
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    assert!(agent.memory.frontends().contains_key(&frontend(3)), "tried again when a number became free");
}

#[test]
fn space_that_waits_for_a_grace_period_is_used_within_the_run() {
    let mut agent = Agent::new(Capacity { frontends: 1, backends: 2, ..CAPACITY });
    agent.change([("a", service("a", &[1, 2], &[1]))]);
    let report = agent.try_change([("a", None), ("b", service("b", &[3, 4], &[2]))]);
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    assert_eq!(report.counts.graces, 1);
    assert_eq!(agent.joined(frontend(2)).into_keys().collect::<Vec<_>>(), [pod(3), pod(4)]);
}

#[test]
fn what_cannot_be_stored_is_refused_by_name() {
    let mut agent = Agent::new(CAPACITY);
    let renamed = |name: &str| with(service("a", &[1], &[1]), |port| port.name = name.to_owned());
    for (wanted, what) in [
        (renamed(&"x".repeat(190)), "at most 191 bytes"),
        (renamed("a:b"), "cannot be stored"),
        (with(service("a", &[1], &[1]), |port| port.in_sets = 2), "inconsistent"),
        (with(service("a", &[1], &[1]), |port| port.frontends[0].inside.offset = 1), "outside"),
        (service("a", &[1], &[1, 1]), "occurs twice"),
    ] {
        let report = agent.try_change([("a", wanted)]);
        assert_eq!((report.failed.len(), report.counts.writes()), (1, 0));
        assert!(agent.error("a").contains(what), "{}", agent.error("a"));
    }
    let many: Vec<WantedBackend> = service("a", &[1], &[1]).unwrap().ports[0].backends.repeat(65_536);
    agent.try_change([("a", with(service("a", &[1], &[1]), |port| port.backends.clone_from(&many)))]);
    assert!(agent.error("a").contains("65536 endpoints"), "{}", agent.error("a"));
    assert_eq!(agent.reconciler.status().next_try(), None, "only a change can help");

    let twice = [("b", service("b", &[1], &[1])), ("c", service("c", &[1], &[1]))];
    agent.try_change(twice);
    assert!(agent.error("c").contains("10.96.0.1:80/TCP") && agent.error("c").contains("default/b"));
}
