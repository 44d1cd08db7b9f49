//! The system calls behind the kernel's maps: bpf(2) on maps, their memory, and the grace period. All that is
//! unsafe about writing maps is in this file.

use std::{
    ffi::CString,
    io,
    marker::PhantomData,
    mem::{size_of, size_of_val},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use kproxy_common::{Address, Backend, Flow, FlowKey, FrontendKey, Owner, ServiceInfo, SourceRangeKey};

use crate::pretend::{Feature, lacks};

// Commands and constants of linux/bpf.h.
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_MAP_DELETE_BATCH: libc::c_long = 27;

/// Insert, and fail if the key is there.
pub const BPF_NOEXIST: u64 = 1;
/// Insert or replace.
pub const BPF_ANY: u64 = 0;

/// The sorts of maps, `enum bpf_map_type`.
pub mod kind {
    pub const HASH: u32 = 1;
    pub const ARRAY: u32 = 2;
    pub const PERCPU_ARRAY: u32 = 6;
    pub const LRU_HASH: u32 = 9;
    pub const LPM_TRIE: u32 = 11;
    pub const ARRAY_OF_MAPS: u32 = 12;
    pub const RINGBUF: u32 = 27;
}

/// Flags of a map.
pub mod flag {
    pub const NO_PREALLOC: u32 = 1;
    pub const MMAPABLE: u32 = 1 << 10;
}

/// What a kernel says that has no batches for a map: of an internal number that got out.
const ENOTSUPP: i32 = 524;

/// How a map is made, or was.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct MapAttributes {
    pub kind: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
    /// A map as the elements of a map of maps are, 0 for other sorts.
    pub inner_map_fd: u32,
}

#[repr(C)]
struct Element {
    fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    fd: u32,
    element_flags: u64,
    flags: u64,
}

#[repr(C)]
struct ObjectGet {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct GetInfo {
    fd: u32,
    length: u32,
    info: u64,
}

/// The head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    name: [u8; 16],
}

/// A map that is open, whose keys and values have sizes that were asked of the kernel.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    attributes: MapAttributes,
    /// Bytes that the kernel copies for a value: of a per-CPU map, those of all CPUs.
    value_bytes: usize,
}

impl Map {
    /// Opens a pin.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
        let mut attributes = ObjectGet { path: path.as_ptr() as u64, fd: 0, flags: 0 };
        // SAFETY: `path` outlives the call, which only reads it.
        let fd = unsafe { bpf(BPF_OBJ_GET, &mut attributes) }?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        Self::from_fd(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Makes a map.
    pub fn create(attributes: MapAttributes) -> io::Result<Self> {
        let mut copy = attributes;
        // SAFETY: the structure is the head of what the command takes, and holds no pointers.
        let fd = unsafe { bpf(BPF_MAP_CREATE, &mut copy) }?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        Self::from_fd(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// From an open descriptor; an error if it is no map's.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let mut info = MapInfo::default();
        let mut attributes = GetInfo {
            fd: fd.as_raw_fd() as u32,
            length: size_of::<MapInfo>() as u32,
            info: (&raw mut info).expose_provenance() as u64,
        };
        // SAFETY: `info` is as long as the call says, is valid with any bytes, and outlives the call.
        unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
        if (attributes.length as usize) < size_of::<MapInfo>() {
            return Err(io::Error::other("the descriptor is not that of a BPF map"));
        }
        let MapInfo { kind, key_size, value_size, max_entries, flags, id: _, name: _ } = info;
        let attributes = MapAttributes { kind, key_size, value_size, max_entries, flags, inner_map_fd: 0 };
        let value_bytes = match kind {
            kind::PERCPU_ARRAY => (value_size as usize).next_multiple_of(8) * possible_cpus()?,
            _ => value_size as usize,
        };
        Ok(Self { fd, attributes, value_bytes })
    }

    /// What sort of map it is, and how large.
    pub fn attributes(&self) -> MapAttributes {
        self.attributes
    }

    /// Bytes of a value as the kernel copies it.
    pub fn value_bytes(&self) -> usize {
        self.value_bytes
    }

    /// The value under `key`; `None` if there is none.
    pub fn lookup(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.check_sizes(key, 1, None)?;
        let mut value = vec![0; self.value_bytes];
        let mut attributes = self.element(key, value.as_mut_ptr().expose_provenance(), 0);
        // SAFETY: `key` has the map's key size, `value` room for its values; both outlive the call.
        match unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attributes) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes one element.
    pub fn update(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        self.check_sizes(key, 1, Some(value))?;
        let mut attributes = self.element(key, value.as_ptr().expose_provenance(), flags);
        // SAFETY: `key` and `value` have the map's sizes, outlive the call and are only read.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
    }

    /// Deletes one element.
    pub fn delete(&self, key: &[u8]) -> io::Result<()> {
        self.check_sizes(key, 1, None)?;
        let mut attributes = self.element(key, 0, 0);
        // SAFETY: `key` has the map's key size, outlives the call and is only read.
        unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attributes) }.map(drop)
    }

