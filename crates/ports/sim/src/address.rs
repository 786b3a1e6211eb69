//! The wire forms of lane addresses and region keys.

use crossdock_transport::{Error, LaneAddress, LaneId, LocalId, RemoteKey, Result};

use crate::random::mix;
use crate::wire::End;

/// What a [`RemoteKey`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub port: u32,
    pub region: LocalId,
    pub bytes: u64,
}

/// Makes an address: which fabric, which port, which lane, and a seal.
pub(crate) fn address(fabric: u64, end: End) -> LaneAddress {
    let bytes = seal(ADDRESS, [fabric, u64::from(end.port), u64::from(end.lane.0)]);
    LaneAddress::new(&bytes).expect("shorter than an address may be")
}

/// Reads an address of this fabric.
pub(crate) fn read_address(fabric: u64, address: &LaneAddress) -> Result<End> {
    let [its_fabric, port, lane] =
        open(ADDRESS, address.bytes()).ok_or(Error::BadAddress { reason: "not made by a simulated port" })?;
    let (Ok(port), Ok(lane)) = (u32::try_from(port), u32::try_from(lane)) else {
        return Err(Error::BadAddress { reason: "numbers out of range" });
    };
    if its_fabric != fabric {
        return Err(Error::BadAddress { reason: "of another fabric" });
    }
    Ok(End { port, lane: LaneId(lane) })
}

/// Makes a key.
pub(crate) fn key(key: Key) -> RemoteKey {
    let bytes = seal(KEY, [u64::from(key.port), u64::from(key.region.0), key.bytes]);
    RemoteKey::new(&bytes).expect("shorter than a key may be")
}

/// Reads a key.
pub(crate) fn read_key(key: &RemoteKey) -> Result<Key> {
    let [port, region, bytes] =
        open(KEY, key.bytes()).ok_or(Error::BadKey { reason: "not made by a simulated port" })?;
    let (Ok(port), Ok(region)) = (u32::try_from(port), u32::try_from(region)) else {
        return Err(Error::BadKey { reason: "numbers out of range" });
    };
    Ok(Key { port, region: LocalId(region), bytes })
}

fn seal(kind: u64, words: [u64; 3]) -> [u8; 32] {
    let mut bytes = [0; 32];
    let sum = checksum(kind, words);
    for (at, word) in words.into_iter().chain([sum]).enumerate() {
        bytes[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn open(kind: u64, bytes: &[u8]) -> Option<[u64; 3]> {
    let bytes: &[u8; 32] = bytes.try_into().ok()?;
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().ok()?);
    }
    let [a, b, c, sum] = words;
    (checksum(kind, [a, b, c]) == sum).then_some([a, b, c])
}

fn checksum(kind: u64, words: [u64; 3]) -> u64 {
    words.into_iter().fold(kind, |sum, word| mix(sum ^ word).wrapping_add(word))
}

const ADDRESS: u64 = 0x7369_6d20_6c61_6e65;
const KEY: u64 = 0x7369_6d20_6b65_7920;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_read_and_nothing_else() {
        let end = End { port: 3, lane: LaneId(9) };
        let made = address(77, end);
        assert_eq!(read_address(77, &made), Ok(end));
        assert_eq!(read_address(78, &made), Err(Error::BadAddress { reason: "of another fabric" }));
        let made_key = key(Key { port: 1, region: LocalId(2), bytes: 4096 });
        assert_eq!(read_key(&made_key), Ok(Key { port: 1, region: LocalId(2), bytes: 4096 }));
        for bit in 0..256 {
            let mut bytes = made.bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let flipped = LaneAddress::new(&bytes).expect("of the same length");
            assert!(matches!(read_address(77, &flipped), Err(Error::BadAddress { .. })), "bit {bit}");
        }
        let address_as_key = RemoteKey::new(made.bytes()).expect("of the same length");
        assert!(matches!(read_key(&address_as_key), Err(Error::BadKey { .. })));
    }
}
