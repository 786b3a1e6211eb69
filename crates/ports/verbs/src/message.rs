//! What the two ends of a lane say to each other on the lane itself.
//!
//! Data goes by RDMA writes and reads. What is said beside them goes by sends, each of which takes one receive of the
//! peer's shared queue: a *hello* each way when the lane begins; *credits*, by which a receiver of immediates lets
//! its peer send more; a *bye*. Credits and bye are sends without a byte whose immediate says everything.

use crossdock_transport::DownCause;

/// The first thing that each end shows the other.
///
/// | at | bytes | field |
/// |---:|---:|---|
/// | 0 | 4 | `"xdVH"` |
/// | 4 | 2 | version of what is said on a lane, little-endian |
/// | 6 | 2 | 0 |
/// | 8 | 4 | how many immediates the peer may have on their way, little-endian |
/// | 12 | 32 | the lane's tag |
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hello {
    pub immediates: u32,
    pub tag: [u8; 32],
}

impl Hello {
    pub const BYTES: usize = 44;

    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.immediates.to_le_bytes());
        bytes[12..].copy_from_slice(&self.tag);
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DownCause> {
        let unreadable = DownCause::PeerMisbehaved { what: "its hello cannot be read" };
        let Ok(bytes) = <&[u8; Self::BYTES]>::try_from(bytes) else { return Err(unreadable) };
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        let immediates = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
        if &bytes[..4] != MAGIC || bytes[6..8] != [0; 2] || immediates == 0 {
            return Err(unreadable);
        }
        if version != VERSION {
            return Err(DownCause::PeerMisbehaved { what: "it speaks another version on lanes" });
        }
        Ok(Self { immediates, tag: bytes[12..].try_into().expect("thirty-two bytes") })
    }
}

/// What a send without a byte says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// So many more immediates may be sent.
    Credits(u32),
    /// The lane ends here.
    Bye,
}

impl Word {
    /// As an immediate: the uppermost 4 bits say what it is, the others how many.
    pub fn encode(self) -> u32 {
        match self {
            Word::Credits(count) => CREDITS | count,
            Word::Bye => BYE,
        }
    }

    pub fn decode(imm: u32) -> Result<Self, DownCause> {
        let count = imm & COUNT;
        match imm & !COUNT {
            CREDITS if count > 0 => Ok(Word::Credits(count)),
            BYE if count == 0 => Ok(Word::Bye),
            _ => Err(DownCause::PeerMisbehaved { what: "it said a word that there is not" }),
        }
    }
}

const MAGIC: &[u8; 4] = b"xdVH";
const VERSION: u16 = 1;
const COUNT: u32 = (1 << 28) - 1;
const CREDITS: u32 = 1 << 28;
const BYE: u32 = 2 << 28;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_hello_is_read_as_it_was_written(immediates in 1u32.., tag: [u8; 32]) {
            let hello = Hello { immediates, tag };
            prop_assert!(Hello::decode(&hello.encode()) == Ok(hello));
        }

        #[test]
        fn a_word_has_one_form(imm: u32) {
            if let Ok(word) = Word::decode(imm) {
                prop_assert_eq!(word.encode(), imm);
            }
        }

        #[test]
        fn no_bytes_make_it_stumble(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Hello::decode(&bytes);
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = Hello { immediates: 8, tag: [7; 32] }.encode();
        bytes[4] += 1;
        let Err(DownCause::PeerMisbehaved { what }) = Hello::decode(&bytes) else { panic!("taken") };
        assert!(what.contains("version"), "{what}");
    }

    #[test]
    fn words_are_read_as_they_were_written() {
        for word in [Word::Credits(1), Word::Credits(COUNT), Word::Bye] {
            assert_eq!(Word::decode(word.encode()), Ok(word));
        }
        assert!(Word::decode(0).is_err() && Word::decode(CREDITS).is_err());
    }
}
