//! What programs see: the maps read as a program reads them, after every single write.

use std::collections::{BTreeMap, BTreeSet};

use kproxy_common::{
    Address, AddressKind, Backend, BackendSlots, Block, FrontendKey, Mode, Options, ServiceEntry,
    ServiceIdentity, ServiceInfo, Side, SourceRangeKey,
};

use super::world::{self, World};
use crate::{
    maps::{MapWriter, WriteError, memory::Memory},
    plan::Word,
    wanted::WantedBackend,
};

/// All that a program can find out about a frontend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrontendView {
    pub owner: String,
    pub inside: SideView,
    pub outside: SideView,
    pub affinity_timeout: u32,
    pub in_sets: u16,
    pub serving: Vec<WantedBackend>,
    /// The lengths of its source ranges.
    pub ranges: BTreeSet<u32>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SideView {
    pub mode: Mode,
    pub options: u8,
    pub backends: Vec<WantedBackend>,
}

/// What may stand under each frontend: what was wanted when all was last done, and whatever since.
pub struct Expected {
    views: BTreeMap<FrontendKey, Vec<FrontendView>>,
    /// Frontends that were there when the maps were last as wanted, and are wanted ever since.
    steady: BTreeSet<FrontendKey>,
    everything_fits: bool,
}

impl Expected {
    /// Nothing is wanted.
    pub fn new(everything_fits: bool) -> Self {
        Self { views: BTreeMap::new(), steady: BTreeSet::new(), everything_fits }
    }

    /// This is wanted, too.
    pub fn also(&mut self, world: &World) {
        let wanted = world.wanted();
        for service in wanted.values() {
            for port in &service.ports {
                for frontend in &port.frontends {
                    let views = self.views.entry(frontend.key).or_default();
                    let view = world::view(service, port, frontend);
                    if !views.contains(&view) {
                        views.push(view);
                    }
                }
            }
        }
        let keys: BTreeSet<FrontendKey> = world::frontends(&wanted).collect();
        self.steady.retain(|key| keys.contains(key));
    }

    /// This is wanted, and all is done.
    pub fn only(&mut self, world: &World) {
        self.views.clear();
        self.steady = world::frontends(&world.wanted()).filter(|_| self.everything_fits).collect();
        self.also(world);
    }
}

/// What stands under a frontend now, if it is there.
pub fn view_of(memory: &Memory, key: &FrontendKey) -> Option<FrontendView> {
    let number = *memory.frontends().get(key)?;
    let words = memory.words(number);
    let side = |word: Word| side_view(memory, words[word as usize]);
    let block = Block::from_word(words[Word::Block as usize]);
    let ranges = memory.source_ranges().iter().filter(|range| range.number == number);
    let (inside, outside) = (side(Word::Inside), side(Word::Outside));
    let asks = (inside.options | outside.options) & Options::SOURCE_RANGES != 0;
    Some(FrontendView {
        owner: memory.info(number).expect("every number says whose it is").name().to_owned(),
        inside,
        outside,
        affinity_timeout: ServiceIdentity::from_word(words[Word::Identity as usize]).affinity_timeout(),
        in_sets: block.in_sets(),
        serving: backends(memory, block.first_slot(), block.serving()),
        ranges: if asks { ranges.map(|range| range.prefix_length - 32).collect() } else { BTreeSet::new() },
    })
}

fn side_view(memory: &Memory, word: u64) -> SideView {
    let side = Side::from_word(word).expect("a side is never torn");
    SideView {
        mode: side.mode(),
        options: side.options(),
        backends: backends(memory, side.first_slot(), side.count()),
    }
}

/// The backends in a run of slots, which must all be there and of one Service port.
fn backends(memory: &Memory, first: u32, count: u16) -> Vec<WantedBackend> {
    let slots =
        (first..first + u32::from(count)).map(|slot| memory.backend(slot).expect("a backend is missing"));
    let slots: Vec<Backend> = slots.collect();
    assert!(slots.windows(2).all(|pair| pair[0].service() == pair[1].service()), "mixed: {slots:?}");
    slots
        .into_iter()
        .map(|slot| WantedBackend {
            address: slot.address(),
            port: slot.port(),
            location: slot.location(),
            state: slot.state(),
        })
        .collect()
}

/// The slots that the words of a number point at.
fn slots_of(memory: &Memory, number: u32) -> Vec<(Word, u32)> {
    let words = memory.words(number);
    let slots = |word: Word| {
        let (first, length) = word.run(words[word as usize]).unwrap_or((0, 0));
        (first..first + length).map(move |slot| (word, slot))
    };
    Word::STORE_ORDER.into_iter().flat_map(slots).collect()
}

/// The twin, read as a program would after every write.
pub struct Checked<'a> {
    memory: &'a mut Memory,
    expected: &'a Expected,
    /// Steady frontends that are there.
    present: BTreeSet<FrontendKey>,
    /// Service ports whose frontends, or words of one, led to several blocks when another one was written, since a write
    /// had failed or one of them waits to be taken over: a third one has no room in `backend_slot`, so that some clients may move.
    divided: BTreeSet<u32>,
}

impl<'a> Checked<'a> {
    pub fn new(memory: &'a mut Memory, expected: &'a Expected) -> Self {
        let present =
            expected.steady.iter().filter(|key| memory.frontends().contains_key(key)).copied().collect();
        let mut checked = Self { memory, expected, present, divided: BTreeSet::new() };
        checked.note_divided();
        checked
    }

