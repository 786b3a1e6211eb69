//! A heartbeat on the wire: 32 bytes, little-endian.

/// One heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Datagram {
    /// Which session, and that the sender belongs to it.
    pub token: u64,
    /// Grows with each heartbeat of a session; the first is 1.
    pub sequence: u64,
    /// The highest sequence that the sender has heard from the receiver; 0 for none.
    pub echo: u64,
}

impl Datagram {
    /// Their length.
    pub const BYTES: usize = 32;
    const MAGIC: u32 = u32::from_le_bytes(*b"xdhb");
    const VERSION: u32 = 1;

    /// As it is sent.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..4].copy_from_slice(&Self::MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&Self::VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.token.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.echo.to_le_bytes());
        bytes
    }

    /// What was received, if it is a heartbeat at all.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let head = u64::from(Self::VERSION) << 32 | u64::from(Self::MAGIC);
        (word(0) == head).then(|| Self { token: word(8), sequence: word(16), echo: word(24) })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn wire_form_is_pinned() {
        let beat = Datagram { token: 0x0807_0605_0403_0201, sequence: 9, echo: 10 };
        let bytes = beat.to_bytes();
        let mut expected = [0; 32];
        expected[..16].copy_from_slice(b"xdhb\x01\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08");
        (expected[16], expected[24]) = (9, 10);
        assert_eq!(bytes, expected);
        assert_eq!(Datagram::from_bytes(&bytes), Some(beat));
    }
}
