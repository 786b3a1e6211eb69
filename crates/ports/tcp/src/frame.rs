//! What travels on a lane's connection, byte by byte. All numbers are little-endian.
//!
//! A connection begins with one [`Hello`] in each direction. After that, each direction is a sequence of frames:
//! a head of [`HEAD_BYTES`], a list of `pages` page numbers of four bytes each, and the payload.
//!
//! | at | bytes | field | write | read | reply | notify | close |
//! |---:|---:|---|---|---|---|---|---|
//! | 0 | 1 | kind | 1 | 2 | 3 | 4 | 5 |
//! | 1 | 1 | flags | bit 0: there is an immediate | 0 | 0 | 0 | 0 |
//! | 2 | 2 | pages | 0: a span | 0: a span | 0 | 0 | 0 |
//! | 4 | 4 | word | the immediate, or 0 | number of the request | number of the request | the immediate | 0 |
//! | 8 | 4 | grant | index and generation | index and generation | 0 | 0 | 0 |
//! | 12 | 4 | region | of the receiver | of the receiver | 0 | 0 | 0 |
//! | 16 | 8 | offset | in the region | in the region | 0 | 0 | 0 |
//! | 24 | 8 | stride | 0 in a span | 0 in a span | 0 | 0 | 0 |
//! | 32 | 8 | piece bytes | of each page, or of the span | as in a write | of the whole payload | 0 | 0 |
//!
//! The payload of a write is its pieces in the order of the list; that of a reply, the pieces of the request in
//! the order of its list. The other kinds have none.

use crossdock_transport::{DownCause, GrantId};
use subtle::ConstantTimeEq;

/// Length of a frame's head.
pub(crate) const HEAD_BYTES: usize = 40;
/// The most pages one frame lists. A frame's pieces, its head and what follows fit one `readv`.
pub(crate) const FRAME_PAGES_MAX: usize = 512;
/// The longest prologue of a payload.
pub(crate) const PROLOGUE_BYTES_MAX: usize = HEAD_BYTES + 4 * FRAME_PAGES_MAX;
/// Length of the first message of a connection.
pub(crate) const HELLO_BYTES: usize = 96;

/// A name that only the two ends of a lane know.
pub(crate) type Cookie = [u8; 16];

/// One frame, without its list and payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// The payload goes to this place of the receiver's memory; then the immediate is told.
    Write { extent: Extent, imm: Option<u32> },
    /// The receiver answers with these bytes of its memory.
    Read { extent: Extent, request: u32 },
    /// The bytes of the oldest request that has no reply yet.
    Reply { request: u32, bytes: u64 },
    /// An immediate without bytes.
    Notify { imm: u32 },
    /// Nothing follows.
    Close,
}

/// Where in the receiver's memory, and by which right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub grant: GrantId,
    pub region: u32,
    pub offset: u64,
    pub stride_bytes: u64,
    pub piece_bytes: u64,
    /// Length of the list; zero for a span.
    pub pages: u16,
}

impl Extent {
    /// How many bytes the pieces have together. A decoded extent does not overflow.
    pub fn bytes(&self) -> u64 {
        self.piece_bytes * u64::from(self.pages.max(1))
    }
}

