//! The system calls that the libraries do not offer: exchanging the program of a link, asking a link what it
//! is attached to, and the cookie of a network namespace.

use std::{
    ffi::CString,
    io,
    mem::{size_of, zeroed},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use crate::pretend::{Feature, lacks};

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_ITER_CREATE: libc::c_long = 33;
const BPF_LINK_DETACH: libc::c_long = 34;
/// `enum bpf_attach_type`.
const BPF_TRACE_ITER: u32 = 28;
/// From `asm-generic/socket.h`; Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// The arguments of BPF_LINK_CREATE for an iterator.
#[repr(C)]
struct IteratorLink {
    program_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    info: u64,
    info_length: u32,
    _pad: u32,
}

/// `union bpf_iter_link_info`, where it names a map.
#[repr(C)]
struct IteratorMap {
    map_fd: u32,
}

#[repr(C)]
struct IteratorCreate {
    link_fd: u32,
    flags: u32,
}

#[repr(C)]
struct GetInfo {
    fd: u32,
    length: u32,
    info: u64,
}

/// The head of `struct bpf_link_info`, as far as cgroup and tcx links use it.
#[repr(C)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _pad: u32,
    target: u64,
    more: [u64; 8],
}

#[repr(C)]
struct ObjGet {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens what is pinned at `path`.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let attr = ObjGet { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    owned(bpf(BPF_OBJ_GET, &attr)?)
}

/// Puts another program into a link, atomically.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attr =
        LinkUpdate { link_fd: fd_number(link)?, new_prog_fd: fd_number(program)?, flags: 0, old_prog_fd: 0 };
    bpf(BPF_LINK_UPDATE, &attr)?;
    Ok(())
}

/// Takes the program off what the link is attached to, at once (Linux 5.9).
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let attr = LinkUpdate { link_fd: fd_number(link)?, new_prog_fd: 0, flags: 0, old_prog_fd: 0 };
    bpf(BPF_LINK_DETACH, &attr)?;
    Ok(())
}

/// Attaches an iterator to the elements of a map. Reading what [`iterate`] gives runs it.
pub fn iterator_link(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let info = IteratorMap { map_fd: fd_number(map)? };
    let attr = IteratorLink {
        program_fd: fd_number(program)?,
        target_fd: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        info: std::ptr::from_ref(&info) as u64,
        info_length: size_of::<IteratorMap>() as u32,
        _pad: 0,
    };
    owned(bpf(BPF_LINK_CREATE, &attr)?)
}

/// A file whose contents are what the iterator writes, from the start.
pub fn iterate(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    owned(bpf(BPF_ITER_CREATE, &IteratorCreate { link_fd: fd_number(link)?, flags: 0 })?)
}

/// What a link is attached to: the cgroup's id (its inode), or for packet hooks the interface's index, which
/// is 0 once the interface is gone. Both are 0 for a link that somebody has detached. And the id of its program.
pub fn link_info(link: BorrowedFd<'_>, is_cgroup: bool) -> io::Result<(u64, u32)> {
    // SAFETY: the structure holds integers only, for which zero is a value.
    let mut info: LinkInfo = unsafe { zeroed() };
    let attr = GetInfo {
        fd: fd_number(link)?,
        length: size_of::<LinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &attr)?;
    let target = if is_cgroup { info.target } else { info.target & u64::from(u32::MAX) };
    Ok((target, info.program))
}

/// The cookie of the network namespace that this process is in; `None` where the kernel cannot tell (before
/// 5.14).
pub fn namespace_cookie() -> io::Result<Option<u64>> {
    if lacks(Feature::NetnsCookie) {
        return Ok(None);
    }
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").or_else(|_| std::net::UdpSocket::bind("[::]:0"))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the buffer is as long as `length` says, and both live across the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        return Ok(Some(cookie));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
        error => Err(error),
    }
}

fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a whole, initialised structure of the size given, of the form that `command` reads;
    // pointers inside it live across the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A descriptor that a command has just made for us.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn fd_number(fd: BorrowedFd<'_>) -> io::Result<u32> {
    u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)
}
