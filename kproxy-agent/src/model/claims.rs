//! Which Service has a frontend that several claim: the oldest, then the first by namespace and name.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use crate::wanted::ServiceKey;

/// A Service that claims something; the smallest wins.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Claimant {
    /// `metadata.creationTimestamp`, in seconds since 1970.
    pub created: i64,
    /// Which Service.
    pub service: Arc<ServiceKey>,
}

/// All claims to keys of one sort (frontends, or addresses).
#[derive(Debug)]
pub struct Claims<K> {
    by_key: HashMap<K, Claimants>,
    /// The keys whose claimants changed since the last settling, each once.
    changed: Vec<K>,
}

/// Those who claim one key.
#[derive(Debug, Default)]
struct Claimants {
    /// Sorted.
    all: Vec<Claimant>,
    /// Who had the key when claims were last settled.
    settled: Option<Arc<ServiceKey>>,
    is_changed: bool,
}

impl<K> Default for Claims<K> {
    fn default() -> Self {
        Self { by_key: HashMap::new(), changed: Vec::new() }
    }
}

impl<K: Copy + Eq + Hash> Claims<K> {
    /// `claimant` claims `key`. Once for each key.
    pub fn add(&mut self, key: K, claimant: Claimant) {
        let claimants = self.by_key.entry(key).or_default();
        if let Err(at) = claimants.all.binary_search(&claimant) {
            claimants.all.insert(at, claimant);
            claimants.note(key, &mut self.changed);
        }
    }

    /// `claimant` no longer claims `key`.
    pub fn remove(&mut self, key: K, claimant: &Claimant) {
        if let Some(claimants) = self.by_key.get_mut(&key)
            && let Ok(at) = claimants.all.binary_search(claimant)
        {
            claimants.all.remove(at);
            claimants.note(key, &mut self.changed);
        }
    }

    /// Who has `key`.
    pub fn winner(&self, key: &K) -> Option<&Arc<ServiceKey>> {
        self.by_key.get(key)?.all.first().map(|claimant| &claimant.service)
    }

    /// Everyone who claims `key`, the winner first.
    pub fn claimants(&self, key: &K) -> impl Iterator<Item = &Arc<ServiceKey>> {
        self.by_key
            .get(key)
            .into_iter()
            .flat_map(|claimants| &claimants.all)
            .map(|claimant| &claimant.service)
    }

    /// Every Service that gained or lost a key since the last call, or lost it to another than before; some of
    /// them several times. Not those that claim a key alone that nobody had: their own change says so. Late,
    /// so that many claims to one key cost one look at its claimants and not one for each.
    pub fn settle(&mut self) -> Vec<Arc<ServiceKey>> {
        let mut affected = Vec::new();
        for key in std::mem::take(&mut self.changed) {
            let Some(claimants) = self.by_key.get_mut(&key) else { continue };
            claimants.is_changed = false;
            let winner = claimants.all.first().map(|claimant| &claimant.service);
            if winner == claimants.settled.as_ref() {
                continue;
            }
            if claimants.settled.is_some() || claimants.all.len() > 1 {
                affected.extend(claimants.all.iter().map(|claimant| Arc::clone(&claimant.service)));
            }
            claimants.settled = winner.cloned();
            if claimants.all.is_empty() {
                self.by_key.remove(&key);
            }
        }
        affected
    }
}

impl Claimants {
    fn note<K>(&mut self, key: K, changed: &mut Vec<K>) {
        if !std::mem::replace(&mut self.is_changed, true) {
            changed.push(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claimant(created: i64, name: &str) -> Claimant {
        let service = ServiceKey { namespace: "default".into(), name: name.into() };
        Claimant { created, service: Arc::new(service) }
    }

    fn settle(claims: &mut Claims<u32>) -> Vec<String> {
        let mut affected: Vec<_> = claims.settle().iter().map(|key| key.name.clone()).collect();
        affected.sort();
        affected
    }

    #[test]
    fn the_older_wins_and_the_next_inherits() {
        let mut claims = Claims::default();
        let (old, young, twin) = (claimant(1, "z"), claimant(2, "b"), claimant(2, "a"));
        claims.add(80, young.clone());
        settle(&mut claims);
        claims.add(80, old.clone());
        assert_eq!(settle(&mut claims), ["b", "z"], "the loser learns of it");
        claims.add(80, twin.clone());
        assert_eq!(settle(&mut claims), [""; 0], "nobody gained or lost anything");
        claims.remove(80, &old);
        assert_eq!(settle(&mut claims), ["a", "b"]);
        assert_eq!(claims.winner(&80), Some(&twin.service));
        claims.remove(80, &twin);
        claims.remove(80, &young);
        settle(&mut claims);
        assert_eq!(claims.winner(&80), None);
        assert!(claims.by_key.is_empty() && claims.changed.is_empty());
    }
}
