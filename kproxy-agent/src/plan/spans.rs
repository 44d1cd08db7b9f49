//! Which numbers or slots are free: runs of a fixed range, given out and taken back.

use std::collections::{BTreeMap, BTreeSet};

/// The free runs of `0..capacity`. Neighbours that become free are one run again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spans {
    by_start: BTreeMap<u32, u32>,
    // Length first: the smallest run that is large enough is one look-up, however many holes there are.
    by_length: BTreeSet<(u32, u32)>,
    free: u32,
}

impl Spans {
    /// Everything is free.
    pub fn new(capacity: u32) -> Self {
        let mut spans = Self { by_start: BTreeMap::new(), by_length: BTreeSet::new(), free: 0 };
        spans.give(0, capacity);
        spans
    }

    /// How many are free.
    pub fn free(&self) -> u32 {
        self.free
    }

    /// How long the longest free run is.
    pub fn longest(&self) -> u32 {
        self.by_length.last().map_or(0, |(length, _)| *length)
    }

    /// Takes `length` from the smallest run that holds them, and says where they begin.
    pub fn take(&mut self, length: u32) -> Option<u32> {
        let (run, start) = self.by_length.range((length, 0)..).next().copied()?;
        self.remove(start, run);
        self.insert(start + length, run - length);
        Some(start)
    }

    /// Takes just these, if all of them are free.
    pub fn take_at(&mut self, start: u32, length: u32) -> bool {
        let Some((run_start, run)) = self.by_start.range(..=start).next_back().map(|(s, l)| (*s, *l)) else {
            return false;
        };
        let (end, run_end) = (u64::from(start) + u64::from(length), u64::from(run_start) + u64::from(run));
        if end > run_end {
            return false;
        }
        self.remove(run_start, run);
        self.insert(run_start, start - run_start);
        self.insert(start + length, (run_end - end) as u32);
        true
    }

    /// Takes back what was given out.
    pub fn give(&mut self, start: u32, length: u32) {
        let (mut start, mut length) = (start, length);
        if let Some((before, run)) = self.by_start.range(..start).next_back().map(|(s, l)| (*s, *l))
            && before + run == start
        {
            self.remove(before, run);
            (start, length) = (before, run + length);
        }
        if let Some(run) = self.by_start.get(&(start + length)).copied() {
            self.remove(start + length, run);
            length += run;
        }
        self.insert(start, length);
    }

    fn insert(&mut self, start: u32, length: u32) {
        if length == 0 {
            return;
        }
        self.by_start.insert(start, length);
        self.by_length.insert((length, start));
        self.free += length;
    }

    fn remove(&mut self, start: u32, length: u32) {
        self.by_start.remove(&start);
        self.by_length.remove(&(length, start));
        self.free -= length;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_smallest_hole_that_fits_is_used() {
        let mut spans = Spans::new(100);
        assert_eq!(spans.take(10), Some(0));
        assert_eq!(spans.take(4), Some(10));
        assert_eq!(spans.take(10), Some(14));
        spans.give(10, 4);
        assert_eq!(spans.take(3), Some(10), "the hole, not the end");
        assert_eq!(spans.take(2), Some(24), "the hole is too small now");
        assert_eq!(spans.take(100), None);
        assert_eq!((spans.free(), spans.longest()), (75, 74));
    }

    #[test]
    fn neighbours_become_one() {
        let mut spans = Spans::new(30);
        for _ in 0..3 {
            spans.take(10);
        }
        spans.give(0, 10);
        spans.give(20, 10);
        assert_eq!(spans.take(30), None);
        spans.give(10, 10);
        assert_eq!(spans, Spans::new(30));
        assert!(spans.take_at(5, 10));
        assert!(!spans.take_at(14, 2), "the first of them is taken");
        assert!(!spans.take_at(29, 2), "beyond the end");
        assert!(spans.take_at(15, 15));
        assert_eq!(spans.longest(), 5);
    }

    proptest! {
        #[test]
        fn nothing_is_given_out_twice_or_lost(lengths in prop::collection::vec((1_u32..9, any::<bool>()), 1..60)) {
            let mut spans = Spans::new(64);
            let mut taken: Vec<(u32, u32)> = Vec::new();
            for (length, take) in lengths {
                if take {
                    if let Some(start) = spans.take(length) {
                        prop_assert!(start + length <= 64);
                        prop_assert!(taken.iter().all(|(s, l)| start + length <= *s || s + l <= start));
                        taken.push((start, length));
                    }
                } else if let Some((start, length)) = taken.pop() {
                    spans.give(start, length);
                }
                prop_assert_eq!(spans.free() + taken.iter().map(|(_, l)| l).sum::<u32>(), 64);
            }
            for (start, length) in taken {
                spans.give(start, length);
            }
            prop_assert_eq!(spans, Spans::new(64));
        }
    }
}
