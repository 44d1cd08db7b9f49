//! From the Pods that are opted out, and the network namespaces that there are, to what is written. Pure.

use std::collections::{BTreeMap, BTreeSet};

use kproxy_common::{Address, OptedOut};

use crate::wanted::{ServiceKey, WantedOptOuts};

/// A network namespace of this node, apart from the host's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Namespace {
    /// SO_NETNS_COOKIE, which the kernel gives out once.
    pub cookie: u64,
    /// The addresses on its interfaces.
    pub addresses: BTreeSet<Address>,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Plan {
    /// Taken out first.
    pub delete: BTreeSet<u64>,
    /// Put in then: whose it is, and its IPv4 and IPv6 address.
    pub insert: BTreeMap<u64, (ServiceKey, [Address; 2])>,
    /// Pods whose network namespace is not to be found.
    pub missing: BTreeSet<ServiceKey>,
}

/// Brings `present` to what is wanted. A namespace is the Pod's that has any of its addresses. What was found once stands
/// while its Pod has no other: a namespace whose last process has ended is not found, and nobody else gets its cookie.
pub fn plan(wanted: &WantedOptOuts, found: &[Namespace], present: &BTreeMap<u64, OptedOut>) -> Plan {
    let owner = |namespace: &Namespace| {
        let has_one = |addresses: &[Address]| addresses.iter().any(|a| namespace.addresses.contains(a));
        let mut pods = wanted.pods.iter();
        pods.find(|(_, addresses)| has_one(addresses)).map(|(pod, addresses)| (pod.clone(), value(addresses)))
    };
    let found: BTreeMap<u64, _> =
        found.iter().map(|namespace| (namespace.cookie, owner(namespace))).collect();
    let mut plan = Plan::default();
    let mut kept = BTreeSet::new();
    for (pod, addresses) in &wanted.pods {
        if found.values().flatten().any(|(owner, _)| owner == pod) {
            continue;
        }
        let value = value(addresses);
        let is_its =
            |(cookie, old): &(&u64, &OptedOut)| [old.v4, old.v6] == value && !found.contains_key(cookie);
        let before = kept.len();
        kept.extend(present.iter().filter(is_its).map(|(cookie, _)| *cookie));
        if kept.len() == before {
            plan.missing.insert(pod.clone());
        }
    }
    for (cookie, (pod, value)) in found.into_iter().filter_map(|(cookie, owner)| Some((cookie, owner?))) {
        if present.get(&cookie).is_some_and(|old| [old.v4, old.v6] == value) {
            kept.insert(cookie);
        } else {
            plan.insert.insert(cookie, (pod, value));
        }
    }
    // What must change is not replaced, but taken out and put in.
    let stale = present.keys().filter(|cookie| !kept.contains(cookie));
    plan.delete =
        stale.filter(|cookie| wanted.is_complete || plan.insert.contains_key(cookie)).copied().collect();
    plan
}

