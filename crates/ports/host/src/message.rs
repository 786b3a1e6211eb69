//! What two ports tell each other over the Unix socket of a lane. One message is one packet.
//!
//! | message | with | meaning |
//! |---|---|---|
//! | `Hello` | doorbell | first, from the end that dials |
//! | `Welcome` | doorbell, rings | the answer: the lane's ends know each other |
//! | `Region` | what its form says | a region that keys can name; all that exist come before `Announced` |
//! | `Announced` | | the sender is ready: the receiver's lane is up |
//! | `Retire` | | the region is deregistered: forget it, unmap it |
//! | `Closed` | | the sender touches the receiver's memory no more, and never will on this lane |

use std::ops::Deref;

use crate::address::Secret;
use crate::medium::OfferForm;

/// One packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Hello(Greeting),
    Welcome(Greeting),
    Region { number: u32, bytes: u64, offer: Described },
    Announced,
    Retire { number: u32 },
    Closed,
}

/// What the ends of a lane tell each other first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Greeting {
    /// The sender's end of the lane.
    pub(crate) from: Secret,
    /// The receiver's end, as the sender was told: who does not know it has no business here.
    pub(crate) to: Secret,
    /// Proves that the sender belongs to the session.
    pub(crate) tag: [u8; 32],
    /// The sender's port, named in its keys.
    pub(crate) port: Secret,
    /// Where `port` lies in the sender's memory, so that the receiver can prove that it reaches that memory.
    pub(crate) port_address: u64,
    /// How many immediates the sender wants to have on their way.
    pub(crate) immediates: u32,
}

/// What a medium says of a region, in one of its forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Described {
    pub(crate) form: u8,
    pub(crate) payload: Payload,
    /// Whether a descriptor comes with the message.
    pub(crate) with_descriptor: bool,
}

/// The bytes by which a medium describes a region; up to [`MAX_BYTES`](Payload::MAX_BYTES).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    /// Zeros behind the end.
    bytes: [u8; Payload::MAX_BYTES],
    end: usize,
}

impl Payload {
    /// No payload is longer.
    pub const MAX_BYTES: usize = 96;

    /// A payload of these bytes.
    ///
    /// # Panics
    /// If they are too many.
    pub fn new(bytes: &[u8]) -> Self {
        let mut payload = Self { bytes: [0; Self::MAX_BYTES], end: bytes.len() };
        payload.bytes[..bytes.len()].copy_from_slice(bytes);
        payload
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.end]
    }
}

impl std::fmt::Debug for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Payload({} bytes)", self.end)
    }
}

impl Message {
    pub(crate) fn encode(&self) -> Writer {
        let mut bytes = Writer::default();
        match self {
            Self::Hello(greeting) => greeting.encode(HELLO, &mut bytes),
            Self::Welcome(greeting) => greeting.encode(WELCOME, &mut bytes),
            Self::Region { number, bytes: length, offer } => {
                bytes.put(&[REGION, offer.form]);
                bytes.put(&number.to_le_bytes());
                bytes.put(&length.to_le_bytes());
                bytes.put(&offer.payload);
            }
            Self::Announced => bytes.put(&[ANNOUNCED]),
            Self::Retire { number } => {
                bytes.put(&[RETIRE]);
                bytes.put(&number.to_le_bytes());
            }
            Self::Closed => bytes.put(&[CLOSED]),
        }
        bytes
    }

    /// Reads a packet of a medium with these forms of offers; `None` if it is none of ours.
    pub(crate) fn decode(packet: &[u8], forms: &[OfferForm]) -> Option<Self> {
        let mut bytes = Reader::new(packet);
        let [kind] = bytes.take()?;
        let message = match kind {
            HELLO => Self::Hello(Greeting::decode(&mut bytes)?),
            WELCOME => Self::Welcome(Greeting::decode(&mut bytes)?),
            REGION => {
                let [form] = bytes.take()?;
                let form = forms.iter().find(|known| known.number == form)?;
                let number = u32::from_le_bytes(bytes.take()?);
                let length = u64::from_le_bytes(bytes.take()?);
                let payload = Payload::new(bytes.take_slice(form.payload_bytes)?);
                let offer = Described { form: form.number, payload, with_descriptor: form.with_descriptor };
                Self::Region { number, bytes: length, offer }
            }
            ANNOUNCED => Self::Announced,
            RETIRE => Self::Retire { number: u32::from_le_bytes(bytes.take()?) },
            CLOSED => Self::Closed,
            _ => return None,
        };
        bytes.is_at_end().then_some(message)
    }

    /// How many descriptors come with it.
    pub(crate) fn descriptors(&self) -> usize {
        match self {
            Self::Hello(_) | Self::Region { offer: Described { with_descriptor: true, .. }, .. } => 1,
            Self::Welcome(_) => 2,
            _ => 0,
        }
    }
}

impl Greeting {
    fn encode(&self, kind: u8, bytes: &mut Writer) {
        bytes.put(&[kind]);
        bytes.put(&self.from);
        bytes.put(&self.to);
        bytes.put(&self.tag);
        bytes.put(&self.port);
        bytes.put(&self.port_address.to_le_bytes());
        bytes.put(&self.immediates.to_le_bytes());
    }

