//! What an interface does in the place of the kernel: checksums, and cutting and joining of segments.

use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::member::Member;

/// Reading and writing of one switch (linux/ethtool.h): checksums of what comes and goes, scattered memory, segmentation
/// by the device and before it, joining of what comes. In the order in which they can be switched on.
const SWITCHES: [(&str, u32, u32); 6] = [
    ("rx-checksumming", 0x14, 0x15),
    ("tx-checksumming", 0x16, 0x17),
    ("scatter-gather", 0x18, 0x19),
    ("tcp-segmentation-offload", 0x1e, 0x1f),
    ("generic-segmentation-offload", 0x23, 0x24),
    ("generic-receive-offload", 0x2b, 0x2c),
];

/// `struct ethtool_value`.
#[repr(C)]
struct Switch {
    command: u32,
    data: u32,
}

impl Member {
    /// Switches all offloads of an interface here on or off.
    ///
    /// # Errors
    /// When one of them stays as it was.
    pub fn set_offloads(&self, interface: &str, on: bool) -> Result<()> {
        let about = || format!("offloads of {interface} in {}", self.name());
        self.netns().within(|| {
            let mut switches = SWITCHES;
            if !on {
                switches.reverse();
            }
            for (name, _, set) in switches {
                ask(interface, set, on.into()).with_context(|| format!("{name} {on}")).with_context(about)?;
            }
            for (name, get, _) in switches {
                let is_on = ask(interface, get, 0)? != 0;
                ensure!(is_on == on, "{}: {name} is {is_on}", about());
            }
            Ok(())
        })
    }
}

/// One request to an interface of this thread's namespace (SIOCETHTOOL).
fn ask(interface: &str, command: u32, data: u32) -> Result<u32> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut switch = Switch { command, data };
    // SAFETY: all zeroes is a value of this C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, octet) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
        *place = octet as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut switch).cast();
    // SAFETY: the structure points to one of the sort that this request takes, and both live until it returns.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) })?;
    Ok(switch.data)
}
