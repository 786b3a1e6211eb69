//! The two texts that travel by way of the callers: where a lane is found, and what names a region.

use crossdock_transport::{Error, LaneAddress, RemoteKey, Result};

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
    pub(crate) fn socket_name(socket: &Secret) -> [u8; SOCKET_PREFIX.len() + 32] {
        let mut name = [0; SOCKET_PREFIX.len() + 32];
        name[..SOCKET_PREFIX.len()].copy_from_slice(SOCKET_PREFIX);
        for (byte, text) in socket.iter().zip(name[SOCKET_PREFIX.len()..].chunks_exact_mut(2)) {
            text[0] = HEX[usize::from(byte >> 4)];
            text[1] = HEX[usize::from(byte & 15)];
        }
        name
    }

    pub(crate) fn encode(&self) -> LaneAddress {
        let mut bytes = Writer::default();
        bytes.put(ADDRESS_MAGIC);
        bytes.put(&self.socket);
        bytes.put(&self.cookie);
        LaneAddress::new(bytes.written()).expect("36 bytes are not too many")
    }

    pub(crate) fn decode(address: &LaneAddress) -> Result<Self> {
        let mut bytes = Reader::new(address.bytes());
        if bytes.take() != Some(*ADDRESS_MAGIC) {
            return Err(Error::BadAddress { reason: "not one of a shared-memory port of this version" });
        }
        match (bytes.take(), bytes.take(), bytes.is_at_end()) {
            (Some(socket), Some(cookie), true) => Ok(Self { socket, cookie }),
            _ => Err(Error::BadAddress { reason: "a shared-memory address of a wrong length" }),
        }
    }
}

impl Key {
    pub(crate) fn encode(&self) -> RemoteKey {
        let mut bytes = Writer::default();
        bytes.put(KEY_MAGIC);
        bytes.put(&self.port);
        bytes.put(&self.region.to_le_bytes());
        bytes.put(&self.bytes.to_le_bytes());
        RemoteKey::new(bytes.written()).expect("32 bytes are not too many")
    }

    pub(crate) fn decode(key: &RemoteKey) -> Result<Self> {
        let mut bytes = Reader::new(key.bytes());
        if bytes.take() != Some(*KEY_MAGIC) {
            return Err(Error::BadKey { reason: "not one of a shared-memory port of this version" });
        }
        match (bytes.take(), bytes.take(), bytes.take(), bytes.is_at_end()) {
            (Some(port), Some(region), Some(length), true) => {
                Ok(Self { port, region: u32::from_le_bytes(region), bytes: u64::from_le_bytes(length) })
            }
            _ => Err(Error::BadKey { reason: "a shared-memory key of a wrong length" }),
        }
    }
}

const SOCKET_PREFIX: &[u8] = b"crossdock-shm-";
const HEX: &[u8; 16] = b"0123456789abcdef";
/// The last byte is the version of all that two ports tell each other.
const ADDRESS_MAGIC: &[u8; 4] = b"xsa\x01";
const KEY_MAGIC: &[u8; 4] = b"xsk\x01";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn addresses_and_keys_survive_the_journey(
            a in any::<[u8; 16]>(), b in any::<[u8; 16]>(), region in any::<u32>(), bytes in any::<u64>(),
        ) {
            let address = Address { socket: a, cookie: b };
            prop_assert_eq!(Address::decode(&address.encode()), Ok(address));
            let key = Key { port: a, region, bytes };
            prop_assert_eq!(Key::decode(&key.encode()), Ok(key));
        }

        #[test]
        fn other_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let address = LaneAddress::new(&bytes).expect("short enough");
            prop_assert!(Address::decode(&address).is_err());
            let key = RemoteKey::new(&bytes).expect("short enough");
            prop_assert!(Key::decode(&key).is_err());
        }

        #[test]
        fn a_missing_or_an_added_byte_is_refused(cut in 0usize..36) {
            let mut bytes = Address { socket: [1; 16], cookie: [2; 16] }.encode().bytes().to_vec();
            bytes.push(0);
            prop_assert!(Address::decode(&LaneAddress::new(&bytes).expect("short enough")).is_err());
            bytes.truncate(cut);
            prop_assert!(Address::decode(&LaneAddress::new(&bytes).expect("short enough")).is_err());
        }
    }

    #[test]
    fn a_socket_name_is_hexadecimal() {
        assert_eq!(&Address::socket_name(&[0xa5; 16])[..18], b"crossdock-shm-a5a5");
    }
}
