//! Control messages as bytes: each has one form, and no bytes at all do harm.

use crossdock_proto::{
    About, CancelWhy, DecodeError, Difference, Fingerprint, Identity, Message, RailOffer, Refusal,
    RegionOffer, Released, RoleKind, RoomName,
};
use crossdock_transport::{Access, GrantId, LaneAddress, RemoteKey};
use proptest::prelude::*;

use crate::world::Chance;

const FROM: Identity = Identity { node: 0x0102_0304_0506_0708, incarnation: 0x1112_1314_1516_1718 };
const ROOM: RoomName = RoomName { room: 7, use_count: 1 };

fn about() -> About {
    About {
        name: "decode-3".to_string(),
        nonce: [9; 32],
        auth: true,
        fingerprint: Fingerprint::new([
            ("dtype".to_string(), "bf16".to_string()),
            ("model".to_string(), "modèle".to_string()),
        ]),
        rails: vec![
            RailOffer { kind: "shm".to_string(), reach: "host:1000".to_string(), bytes_per_second: 10 },
            RailOffer { kind: "tcp".to_string(), reach: String::new(), bytes_per_second: u64::MAX },
        ],
        lanes_per_rail: 2,
        pulse_address: "10.0.0.1:7000".to_string(),
        heartbeat_ns: 200_000_000,
    }
}

/// Messages of every kind, with full and with empty lists.
pub fn corpus() -> Vec<Message> {
    let grant = GrantId::new(5, 3);
    let refusals = [
        Refusal::Version { here_min: 1, here_max: 2, there_min: 3, there_max: 4 },
        Refusal::NotAuthentic,
        Refusal::AuthMismatch,
        Refusal::Fingerprint(vec![
            Difference { key: "a".into(), ours: Some("1".into()), theirs: None },
            Difference { key: "b".into(), ours: None, theirs: Some(String::new()) },
        ]),
        Refusal::NoRail { here: "shm".into(), there: "tcp, verbs".into() },
        Refusal::Busy,
        Refusal::Duplicate,
        Refusal::SameNode,
    ];
    let whys = [
        CancelWhy::Cancelled,
        CancelWhy::Expired,
        CancelWhy::Busy,
        CancelWhy::Failed,
        CancelWhy::Corrupt,
        CancelWhy::Mismatch,
    ];
    let roles = [RoleKind::Receiving, RoleKind::Sending, RoleKind::Fetching, RoleKind::Serving];
    let mut corpus = vec![
        Message::Hello { version_min: 1, version_max: 1, about: about() },
        Message::Welcome { version: 1, about: about(), proof: [8; 32] },
        Message::Prove { proof: [7; 32] },
        Message::Setup { lanes: Vec::new(), regions: Vec::new(), app: Vec::new(), held: Vec::new() },
        Message::Setup {
            lanes: vec![
                (0, LaneAddress::new(&[1, 2, 3]).unwrap()),
                (15, LaneAddress::new(&[4; 256]).unwrap()),
            ],
            regions: vec![RegionOffer {
                region: 2,
                bytes: 1 << 40,
                keys: vec![(0, RemoteKey::new(b"key").unwrap()), (1, RemoteKey::new(&[]).unwrap())],
            }],
            app: vec![1, 2, 3],
            held: vec![grant, GrantId::new(GrantId::INDICES - 1, GrantId::GENERATIONS - 1)],
        },
        Message::Ready,
        Message::Goodbye,
        Message::Restart,
        Message::Ping { stamp: 1 },
        Message::Pong { stamp: u64::MAX },
        Message::LaneLost { slot: 0 },
        Message::Want { room: ROOM, duration_ns: 9, params: b"ask".to_vec() },
        Message::Regrant { room: ROOM, attempt: 1, grant },
        Message::Finish { room: ROOM, attempt: 0, arrivals: vec![1, 0, 3], aux: b"aux".to_vec() },
        Message::Delivered { room: ROOM },
        Message::Release { released: Vec::new(), delivered: false },
        Message::Release { released: vec![Released { grant, down_lanes: 0x8001 }], delivered: true },
    ];
    for access in [Access::Read, Access::Write] {
        let (params, pages) = (b"params".to_vec(), vec![3, 1, 2]);
        corpus.push(Message::Grant {
            room: ROOM,
            access,
            attempt: 0,
            grant,
            duration_ns: 1_000_000_000,
            params,
            pages,
        });
    }
    corpus.extend(refusals.map(|refusal| Message::Refuse { refusal }));
    corpus.extend(roles.map(|from| Message::Cancel { room: ROOM, from, why: CancelWhy::Cancelled }));
    corpus.extend(whys.map(|why| Message::Cancel { room: ROOM, from: RoleKind::Receiving, why }));
    corpus
}