    /// The key that follows `key`, or the first one; `None` at the end.
    pub fn next_key(&self, key: Option<&[u8]>) -> io::Result<Option<Vec<u8>>> {
        if let Some(key) = key {
            self.check_sizes(key, 1, None)?;
        }
        let mut next = vec![0; self.attributes.key_size as usize];
        let mut attributes = self.element(key.unwrap_or(&[]), next.as_mut_ptr().expose_provenance(), 0);
        if key.is_none() {
            attributes.key = 0;
        }
        // SAFETY: `key` is null or has the map's key size, `next` has room for a key; both outlive the call.
        match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attributes) } {
            Ok(_) => Ok(Some(next)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes `count` elements, whose keys and values lie one after the other. Says how many were written
    /// before the first error.
    pub fn update_batch(&self, keys: &[u8], values: &[u8], count: u32) -> (u32, io::Result<()>) {
        if let Err(error) = self.check_sizes(keys, count, Some(values)) {
            return (0, Err(error));
        }
        self.batch(BPF_MAP_UPDATE_BATCH, keys, values.as_ptr().expose_provenance(), count)
    }

    /// Deletes `count` elements. Says how many were deleted before the first error.
    pub fn delete_batch(&self, keys: &[u8], count: u32) -> (u32, io::Result<()>) {
        if let Err(error) = self.check_sizes(keys, count, None) {
            return (0, Err(error));
        }
        self.batch(BPF_MAP_DELETE_BATCH, keys, 0, count)
    }

    /// Reads up to `count` elements that follow the position `from` (none: from the start). Gives keys, values
    /// and the next position; none at the end.
    pub fn lookup_batch(&self, from: Option<&Position>, count: u32) -> io::Result<Elements> {
        let (key_size, value_size) = (self.attributes.key_size as usize, self.value_bytes);
        let mut keys = vec![0_u8; key_size * count as usize];
        let mut values = vec![0_u8; value_size * count as usize];
        // A position is a number or a key, whichever is longer.
        let mut next = Position(vec![0; key_size.max(8)]);
        let mut attributes = Batch {
            in_batch: from.map_or(0, |from| from.0.as_ptr().expose_provenance() as u64),
            out_batch: next.0.as_mut_ptr().expose_provenance() as u64,
            keys: keys.as_mut_ptr().expose_provenance() as u64,
            values: values.as_mut_ptr().expose_provenance() as u64,
            count,
            fd: self.fd.as_raw_fd() as u32,
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: `keys` and `values` have room for `count` of the map's elements, positions for the longest
        // that any map has; all outlive the call.
        let result = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attributes) };
        let end = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        let read = attributes.count.min(count) as usize;
        keys.truncate(key_size * read);
        values.truncate(value_size * read);
        Ok(Elements { keys, values, next: (!end).then_some(next) })
    }

    /// Maps the values of a BPF_F_MMAPABLE array into memory.
    pub fn map_memory(&self) -> io::Result<Mapping> {
        // The kernel lays elements out in multiples of eight bytes.
        let stride = (self.attributes.value_size as usize).next_multiple_of(8);
        let length = stride * self.attributes.max_entries as usize;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, self.fd.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        Ok(Mapping { start, length, stride, _not_shared: PhantomData })
    }

    fn element(&self, key: &[u8], value: usize, flags: u64) -> Element {
        let key = key.as_ptr().expose_provenance() as u64;
        Element { fd: self.fd.as_raw_fd() as u32, _pad: 0, key, value: value as u64, flags }
    }

    fn batch(&self, command: libc::c_long, keys: &[u8], values: usize, count: u32) -> (u32, io::Result<()>) {
        let mut attributes = Batch {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr().expose_provenance() as u64,
            values: values as u64,
            count,
            fd: self.fd.as_raw_fd() as u32,
            element_flags: BPF_ANY,
            flags: 0,
        };
        // SAFETY: both callers have checked that `keys` holds `count` keys and, unless null, that `values` holds
        // as many values; they outlive the call, which only reads them.
        match unsafe { bpf(command, &mut attributes) } {
            Ok(_) => (count, Ok(())),
            // A call that is refused as a whole leaves the count as it was.
            Err(error) if attributes.count >= count => (0, Err(error)),
            Err(error) => (attributes.count, Err(error)),
        }
    }

    /// The kernel believes what we say about lengths.
    fn check_sizes(&self, keys: &[u8], count: u32, values: Option<&[u8]>) -> io::Result<()> {
        let fits = |bytes: &[u8], size: usize| bytes.len() == size * count as usize;
        if fits(keys, self.attributes.key_size as usize)
            && values.is_none_or(|values| fits(values, self.value_bytes))
        {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "keys or values have not the sizes that the map has"))
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where a batched read goes on.
#[derive(Clone, Debug)]
pub struct Position(Vec<u8>);

/// What a batched read gave.
#[derive(Debug)]
pub struct Elements {
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
    pub next: Option<Position>,
}

/// The values of an array map, in memory. Programs read them meanwhile.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
    stride: usize,
    // Two threads must not write the same map; one may hand it to another.
    _not_shared: PhantomData<std::cell::Cell<()>>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and only its owner unmaps it.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Stores the word `word` of an element at once; what was written before is seen by who reads it.
    pub fn store_u64(&self, element: u32, word: usize, value: u64) -> io::Result<()> {
        let at = self.at(element, word * 8, 8)?;
        // SAFETY: `at` is within the mapping, which is page-aligned, and so aligned to eight bytes; everyone
        // who accesses a word while programs run does so at once.
        unsafe { AtomicU64::from_ptr(at.as_ptr().cast()) }.store(value, Ordering::Release);
        Ok(())
    }

    /// Reads a word at once.
    pub fn load_u64(&self, element: u32, word: usize) -> io::Result<u64> {
        let at = self.at(element, word * 8, 8)?;
        // SAFETY: as for `store_u64`.
        Ok(unsafe { AtomicU64::from_ptr(at.as_ptr().cast()) }.load(Ordering::Acquire))
    }

    /// Stores 32 bits at `offset` within an element at once; `offset` is a multiple of four.
    pub fn store_u32(&self, element: u32, offset: usize, value: u32) -> io::Result<()> {
        let at = self.at(element, offset, 4)?;
        if !offset.is_multiple_of(4) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the offset is not aligned"));
        }
        // SAFETY: `at` is within the mapping and aligned to four bytes; everyone who accesses it while programs
        // run does so at once.
        unsafe { AtomicU32::from_ptr(at.as_ptr().cast()) }.store(value, Ordering::Release);
        Ok(())
    }

    /// Writes bytes of an element, or from there on into those that follow. Not at once: for what no program
    /// reads.
    pub fn write(&self, element: u32, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let at = self.at(element, offset, bytes.len())?;
        // SAFETY: `at` and what follows it lie within the mapping, and `bytes` outside of it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Reads bytes of an element. Not at once.
    pub fn read(&self, element: u32, offset: usize, bytes: &mut [u8]) -> io::Result<()> {
        let at = self.at(element, offset, bytes.len())?;
        // SAFETY: as for `write`.
        unsafe { std::ptr::copy_nonoverlapping(at.as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn at(&self, element: u32, offset: usize, length: usize) -> io::Result<NonNull<u8>> {
        let start = element as usize * self.stride + offset;
        if offset >= self.stride || length > self.length || start > self.length - length {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "outside of the map"));
        }
        // SAFETY: `start` is within the mapping, as was just checked.
        Ok(unsafe { self.start.add(start) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length, and nothing points into it once its owner is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// Values whose bytes in memory are those of the map.
///
/// # Safety
///
/// Every byte of a value must be initialised: the type is `repr(C)` without implicit padding.
pub unsafe trait Plain: Copy {}

// SAFETY: `repr(C)`, its padding is a field, and its size in the map is asserted where it is defined.
unsafe impl Plain for Backend {}
// SAFETY: as for `Backend`; 192 + 8 + 20 + 4 bytes, each field aligned where it lies.
unsafe impl Plain for ServiceInfo {}
// SAFETY: as for `Backend`; the last of its 20 bytes is a field that pads.
unsafe impl Plain for FrontendKey {}
// SAFETY: as for `Backend`; 4 + 4 + 16 bytes.
unsafe impl Plain for SourceRangeKey {}
// SAFETY: as for `Backend`; 4 + 4 + 8 + 64 + 16 bytes.
unsafe impl Plain for Owner {}
// SAFETY: as for `Backend`.
unsafe impl Plain for FlowKey {}
// SAFETY: as for `Backend`.
unsafe impl Plain for Flow {}
// SAFETY: sixteen octets.
unsafe impl Plain for Address {}

/// The bytes of values, one after the other.
pub fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: all bytes of the slice are initialised, as `Plain` demands, and any byte is a u8.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Whether an error says that the kernel has no batches, for this map or at all.
pub fn lacks_batches(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP))
}

/// Waits for an RCU grace period by membarrier(2), which does that where more than one CPU is online and none
/// is in nohz_full.
pub fn membarrier_global() -> io::Result<()> {
    // SAFETY: sysconf has no preconditions.
    if unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) } < 2 {
        // On one CPU the call returns at once, but a program may have been preempted there.
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the call takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How many CPUs there can be: per-CPU maps have a value for each.
fn possible_cpus() -> io::Result<usize> {
    let path = "/sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string(path)?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<usize>().ok());
    last.map(|last| last + 1).ok_or_else(|| io::Error::other(format!("{path} does not list CPUs: {text:?}")))
}

/// # Safety
///
/// `attributes` must be what `command` takes, and what it points at must be as long as the command assumes.
unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<i32> {
    let is_batch = matches!(command, BPF_MAP_LOOKUP_BATCH | BPF_MAP_UPDATE_BATCH | BPF_MAP_DELETE_BATCH);
    if is_batch && lacks(Feature::Batches) {
        // As a kernel says that does not know the command.
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the caller vouches for the contents; the length is the structure's own.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}
