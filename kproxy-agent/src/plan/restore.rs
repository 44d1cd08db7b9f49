//! From what the maps hold at start to [`Tables`]. What does not fit together is named, and rewritten by the
//! first plan; it is never trusted.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use kproxy_common::{
    Address, AddressKind, Backend, FrontendKey, FrontendKind, ServiceEntry, ServiceInfo, ServiceKind,
    SourceRangeKey, TrafficPolicy,
};

use super::{
    Capacity, Tables,
    backend_ids::BackendIds,
    slots::{Slots, Word},
    tables::{AddressRecord, Port, PortRecord},
};
use crate::wanted::{PassThroughRule, ServiceKey};

/// What the maps hold, read when nobody writes them and a grace period after anybody did.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// `frontend`.
    pub frontends: Vec<(FrontendKey, u32)>,
    /// `service`, by number. Elements beyond the end are zero.
    pub entries: Vec<[u64; 4]>,
    /// `service_info`, by number; `None` where the bytes form none.
    pub infos: Vec<Option<ServiceInfo>>,
    /// `backend`, by slot; `None` where the bytes form none.
    pub backends: Vec<Option<Backend>>,
    /// `backend_slot`, by id. Elements beyond the end are zero.
    pub backend_slots: Vec<u64>,
    /// `address`; `None` for a kind that this version does not know.
    pub addresses: Vec<(Address, Option<AddressKind>)>,
    /// `source_range`.
    pub source_ranges: Vec<SourceRangeKey>,
}

impl Snapshot {
    /// Sorts what has no order and cuts off unused ends, so that equal maps give equal snapshots.
    pub fn normalize(&mut self) {
        self.frontends.sort_unstable();
        self.addresses.sort_unstable();
        self.source_ranges.sort_unstable();
        trim(&mut self.entries, |words| *words == [0; 4]);
        trim(&mut self.infos, Option::is_none);
        trim(&mut self.backends, Option::is_none);
        trim(&mut self.backend_slots, |word| *word == 0);
    }
}

/// Whose a number is, as text in `service_info`.
type Claim = (ServiceKey, String, kproxy_common::Protocol, bool);

/// The tables that `snapshot` holds, and what in it does not fit together, for people.
///
/// The first plan must be made with the complete list of Services: it removes what nobody wants.
pub fn restore(snapshot: &Snapshot, capacity: Capacity) -> (Tables, Vec<String>) {
    let mut tables = Tables::new(capacity);
    let mut problems = Vec::new();

    tables.backend = snapshot.backends.clone();
    for (number, words) in snapshot.entries.iter().enumerate() {
        tables.number_state(number as u32).words = *words;
    }
    for (number, info) in snapshot.infos.iter().enumerate() {
        if let Some(info) = info {
            tables.number_state(number as u32).info = Some(Arc::new(*info));
        }
    }
    restore_frontends(&mut tables, snapshot, &mut problems);
    restore_addresses(&mut tables, snapshot, &mut problems);
    for key in &snapshot.source_ranges {
        tables.inserted_source_range(*key);
    }
    restore_space(&mut tables);
    restore_backend_ids(&mut tables, snapshot);
    restore_ids(&mut tables, snapshot);
    restore_owners(&mut tables, &mut problems);
    (tables, problems)
}

/// Namespace and name of the Service, and the port's name, from [`ServiceInfo::name`].
pub fn split_name(name: &str) -> Option<(ServiceKey, &str)> {
    let (namespace, rest) = name.split_once('/')?;
    let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
    if namespace.is_empty() || name.is_empty() {
        return None;
    }
    Some((ServiceKey { namespace: namespace.to_owned(), name: name.to_owned() }, port))
}