pub fn encoded(message: &Message) -> Vec<u8> {
    let mut frame = Vec::new();
    message.encode(FROM, &mut frame);
    frame
}

/// What holds for any bytes.
fn check(frame: &[u8]) -> bool {
    let Ok((from, message)) = Message::decode(frame) else { return false };
    let mut again = Vec::new();
    message.encode(from, &mut again);
    assert_eq!(again, frame, "{message:?} has two forms");
    true
}

/// A frame with something wrong in it, as wires, bugs and attackers make them.
pub fn mutated(corpus: &[Vec<u8>], chance: &mut Chance) -> Vec<u8> {
    let mut frame = chance.one_of(corpus).clone();
    for _ in 0..=chance.below(3) {
        let at = chance.below(frame.len().max(1));
        match chance.below(7) {
            0 => frame.truncate(at),
            1 => frame.extend((0..chance.below(9)).map(|n| n as u8)),
            2 => {
                if let Some(byte) = frame.get_mut(at) {
                    *byte ^= 1 << chance.below(8);
                }
            }
            3 => {
                if let Some(byte) = frame.get_mut(at) {
                    *byte = [0, 1, 2, 0x7f, 0x80, 0xff][chance.below(6)];
                }
            }
            // Numbers and counts at their limits.
            4 => {
                let value = [0, 1, 255, 1 << 18, 1 << 30, u32::MAX][chance.below(6)];
                for (byte, value) in frame.iter_mut().skip(at).zip(value.to_le_bytes()) {
                    *byte = value;
                }
            }
            5 => drop(frame.splice(at..at, chance.one_of(corpus).iter().copied().take(12)).count()),
            _ => {
                let other = chance.one_of(corpus);
                frame.truncate(at);
                frame.extend_from_slice(&other[chance.below(other.len())..]);
            }
        }
    }
    frame
}

#[test]
fn every_kind_is_read_as_it_was_written() {
    let mut kinds = std::collections::BTreeSet::new();
    for message in corpus() {
        let frame = encoded(&message);
        kinds.insert(frame[2]);
        assert_eq!(Message::decode(&frame), Ok((FROM, message)));
    }
    assert_eq!(kinds, (1..=18).collect());
}

/// The form that `docs/wire.md` specifies.
#[test]
fn the_form_is_the_table() {
    let head = [
        &[0x0c, 0xcd][..],
        &[13, 0],
        &[8, 7, 6, 5, 4, 3, 2, 1],
        &[0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11],
    ]
    .concat();
    let grant = Message::Grant {
        room: RoomName { room: 0x0a0b, use_count: 2 },
        access: Access::Write,
        attempt: 3,
        grant: GrantId::new(1, 4),
        duration_ns: 5,
        params: vec![6, 7],
        pages: vec![8, 9],
    };
    let expected = [
        &head[..],
        &[0x0b, 0x0a, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0],
        &[1],
        &[3, 0, 0, 0],
        &[4, 0x10, 0, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0],
        &[2, 0, 0, 0, 6, 7],
        &[2, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0],
    ]
    .concat();
    assert_eq!(encoded(&grant), expected);
    let cancel = Message::Cancel { room: ROOM, from: RoleKind::Serving, why: CancelWhy::Mismatch };
    assert_eq!(encoded(&cancel)[20..], [7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3, 5]);
    let released = vec![Released { grant: GrantId::new(1, 4), down_lanes: 0x0102 }];
    let release = Message::Release { released, delivered: true };
    assert_eq!(encoded(&release)[20..], [1, 1, 0, 0, 0, 4, 0x10, 0, 0, 2, 1]);
}