impl Frame {
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        let mut put = |kind: u8, flags: u8, word: u32, extent: Option<&Extent>, bytes: u64| {
            head[0] = kind;
            head[1] = flags;
            head[4..8].copy_from_slice(&word.to_le_bytes());
            if let Some(extent) = extent {
                head[2..4].copy_from_slice(&extent.pages.to_le_bytes());
                head[8..12].copy_from_slice(&extent.grant.bits().to_le_bytes());
                head[12..16].copy_from_slice(&extent.region.to_le_bytes());
                head[16..24].copy_from_slice(&extent.offset.to_le_bytes());
                head[24..32].copy_from_slice(&extent.stride_bytes.to_le_bytes());
            }
            head[32..40].copy_from_slice(&bytes.to_le_bytes());
        };
        match self {
            Frame::Write { extent, imm: None } => put(WRITE, 0, 0, Some(extent), extent.piece_bytes),
            Frame::Write { extent, imm: Some(imm) } => {
                put(WRITE, WITH_IMM, *imm, Some(extent), extent.piece_bytes);
            }
            Frame::Read { extent, request } => put(READ, 0, *request, Some(extent), extent.piece_bytes),
            Frame::Reply { request, bytes } => put(REPLY, 0, *request, None, *bytes),
            Frame::Notify { imm } => put(NOTIFY, 0, *imm, None, 0),
            Frame::Close => put(CLOSE, 0, 0, None, 0),
        }
        head
    }

    /// Reads a head, and refuses whatever an honest peer does not send.
    pub fn decode(head: &[u8; HEAD_BYTES]) -> Result<Frame, DownCause> {
        let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let (kind, flags, pages, word) = (head[0], head[1], u16_at(2), u32_at(4));
        let extent = || {
            let extent = Extent {
                grant: GrantId::from_bits(u32_at(8)),
                region: u32_at(12),
                offset: u64_at(16),
                stride_bytes: u64_at(24),
                piece_bytes: u64_at(32),
                pages,
            };
            if usize::from(pages) > FRAME_PAGES_MAX {
                return Err(misbehaved("a frame with too many pages"));
            }
            if u32_at(8) != extent.grant.bits() || (pages == 0 && extent.stride_bytes != 0) {
                return Err(misbehaved("a frame with bits that have no meaning"));
            }
            if extent.piece_bytes == 0 || extent.piece_bytes.checked_mul(u64::from(pages.max(1))).is_none() {
                return Err(misbehaved("a frame of impossible length"));
            }
            Ok(extent)
        };
        let (frame, meaningful) = match (kind, flags) {
            (WRITE, 0) => (Frame::Write { extent: extent()?, imm: None }, word == 0),
            (WRITE, WITH_IMM) => (Frame::Write { extent: extent()?, imm: Some(word) }, true),
            (READ, 0) => (Frame::Read { extent: extent()?, request: word }, true),
            (REPLY, 0) => {
                (Frame::Reply { request: word, bytes: u64_at(32) }, pages == 0 && zero(&head[8..32]))
            }
            (NOTIFY, 0) => (Frame::Notify { imm: word }, pages == 0 && zero(&head[8..])),
            (CLOSE, 0) => (Frame::Close, zero(&head[2..])),
            _ => return Err(misbehaved("a frame of unknown kind")),
        };
        if !meaningful {
            return Err(misbehaved("a frame with bits that have no meaning"));
        }
        Ok(frame)
    }

    /// Length of the list that follows the head.
    pub fn list_bytes(&self) -> usize {
        match self {
            Frame::Write { extent, .. } | Frame::Read { extent, .. } => 4 * usize::from(extent.pages),
            _ => 0,
        }
    }
}

/// The first message of each direction of a connection.
///
/// | at | bytes | field |
/// |---:|---:|---|
/// | 0 | 8 | `"xdlane\0\1"` |
/// | 8 | 4 | 0: welcome; 1: your tag is wrong (from the end that was dialled only; the tag is then zero) |
/// | 12 | 4 | how many read requests this end keeps without having answered |
/// | 16 | 16 | cookie of the sending end |
/// | 32 | 16 | cookie of the receiving end |
/// | 48 | 32 | tag of the sending end |
/// | 80 | 8 | nonce of the sending port, the one in its keys |
/// | 88 | 8 | 0 |
#[derive(Clone, Copy)]
pub(crate) struct Hello {
    pub welcome: bool,
    pub requests_max: u32,
    pub from: Cookie,
    pub to: Cookie,
    pub tag: [u8; 32],
    pub nonce: u64,
}

impl Hello {
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(HELLO_MAGIC);
        bytes[8..12].copy_from_slice(&u32::from(!self.welcome).to_le_bytes());
        bytes[12..16].copy_from_slice(&self.requests_max.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.from);
        bytes[32..48].copy_from_slice(&self.to);
        bytes[48..80].copy_from_slice(&self.tag);
        bytes[80..88].copy_from_slice(&self.nonce.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, DownCause> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let verdict = u32_at(8);
        if &bytes[..8] != HELLO_MAGIC || verdict > 1 || !zero(&bytes[88..]) {
            return Err(misbehaved("a greeting of another protocol"));
        }
        Ok(Hello {
            welcome: verdict == 0,
            requests_max: u32_at(12),
            from: bytes[16..32].try_into().expect("sixteen bytes"),
            to: bytes[32..48].try_into().expect("sixteen bytes"),
            tag: bytes[48..80].try_into().expect("32 bytes"),
            nonce: u64::from_le_bytes(bytes[80..88].try_into().expect("eight bytes")),
        })
    }

