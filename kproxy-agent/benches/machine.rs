//! A machine that runs the packet programs one instruction after the other and counts them: processors count them too, but
//! those of virtual machines often tell nobody. Maps are copies of the kernel's; of helpers there are those that the main
//! paths call, and any other ends the run. What comes out must be what the kernel's run makes of the same packet: whoever
//! asks for a count compares.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    os::fd::{AsRawFd as _, OwnedFd},
};

use aya_obj::{Object, generated::bpf_insn, generated::bpf_map_type};
use kproxy_common::{PACKET_PARTS, map_names};

/// Instructions of a path at the most: far more than any has.
const PATIENCE: u64 = 1_000_000;
const STACK: usize = 512;
/// Known to the kernel alone.
const ENOTSUPP: i32 = 524;
/// Addresses in a context have 32 bits, so packets lie this low.
const PACKET: usize = 0x1000_0000;
const PACKET_ROOM: usize = 0x2_0000;

/// The programs, and the maps as they were copied last.
pub struct Machine {
    programs: HashMap<String, Vec<bpf_insn>>,
    maps: Vec<Memory>,
    packet: Packet,
}

/// What a run came to.
pub struct Ran {
    /// Of each program, in the order in which they went on in one another.
    pub instructions: Vec<(String, u64)>,
    /// What the last one returned.
    pub action: i32,
    /// The packet as it is then.
    pub bytes: Vec<u8>,
}

/// A map. Words, so that all values are aligned.
struct Memory {
    name: String,
    is_array: bool,
    /// It is copied from the kernel, not begun with zeroes.
    is_copied: bool,
    key_size: usize,
    value_size: usize,
    entries: BTreeMap<Vec<u8>, Box<[u64]>>,
}

/// Where packets lie.
struct Packet {
    start: *mut u8,
    length: usize,
}

