//! Reading a BPF ring buffer by several readers at once.
//!
//! The kernel knows one consumer: it writes no further than a whole buffer ahead of the consumer's position. Here every
//! reader has a place of its own and moves that position no further than it has read itself, never back. So the fastest
//! decides what may be overwritten; one that falls a whole buffer behind finds that out and skips to the present.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use super::sys::{Map, kind};

/// In a record's length, of linux/bpf.h: it is being written.
const BUSY: u32 = 1 << 31;
/// It is to be skipped.
const DISCARDED: u32 = 1 << 30;
/// A record's header: its length, and where its page is.
const HEADER: u64 = 8;

/// What a reader found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Read<const N: usize> {
    /// The next record.
    Record([u8; N]),
    /// Nothing was written since.
    Nothing,
    /// This reader was overtaken: what lay between is lost to it.
    Overtaken,
}

/// A reader, from its making on, of a ring buffer whose records are at most `N` octets long.
#[derive(Debug)]
pub struct Reader<const N: usize> {
    consumer: Mapped,
    /// The producer's page, then the data, twice, so that no record is in two pieces.
    producer: Mapped,
    page: usize,
    size: u64,
    position: u64,
}

/// Memory of the kernel, mapped here.
#[derive(Debug)]
struct Mapped {
    start: NonNull<u8>,
    length: usize,
}

impl<const N: usize> Reader<N> {
    /// Of this map.
    pub(in crate::maps) fn new(map: &Map) -> io::Result<Self> {
        let attributes = map.attributes();
        if attributes.kind != kind::RINGBUF {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the map is no ring buffer"));
        }
        // SAFETY: sysconf has no preconditions.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).map_err(io::Error::other)?;
        let size = attributes.max_entries as usize;
        if N + HEADER as usize > size {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the ring buffer is smaller than a record",
            ));
        }
        let fd = map.as_fd().as_raw_fd();
        let consumer = Mapped::new(fd, 0, page, libc::PROT_READ | libc::PROT_WRITE)?;
        let producer = Mapped::new(fd, page, page + 2 * size, libc::PROT_READ)?;
        let mut reader = Self { consumer, producer, page, size: size as u64, position: 0 };
        reader.skip_to_present();
        Ok(reader)
    }

    /// The next record. One that is shorter than `N` is filled up with zeroes, a longer one is cut off.
    pub fn read(&mut self) -> Read<N> {
        loop {
            let end = self.producer_position().load(Ordering::Acquire);
            if end == self.position {
                return Read::Nothing;
            }
            if end.wrapping_sub(self.position) > self.size {
                self.skip_to_present();
                return Read::Overtaken;
            }
            let (header, mut record) = (self.header().load(Ordering::Acquire), [0; N]);
            if header & BUSY != 0 {
                return Read::Nothing;
            }
            let length = header & !DISCARDED;
            let copied = (length as usize).min(N);
            let at = self.page + (self.position % self.size) as usize + HEADER as usize;
            // SAFETY: the record begins within the first of the two images of the data, and what is copied of it is no
            // longer than the data, as `new` has checked: it ends within the second image at the latest. A program may
            // write there if this reader was overtaken, which is asked below, before the copy is used.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    self.producer.start.as_ptr().add(at),
                    record.as_mut_ptr(),
                    copied,
                );
            }
            fence(Ordering::Acquire);
            let end = self.producer_position().load(Ordering::Acquire);
            if end.wrapping_sub(self.position) > self.size {
                self.skip_to_present();
                return Read::Overtaken;
            }
            self.position = self.position.wrapping_add((HEADER + u64::from(length)).next_multiple_of(8));
            self.release();
            if header & DISCARDED == 0 {
                return Read::Record(record);
            }
        }
    }

    /// From now on, what is written from now on.
    fn skip_to_present(&mut self) {
        self.position = self.producer_position().load(Ordering::Acquire);
        self.release();
    }

    /// Lets programs write over what this reader has read.
    fn release(&self) {
        // SAFETY: the page begins with the consumer's position, a word that everyone accesses at once.
        let consumer = unsafe { AtomicU64::from_ptr(self.consumer.start.as_ptr().cast()) };
        consumer.fetch_max(self.position, Ordering::AcqRel);
    }

    fn producer_position(&self) -> &AtomicU64 {
        // SAFETY: as in `release`, of the producer's page; it is mapped as long as this reader lives.
        unsafe { AtomicU64::from_ptr(self.producer.start.as_ptr().cast()) }
    }

    /// The length word of the record at this reader's position.
    fn header(&self) -> &AtomicU32 {
        let at = self.page + (self.position % self.size) as usize;
        // SAFETY: within the first image of the data; positions are multiples of eight.
        unsafe { AtomicU32::from_ptr(self.producer.start.as_ptr().add(at).cast()) }
    }
}

