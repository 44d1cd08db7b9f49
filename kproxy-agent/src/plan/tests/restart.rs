//! Agents that start over what another one left.

use super::*;

#[test]
fn a_restart_with_the_same_wish_writes_nothing_and_a_shorter_list_removes() {
    let mut agent = Agent::new(CAPACITY);
    let wanted = || {
        let a = with_ranges(with_affinity(service("a", &[1, 2], &[1, 2])), &[8]);
        [("a", with_address(a, 1, AddressKind::ClusterIp)), ("b", service("b", &[], &[3]))]
    };
    agent.change(wanted());
    let (mut second, problems) = Agent::over(&agent.memory.snapshot());
    assert_eq!(problems, Vec::<String>::new());
    let all = |wanted: &[(&str, Option<WantedService>)]| -> BTreeMap<_, _> {
        wanted.iter().map(|(name, wanted)| (name_of(name), wanted.clone().unwrap())).collect()
    };
    second.reconciler.want_all(all(&wanted()), second.now);
    let report = second.reconciler.run(&mut second.memory, second.now);
    assert_eq!((report.counts.writes(), report.calls), (0, 0));

    second.reconciler.want_all(all(&wanted()[1..]), second.now);
    second.reconciler.run(&mut second.memory, second.now);
    second.settle();
    assert_eq!(second.memory.frontends().keys().copied().collect::<Vec<_>>(), [frontend(3)]);
    assert_eq!((second.memory.addresses().len(), second.memory.source_ranges().len()), (0, 0));
}

#[test]
fn identities_and_joins_go_on_after_a_restart() {
    let mut agent = Agent::new(CAPACITY);
    agent.change([("a", service("a", &[1, 2], &[1]))]);
    agent.change([("b", service("b", &[3], &[2]))]);
    let (mut second, _) = Agent::over(&agent.memory.snapshot());
    second.change([("c", service("c", &[4], &[3]))]);
    assert!(second.identity(frontend(3)).service() > agent.identity(frontend(2)).service());
    assert!(second.joined(frontend(3))[&pod(4)] > agent.joined(frontend(2))[&pod(3)]);
}

#[test]
fn what_does_not_fit_together_is_named_and_mended() {
    let mut agent = Agent::new(CAPACITY);
    let wanted = || with_address(service("a", &[1, 2], &[1, 2, 3]), 1, AddressKind::ClusterIp);
    agent.change([("a", wanted())]);
    agent.change([("b", service("b", &[3], &[4, 5]))]);
    let sound = agent.memory.snapshot();
    type Breakage<'a> = (&'a str, &'a dyn Fn(&mut Snapshot));
    let breakages: [Breakage<'_>; 9] = [
        ("out of range", &|snapshot| snapshot.frontends[0].1 = 1_000),
        ("another frontend's", &|snapshot| snapshot.frontends[0].1 = snapshot.frontends[1].1),
        ("unused or unreadable", &|snapshot| snapshot.entries[0] = [0; 4]),
        ("unused or unreadable", &|snapshot| snapshot.entries[0] = [u64::MAX; 4]),
        ("does not say whose", &|snapshot| snapshot.infos[0] = None),
        ("does not say whose", &|snapshot| {
            let name = &mut snapshot.infos[0].as_mut().unwrap().name;
            name[3] = 0;
        }),
        ("a kind that this version does not know", &|snapshot| snapshot.addresses[0].1 = None),
        ("", &|snapshot| snapshot.entries[2] = snapshot.entries[3]),
        ("", &|snapshot| snapshot.backends[0] = snapshot.backends[2]),
    ];
    for (what, breakage) in breakages {
        let mut snapshot = sound.clone();
        breakage(&mut snapshot);
        let (mut second, problems) = Agent::over(&snapshot);
        assert_eq!(problems.len(), usize::from(!what.is_empty()), "{what}: {problems:?}");
        assert!(problems.iter().all(|problem| problem.contains(what)), "{what}: {problems:?}");
        let all = BTreeMap::from([
            (name_of("a"), wanted().unwrap()),
            (name_of("b"), service("b", &[3], &[4, 5]).unwrap()),
        ]);
        second.reconciler.want_all(all.clone(), second.now);
        let report = second.reconciler.run(&mut second.memory, second.now);
        assert!(report.failed.is_empty() && report.counts.writes() > 0, "{what}: {report:?}");
        second.settle();
        for (last, pods) in [(1, &[1, 2][..]), (2, &[1, 2]), (3, &[1, 2]), (4, &[3]), (5, &[3])] {
            let should: Vec<_> = pods.iter().copied().map(pod).collect();
            assert_eq!(
                second.joined(frontend(last)).into_keys().collect::<Vec<_>>(),
                should,
                "{what}, {last}"
            );
        }

        let (mut third, problems) = Agent::over(&second.memory.snapshot());
        assert_eq!(problems, Vec::<String>::new(), "{what}");
        third.reconciler.want_all(all, third.now);
        assert_eq!(third.reconciler.run(&mut third.memory, third.now).counts.writes(), 0, "{what}");
    }
}