    fn note_divided(&mut self) {
        let mut blocks: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for number in self.memory.frontends().values() {
            for (_, slot) in slots_of(self.memory, *number) {
                let service = self.memory.backend(slot).expect("a backend is missing").service();
                let block = Block::from_word(self.memory.words(*number)[Word::Block as usize]);
                // Of a frontend whose words were not all stored, some lead elsewhere than its block.
                let run = block.first_slot()..block.first_slot() + u32::from(block.serving());
                let first = if run.contains(&slot) { block.first_slot() } else { slot };
                blocks.entry(service).or_default().insert(first);
            }
        }
        self.divided.extend(blocks.into_iter().filter(|(_, blocks)| blocks.len() > 1).map(|(id, _)| id));
    }

    /// Whoever reads the words now, or has read them just before, finds every backend by its id in the slots that they
    /// point at: no client moves, and no socket, whose backend stays.
    fn check_all_found(&self) {
        self.memory.frontends().values().for_each(|number| self.check_found(*number));
    }

    fn check_found(&self, number: u32) {
        for (word, slot) in slots_of(self.memory, number) {
            let backend = self.memory.backend(slot).expect("a backend is missing");
            let is_found = self.memory.slots_of(backend.id()).is_some_and(|slots| slots.contains(slot));
            assert!(
                is_found || self.divided.contains(&backend.service()),
                "{word:?} of {number} points at slot {slot}, and the id of {backend:?} does not lead there"
            );
        }
    }

    fn check_number(&self, number: u32) {
        let key = self.memory.frontends().iter().find(|(_, other)| **other == number).map(|(key, _)| *key);
        if let Some(key) = key {
            self.check_found(number);
            self.check_frontend(&key);
        }
    }

    /// Each word is that of something that was or is wanted, and asks for no source ranges that are not there.
    fn check_frontend(&self, key: &FrontendKey) {
        let Some(is) = view_of(self.memory, key) else { return };
        let views = self.expected.views.get(key).map_or(&[][..], Vec::as_slice);
        let allows = |side: &SideView, of: fn(&FrontendView) -> &SideView| {
            views.iter().any(|view| {
                of(view) == side
                    && (side.options & Options::SOURCE_RANGES == 0 || view.ranges.is_subset(&is.ranges))
            })
        };
        assert!(allows(&is.inside, |view| &view.inside), "{key:?} has {is:#?} of {views:#?}");
        assert!(allows(&is.outside, |view| &view.outside), "{key:?} has {is:#?} of {views:#?}");
        let block = views.iter().any(|view| (view.in_sets, &view.serving) == (is.in_sets, &is.serving));
        assert!(block, "{key:?} has {is:#?} of {views:#?}");
    }

    fn check_present(&self) {
        for key in &self.present {
            assert!(self.memory.frontends().contains_key(key), "{key:?} is missing for a moment");
        }
    }
}

impl MapWriter for Checked<'_> {
    fn write_backends(&mut self, first_slot: u32, backends: &[Backend]) -> Result<(), WriteError> {
        self.note_divided();
        // The twin sees to it that no word points at these.
        self.memory.write_backends(first_slot, backends)
    }

    fn store_backend_slots(&mut self, backend: u32, slots: BackendSlots) -> Result<(), WriteError> {
        let result = self.memory.store_backend_slots(backend, slots);
        self.check_all_found();
        result
    }

    fn write_info(&mut self, number: u32, info: &ServiceInfo) -> Result<(), WriteError> {
        self.memory.write_info(number, info)
    }

    fn write_entry(&mut self, number: u32, entry: &ServiceEntry) -> Result<(), WriteError> {
        let result = self.memory.write_entry(number, entry);
        self.check_number(number);
        result
    }

    fn store_word(&mut self, number: u32, word: Word, value: u64) -> Result<(), WriteError> {
        let result = self.memory.store_word(number, word, value);
        self.check_number(number);
        result
    }

    fn reset_counters(&mut self, numbers: &[u32]) -> Vec<Result<(), WriteError>> {
        self.memory.reset_counters(numbers)
    }

    fn insert_frontends(&mut self, frontends: &[(FrontendKey, u32)]) -> Vec<Result<(), WriteError>> {
        let results = self.memory.insert_frontends(frontends);
        frontends.iter().for_each(|(key, number)| {
            self.check_frontend(key);
            if self.memory.frontends().contains_key(key) {
                self.check_found(*number);
            }
        });
        results
    }

    fn delete_frontends(&mut self, keys: &[FrontendKey]) -> Vec<Result<(), WriteError>> {
        let results = self.memory.delete_frontends(keys);
        self.check_present();
        results
    }

    fn insert_addresses(&mut self, addresses: &[(Address, AddressKind)]) -> Vec<Result<(), WriteError>> {
        self.memory.insert_addresses(addresses)
    }

    fn delete_addresses(&mut self, addresses: &[Address]) -> Vec<Result<(), WriteError>> {
        self.memory.delete_addresses(addresses)
    }

    fn insert_source_ranges(&mut self, keys: &[SourceRangeKey]) -> Vec<Result<(), WriteError>> {
        self.memory.insert_source_ranges(keys)
    }

    fn delete_source_ranges(&mut self, keys: &[SourceRangeKey]) -> Vec<Result<(), WriteError>> {
        let results = self.memory.delete_source_ranges(keys);
        keys.iter().for_each(|key| self.check_number(key.number));
        results
    }

    fn grace(&mut self) -> Result<(), WriteError> {
        self.memory.grace()
    }

    fn calls(&self) -> u64 {
        self.memory.calls()
    }
}
