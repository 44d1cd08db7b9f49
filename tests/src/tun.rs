//! Links without Ethernet headers: a TUN device at each end, as a VPN or an IP tunnel has them, and this process between.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe;

use crate::member::Member;

/// The largest packet with what the kernel says about it (`virtio_net_hdr`, 10 octets).
const LARGEST: usize = 65_536 + 10;

/// A link between two members; it ends when dropped, with its devices.
#[derive(Debug)]
pub struct TunLink {
    /// Closed to end the threads.
    stop: Option<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

impl TunLink {
    /// Makes a device of this name at each end, without addresses. Packets cross as they are: not cut into segments, and
    /// without their checksums, where the device would have had to do that.
    ///
    /// # Errors
    /// When the kernel has no TUN devices, or the name is taken.
    pub fn between(one: &Member, other: &Member, name: &str) -> Result<Self> {
        let ends = [one, other].map(|member| {
            member.netns().within(|| device(name)).with_context(|| format!("{name} in {}", member.name()))
        });
        let [one, other] = ends;
        let (one, other) = (one?, other?);
        let (watched, stop) = pipe().context("no pipe")?;
        let threads = [(one.try_clone()?, other.try_clone()?), (other, one)]
            .into_iter()
            .map(|(from, to)| {
                let watched = watched.try_clone()?;
                Ok(thread::spawn(move || carry(from, to, &watched)))
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self { stop: Some(stop), threads })
    }
}

impl Drop for TunLink {
    fn drop(&mut self) {
        self.stop.take();
        for thread in self.threads.drain(..) {
            // One that panicked has said so on stderr.
            let _ = thread.join();
        }
    }
}

/// Carries packets until the other end of the pipe is closed.
fn carry(mut from: File, mut to: File, stop: &OwnedFd) {
    let mut buffer = vec![0; LARGEST];
    loop {
        let wanted = [from.as_fd(), stop.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let mut fds = wanted;
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        if fds[1].any() == Some(true) {
            return;
        }
        // A device that is down neither gives nor takes any.
        if let Ok(length) = from.read(&mut buffer) {
            let _ = to.write(&buffer[..length]);
        }
    }
}

/// A device of this thread's namespace, which is up.
fn device(name: &str) -> Result<File> {
    let file =
        File::options().read(true).write(true).open("/dev/net/tun").context("cannot open /dev/net/tun")?;
    // SAFETY: all zeroes is a value of this C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, octet) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *place = octet as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open, and the structure is the one that this request takes.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
        .context("TUNSETIFF")?;
    let offloads = libc::c_ulong::from(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6);
    // SAFETY: as above; this request takes a number.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) })
        .context("TUNSETOFFLOAD")?;
    Ok(file)
}
