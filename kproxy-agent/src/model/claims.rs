//! Which Service has a frontend that several claim: the oldest, then the first by namespace and name.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
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

/// All claims to keys of one sort (frontends, or addresses). Nearly every key has one claimant, so that only
/// those with several are looked at twice.
#[derive(Debug)]
pub struct Claims<K> {
    by_key: HashMap<K, Claimants>,
    /// How many keys have several claimants.
    contested: usize,
    /// Keys with several claimants before or after a change since the last settling, and who had them then.
    changed: HashMap<K, Arc<ServiceKey>>,
}

/// Those who claim one key.
#[derive(Debug)]
struct Claimants {
    winner: Claimant,
    /// Sorted.
    losers: Vec<Claimant>,
}

impl<K> Default for Claims<K> {
    fn default() -> Self {
        Self { by_key: HashMap::new(), contested: 0, changed: HashMap::new() }
    }
}

impl<K: Copy + Eq + Hash> Claims<K> {
    /// `claimant` claims `key`. Once for each key.
    pub fn add(&mut self, key: K, claimant: Claimant) {
        let claimants = match self.by_key.entry(key) {
            Entry::Vacant(free) => {
                free.insert(Claimants { winner: claimant, losers: Vec::new() });
                return;
            }
            Entry::Occupied(claimed) => claimed.into_mut(),
        };
        self.changed.entry(key).or_insert_with(|| Arc::clone(&claimants.winner.service));
        if claimants.losers.is_empty() {
            self.contested += 1;
        }
        let loser = if claimant < claimants.winner {
            std::mem::replace(&mut claimants.winner, claimant)
        } else {
            claimant
        };
        let at = claimants.losers.partition_point(|other| *other < loser);
        claimants.losers.insert(at, loser);
    }

    /// `claimant` no longer claims `key`.
    pub fn remove(&mut self, key: K, claimant: &Claimant) {
        let Some(claimants) = self.by_key.get_mut(&key) else { return };
        let is_winner = claimants.winner == *claimant;
        if claimants.losers.is_empty() {
            if is_winner {
                self.by_key.remove(&key);
            }
            return;
        }
        let at = if is_winner { Ok(0) } else { claimants.losers.binary_search(claimant) };
        let Ok(at) = at else { return };
        self.changed.entry(key).or_insert_with(|| Arc::clone(&claimants.winner.service));
        let next = claimants.losers.remove(at);
        if is_winner {
            claimants.winner = next;
        }
        if claimants.losers.is_empty() {
            self.contested -= 1;
        }
    }

    /// Whether anyone claims `key`.
    pub fn is_claimed(&self, key: &K) -> bool {
        self.by_key.contains_key(key)
    }

    /// Who has `key` instead of `service`, which claims it too.
    pub fn rival(&self, key: &K, service: &ServiceKey) -> Option<&ServiceKey> {
        if self.contested == 0 {
            return None;
        }
        let winner = &*self.by_key.get(key)?.winner.service;
        (winner != service).then_some(winner)
    }

    /// Every Service that claims a key which passed from one Service to another since the last call, some of
    /// them several times. Those that claimed, or gave up, what nobody else claims are affected by their own
    /// change. Late, so that many claims to one key cost one look at its claimants and not one for each.
    pub fn settle(&mut self) -> Vec<Arc<ServiceKey>> {
        let mut affected = Vec::new();
        for (key, winner) in self.changed.drain() {
            if let Some(claimants) = self.by_key.get(&key)
                && claimants.winner.service != winner
            {
                affected.extend(claimants.services().cloned());
            }
        }
        affected
    }
}

impl Claimants {
    fn services(&self) -> impl Iterator<Item = &Arc<ServiceKey>> {
        std::iter::once(&self.winner).chain(&self.losers).map(|claimant| &claimant.service)
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
        assert_eq!(settle(&mut claims), [""; 0], "alone");
        assert_eq!(claims.rival(&80, &young.service), None);
        claims.add(80, old.clone());
        assert_eq!(settle(&mut claims), ["b", "z"], "the loser learns of it");
        assert_eq!(claims.rival(&80, &young.service), Some(&*old.service));
        claims.add(80, twin.clone());
        assert_eq!(settle(&mut claims), [""; 0], "nobody gained or lost anything");
        claims.remove(80, &old);
        assert_eq!(settle(&mut claims), ["a", "b"]);
        assert_eq!(claims.rival(&80, &young.service), Some(&*twin.service));
        claims.remove(80, &twin);
        assert_eq!(settle(&mut claims), ["b"]);
        claims.remove(80, &young);
        claims.remove(80, &young);
        assert_eq!(settle(&mut claims), [""; 0]);
        assert!(claims.by_key.is_empty() && claims.contested == 0);
    }

    #[test]
    fn what_passes_on_and_back_before_it_is_settled_did_not_pass() {
        let mut claims = Claims::default();
        let (old, young) = (claimant(1, "z"), claimant(2, "b"));
        claims.add(80, young.clone());
        claims.add(80, old.clone());
        claims.remove(80, &old);
        assert_eq!(settle(&mut claims), [""; 0]);
        assert_eq!((claims.contested, claims.rival(&80, &young.service)), (0, None));
    }
}
