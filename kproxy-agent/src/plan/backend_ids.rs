//! The ids of backends: which are free, which slots name one, and where `backend_slot` says that each stands.

use kproxy_common::BackendSlots;

use super::spans::Spans;

/// An id is in use while a slot names it that is in use. So there are never more of them than slots.
#[derive(Clone, Debug)]
pub struct BackendIds {
    free: Spans,
    /// Of each id, how many slots name it.
    uses: Vec<u32>,
    /// Of each slot in use, the id that it names.
    named: Vec<Option<u32>>,
    /// What stands in `backend_slot`, by id.
    words: Vec<u64>,
    /// Given out for a plan; nothing names them before it was executed.
    reserved: Vec<u32>,
}

impl BackendIds {
    /// All free.
    pub fn new(capacity: u32) -> Self {
        Self {
            free: Spans::new(capacity),
            uses: Vec::new(),
            named: Vec::new(),
            words: Vec::new(),
            reserved: Vec::new(),
        }
    }

    /// What an earlier agent left: the words of `backend_slot`, and slots with the ids that they name. An id that is
    /// named by slots of several backends is the first one's; the others must be written anew.
    pub fn restore(capacity: u32, words: Vec<u64>, named: impl Iterator<Item = (u32, u32)>) -> Self {
        let mut ids = Self { words, ..Self::new(capacity) };
        for (slot, id) in named.filter(|(_, id)| *id < capacity) {
            ids.name(slot, id);
        }
        // In runs: most ids follow on one another.
        let mut run: Option<(u32, u32)> = None;
        for id in (0..).zip(&ids.uses).filter(|(_, uses)| **uses > 0).map(|(id, _)| id) {
            run = match run {
                Some((first, length)) if first + length == id => Some((first, length + 1)),
                Some((first, length)) => {
                    ids.free.take_at(first, length);
                    Some((id, 1))
                }
                None => Some((id, 1)),
            };
        }
        if let Some((first, length)) = run {
            ids.free.take_at(first, length);
        }
        ids
    }

    /// Takes so many free ids, one after the other where there are as many.
    pub fn reserve(&mut self, count: u32) -> Option<Vec<u32>> {
        let mut taken = Vec::with_capacity(count as usize);
        if let Some(first) = self.free.take(count) {
            taken.extend(first..first + count);
        } else {
            while (taken.len() as u32) < count {
                let Some(id) = self.free.take(1) else {
                    taken.into_iter().for_each(|id| self.free.give(id, 1));
                    return None;
                };
                taken.push(id);
            }
        }
        self.reserved.extend(&taken);
        Some(taken)
    }

    /// How many reservations are open; for [`BackendIds::release_reserved`].
    pub fn reserved(&self) -> usize {
        self.reserved.len()
    }

    /// Closes the reservations from the `kept`th on: what no slot names is free again.
    pub fn release_reserved(&mut self, kept: usize) {
        for id in self.reserved.split_off(kept) {
            if self.uses.get(id as usize).is_none_or(|uses| *uses == 0) {
                self.free.give(id, 1);
            }
        }
    }

    /// The backend in this slot has this id.
    pub fn name(&mut self, slot: u32, id: u32) {
        self.forget(slot);
        *place(&mut self.uses, id) += 1;
        *place(&mut self.named, slot) = Some(id);
    }

    /// The slot is free.
    pub fn forget(&mut self, slot: u32) {
        let Some(id) = self.named.get_mut(slot as usize).and_then(Option::take) else { return };
        let uses = &mut self.uses[id as usize];
        *uses -= 1;
        if *uses == 0 {
            self.free.give(id, 1);
        }
    }

    /// Whether this slot, which is in use, names this id.
    pub fn is(&self, slot: u32, id: u32) -> bool {
        self.named.get(slot as usize) == Some(&Some(id))
    }

    /// `backend_slot` says this.
    pub fn stored(&mut self, id: u32, slots: BackendSlots) {
        *place(&mut self.words, id) = slots.to_word();
    }

    /// What `backend_slot` says.
    pub fn slots(&self, id: u32) -> BackendSlots {
        BackendSlots::from_word(self.words.get(id as usize).copied().unwrap_or(0))
    }

    /// `backend_slot`, by id.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many ids are free.
    pub fn free(&self) -> u32 {
        self.free.free()
    }
}

fn place<T: Clone + Default>(values: &mut Vec<T>, index: u32) -> &mut T {
    let index = index as usize;
    if index >= values.len() {
        values.resize(index + 1, T::default());
    }
    &mut values[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_free_when_no_slot_names_it() {
        let mut ids = BackendIds::new(8);
        assert_eq!(ids.reserve(3), Some(vec![0, 1, 2]));
        // Two of them were written, and one of these into another slot too.
        for (slot, id) in [(10, 0), (11, 1), (20, 1)] {
            ids.name(slot, id);
        }
        ids.release_reserved(0);
        assert_eq!(ids.free(), 6);
        ids.forget(11);
        assert!(ids.is(20, 1) && !ids.is(11, 1));
        assert_eq!(ids.free(), 6, "another slot names it");
        ids.forget(20);
        ids.forget(20);
        assert_eq!(ids.free(), 7);
        // In holes, where there is no such run.
        assert_eq!(ids.reserve(7).map(|ids| ids.len()), Some(7));
        assert_eq!(ids.reserve(1), None);
        ids.release_reserved(0);
        assert_eq!(ids.free(), 7);
    }

    #[test]
    fn what_was_left_is_in_use() {
        let named = [(5, 3), (6, 4), (9, 3), (7, 900)];
        let mut ids = BackendIds::restore(8, vec![0, 7], named.into_iter());
        assert_eq!((ids.free(), ids.slots(1)), (6, BackendSlots::from_word(7)));
        assert!(!ids.is(7, 900), "there is no such id");
        ids.forget(5);
        ids.forget(6);
        assert_eq!(ids.free(), 7);
    }
}
