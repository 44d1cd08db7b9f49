//! The slots of `backend`: which are free, which a word of `service` points at, and which a running program
//! may still read.

use std::collections::BTreeMap;

use kproxy_common::{Block, Side};

use super::spans::Spans;

/// One of the four words of a service entry; the number is its place there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Word {
    /// [`kproxy_common::ServiceEntry::inside`].
    Inside = 0,
    /// [`kproxy_common::ServiceEntry::outside`].
    Outside = 1,
    /// [`kproxy_common::ServiceEntry::identity`].
    Identity = 2,
    /// [`kproxy_common::ServiceEntry::block`].
    Block = 3,
}

impl Word {
    /// In the order in which the words of an entry in use are stored. The block comes first: flows look their
    /// backend up there, and one that is just being picked from the new set must be found. The identity, with
    /// the affinity timeout, comes before the sides, which switch affinity on.
    pub const STORE_ORDER: [Self; 4] = [Self::Block, Self::Identity, Self::Inside, Self::Outside];

    /// First slot and number of the slots that this word, holding `value`, points at.
    pub fn run(self, value: u64) -> Option<(u32, u32)> {
        let (first, length) = match self {
            Self::Inside | Self::Outside => {
                let side = Side::from_word(value).ok()?;
                (side.first_slot(), side.count())
            }
            Self::Block => {
                let block = Block::from_word(value);
                (block.first_slot(), block.serving())
            }
            Self::Identity => return None,
        };
        (length > 0).then_some((first, u32::from(length)))
    }
}

/// Every slot is free, in a block, or waits for a grace period.
#[derive(Clone, Debug)]
pub struct Slots {
    capacity: u32,
    free: Spans,
    blocks: BTreeMap<u32, BlockUse>,
    retired: Vec<(u32, u32)>,
    reserved: Vec<Reserved>,
    /// What became free since this was last taken.
    freed: Vec<(u32, u32)>,
}

/// Slots that a plan will point words at.
#[derive(Clone, Copy, Debug)]
enum Reserved {
    /// A new block, by its first slot.
    Fresh(u32),
    /// A block in use. Its words may all be stored anew before the plan points others at it.
    Held(u32),
}

/// Slots that were given out together.
#[derive(Clone, Copy, Debug)]
struct BlockUse {
    length: u32,
    /// How many words point into it.
    words: u32,
}

impl Slots {
    /// All free.
    pub fn new(capacity: u32) -> Self {
        Self {
            capacity,
            free: Spans::new(capacity),
            blocks: BTreeMap::new(),
            retired: Vec::new(),
            reserved: Vec::new(),
            freed: Vec::new(),
        }
    }

    /// With the slots that these words point at in use. Words that point at overlapping runs share a block.
    /// A word that points beyond the end counts for nothing.
    pub fn with_words(capacity: u32, words: impl Iterator<Item = (Word, u64)>) -> Self {
        let mut slots = Self::new(capacity);
        let mut runs: Vec<(u32, u32)> = words
            .filter_map(|(word, value)| word.run(value))
            .filter(|(first, length)| first.checked_add(*length).is_some_and(|end| end <= capacity))
            .collect();
        runs.sort_unstable();
        let mut current: Option<(u32, BlockUse)> = None;
        for (first, length) in runs {
            match &mut current {
                Some((start, block)) if first < *start + block.length => {
                    block.length = block.length.max(first + length - *start);
                    block.words += 1;
                }
                _ => {
                    slots.adopt(current);
                    current = Some((first, BlockUse { length, words: 1 }));
                }
            }
        }
        slots.adopt(current);
        slots
    }

    /// How many slots are free now.
    pub fn free(&self) -> u32 {
        self.free.free()
    }

    /// The longest run of free slots.
    pub fn longest_free(&self) -> u32 {
        self.free.longest()
    }

