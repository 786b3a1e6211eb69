//! What ports tell each other through the control stream: the end of a lane, and how a region is called.

use std::fmt;

use crossdock_transport::{Error, LaneAddress, RemoteKey, Result};

/// The link below a port. Only ports with the same one connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    InfiniBand,
    Ethernet,
}

/// The 128 bits that name a port of a device in its network.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Gid(pub [u8; 16]);

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = std::net::Ipv6Addr::from(self.0);
        match address.to_ipv4_mapped() {
            Some(address) => write!(f, "{address}"),
            None => write!(f, "{address}"),
        }
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({self})")
    }
}

/// One end of a lane: a queue pair, and how packets get there.
///
/// | at | bytes | field |
/// |---:|---:|---|
/// | 0 | 4 | `"xdVA"` |
/// | 4 | 1 | 1 InfiniBand, 2 Ethernet |
/// | 5 | 1 | path MTU, as the device counts it: 1 (256 bytes) to 5 (4096) |
/// | 6 | 1 | how many reads of the peer's this end serves at a time |
/// | 7 | 1 | 0 |
/// | 8 | 4 | queue pair number, 24 bits, little-endian |
/// | 12 | 4 | first packet number, 24 bits, little-endian |
/// | 16 | 2 | LID, little-endian; 0 on Ethernet |
/// | 18 | 2 | partition key, little-endian |
/// | 20 | 16 | GID |
/// | 36 | 8 | nonce of the port, little-endian |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub link: Link,
    pub mtu: u8,
    pub reads_served: u8,
    pub queue_pair: u32,
    pub first_packet: u32,
    pub lid: u16,
    pub partition_key: u16,
    pub gid: Gid,
    pub nonce: u64,
}

impl End {
    pub fn encode(&self) -> LaneAddress {
        let mut bytes = [0; 44];
        bytes[..4].copy_from_slice(END_MAGIC);
        bytes[4] = match self.link {
            Link::InfiniBand => 1,
            Link::Ethernet => 2,
        };
        bytes[5] = self.mtu;
        bytes[6] = self.reads_served;
        bytes[8..12].copy_from_slice(&self.queue_pair.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.first_packet.to_le_bytes());
        bytes[16..18].copy_from_slice(&self.lid.to_le_bytes());
        bytes[18..20].copy_from_slice(&self.partition_key.to_le_bytes());
        bytes[20..36].copy_from_slice(&self.gid.0);
        bytes[36..].copy_from_slice(&self.nonce.to_le_bytes());
        LaneAddress::new(&bytes).expect("short enough")
    }

    pub fn decode(address: &LaneAddress) -> Result<Self> {
        let bad = Error::BadAddress { reason: "not one of a verbs port" };
        let Ok(bytes) = <&[u8; 44]>::try_from(address.bytes()) else { return Err(bad) };
        let link = match bytes[4] {
            1 => Link::InfiniBand,
            2 => Link::Ethernet,
            _ => return Err(bad),
        };
        let end = Self {
            link,
            mtu: bytes[5],
            reads_served: bytes[6],
            queue_pair: u32_at(bytes, 8),
            first_packet: u32_at(bytes, 12),
            lid: u16_at(bytes, 16),
            partition_key: u16_at(bytes, 18),
            gid: Gid(bytes[20..36].try_into().expect("sixteen bytes")),
            nonce: u64_at(bytes, 36),
        };
        let in_range = (1..=5).contains(&end.mtu) && end.queue_pair < 1 << 24 && end.first_packet < 1 << 24;
        if &bytes[..4] != END_MAGIC || bytes[7] != 0 || !in_range {
            return Err(bad);
        }
        Ok(end)
    }
}

/// A region of one port.
///
/// | at | bytes | field |
/// |---:|---:|---|
/// | 0 | 4 | `"xdVK"` |
/// | 4 | 4 | remote key |
/// | 8 | 8 | where the region begins, as the device counts it |
/// | 16 | 8 | length in bytes |
/// | 24 | 8 | nonce of the port |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub key: u32,
    pub base: u64,
    pub bytes: u64,
    pub nonce: u64,
}

impl Key {
    pub fn encode(&self) -> RemoteKey {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(KEY_MAGIC);
        bytes[4..8].copy_from_slice(&self.key.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.base.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[24..].copy_from_slice(&self.nonce.to_le_bytes());
        RemoteKey::new(&bytes).expect("short enough")
    }

    pub fn decode(key: &RemoteKey) -> Result<Self> {
        let bad = Error::BadKey { reason: "not one of a verbs port" };
        let Ok(bytes) = <&[u8; 32]>::try_from(key.bytes()) else { return Err(bad) };
        let key = Self {
            key: u32_at(bytes, 4),
            base: u64_at(bytes, 8),
            bytes: u64_at(bytes, 16),
            nonce: u64_at(bytes, 24),
        };
        if &bytes[..4] != KEY_MAGIC || key.base.checked_add(key.bytes).is_none() {
            return Err(bad);
        }
        Ok(key)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

const END_MAGIC: &[u8; 4] = b"xdVA";
const KEY_MAGIC: &[u8; 4] = b"xdVK";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn end() -> impl Strategy<Value = End> {
        let link = prop_oneof![Just(Link::InfiniBand), Just(Link::Ethernet)];
        let numbers = (1..=5u8, any::<u8>(), 0..1u32 << 24, 0..1u32 << 24, any::<u16>(), any::<u16>());
        (link, numbers, any::<[u8; 16]>(), any::<u64>()).prop_map(|(link, numbers, gid, nonce)| {
            let (mtu, reads_served, queue_pair, first_packet, lid, partition_key) = numbers;
            let gid = Gid(gid);
            End { link, mtu, reads_served, queue_pair, first_packet, lid, partition_key, gid, nonce }
        })
    }

    proptest! {
        #[test]
        fn an_address_is_read_as_it_was_written(end in end()) {
            prop_assert_eq!(End::decode(&end.encode()), Ok(end));
        }

        #[test]
        fn a_key_is_read_as_it_was_written(key: u32, base: u64, bytes: u64, nonce: u64) {
            let key = Key { key, base, bytes: bytes.min(u64::MAX - base), nonce };
            prop_assert_eq!(Key::decode(&key.encode()), Ok(key));
        }

        /// Whatever else is read is read as something that would be written so.
        #[test]
        fn an_address_has_one_form(mut bytes in proptest::collection::vec(any::<u8>(), 44), whole: bool) {
            bytes[..4].copy_from_slice(END_MAGIC);
            bytes[4] = 1 + bytes[4] % 2;
            bytes[7] *= u8::from(!whole);
            let address = LaneAddress::new(&bytes).unwrap();
            if let Ok(end) = End::decode(&address) {
                prop_assert_eq!(end.encode(), address);
            }
        }
    }

    #[test]
    fn gids_read_as_addresses() {
        let mut gid = Gid([0; 16]);
        gid.0[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 0, 2]);
        assert_eq!(gid.to_string(), "10.0.0.2");
        gid.0[..2].copy_from_slice(&[0xfe, 0x80]);
        assert_eq!(gid.to_string(), "fe80::ffff:a00:2");
    }
}