impl Mapped {
    fn new(fd: i32, offset: usize, length: usize, protection: i32) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping, wherever the kernel likes; errors are checked.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap gave address 0"))?;
        Ok(Self { start, length })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, and nothing points into it once its owner is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 4_096;

    /// A ring buffer in plain memory, written here as the kernel writes it.
    struct Ring {
        consumer: i32,
        producer: i32,
        page: usize,
        position: u64,
        view: Mapped,
    }

    fn memory(length: usize) -> i32 {
        // SAFETY: the name is a C string; the descriptor is checked.
        let fd = unsafe { libc::memfd_create(c"ring".as_ptr(), 0) };
        assert!(fd >= 0);
        // SAFETY: the call takes numbers only.
        assert_eq!(unsafe { libc::ftruncate(fd, length as libc::off_t) }, 0);
        fd
    }

    impl Ring {
        fn new() -> Self {
            // SAFETY: sysconf has no preconditions.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
            let (consumer, producer) = (memory(page), memory(page + 2 * SIZE));
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let view = Mapped::new(producer, 0, page + 2 * SIZE, both).unwrap();
            Self { consumer, producer, page, position: 0, view }
        }

        fn reader(&self) -> Reader<8> {
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let mut reader = Reader {
                consumer: Mapped::new(self.consumer, 0, self.page, both).unwrap(),
                producer: Mapped::new(self.producer, 0, self.page + 2 * SIZE, libc::PROT_READ).unwrap(),
                page: self.page,
                size: SIZE as u64,
                position: 0,
            };
            reader.skip_to_present();
            reader
        }

        /// Writes a record whose header has these bits beside the length.
        fn write(&mut self, value: u64, bits: u32) {
            let at = (self.position % SIZE as u64) as usize;
            let header = (u64::from(8 | bits)).to_ne_bytes();
            for (offset, byte) in header.into_iter().chain(value.to_ne_bytes()).enumerate() {
                for image in [0, SIZE] {
                    // Both images are one memory in the kernel's mapping.
                    let place = self.page + (at + offset) % SIZE + image;
                    // SAFETY: within the page and the two images behind it.
                    unsafe { self.view.start.as_ptr().add(place).write(byte) };
                }
            }
            self.position += 16;
            self.publish();
        }

        fn publish(&self) {
            // SAFETY: the page begins with the position.
            let position = unsafe { AtomicU64::from_ptr(self.view.start.as_ptr().cast()) };
            position.store(self.position, Ordering::Release);
        }
    }

    impl Drop for Ring {
        fn drop(&mut self) {
            for fd in [self.consumer, self.producer] {
                // SAFETY: both were opened here, and readers have mappings of their own.
                unsafe { libc::close(fd) };
            }
        }
    }

    fn all(reader: &mut Reader<8>) -> Vec<u64> {
        let mut read = Vec::new();
        while let Read::Record(bytes) = reader.read() {
            read.push(u64::from_ne_bytes(bytes));
        }
        read
    }

    #[test]
    fn every_reader_sees_every_record_from_its_making_on() {
        let mut ring = Ring::new();
        ring.write(1, 0);
        let mut first = ring.reader();
        ring.write(2, 0);
        let mut second = ring.reader();
        // Many times around.
        for value in 3..3_000 {
            ring.write(value, 0);
            if value % 100 == 0 {
                let expected = if value == 100 { 3 } else { value - 99 };
                assert_eq!(all(&mut second), (expected..=value).collect::<Vec<_>>());
                let expected = if value == 100 { 2 } else { value - 99 };
                assert_eq!(all(&mut first), (expected..=value).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_reader_that_is_overtaken_goes_on_with_the_present() {
        let mut ring = Ring::new();
        let mut reader = ring.reader();
        for value in 0..=(SIZE as u64 / 16) {
            ring.write(value, 0);
        }
        assert_eq!(reader.read(), Read::Overtaken);
        assert_eq!(reader.read(), Read::Nothing);
        ring.write(7, 0);
        assert_eq!(all(&mut reader), [7]);
    }

    #[test]
    fn records_that_are_being_written_are_waited_for_and_discarded_ones_skipped() {
        let mut ring = Ring::new();
        let mut reader = ring.reader();
        ring.write(1, DISCARDED);
        ring.write(2, 0);
        assert_eq!(all(&mut reader), [2]);
        ring.write(3, BUSY);
        ring.write(4, 0);
        assert_eq!(reader.read(), Read::Nothing);
        ring.position -= 32;
        ring.write(3, 0);
        ring.position += 16;
        ring.publish();
        assert_eq!(all(&mut reader), [3, 4]);
    }
}