    fn decode(bytes: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            from: bytes.take()?,
            to: bytes.take()?,
            tag: bytes.take()?,
            port: bytes.take()?,
            port_address: u64::from_le_bytes(bytes.take()?),
            immediates: u32::from_le_bytes(bytes.take()?),
        })
    }
}

/// A packet being written.
pub(crate) struct Writer {
    bytes: [u8; MAX_BYTES],
    end: usize,
}

impl Default for Writer {
    fn default() -> Self {
        Self { bytes: [0; MAX_BYTES], end: 0 }
    }
}

impl Writer {
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.end..][..bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    pub(crate) fn written(&self) -> &[u8] {
        &self.bytes[..self.end]
    }
}

/// A packet being read.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(crate) fn take_slice(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.0.is_empty()
    }
}

/// No packet is longer.
pub(crate) const MAX_BYTES: usize = 128;
/// No packet brings more descriptors.
pub(crate) const MAX_DESCRIPTORS: usize = 2;

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const REGION: u8 = 3;
const ANNOUNCED: u8 = 4;
const RETIRE: u8 = 5;
const CLOSED: u8 = 6;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FORMS: &[OfferForm] = &[
        OfferForm { number: 0, payload_bytes: 8, with_descriptor: true },
        OfferForm { number: 1, payload_bytes: 0, with_descriptor: false },
        OfferForm { number: 7, payload_bytes: Payload::MAX_BYTES, with_descriptor: false },
    ];

    fn greeting() -> impl Strategy<Value = Greeting> {
        (any::<Secret>(), any::<Secret>(), any::<[u8; 32]>(), any::<Secret>(), any::<u64>(), any::<u32>())
            .prop_map(|(from, to, tag, port, port_address, immediates)| Greeting {
                from,
                to,
                tag,
                port,
                port_address,
                immediates,
            })
    }

    fn message() -> impl Strategy<Value = Message> {
        let offer = (0..FORMS.len(), any::<[u8; Payload::MAX_BYTES]>()).prop_map(|(at, bytes)| {
            let OfferForm { number, payload_bytes, with_descriptor } = FORMS[at];
            Described { form: number, payload: Payload::new(&bytes[..payload_bytes]), with_descriptor }
        });
        prop_oneof![
            greeting().prop_map(Message::Hello),
            greeting().prop_map(Message::Welcome),
            (any::<u32>(), any::<u64>(), offer).prop_map(|(number, bytes, offer)| Message::Region {
                number,
                bytes,
                offer
            }),
            Just(Message::Announced),
            any::<u32>().prop_map(|number| Message::Retire { number }),
            Just(Message::Closed),
        ]
    }

    /// Two ports of different builds have to understand each other: these are the bytes of docs/wire-shm.md.
    #[test]
    fn packets_are_as_they_always_were() {
        let region = |form, address: u64, with_descriptor| {
            let offer = Described { form, payload: Payload::new(&address.to_le_bytes()), with_descriptor };
            Message::Region { number: 0x0102_0304, bytes: 0x1112_1314_1516_1718, offer }
        };
        let told = [4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11];
        let shared = [&[3, 0][..], &told, &[0; 8]].concat();
        assert_eq!(region(0, 0, true).encode().written(), shared);
        let private = [&[3, 1][..], &told, &[8, 7, 6, 5, 4, 3, 2, 1]].concat();
        assert_eq!(region(1, 0x0102_0304_0506_0708, false).encode().written(), private);
        assert_eq!(Message::Announced.encode().written(), [4]);
        assert_eq!(Message::Retire { number: 0x0102_0304 }.encode().written(), [5, 4, 3, 2, 1]);
        assert_eq!(Message::Closed.encode().written(), [6]);
        let greeting = Greeting {
            from: [1; 16],
            to: [2; 16],
            tag: [3; 32],
            port: [4; 16],
            port_address: 0x0102_0304_0506_0708,
            immediates: 0x0102_0304,
        };
        let said =
            [&[1; 16][..], &[2; 16], &[3; 32], &[4; 16], &[8, 7, 6, 5, 4, 3, 2, 1], &[4, 3, 2, 1]].concat();
        for (kind, message) in [(1, Message::Hello(greeting)), (2, Message::Welcome(greeting))] {
            assert_eq!(message.encode().written(), [&[kind][..], &said].concat());
        }
    }

    proptest! {
        #[test]
        fn messages_survive_the_journey(message in message()) {
            prop_assert_eq!(Message::decode(message.encode().written(), FORMS), Some(message));
        }

        #[test]
        fn a_message_of_another_length_is_refused(message in message(), cut in 0usize..MAX_BYTES) {
            let packet = message.encode();
            let mut bytes = packet.written().to_vec();
            bytes.push(0);
            prop_assert_eq!(Message::decode(&bytes, FORMS), None);
            bytes.pop();
            bytes.truncate(cut);
            if bytes.len() < packet.written().len() {
                prop_assert_eq!(Message::decode(&bytes, FORMS), None);
            }
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..MAX_BYTES)) {
            if let Some(message) = Message::decode(&bytes, FORMS) {
                prop_assert!(message.descriptors() <= MAX_DESCRIPTORS);
            }
        }
    }
}
