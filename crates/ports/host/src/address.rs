//! The two texts that travel by way of the callers: where a lane is found, and what names a region.

use std::fmt::Write as _;

use crossdock_transport::{Error, LaneAddress, RemoteKey, Result};

use crate::medium::Kind;
use crate::message::{Reader, Writer};

/// Random, so that nobody guesses it: names a lane's end, a port's socket, a port.
pub(crate) type Secret = [u8; 16];

/// Draws a new one.
pub(crate) fn secret() -> Result<Secret> {
    let mut secret = [0; 16];
    let drawn = rustix::rand::getrandom(&mut secret, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::Os { call: "getrandom", errno: errno.raw_os_error() })?;
    // The kernel gives up to 256 bytes at once.
    debug_assert_eq!(drawn, secret.len());
    Ok(secret)
}

/// One end of a lane, as the other end finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    /// The port's socket.
    pub(crate) socket: Secret,
    /// The lane's end. The end with the smaller cookie dials.
    pub(crate) cookie: Secret,
}

/// What [`RemoteKey`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// Which port registered it.
    pub(crate) port: Secret,
    /// Its number there.
    pub(crate) region: u32,
    /// Its length.
    pub(crate) bytes: u64,
}

impl Address {
    /// The name of the socket in the abstract namespace, which needs no file system and vanishes with its owner.
    pub(crate) fn socket_name(kind: &Kind, socket: &Secret) -> String {
        let mut name = format!("crossdock-{}-", kind.name);
        for byte in socket {
            let _ = write!(name, "{byte:02x}");
        }
        name
    }

    pub(crate) fn encode(&self, kind: &Kind) -> LaneAddress {
        let mut bytes = Writer::default();
        bytes.put(&kind.address_magic);
        bytes.put(&self.socket);
        bytes.put(&self.cookie);
        LaneAddress::new(bytes.written()).expect("36 bytes are not too many")
    }

    pub(crate) fn decode(kind: &Kind, address: &LaneAddress) -> Result<Self> {
        let mut bytes = Reader::new(address.bytes());
        if bytes.take() != Some(kind.address_magic) {
            return Err(Error::BadAddress { reason: "not one of a port of this kind and version" });
        }
        match (bytes.take(), bytes.take(), bytes.is_at_end()) {
            (Some(socket), Some(cookie), true) => Ok(Self { socket, cookie }),
            _ => Err(Error::BadAddress { reason: "of a wrong length" }),
        }
    }
}

impl Key {
    pub(crate) fn encode(&self, kind: &Kind) -> RemoteKey {
        let mut bytes = Writer::default();
        bytes.put(&kind.key_magic);
        bytes.put(&self.port);
        bytes.put(&self.region.to_le_bytes());
        bytes.put(&self.bytes.to_le_bytes());
        RemoteKey::new(bytes.written()).expect("32 bytes are not too many")
    }

    pub(crate) fn decode(kind: &Kind, key: &RemoteKey) -> Result<Self> {
        let mut bytes = Reader::new(key.bytes());
        if bytes.take() != Some(kind.key_magic) {
            return Err(Error::BadKey { reason: "not one of a port of this kind and version" });
        }
        match (bytes.take(), bytes.take(), bytes.take(), bytes.is_at_end()) {
            (Some(port), Some(region), Some(length), true) => {
                Ok(Self { port, region: u32::from_le_bytes(region), bytes: u64::from_le_bytes(length) })
            }
            _ => Err(Error::BadKey { reason: "of a wrong length" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIND: Kind =
        Kind { name: "test", address_magic: *b"ta\x00\x01", key_magic: *b"tk\x00\x01", offers: &[] };

    proptest! {
        #[test]
        fn addresses_and_keys_survive_the_journey(
            a in any::<[u8; 16]>(), b in any::<[u8; 16]>(), region in any::<u32>(), bytes in any::<u64>(),
        ) {
            let address = Address { socket: a, cookie: b };
            prop_assert_eq!(Address::decode(&KIND, &address.encode(&KIND)), Ok(address));
            let key = Key { port: a, region, bytes };
            prop_assert_eq!(Key::decode(&KIND, &key.encode(&KIND)), Ok(key));
        }

        #[test]
        fn other_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let address = LaneAddress::new(&bytes).expect("short enough");
            prop_assert!(Address::decode(&KIND, &address).is_err());
            let key = RemoteKey::new(&bytes).expect("short enough");
            prop_assert!(Key::decode(&KIND, &key).is_err());
        }

        #[test]
        fn a_missing_or_an_added_byte_is_refused(cut in 0usize..36) {
            let mut bytes = Address { socket: [1; 16], cookie: [2; 16] }.encode(&KIND).bytes().to_vec();
            bytes.push(0);
            prop_assert!(Address::decode(&KIND, &LaneAddress::new(&bytes).expect("short enough")).is_err());
            bytes.truncate(cut);
            prop_assert!(Address::decode(&KIND, &LaneAddress::new(&bytes).expect("short enough")).is_err());
        }
    }

    /// Two ports of different builds have to understand each other: these are the bytes of docs/wire-shm.md.
    #[test]
    fn addresses_and_keys_are_as_they_always_were() {
        let kind = Kind { name: "shm", address_magic: *b"xsa\x01", key_magic: *b"xsk\x01", offers: &[] };
        let address = Address { socket: [1; 16], cookie: [2; 16] }.encode(&kind);
        assert_eq!(address.bytes(), [&b"xsa\x01"[..], &[1; 16], &[2; 16]].concat());
        let key = Key { port: [3; 16], region: 0x0102_0304, bytes: 0x1112_1314_1516_1718 }.encode(&kind);
        let numbers = [4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11];
        assert_eq!(key.bytes(), [&b"xsk\x01"[..], &[3; 16], &numbers].concat());
        let name = Address::socket_name(&kind, &[0xa5; 16]);
        assert_eq!(name, format!("crossdock-shm-{}", "a5".repeat(16)));
    }

    #[test]
    fn a_socket_name_is_hexadecimal() {
        let name = Address::socket_name(&KIND, &[0xa5; 16]);
        assert_eq!(name, format!("crossdock-test-{}", "a5".repeat(16)));
    }
}