impl Packet {
    fn new() -> Self {
        // SAFETY: a new mapping, in nobody's place; the address is checked.
        let start = unsafe {
            libc::mmap(
                PACKET as *mut libc::c_void,
                PACKET_ROOM,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        assert_eq!(start as usize, PACKET, "there is room for packets");
        Self { start: start.cast(), length: 0 }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is this long, and never given back.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}

impl Machine {
    /// Of this object.
    pub fn new(object: &[u8]) -> Self {
        let mut object = Object::parse(object).expect("the object can be read");
        let maps: Vec<_> = object.maps.iter().map(|(name, map)| (name.clone(), map.clone())).collect();
        let sections: HashSet<_> = object.functions.keys().map(|(section, _)| *section).collect();
        let numbered =
            maps.iter().enumerate().map(|(number, (name, map))| (name.as_str(), number as i32, map));
        object.relocate_maps(numbered, &sections).expect("all maps are there");
        object.relocate_calls(&sections).expect("all functions are there");
        let programs = object.programs.iter();
        let programs = programs
            .map(|(name, program)| {
                (name.clone(), object.functions[&program.function_key()].instructions.clone())
            })
            .collect();
        let maps = maps
            .iter()
            .map(|(name, map)| {
                let kind = map.map_type();
                let is = |wanted: bpf_map_type| kind == wanted as u32;
                let is_per_cpu = is(bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY);
                let is_array = is_per_cpu || is(bpf_map_type::BPF_MAP_TYPE_ARRAY);
                let is_hash = is(bpf_map_type::BPF_MAP_TYPE_HASH)
                    || is(bpf_map_type::BPF_MAP_TYPE_LRU_HASH)
                    || is(bpf_map_type::BPF_MAP_TYPE_LPM_TRIE);
                let (key_size, value_size) = (map.key_size() as usize, map.value_size() as usize);
                let mut memory = Memory {
                    name: name.clone(),
                    is_array,
                    is_copied: map.data().is_empty() && !is_per_cpu && (is_array || is_hash),
                    key_size,
                    value_size,
                    entries: BTreeMap::new(),
                };
                // What the object brings along, its constants.
                if !map.data().is_empty() {
                    memory.put(&[0; 4], map.data());
                }
                memory
            })
            .collect();
        Self { programs, maps, packet: Packet::new() }
    }

    /// Copies the kernel's maps.
    pub fn copy(&mut self, mut descriptor: impl FnMut(&str) -> OwnedFd) {
        for map in &mut self.maps {
            if !map.is_copied {
                continue;
            }
            map.entries.clear();
            let fd = descriptor(&map.name);
            let mut key: Option<Vec<u8>> = None;
            loop {
                let mut next = vec![0; map.key_size];
                if !element(GET_NEXT_KEY, &fd, key.as_deref(), next.as_mut_ptr()) {
                    break;
                }
                let mut value = vec![0; map.value_size];
                if element(LOOKUP, &fd, Some(&next), value.as_mut_ptr()) {
                    map.put(&next, &value);
                }
                key = Some(next);
            }
        }
    }

    /// Runs a program, and those that it goes on in, on a packet with an Ethernet header that came by this interface.
    pub fn run(&mut self, program: &str, bytes: &[u8], interface: u32) -> Ran {
        assert!(bytes.len() <= PACKET_ROOM);
        self.packet.length = bytes.len();
        self.packet.bytes().copy_from_slice(bytes);
        let mut context = [0_u32; 48];
        let word = |at: usize| at / 4;
        context[0] = bytes.len() as u32;
        context[word(16)] = u16::from_ne_bytes([bytes[12], bytes[13]]).into();
        context[word(40)] = interface;
        context[word(76)] = PACKET as u32;
        context[word(80)] = (PACKET + bytes.len()) as u32;
        let mut ran = Ran { instructions: Vec::new(), action: 0, bytes: Vec::new() };
        let mut program = program.to_owned();
        loop {
            let code = self.programs[&program].clone();
            let mut count = 0;
            let end = self.go(&code, context.as_mut_ptr() as u64, &mut count);
            ran.instructions.push((program, count));
            match end {
                End::Returned(action) => {
                    ran.action = action;
                    ran.bytes = self.packet.bytes().to_vec();
                    return ran;
                }
                End::GoesOn(part) => program = PACKET_PARTS[part as usize].to_owned(),
            }
        }
    }

    fn go(&mut self, code: &[bpf_insn], context: u64, count: &mut u64) -> End {
        let mut registers = [0_u64; 11];
        registers[1] = context;
        let mut stacks = vec![vec![0_u64; STACK / 8].into_boxed_slice()];
        registers[10] = stacks[0].as_mut_ptr() as u64 + STACK as u64;
        let mut callers = Vec::new();
        let mut at = 0_usize;
        loop {
            let instruction = code[at];
            let (class, operation) = (instruction.code & 7, instruction.code & 0xf0);
            let (to, from) = (usize::from(instruction.dst_reg()), usize::from(instruction.src_reg()));
            let offset = i64::from(instruction.off);
            let constant = i64::from(instruction.imm) as u64;
            *count += 1;
            assert!(*count < PATIENCE, "it does not end");
            at += 1;
            let jump = |at: usize| (at as i64 + offset) as usize;
            match class {
                // LD: a constant of 64 bits, in two instructions' places.
                0 => {
                    assert_eq!(instruction.code, 0x18);
                    let upper = code[at].imm as u32;
                    at += 1;
                    registers[to] = match from {
                        0 => u64::from(upper) << 32 | u64::from(instruction.imm as u32),
                        // A map, by its number.
                        1 => constant,
                        // A place in a map's only value.
                        2 => {
                            let value = self.maps[instruction.imm as usize].find(&[0; 4]);
                            value.expect("it has a value") + u64::from(upper)
                        }
                        other => panic!("a constant of kind {other}"),
                    };
                }
                1 => {
                    assert_eq!(instruction.code & 0xe0, 0x60, "a load as any");
                    let place = registers[from].wrapping_add(offset as u64);
                    registers[to] = load(place, instruction.code & 0x18);
                }
                2 => store(registers[to].wrapping_add(offset as u64), instruction.code & 0x18, constant),
                3 => {
                    let place = registers[to].wrapping_add(offset as u64);
                    let size = instruction.code & 0x18;
                    match instruction.code & 0xe0 {
                        0x60 => store(place, size, registers[from]),
                        0xc0 => {
                            assert_eq!(instruction.imm, 0, "the addition that returns nothing");
                            store(place, size, load(place, size).wrapping_add(registers[from]));
                        }
                        mode => panic!("a store of kind {mode:#x}"),
                    }
                }
                4 | 7 => {
                    let source = if instruction.code & 8 == 0 { constant } else { registers[from] };
                    assert_eq!(instruction.off, 0, "arithmetic of the first version");
                    registers[to] = arithmetic(&instruction, class == 7, registers[to], source);
                }
                5 | 6 if class == 5 && operation == 0 => at = jump(at),
                5 if operation == 0x80 && from == 1 => {
                    callers
                        .push((at, [registers[6], registers[7], registers[8], registers[9], registers[10]]));
                    let mut stack = vec![0_u64; STACK / 8].into_boxed_slice();
                    registers[10] = stack.as_mut_ptr() as u64 + STACK as u64;
                    stacks.push(stack);
                    at = (at as i64 + i64::from(instruction.imm)) as usize;
                }
                5 if operation == 0x80 => {
                    let [_, a, b, c, d, e, ..] = registers;
                    match self.helper(instruction.imm, [a, b, c, d, e]) {
                        Ok(result) => registers[0] = result,
                        Err(part) => return End::GoesOn(part),
                    }
                }
                5 if operation == 0x90 => {
                    let Some((back, saved)) = callers.pop() else {
                        return End::Returned(registers[0] as i32);
                    };
                    stacks.pop();
                    registers[6..].copy_from_slice(&saved);
                    at = back;
                }
                5 | 6 => {
                    let source = if instruction.code & 8 == 0 { constant } else { registers[from] };
                    if compares(operation, class == 5, registers[to], source) {
                        at = jump(at);
                    }
                }
                _ => unreachable!("a class has three bits"),
            }
        }
    }

    /// What a helper returns; an error is a part that the program goes on in.
    fn helper(&mut self, number: i32, [a, b, c, d, e]: [u64; 5]) -> Result<u64, u32> {
        Ok(match number {
            1 => {
                let map = &mut self.maps[a as usize];
                map.find(&octets(b, map.key_size)).unwrap_or(0)
            }
            2 => {
                let map = &mut self.maps[a as usize];
                let (key, value) = (octets(b, map.key_size), octets(c, map.value_size));
                let is_there = map.entries.contains_key(&key);
                match d {
                    1 if is_there => -i64::from(libc::EEXIST) as u64,
                    2 if !is_there => -i64::from(libc::ENOENT) as u64,
                    _ => {
                        map.put(&key, &value);
                        0
                    }
                }
            }
            3 => {
                let map = &mut self.maps[a as usize];
                let key = octets(b, map.key_size);
                if map.entries.remove(&key).is_some() { 0 } else { -i64::from(libc::ENOENT) as u64 }
            }
            5 => kproxy::flows::now().expect("there is a clock"),
            9 => {
                self.packet.bytes()[b as usize..(b + d) as usize].copy_from_slice(&octets(c, d as usize));
                0
            }
            10 => self.replace(b, c, d, e),
            // A datagram without a checksum stays without.
            11 if e & 0x20 != 0 && self.word(b) == 0 => 0,
            11 => self.replace(b, c, d, e),
            12 => {
                assert_eq!(self.maps[b as usize].name, map_names::PROGRAMS);
                return Err(c as u32);
            }
            28 => {
                let sum = |place, size: u64| -> u32 {
                    let words = octets(place, size as usize);
                    let words =
                        words.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
                    words.fold(0, add)
                };
                u64::from(add(add(sum(c, d), !sum(a, b)), e as u32))
            }
            39 => 0,
            // There is no sum of a device's.
            40 => -i64::from(ENOTSUPP) as u64,
            // No socket has this address.
            84 | 85 | 99 => 0,
            other => panic!("helper {other} is on no main path"),
        })
    }

    /// `bpf_l3_csum_replace` and `bpf_l4_csum_replace` on a packet whose checksums are all there.
    fn replace(&mut self, at: u64, from: u64, to: u64, flags: u64) -> u64 {
        let old = !u32::from(self.word(at)) & 0xffff;
        let sum = match flags & 0xf {
            0 => add(old, to as u32),
            2 => add(add(old, !(from as u32) & 0xffff), to as u32 & 0xffff),
            4 => add(add(old, !(from as u32)), to as u32),
            size => panic!("a checksum over {size}"),
        };
        let sum = (sum & 0xffff) + (sum >> 16);
        let mut new = !((sum & 0xffff) + (sum >> 16)) as u16;
        if flags & 0x20 != 0 && new == 0 {
            new = u16::MAX;
        }
        self.packet.bytes()[at as usize..at as usize + 2].copy_from_slice(&new.to_ne_bytes());
        0
    }

    fn word(&mut self, at: u64) -> u16 {
        let bytes = self.packet.bytes();
        u16::from_ne_bytes([bytes[at as usize], bytes[at as usize + 1]])
    }
}

enum End {
    Returned(i32),
    GoesOn(u32),
}

impl Memory {
    fn put(&mut self, key: &[u8], value: &[u8]) {
        let mut words = vec![0_u64; value.len().div_ceil(8)].into_boxed_slice();
        for (word, octets) in words.iter_mut().zip(value.chunks(8)) {
            let mut whole = [0; 8];
            whole[..octets.len()].copy_from_slice(octets);
            *word = u64::from_ne_bytes(whole);
        }
        self.entries.insert(key.to_vec(), words);
    }

    /// The address of a value.
    fn find(&mut self, key: &[u8]) -> Option<u64> {
        assert!(
            self.name != map_names::SOURCE_RANGE || self.entries.is_empty(),
            "prefixes are not searched here"
        );
        if self.is_array && !self.entries.contains_key(key) {
            self.put(key, &vec![0; self.value_size]);
        }
        self.entries.get_mut(key).map(|value| value.as_mut_ptr() as u64)
    }
}

fn add(a: u32, b: u32) -> u32 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u32::from(carry)
}

fn arithmetic(instruction: &bpf_insn, is_wide: bool, a: u64, b: u64) -> u64 {
    let operation = instruction.code & 0xf0;
    if operation == 0xd0 {
        // To big-endian, or, where the class is the wide one, round in any case.
        let is_swapped = is_wide || (instruction.code & 8 != 0) == cfg!(target_endian = "little");
        return match (instruction.imm, is_swapped) {
            (16, true) => u64::from((a as u16).swap_bytes()),
            (16, false) => u64::from(a as u16),
            (32, true) => u64::from((a as u32).swap_bytes()),
            (32, false) => u64::from(a as u32),
            (64, true) => a.swap_bytes(),
            (64, false) => a,
            (bits, _) => panic!("{bits} bits"),
        };
    }
    // What has 32 bits is done in 64, on operands and to a result whose upper half is 0.
    let cut = |value: u64| if is_wide { value } else { u64::from(value as u32) };
    let (a, b) = (cut(a), cut(b));
    let shift = b & if is_wide { 63 } else { 31 };
    cut(match operation {
        0x00 => a.wrapping_add(b),
        0x10 => a.wrapping_sub(b),
        0x20 => a.wrapping_mul(b),
        0x30 => a.checked_div(b).unwrap_or(0),
        0x40 => a | b,
        0x50 => a & b,
        0x60 => a << shift,
        0x70 => a >> shift,
        0x80 => a.wrapping_neg(),
        0x90 => a.checked_rem(b).unwrap_or(a),
        0xa0 => a ^ b,
        0xb0 => b,
        _ => (signed(a, is_wide) >> shift) as u64,
    })
}

/// As a number with a sign, of 64 or of 32 bits.
fn signed(value: u64, is_wide: bool) -> i64 {
    if is_wide { value as i64 } else { i64::from(value as i32) }
}

fn compares(operation: u8, is_wide: bool, a: u64, b: u64) -> bool {
    let (a, b) = if is_wide { (a, b) } else { (u64::from(a as u32), u64::from(b as u32)) };
    let signed = |value| signed(value, is_wide);
    match operation {
        0x10 => a == b,
        0x20 => a > b,
        0x30 => a >= b,
        0x40 => a & b != 0,
        0x50 => a != b,
        0x60 => signed(a) > signed(b),
        0x70 => signed(a) >= signed(b),
        0xa0 => a < b,
        0xb0 => a <= b,
        0xc0 => signed(a) < signed(b),
        0xd0 => signed(a) <= signed(b),
        other => panic!("a jump of kind {other:#x}"),
    }
}

/// How many octets the size in an instruction's code says.
fn size(code: u8) -> usize {
    match code {
        0x00 => 4,
        0x08 => 2,
        0x10 => 1,
        _ => 8,
    }
}

fn load(place: u64, code: u8) -> u64 {
    let mut value = [0; 8];
    let octets = octets(place, size(code));
    value[..octets.len()].copy_from_slice(&octets);
    u64::from_le_bytes(value)
}

fn store(place: u64, code: u8, value: u64) {
    // SAFETY: the kernel's verifier has shown that the program stays in its memory, all of which is here.
    let memory = unsafe { std::slice::from_raw_parts_mut(place as *mut u8, size(code)) };
    memory.copy_from_slice(&value.to_le_bytes()[..size(code)]);
}

fn octets(place: u64, length: usize) -> Vec<u8> {
    if length == 0 {
        return Vec::new();
    }
    // SAFETY: as in `store`.
    unsafe { std::slice::from_raw_parts(place as *const u8, length) }.to_vec()
}

const LOOKUP: libc::c_long = 1;
const GET_NEXT_KEY: libc::c_long = 4;

/// Reads an element of a map, or the key behind one; whether there is one.
fn element(command: libc::c_long, map: &OwnedFd, key: Option<&[u8]>, out: *mut u8) -> bool {
    #[repr(C)]
    struct Attributes {
        map: u32,
        _pad: u32,
        key: u64,
        out: u64,
        flags: u64,
    }
    let attributes = Attributes {
        map: map.as_raw_fd() as u32,
        _pad: 0,
        key: key.map_or(0, |key| key.as_ptr() as u64),
        out: out as u64,
        flags: 0,
    };
    // SAFETY: the attributes are as the kernel reads them for these commands; key and value are as long as the map says.
    unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attributes, size_of::<Attributes>()) == 0 }
}
