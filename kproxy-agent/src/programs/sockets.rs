//! Which sockets are connected to service addresses: asked of the kernel through an iterator over socket storage.

use std::{
    fs::File,
    io::{self, Read as _},
    mem::offset_of,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use aya::programs::Program;
use kproxy_common::{Address, ConnectedSocket, SocketIdentity, SocketRecord, map_names};

use super::{
    Programs,
    sys::{iterate, iterator_link, open_pin},
};

const PROGRAM: &str = "connected_sockets";
const ITEM: usize = size_of::<ConnectedSocket>();

/// Lists UDP sockets that were connected to service addresses, in every network namespace.
#[derive(Debug)]
pub struct SocketIterator {
    link: OwnedFd,
}

impl SocketIterator {
    /// Over the sockets that have records in the map pinned below `root`; `None` where the kernel has not accepted the
    /// program, which was said when it was loaded.
    pub fn new(programs: &mut Programs, root: &Path) -> Result<Option<Self>> {
        let Some(Program::Iter(program)) = programs.ebpf.program_mut(PROGRAM) else {
            bail!("the program {PROGRAM} is missing from this binary: it was built wrongly");
        };
        let Ok(program) = program.fd() else {
            return Ok(None);
        };
        let map = open_pin(&root.join(map_names::SOCKET)).context("cannot open the map socket")?;
        let link = iterator_link(program.as_fd(), map.as_fd()).context("cannot iterate over sockets")?;
        Ok(Some(Self { link }))
    }

    /// The sockets as they are now.
    pub fn list(&self) -> io::Result<Vec<ConnectedSocket>> {
        let mut bytes = Vec::new();
        File::from(iterate(self.link.as_fd())?).read_to_end(&mut bytes)?;
        Ok(bytes.chunks_exact(ITEM).filter_map(parse).collect())
    }
}

fn parse(bytes: &[u8]) -> Option<ConnectedSocket> {
    let identity = offset_of!(ConnectedSocket, identity);
    let record = offset_of!(ConnectedSocket, record);
    let u64_at = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let u16_at = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let address_at = |at: usize| Some(Address::new(bytes.get(at..at + 16)?.try_into().ok()?));
    Some(ConnectedSocket {
        identity: SocketIdentity {
            socket_cookie: u64_at(identity + offset_of!(SocketIdentity, socket_cookie))?,
            netns_cookie: u64_at(identity + offset_of!(SocketIdentity, netns_cookie))?,
        },
        record: SocketRecord {
            service_address: address_at(record + offset_of!(SocketRecord, service_address))?,
            backend_address: address_at(record + offset_of!(SocketRecord, backend_address))?,
            service_port: u16_at(record + offset_of!(SocketRecord, service_port))?,
            backend_port: u16_at(record + offset_of!(SocketRecord, backend_port))?,
            number: u32_at(record + offset_of!(SocketRecord, number))?,
            service: u32_at(record + offset_of!(SocketRecord, service))?,
            backend: u32_at(record + offset_of!(SocketRecord, backend))?,
            last_used: u64_at(record + offset_of!(SocketRecord, last_used))?,
        },
    })
}
