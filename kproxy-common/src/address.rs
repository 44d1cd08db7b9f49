//! IP addresses and prefixes as the maps hold them: 16 bytes for both families.

/// An IP address: 16 octets in network order, IPv4 as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
///
/// One form for both families means one set of maps, programs and tests. The 4-byte alignment lets the
/// compiler copy and compare it in words; without it, the bpf target calls a loop over bytes.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    octets: [u8; 16],
}

impl Address {
    /// `::`. As a destination it is the client's own loopback address: see [`Address::or_loopback`].
    pub const UNSPECIFIED: Self = Self { octets: [0; 16] };
    /// `0.0.0.0`, in its mapped form.
    pub const UNSPECIFIED_V4: Self = Self { octets: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0] };

    /// From octets in network order.
    pub const fn new(octets: [u8; 16]) -> Self {
        Self { octets }
    }

    /// From four 32-bit words as they lie in a packet or a socket: network order in memory.
    #[inline(always)]
    pub fn from_words(words: [u32; 4]) -> Self {
        // SAFETY: both are 16 bytes without padding, and every bit pattern is valid for both.
        unsafe { core::mem::transmute::<[u32; 4], Self>(words) }
    }

    /// From an IPv4 address as it lies in a packet or a socket: network order in memory.
    #[inline(always)]
    pub fn from_v4_word(word: u32) -> Self {
        Self::from_words([0, 0, 0xffff_u32.to_be(), word])
    }

    /// Which of 64 bits stands for it, shared with others: by its last six bits, which hosts of one network differ in.
    #[inline(always)]
    pub fn bit(&self) -> u64 {
        1 << (u32::from_be(self.words()[3]) & 63)
    }

    /// Four 32-bit words, network order in memory.
    #[inline(always)]
    pub fn words(&self) -> [u32; 4] {
        // SAFETY: both are 16 bytes without padding, and every bit pattern is valid for both.
        unsafe { core::mem::transmute::<Self, [u32; 4]>(*self) }
    }

    /// Copies this to `place` word by word. Of two places in memory that might overlap, the compiler would have the copy
    /// made by a function, which not every program may call.
    #[inline(always)]
    pub fn copy_to(&self, place: &mut Self) {
        let words = self.words();
        let place = core::ptr::from_mut(place).cast::<u32>();
        let mut i = 0;
        while i < 4 {
            // SAFETY: an address is four aligned words, each of which may have any value.
            unsafe { core::ptr::write_volatile(place.add(i), words[i]) };
            i += 1;
        }
    }

    /// The IPv4 address in network order (in memory), if this is one; for IPv6 the last four octets.
    #[inline(always)]
    pub fn v4_word(&self) -> u32 {
        self.words()[3]
    }

    /// The octets in network order.
    pub const fn octets(&self) -> [u8; 16] {
        self.octets
    }

    /// Whether this is an IPv4 address in its mapped form.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        let [a, b, c, _] = self.words();
        a | b == 0 && c == 0xffff_u32.to_be()
    }

    /// Whether this is `127.0.0.0/8` (RFC 1122, 3.2.1.3) or `::1` (RFC 4291, 2.5.3).
    #[inline(always)]
    pub fn is_loopback(&self) -> bool {
        let [a, b, c, d] = self.words();
        if a | b != 0 {
            return false;
        }
        (c == 0xffff_u32.to_be() && u32::from_be(d) >> 24 == 127) || (c == 0 && d == 1_u32.to_be())
    }

    /// Whether this can be one machine's address that others see: neither a group's (RFC 5771, RFC 4291, 2.7), nor
    /// broadcast, loopback or unspecified.
    #[inline(always)]
    pub fn is_unicast(&self) -> bool {
        let [a, b, c, d] = self.words();
        if self.is_v4() {
            let word = u32::from_be(d);
            let first = word >> 24;
            return first != 0 && first != 127 && first >> 4 != 0xe && word != u32::MAX;
        }
        a | b | c != 0 && u32::from_be(a) >> 24 != 0xff || a | b | c == 0 && u32::from_be(d) > 1
    }

    /// `::` or `::ffff:0.0.0.0`: the key under which NodePorts of this address's family are found.
    #[inline(always)]
    pub fn any_of_family(&self) -> Self {
        // Of words: a constant is copied from memory, octet by octet.
        Self::from_words([0, 0, if self.is_v4() { 0xffff_u32.to_be() } else { 0 }, 0])
    }

    /// Where a socket goes that is asked to go here: to its own loopback address, of the same family, instead of
    /// the unspecified one (Linux: `ip_route_output_key_hash_rcu`, `tcp_v6_connect`, `udpv6_sendmsg`). The kernel
    /// replaces it after the socket hooks ran. A socket that is bound to an IPv4 address goes there instead, which
    /// hooks are not told.
    ///
    /// Without a branch: one would double what the verifier walks of the programs that go on from here.
    #[inline(always)]
    pub fn or_loopback(&self) -> Self {
        let [a, b, c, d] = self.words();
        let mapped = 0xffff_u32.to_be();
        // Of 32 bits, and 0 if the address is unspecified: of two factors one is 0 if their product is.
        let differs = u64::from(a | b | d) | (u64::from(c) * u64::from(c ^ mapped));
        let differs = (differs | differs >> 32) & u64::from(u32::MAX);
        // SAFETY: a valid place. Volatile, or the compiler knows better and branches.
        let differs = unsafe { core::ptr::read_volatile(&raw const differs) };
        let is_unspecified = (differs.wrapping_sub(1) as i64 >> 63) as u32;
        // All bits if mapped, else none.
        let is_v4 = c | c.rotate_left(16);
        let last = 1_u32.to_be() | is_v4 & 0x7f00_0000_u32.to_be();
        Self::from_words([a, b, c, d | last & is_unspecified])
    }

    /// Whether this is the unspecified address of its family.
    #[inline(always)]
    pub fn is_unspecified(&self) -> bool {
        let [a, b, c, d] = self.words();
        a | b | d == 0 && (c == 0 || c == 0xffff_u32.to_be())
    }
}