/// The first address of each family.
fn value(addresses: &[Address]) -> [Address; 2] {
    let first = |is_v4: bool| addresses.iter().find(|address| address.is_v4() == is_v4).copied();
    [first(true).unwrap_or(Address::UNSPECIFIED_V4), first(false).unwrap_or(Address::UNSPECIFIED)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::parse::ip;

    fn key(name: &str) -> ServiceKey {
        ServiceKey { namespace: "default".to_owned(), name: name.to_owned() }
    }

    fn addresses(texts: &[&str]) -> Vec<Address> {
        texts.iter().map(|text| ip(text).expect("an address")).collect()
    }

    fn wanted(pods: &[(&str, &[&str])]) -> WantedOptOuts {
        let pods = pods.iter().map(|(name, ips)| (key(name), addresses(ips).into_boxed_slice()));
        WantedOptOuts { pods: pods.collect(), is_complete: true }
    }

    fn namespace(cookie: u64, ips: &[&str]) -> Namespace {
        Namespace { cookie, addresses: addresses(ips).into_iter().collect() }
    }

    /// What stands after the plan was carried out.
    fn after(plan: &Plan, present: &BTreeMap<u64, OptedOut>) -> BTreeMap<u64, OptedOut> {
        let mut present = present.clone();
        for cookie in &plan.delete {
            assert!(present.remove(cookie).is_some(), "{cookie} was not there");
        }
        for (cookie, (_, [v4, v6])) in &plan.insert {
            let value = OptedOut { v4: *v4, v6: *v6, since: 0 };
            assert_eq!(present.insert(*cookie, value), None, "{cookie} was replaced");
        }
        present
    }

    #[test]
    fn a_pod_is_found_by_its_addresses_and_gone_when_it_goes() {
        let mesh: (&str, &[&str]) = ("mesh", &["10.244.1.7", "2001:db8::7"]);
        let all = [
            namespace(1, &["127.0.0.1", "10.244.1.6"]),
            namespace(2, &["127.0.0.1", "10.244.1.7", "2001:db8::7"]),
        ];
        let none = BTreeMap::new();
        let first = plan(&wanted(&[mesh]), &all, &none);
        assert_eq!(first.insert.keys().collect::<Vec<_>>(), [&2]);
        let present = after(&first, &none);
        assert_eq!(plan(&wanted(&[mesh]), &all, &present), Plan::default(), "nothing changed");
        // Its last process ended, or was not seen.
        assert_eq!(plan(&wanted(&[mesh]), &all[..1], &present), Plan::default());
        // Another sandbox under the same address.
        let other = [namespace(3, &["10.244.1.7"])];
        let moved = plan(&wanted(&[mesh]), &other, &present);
        assert_eq!(after(&moved, &present).into_keys().collect::<Vec<_>>(), [3]);
        // Gone, or not opted out any more.
        let gone = plan(&wanted(&[]), &all, &present);
        assert_eq!(gone, Plan { delete: BTreeSet::from([2]), ..Plan::default() });
        let unknown = WantedOptOuts { is_complete: false, ..wanted(&[]) };
        assert_eq!(plan(&unknown, &all, &present), Plan::default(), "nobody knows yet");
    }

    #[test]
    fn a_pod_without_a_namespace_is_missing() {
        let wanted = wanted(&[("mesh", &["10.244.1.7"]), ("other", &["10.244.1.8"])]);
        let plan = plan(&wanted, &[namespace(1, &["10.244.1.8"])], &BTreeMap::new());
        assert_eq!(plan.missing, BTreeSet::from([key("mesh")]));
        assert_eq!(plan.insert.keys().collect::<Vec<_>>(), [&1]);
    }

    #[test]
    fn an_address_that_another_pod_has_now_leads_to_that_one() {
        let all = [namespace(1, &["10.244.1.7"])];
        let present =
            after(&plan(&wanted(&[("one", &["10.244.1.7"])]), &all, &BTreeMap::new()), &BTreeMap::new());
        // The same sandbox with another address beside.
        let more = wanted(&[("one", &["10.244.1.7", "2001:db8::7"])]);
        let changed = plan(&more, &all, &present);
        assert_eq!(changed.delete, BTreeSet::from([1]));
        assert_eq!(after(&changed, &present)[&1].v6, addresses(&["2001:db8::7"])[0]);
    }

    proptest! {
        /// From whatever stands to what is wanted: exactly the namespaces of the Pods are in, none is replaced, and
        /// asked again nothing is to be done.
        #[test]
        fn it_ends_in_what_is_wanted(
            pods in prop::collection::btree_map("[a-d]", prop::collection::btree_set(1_u8..8, 1..3), 0..4),
            spaces in prop::collection::btree_map(1_u64..8, prop::collection::btree_set(1_u8..8, 0..3), 0..6),
            before in prop::collection::btree_map(1_u64..8, 1_u8..8, 0..6),
        ) {
            let at = |last: u8| ip(&format!("10.244.1.{last}")).expect("an address");
            let pods = pods.into_iter().map(|(name, ips)| (key(&name), ips.into_iter().map(at).collect()));
            let wanted = WantedOptOuts { pods: pods.collect(), is_complete: true };
            let found: Vec<_> = spaces
                .into_iter()
                .map(|(cookie, ips)| Namespace { cookie, addresses: ips.into_iter().map(at).collect() })
                .collect();
            let before = before.into_iter().map(|(cookie, last)| {
                (cookie, OptedOut { v4: at(last), v6: Address::UNSPECIFIED, since: 0 })
            });
            let before = before.collect();
            let planned = plan(&wanted, &found, &before);
            let now = after(&planned, &before);
            for namespace in &found {
                let pod = wanted.pods.values().find(|ips| ips.iter().any(|ip| namespace.addresses.contains(ip)));
                prop_assert_eq!(now.contains_key(&namespace.cookie), pod.is_some(), "{:?}", namespace);
            }
            // What is not found any more belongs to a Pod that is opted out.
            for value in now.values() {
                prop_assert!(wanted.pods.values().any(|ips| ips.contains(&value.v4)), "{:?}", value);
            }
            let again = plan(&wanted, &found, &now);
            prop_assert_eq!((again.insert.len(), again.delete.len()), (0, 0), "{:?}", again);
        }
    }
}