    /// Whether the sender showed this tag. The time does not depend on where the two differ.
    pub fn shows(&self, tag: &[u8; 32]) -> bool {
        bool::from(self.tag.ct_eq(tag))
    }
}

/// The end of a lane whose peer broke the rules.
pub(crate) fn misbehaved(what: &'static str) -> DownCause {
    DownCause::PeerMisbehaved { what }
}

fn zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

const HELLO_MAGIC: &[u8; 8] = b"xdlane\0\x01";
const WRITE: u8 = 1;
const READ: u8 = 2;
const REPLY: u8 = 3;
const NOTIFY: u8 = 4;
const CLOSE: u8 = 5;
const WITH_IMM: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extents() -> impl Strategy<Value = Extent> {
        (any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>(), 1..=u64::MAX / 512, 0..=512u16).prop_map(
            |(grant, region, offset, stride_bytes, piece_bytes, pages)| Extent {
                grant: GrantId::from_bits(grant),
                region,
                offset,
                stride_bytes: if pages == 0 { 0 } else { stride_bytes },
                piece_bytes,
                pages,
            },
        )
    }

    fn frames() -> impl Strategy<Value = Frame> {
        prop_oneof![
            (extents(), any::<Option<u32>>()).prop_map(|(extent, imm)| Frame::Write { extent, imm }),
            (extents(), any::<u32>()).prop_map(|(extent, request)| Frame::Read { extent, request }),
            (any::<u32>(), any::<u64>()).prop_map(|(request, bytes)| Frame::Reply { request, bytes }),
            any::<u32>().prop_map(|imm| Frame::Notify { imm }),
            Just(Frame::Close),
        ]
    }

    proptest! {
        #[test]
        fn a_frame_is_read_as_it_was_written(frame in frames()) {
            prop_assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
        }

        /// Whatever is accepted is written back bit by bit: no two heads mean the same.
        #[test]
        fn any_bytes_are_refused_or_mean_one_frame(
            frame in frames(),
            changes in prop::collection::vec((0..HEAD_BYTES, any::<u8>()), 0..6),
        ) {
            let mut head = frame.encode();
            for (at, byte) in changes {
                head[at] = byte;
            }
            if let Ok(read) = Frame::decode(&head) {
                prop_assert_eq!(read.encode(), head);
                prop_assert!(read.list_bytes() + HEAD_BYTES <= PROLOGUE_BYTES_MAX);
            }
        }

        #[test]
        fn random_heads_do_no_harm(head in any::<[u8; HEAD_BYTES]>()) {
            if let Ok(read) = Frame::decode(&head) {
                prop_assert_eq!(read.encode(), head);
            }
        }

        #[test]
        fn a_hello_is_read_as_it_was_written(
            welcome: bool, requests_max: u32, from: [u8; 16], to: [u8; 16], tag: [u8; 32], nonce: u64,
        ) {
            let bytes = Hello { welcome, requests_max, from, to, tag, nonce }.encode();
            let read = Hello::decode(&bytes).unwrap();
            prop_assert_eq!(read.encode(), bytes);
            prop_assert!(read.shows(&tag));
            let mut other = tag;
            other[31] ^= 1;
            prop_assert!(!read.shows(&other));
        }
    }

    #[test]
    fn greetings_of_others_are_refused() {
        let good =
            Hello { welcome: true, requests_max: 1, from: [1; 16], to: [2; 16], tag: [3; 32], nonce: 4 };
        for at in (0..12).chain(88..96) {
            let mut bytes = good.encode();
            bytes[at] ^= 0x80;
            assert!(Hello::decode(&bytes).is_err(), "byte {at}");
        }
    }
}