fn restore_frontends(tables: &mut Tables, snapshot: &Snapshot, problems: &mut Vec<String>) {
    // Where two have one number, it is the one's that service_info names.
    let named = |key: &FrontendKey, number: u32| {
        snapshot.infos.get(number as usize).is_some_and(|info| info.is_some_and(|info| info.frontend == *key))
    };
    let mut frontends: Vec<_> = snapshot.frontends.iter().collect();
    frontends.sort_by_key(|(key, number)| !named(key, *number));
    for (key, number) in frontends {
        let taken = *number >= tables.capacity.frontends
            || tables.numbers.get(*number as usize).is_some_and(|state| state.frontend.is_some());
        if taken {
            problems.push(format!(
                "frontend {} has number {number}, which is out of range or another frontend's: removing it",
                describe(key)
            ));
            tables.leftovers.frontends.insert(*key);
            continue;
        }
        tables.inserted_frontend(*key, *number);
        match tables.entry(*number) {
            Some(entry) if entry != ServiceEntry::UNUSED => {}
            _ => problems.push(format!(
                "frontend {} has number {number}, whose entry is unused or unreadable: writing it anew",
                describe(key)
            )),
        }
    }
}

fn restore_addresses(tables: &mut Tables, snapshot: &Snapshot, problems: &mut Vec<String>) {
    for (address, kind) in &snapshot.addresses {
        tables.address.insert(*address, AddressRecord { kind: *kind, owner: None });
        match kind {
            Some(AddressKind::NodePort) => {
                tables.node_present.insert(*address);
            }
            Some(_) => {
                tables.leftovers.addresses.insert(*address);
            }
            None => {
                problems.push(format!(
                    "address {address} has a kind that this version does not know: removing it"
                ));
                tables.leftovers.addresses.insert(*address);
            }
        }
    }
}

/// Numbers and slots in use; numbers without a frontend are retired, to be cleared.
fn restore_space(tables: &mut Tables) {
    let words = tables
        .numbers
        .iter()
        .flat_map(|number| Word::STORE_ORDER.map(|word| (word, number.words[word as usize])));
    tables.slots = Slots::with_words(tables.capacity.backends, words);
    let with_ranges: BTreeSet<u32> = tables.source_range.keys().copied().collect();
    for number in 0..tables.numbers.len() as u32 {
        let state = &tables.numbers[number as usize];
        if state.frontend.is_some() {
            tables.free_numbers.take_at(number, 1);
        } else if state.words != [0; 4] && !with_ranges.contains(&number) {
            tables.free_numbers.take_at(number, 1);
            tables.retired_numbers.insert(number);
        }
    }
    for number in with_ranges {
        let in_use = tables.numbers.get(number as usize).is_some_and(|state| state.frontend.is_some());
        if !in_use {
            tables.retired_ranges.extend(tables.source_range[&number].iter().copied());
            if tables.free_numbers.take_at(number, 1) {
                tables.retired_numbers.insert(number);
            }
        }
    }
}

/// The ids that slots in use name. Where two backends name one, or one that does not exist, the block of the second is
/// written anew by the first plan.
fn restore_backend_ids(tables: &mut Tables, snapshot: &Snapshot) {
    let mut whose: HashMap<u32, (u32, Address, u16)> = HashMap::new();
    let slots: Vec<u32> =
        tables.slots.in_use().flat_map(|(first, length)| first..first.saturating_add(length)).collect();
    let named = slots.into_iter().filter_map(|slot| {
        let backend = tables.backend.get(slot as usize).copied().flatten()?;
        let who = (backend.service(), backend.address(), backend.port());
        (*whose.entry(backend.id()).or_insert(who) == who).then_some((slot, backend.id()))
    });
    let named: Vec<_> = named.collect();
    tables.ids =
        BackendIds::restore(tables.capacity.backends, snapshot.backend_slots.clone(), named.into_iter());
}

/// Numbers that are never given out twice go on after the largest that was seen.
fn restore_ids(tables: &mut Tables, snapshot: &Snapshot) {
    let backends = || snapshot.backends.iter().flatten();
    let in_entries = (0..tables.numbers.len() as u32).map(|number| tables.identity(number).service()).max();
    let in_slots = backends().map(Backend::service).max();
    tables.next_service = in_entries.max(in_slots).unwrap_or(0).wrapping_add(1);
    tables.next_joined = backends().map(Backend::joined).max().unwrap_or(0).wrapping_add(1);
}

