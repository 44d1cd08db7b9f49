//! Transfers: many bytes of a known pattern over one connection, checked where they arrive.

use std::io::{self, Read, Write};

/// Bytes repeat after this many: a prime, so that what is lost or doubled in blocks shows.
const PERIOD: u64 = 251;

/// Bytes written or read at once.
const CHUNK: usize = 64 * 1024;

/// What the server says once everything has arrived there as it should.
pub const RECEIVED: &str = "received\n";

/// A transfer as asked for in a line to an echo server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Bytes from the client to the server, right after the line.
    pub up: u64,
    /// Bytes from the server to the client, after that.
    pub down: u64,
}

impl Transfer {
    /// The line that asks for it.
    pub fn line(self) -> String {
        format!("transfer {} {}", self.up, self.down)
    }

    /// Reads the line; `None` where it asks for something else.
    pub fn asked(line: &str) -> Option<Self> {
        let (up, down) = line.strip_prefix("transfer ")?.split_once(' ')?;
        Some(Self { up: up.parse().ok()?, down: down.parse().ok()? })
    }
}

/// Writes so many bytes of the pattern.
pub fn send(to: &mut impl Write, count: u64) -> io::Result<()> {
    let pattern = pattern(CHUNK);
    let mut sent = 0;
    while sent < count {
        let from = (sent % PERIOD) as usize;
        let length = (count - sent).min((pattern.len() - from) as u64) as usize;
        to.write_all(&pattern[from..from + length])?;
        sent += length as u64;
    }
    to.flush()
}

/// Reads so many bytes, which must be the pattern.
pub fn receive(from: &mut impl Read, count: u64) -> io::Result<()> {
    let pattern = pattern(CHUNK + PERIOD as usize);
    let mut buffer = vec![0; CHUNK];
    let mut received = 0;
    while received < count {
        let length = (count - received).min(CHUNK as u64) as usize;
        let length = from.read(&mut buffer[..length])?;
        let at = (received % PERIOD) as usize;
        if length == 0 || buffer[..length] != pattern[at..at + length] {
            let text = format!("after {received} bytes of {count} the wrong ones or none came");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        received += length as u64;
    }
    Ok(())
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|at| (at % PERIOD) as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_accepted_and_nothing_else() {
        for count in [0, 1, PERIOD, 65_535, 65_537, 300_001] {
            let mut wire = Vec::new();
            send(&mut wire, count).unwrap();
            assert_eq!(wire.len() as u64, count);
            receive(&mut wire.as_slice(), count).unwrap();
            assert!(receive(&mut wire.as_slice(), count + 1).is_err(), "too few bytes");
        }
        let mut wire = Vec::new();
        send(&mut wire, 200_000).unwrap();
        wire.drain(70_000..71_448);
        assert!(receive(&mut wire.as_slice(), 190_000).is_err(), "a segment is missing");
    }

    #[test]
    fn lines_are_read_back() {
        let transfer = Transfer { up: 5, down: 50_000_000 };
        assert_eq!(Transfer::asked(&transfer.line()), Some(transfer));
        assert_eq!(Transfer::asked("transfer of power"), None);
        assert_eq!(Transfer::asked("hello"), None);
    }
}