/// A prefix. For IPv4 the length counts the 96 bits of the mapped form: `10.0.0.0/8` has length 104.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cidr {
    address: Address,
    prefix_length: u32,
}

impl Cidr {
    /// A prefix of which no address is part: how unused places of a fixed table are filled.
    pub const NONE: Self = Self { address: Address::UNSPECIFIED, prefix_length: u32::MAX };

    /// A prefix of `prefix_length` bits (0 to 128, in the mapped form) of `address`.
    pub const fn new(address: Address, prefix_length: u32) -> Self {
        Self { address, prefix_length }
    }

    /// The prefix's address, as given.
    pub const fn address(&self) -> Address {
        self.address
    }

    /// The prefix's length in bits, 96 added for IPv4.
    pub const fn prefix_length(&self) -> u32 {
        self.prefix_length
    }

    /// Whether this place of a table is unused.
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        self.prefix_length > 128
    }

    /// Whether `address` is part of this prefix.
    #[inline(always)]
    pub fn contains(&self, address: &Address) -> bool {
        if self.is_none() {
            return false;
        }
        let (ours, theirs) = (self.address.words(), address.words());
        let mut left = self.prefix_length;
        let mut differing = 0;
        let mut i = 0;
        while i < 4 {
            let bits = if left > 32 { 32 } else { left };
            // In 64 bits, so that a shift by 32 is defined.
            let mask = !((u64::from(u32::MAX) >> bits) as u32);
            differing |= (u32::from_be(ours[i]) ^ u32::from_be(theirs[i])) & mask;
            left -= bits;
            i += 1;
        }
        differing == 0
    }
}

impl core::fmt::Debug for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

impl core::fmt::Display for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&core::net::IpAddr::from(*self), f)
    }
}

impl From<core::net::IpAddr> for Address {
    fn from(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(v4) => Self::new(v4.to_ipv6_mapped().octets()),
            core::net::IpAddr::V6(v6) => Self::new(v6.octets()),
        }
    }
}

impl From<Address> for core::net::IpAddr {
    fn from(address: Address) -> Self {
        core::net::Ipv6Addr::from(address.octets).to_canonical()
    }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn address(text: &str) -> Address {
        Address::from(text.parse::<IpAddr>().unwrap())
    }

    fn cidr(text: &str, length: u32) -> Cidr {
        let ip = address(text);
        Cidr::new(ip, length + if ip.is_v4() { 96 } else { 0 })
    }

    #[test]
    fn families_are_told_apart() {
        assert!(address("10.0.0.1").is_v4());
        assert!(!address("2001:db8::1").is_v4());
        assert!(address("::ffff:10.0.0.1").is_v4(), "a mapped address is an IPv4 address");
        assert_eq!(address("10.0.0.1").any_of_family(), Address::UNSPECIFIED_V4);
        assert_eq!(address("fd00::1").any_of_family(), Address::UNSPECIFIED);
    }

    #[test]
    fn loopback_is_the_whole_of_127_and_one_of_v6() {
        for (text, is) in [
            ("127.0.0.1", true),
            ("127.255.3.4", true),
            ("::1", true),
            ("128.0.0.1", false),
            ("::2", false),
            ("::", false),
            ("10.127.0.1", false),
        ] {
            assert_eq!(address(text).is_loopback(), is, "{text}");
        }
    }

    #[test]
    fn an_unspecified_destination_is_loopback() {
        for (asked, gone) in [
            ("0.0.0.0", "127.0.0.1"),
            ("::ffff:0.0.0.0", "127.0.0.1"),
            ("::", "::1"),
            ("::1", "::1"),
            ("10.0.0.1", "10.0.0.1"),
            ("::ffff:0:0:0", "::ffff:0:0:0"),
        ] {
            assert_eq!(address(asked).or_loopback(), address(gone), "{asked}");
        }
    }

    #[test]
    fn machines_have_addresses_of_their_own() {
        for (text, is) in [
            ("10.0.0.1", true),
            ("0.0.0.0", false),
            ("0.1.2.3", false),
            ("127.0.0.1", false),
            ("224.0.0.1", false),
            ("239.255.255.255", false),
            ("240.0.0.1", true),
            ("255.255.255.255", false),
            ("2001:db8::1", true),
            ("::", false),
            ("::1", false),
            ("::2", true),
            ("ff02::1", false),
            ("fe80::1", true),
        ] {
            assert_eq!(address(text).is_unicast(), is, "{text}");
        }
    }

    #[test]
    fn prefixes_contain_what_they_should() {
        for (prefix, length, ip, is) in [
            ("10.96.0.0", 12, "10.96.0.1", true),
            ("10.96.0.0", 12, "10.111.255.255", true),
            ("10.96.0.0", 12, "10.112.0.0", false),
            ("0.0.0.0", 0, "203.0.113.1", true),
            ("0.0.0.0", 0, "2001:db8::1", false),
            ("::", 0, "2001:db8::1", true),
            ("fd00:10:96::", 112, "fd00:10:96::ffff", true),
            ("fd00:10:96::", 112, "fd00:10:96::1:0", false),
            ("192.0.2.7", 32, "192.0.2.7", true),
            ("192.0.2.7", 32, "192.0.2.6", false),
        ] {
            assert_eq!(cidr(prefix, length).contains(&address(ip)), is, "{prefix}/{length} {ip}");
        }
        assert!(!Cidr::NONE.contains(&Address::UNSPECIFIED));
    }
}