#[test]
fn every_cut_and_every_extra_byte_is_refused() {
    for message in corpus() {
        let frame = encoded(&message);
        for cut in 0..frame.len() {
            let error = Message::decode(&frame[..cut]).unwrap_err();
            assert!(matches!(error, DecodeError::Truncated { .. }), "{message:?} cut at {cut}: {error}");
        }
        let longer = [&frame[..], &[0]].concat();
        assert_eq!(Message::decode(&longer), Err(DecodeError::Trailing { bytes: 1 }));
    }
}

/// The claim of four thousand million entries is refused for want of their bytes, not by an allocation.
#[test]
fn a_count_is_no_reason_to_reserve_memory() {
    let mut refused = 0;
    for message in corpus() {
        let frame = encoded(&message);
        for at in 20..frame.len().saturating_sub(3) {
            let mut large = frame.clone();
            large[at..at + 4].fill(0xff);
            refused += u32::from(!check(&large));
        }
    }
    assert!(refused > 300, "{refused} refused: the corpus has lost its lists");
}

#[test]
fn what_has_no_meaning_is_refused_by_name() {
    let with = |message: Message, at: usize, value: u8| {
        let mut frame = encoded(&message);
        frame[at] = value;
        Message::decode(&frame).unwrap_err()
    };
    let bad = |field, value| DecodeError::BadValue { field, value };
    assert_eq!(with(Message::Ready, 0, 0), bad("magic", 0xcd00));
    assert_eq!(with(Message::Ready, 2, 19), bad("kind", 19));
    let cancel = Message::Cancel { room: ROOM, from: RoleKind::Sending, why: CancelWhy::Failed };
    assert_eq!(with(cancel.clone(), 32, 4), bad("role", 4));
    assert_eq!(with(cancel, 33, 6), bad("why", 6));
    let regrant = Message::Regrant { room: ROOM, attempt: 1, grant: GrantId::new(0, 0) };
    assert_eq!(with(regrant, 39, 0x40), bad("grant", 0x4000_0000));
    assert_eq!(with(Message::Release { released: Vec::new(), delivered: true }, 20, 2), bad("delivered", 2));
    assert_eq!(with(Message::Refuse { refusal: Refusal::Busy }, 20, 9), bad("refusal", 9));
    let lanes = vec![(3, LaneAddress::new(&[]).unwrap())];
    let setup = Message::Setup { lanes, regions: Vec::new(), app: Vec::new(), held: Vec::new() };
    assert_eq!(with(setup, 24, 16), bad("slot", 16));
    // A fingerprint has one order, and names each value once.
    let mut hello = encoded(&Message::Hello { version_min: 1, version_max: 1, about: about() });
    let key = hello.windows(5).position(|bytes| bytes == b"dtype").unwrap();
    for (first, is_read) in [(b'm', true), (b'n', false)] {
        hello[key..key + 5].copy_from_slice(&[first, b'o', b'd', b'e', b'k']);
        assert_eq!(Message::decode(&hello).is_ok(), is_read);
    }
    hello[key..key + 5].copy_from_slice(b"model");
    assert_eq!(Message::decode(&hello), Err(bad("fingerprint", 2)));
    let name = hello.windows(6).position(|bytes| bytes == b"decode").unwrap();
    hello[name] = 0xff;
    assert_eq!(Message::decode(&hello), Err(DecodeError::NotText { field: "name" }));
}

#[test]
fn a_hundred_thousand_frames_with_something_wrong() {
    let corpus: Vec<Vec<u8>> = corpus().iter().map(encoded).collect();
    let mut chance = Chance::new(1);
    let read = (0..100_000).filter(|_| check(&mutated(&corpus, &mut chance))).count();
    assert!((1_000..90_000).contains(&read), "{read} were read: the mutations are too wild, or too tame");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn arbitrary_bytes_after_a_good_beginning(kind in 0u8..20, body in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut frame = encoded(&Message::Ready);
        frame[2] = kind;
        frame.extend(body);
        check(&frame);
    }
}
