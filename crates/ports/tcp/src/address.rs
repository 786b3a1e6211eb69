//! What ports tell each other through the control stream: where a lane is dialled, and how a region is called.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crossdock_transport::{Error, LaneAddress, LocalId, RemoteKey, Result};

use crate::frame::Cookie;

/// One end of a lane.
///
/// | at | bytes | field |
/// |---:|---:|---|
/// | 0 | 4 | `"xdTA"` |
/// | 4 | 1 | 4 or 6 |
/// | 5 | 1 | 0 |
/// | 6 | 2 | TCP port, little-endian |
/// | 8 | 16 | IP address; of IPv4, four bytes and twelve zeroes |
/// | 24 | 16 | cookie |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub socket: SocketAddr,
    pub cookie: Cookie,
}

impl End {
    pub fn encode(&self) -> LaneAddress {
        let mut bytes = [0; 40];
        bytes[..4].copy_from_slice(END_MAGIC);
        bytes[6..8].copy_from_slice(&self.socket.port().to_le_bytes());
        match self.socket.ip() {
            IpAddr::V4(ip) => {
                bytes[4] = 4;
                bytes[8..12].copy_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                bytes[4] = 6;
                bytes[8..24].copy_from_slice(&ip.octets());
            }
        }
        bytes[24..].copy_from_slice(&self.cookie);
        LaneAddress::new(&bytes).expect("short enough")
    }

    pub fn decode(address: &LaneAddress) -> Result<Self> {
        let bad = Error::BadAddress { reason: "not one of a tcp port" };
        let Ok(bytes) = <&[u8; 40]>::try_from(address.bytes()) else { return Err(bad) };
        let ip: [u8; 16] = bytes[8..24].try_into().expect("sixteen bytes");
        let ip = match bytes[4] {
            4 if ip[4..] == [0; 12] => IpAddr::V4(Ipv4Addr::new(ip[0], ip[1], ip[2], ip[3])),
            6 => IpAddr::V6(Ipv6Addr::from(ip)),
            _ => return Err(bad),
        };
        let port = u16::from_le_bytes([bytes[6], bytes[7]]);
        if &bytes[..4] != END_MAGIC || bytes[5] != 0 || port == 0 || ip.is_unspecified() {
            return Err(bad);
        }
        Ok(Self { socket: SocketAddr::new(ip, port), cookie: bytes[24..].try_into().expect("sixteen bytes") })
    }
}

/// A region of one port.
///
/// | at | bytes | field |
/// |---:|---:|---|
/// | 0 | 4 | `"xdTK"` |
/// | 4 | 4 | region number |
/// | 8 | 8 | length in bytes |
/// | 16 | 8 | nonce of the port |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub region: LocalId,
    pub bytes: u64,
    pub nonce: u64,
}

impl Key {
    pub fn encode(&self) -> RemoteKey {
        let mut bytes = [0; 24];
        bytes[..4].copy_from_slice(KEY_MAGIC);
        bytes[4..8].copy_from_slice(&self.region.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[16..].copy_from_slice(&self.nonce.to_le_bytes());
        RemoteKey::new(&bytes).expect("short enough")
    }

    pub fn decode(key: &RemoteKey) -> Result<Self> {
        let bytes = <&[u8; 24]>::try_from(key.bytes()).ok().filter(|bytes| &bytes[..4] == KEY_MAGIC);
        let bytes = bytes.ok_or(Error::BadKey { reason: "not one of a tcp port" })?;
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let region = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"));
        Ok(Self { region: LocalId(region), bytes: u64_at(8), nonce: u64_at(16) })
    }
}

const END_MAGIC: &[u8; 4] = b"xdTA";
const KEY_MAGIC: &[u8; 4] = b"xdTK";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ends_are_read_as_they_were_written(ip: IpAddr, port in 1..=u16::MAX, cookie: Cookie) {
            prop_assume!(!ip.is_unspecified());
            let end = End { socket: SocketAddr::new(ip, port), cookie };
            prop_assert_eq!(End::decode(&end.encode()), Ok(end));
        }

        #[test]
        fn keys_are_read_as_they_were_written(region: u32, bytes: u64, nonce: u64) {
            let key = Key { region: LocalId(region), bytes, nonce };
            prop_assert_eq!(Key::decode(&key.encode()), Ok(key));
        }

        #[test]
        fn other_bytes_are_refused_or_read_exactly(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let (address, key) = (LaneAddress::new(&bytes).unwrap(), RemoteKey::new(&bytes).unwrap());
            if let Ok(end) = End::decode(&address) {
                prop_assert_eq!(end.encode(), address);
            }
            if let Ok(read) = Key::decode(&key) {
                prop_assert_eq!(read.encode(), key);
            }
        }
    }

    #[test]
    fn addresses_that_cannot_be_dialled_are_refused() {
        let good = End { socket: SocketAddr::from(([10, 0, 0, 1], 4000)), cookie: [7; 16] };
        for (at, byte) in [(0, b'y'), (4, 5), (5, 1), (8, 0), (12, 1)] {
            let mut bytes = good.encode().bytes().to_vec();
            bytes[at] = byte;
            let refused = End::decode(&LaneAddress::new(&bytes).unwrap());
            assert_eq!(refused.is_err(), at != 8, "byte {at}");
        }
        for socket in [SocketAddr::from(([10, 0, 0, 1], 0)), SocketAddr::from(([0, 0, 0, 0], 1))] {
            assert!(End::decode(&End { socket, ..good }.encode()).is_err());
        }
    }
}