fn restore_owners(tables: &mut Tables, problems: &mut Vec<String>) {
    let mut claims: BTreeMap<Claim, BTreeSet<u32>> = BTreeMap::new();
    for (key, number) in tables.frontend.clone() {
        let info = tables.info(number).filter(|info| info.frontend == key && is_sound(info));
        match info.and_then(|info| split_name(info.name())) {
            Some((service, port)) => {
                let claim = (service, port.to_owned(), key.protocol(), key.address().is_v4());
                claims.entry(claim).or_default().insert(number);
            }
            None => {
                problems.push(format!(
                    "service_info of number {number} does not say whose frontend {} is: writing it anew",
                    describe(&key)
                ));
                tables.leftovers.numbers.insert(number);
            }
        }
    }
    let ids = assign_ids(tables, &claims);
    let (known, nameless): (Vec<_>, Vec<_>) =
        claims.into_iter().partition(|(claim, _)| ids.contains_key(claim));
    // Those without an identity come last: a new one must differ from all that are in use.
    for (claim, numbers) in known.into_iter().chain(nameless) {
        let id = ids.get(&claim).copied().unwrap_or_else(|| tables.new_service_id());
        let (service, name, protocol, v4) = claim;
        let known = tables.services.get_key_value(&service).map(|(key, _)| key.clone());
        let service = known.unwrap_or_else(|| Arc::new(service));
        let port = Arc::new(Port { id, service: service.clone(), name: name.into(), protocol, v4 });
        for number in &numbers {
            tables.numbers[*number as usize].port = Some(id);
        }
        tables.ports.insert(id, PortRecord { port, numbers });
        tables.services.entry(service).or_default().ports.push(id);
    }
}

/// Each Service port keeps the identity that most of its numbers have. Where an agent died while a frontend
/// changed hands, an identity can stand under two ports: the one with more numbers keeps it.
fn assign_ids(tables: &Tables, claims: &BTreeMap<Claim, BTreeSet<u32>>) -> BTreeMap<Claim, u32> {
    let mut votes: Vec<(usize, u32, &Claim)> = Vec::new();
    for (claim, numbers) in claims {
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        for number in numbers {
            *counts.entry(tables.identity(*number).service()).or_default() += 1;
        }
        votes.extend(counts.into_iter().filter(|(id, _)| *id != 0).map(|(id, count)| (count, id, claim)));
    }
    votes.sort_by(|(a_count, a_id, a), (b_count, b_id, b)| {
        b_count.cmp(a_count).then_with(|| a_id.cmp(b_id)).then_with(|| a.cmp(b))
    });
    let mut used = BTreeSet::new();
    let mut ids: BTreeMap<Claim, u32> = BTreeMap::new();
    for (_, id, claim) in votes {
        if !ids.contains_key(claim) && used.insert(id) {
            ids.insert(claim.clone(), id);
        }
    }
    ids
}

fn is_sound(info: &ServiceInfo) -> bool {
    let end = info.name.iter().position(|byte| *byte == 0).unwrap_or(info.name.len());
    info.name[end..].iter().all(|byte| *byte == 0)
        && FrontendKind::try_from(info.frontend_kind).is_ok()
        && ServiceKind::try_from(info.service_kind).is_ok()
        && TrafficPolicy::try_from(info.traffic_policy).is_ok()
        && PassThroughRule::from_number(info.pass_through_rule).is_some()
}

/// A frontend as people write it.
pub(crate) fn describe(key: &FrontendKey) -> String {
    let protocol = match key.protocol() {
        kproxy_common::Protocol::Tcp => "TCP",
        kproxy_common::Protocol::Udp => "UDP",
        kproxy_common::Protocol::Sctp => "SCTP",
    };
    let address = std::net::IpAddr::from(key.address());
    format!("{}/{protocol}", std::net::SocketAddr::new(address, key.port()))
}

fn trim<T>(values: &mut Vec<T>, unused: impl Fn(&T) -> bool) {
    while values.last().is_some_and(&unused) {
        values.pop();
    }
}