    /// Whether slots wait for a grace period.
    pub fn any_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Takes free slots for a block that no word points at yet.
    pub fn reserve(&mut self, length: u32) -> Option<u32> {
        let first = self.free.take(length)?;
        self.blocks.insert(first, BlockUse { length, words: 0 });
        self.reserved.push(Reserved::Fresh(first));
        Some(first)
    }

    /// Keeps the block of `slot` in use until the reservation is closed.
    pub fn hold(&mut self, slot: u32) {
        if let Some((first, block)) = self.block_at(slot) {
            block.words += 1;
            self.reserved.push(Reserved::Held(first));
        }
    }

    /// A word now holds `value`.
    pub fn refer(&mut self, word: Word, value: u64) {
        if let Some((_, block)) = self.block_of(word, value) {
            block.words += 1;
        }
    }

    /// A word that a running program may have read no longer holds `value`.
    pub fn leave(&mut self, word: Word, value: u64) {
        if let Some(run) = self.forget(word, value) {
            self.retired.push(run);
        }
    }

    /// A word that no program can have read since the last grace period no longer holds `value`.
    pub fn leave_unseen(&mut self, word: Word, value: u64) {
        if let Some((first, length)) = self.forget(word, value) {
            self.give(first, length);
        }
    }

    /// How many reservations are open; for [`Slots::release_reserved`].
    pub fn reserved(&self) -> usize {
        self.reserved.len()
    }

    /// Closes the reservations from the `kept`th on: what no word points at is free again.
    pub fn release_reserved(&mut self, kept: usize) {
        for reserved in self.reserved.split_off(kept) {
            match reserved {
                Reserved::Fresh(first) => {
                    if let Some(block) = self.blocks.get(&first).copied()
                        && block.words == 0
                    {
                        self.blocks.remove(&first);
                        self.give(first, block.length);
                    }
                }
                Reserved::Held(first) => {
                    let run = self.forget_at(first);
                    self.retired.extend(run);
                }
            }
        }
    }

    /// No program holds a word any more that it read before.
    pub fn grace_passed(&mut self) {
        for (first, length) in std::mem::take(&mut self.retired) {
            self.give(first, length);
        }
    }

    /// The runs (first slot and length) that became free since the last call.
    pub fn take_freed(&mut self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.freed)
    }

    /// The runs (first slot and length) that words point at.
    pub fn in_use(&self) -> impl Iterator<Item = (u32, u32)> {
        self.blocks.iter().map(|(first, block)| (*first, block.length))
    }

    fn give(&mut self, first: u32, length: u32) {
        self.free.give(first, length);
        self.freed.push((first, length));
    }

    fn adopt(&mut self, block: Option<(u32, BlockUse)>) {
        if let Some((first, block)) = block {
            self.free.take_at(first, block.length);
            self.blocks.insert(first, block);
        }
    }

    /// The block that a word points into; none if the word points at nothing, or beyond the end.
    fn block_of(&mut self, word: Word, value: u64) -> Option<(u32, &mut BlockUse)> {
        let (first, length) = word.run(value)?;
        if first.checked_add(length)? > self.capacity {
            return None;
        }
        self.block_at(first)
    }

    fn block_at(&mut self, slot: u32) -> Option<(u32, &mut BlockUse)> {
        let (start, block) = self.blocks.range_mut(..=slot).next_back()?;
        (slot < *start + block.length).then_some((*start, block))
    }

    /// The block, if this was the last word that pointed into it; it is neither in use nor free then.
    fn forget(&mut self, word: Word, value: u64) -> Option<(u32, u32)> {
        let (start, _) = self.block_of(word, value)?;
        self.forget_at(start)
    }

    fn forget_at(&mut self, start: u32) -> Option<(u32, u32)> {
        let block = self.blocks.get_mut(&start)?;
        block.words = block.words.saturating_sub(1);
        if block.words > 0 {
            return None;
        }
        let length = block.length;
        self.blocks.remove(&start);
        Some((start, length))
    }
}
