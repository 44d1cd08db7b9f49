//! CRC32c, the checksum of SCTP (RFC 9260, appendix A), as far as a change of ports needs it.

/// The polynomial 0x1EDC6F41, its bits reversed: the lowest bit stands for the highest power.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// x^(8 · 2^i), by i.
const POWERS: [u32; 16] = {
    let mut powers = [0; 16];
    // x^8: the highest bit is x^0.
    let mut power = 1 << (31 - 8);
    let mut i = 0;
    while i < 16 {
        powers[i] = power;
        power = multiply(power, power);
        i += 1;
    }
    powers
};

/// What the CRC of a packet of `length` octets (0 to 65,535) is to be XORed with when its first four are XORed with
/// `difference`, all in the order in which a little-endian machine loads them.
///
/// A CRC is linear: the change's own CRC, begun at 0, is the change of the CRC. And all that follows the first word is 0,
/// so that this is one word times x^(8 · length).
#[inline(always)]
pub fn crc32c_change(difference: u32, length: u32) -> u32 {
    let mut change = difference;
    let mut i = 0;
    while i < POWERS.len() {
        if length >> i & 1 != 0 {
            change = multiply(POWERS[i], change);
        }
        i += 1;
    }
    change
}

/// The product of two polynomials modulo [`POLYNOMIAL`].
const fn multiply(a: u32, b: u32) -> u32 {
    let (mut product, mut shifted) = (0, b);
    let mut bit = 32;
    while bit > 0 {
        bit -= 1;
        // Arithmetic rather than branches, which a verifier would follow both ways.
        product ^= shifted & 0_u32.wrapping_sub(a >> bit & 1);
        shifted = shifted >> 1 ^ POLYNOMIAL & 0_u32.wrapping_sub(shifted & 1);
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Octet by octet, as the RFC has it.
    fn crc32c(packet: impl Iterator<Item = u8>) -> u32 {
        let mut crc = u32::MAX;
        for octet in packet {
            crc ^= u32::from(octet);
            for _ in 0..8 {
                crc = crc >> 1 ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 };
            }
        }
        !crc
    }

    #[test]
    fn it_is_the_checksum_of_the_standard() {
        // RFC 3720, B.4: 32 octets of 0, and 0 to 31.
        assert_eq!(crc32c([0; 32].into_iter()), 0x8a91_36aa);
        assert_eq!(crc32c(0..32), 0x46dd_794e);
    }

    #[test]
    fn a_change_is_what_a_full_recomputation_gives() {
        let mut random = 1_u32;
        let mut next = move || {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            random
        };
        for length in (16..200).chain([1_499, 1_500, 1_501, 9_000, 32_768, 65_000, 65_535]) {
            let seed = next();
            let difference = next();
            let octet = |at: u32| (seed.wrapping_mul(at.wrapping_mul(2_654_435_761)) >> 24) as u8;
            let changes = difference.to_le_bytes();
            let old = crc32c((0..length).map(octet));
            let new = crc32c((0..length).map(|at| octet(at) ^ changes.get(at as usize).unwrap_or(&0)));
            assert_eq!(old ^ crc32c_change(difference, length), new, "{length} octets");
        }
    }
}
