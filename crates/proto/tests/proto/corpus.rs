//! Messages of every kind, and what goes wrong with their bytes. The tests and the fuzzer share them.

use crossdock_proto::{
    About, CancelWhy, Difference, Fingerprint, Identity, Message, RailOffer, Refusal, RegionOffer, Released,
    RoleKind, RoomName, RoomOnWire,
};
use crossdock_transport::{Access, GrantId, LaneAddress, RemoteKey};

use crate::world::{Chance, on_wire};

pub const FROM: Identity = Identity { node: 0x0102_0304_0506_0708, incarnation: 0x1112_1314_1516_1718 };
pub const ROOM: RoomOnWire = RoomOnWire { name: RoomName { room: 7, use_count: 1, share: 5 }, serial: 3 };

pub fn about() -> About {
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
        Message::Hello {
            version_min: 0,
            version_max: u16::MAX,
            about: About { heartbeat_ns: u64::MAX, lanes_per_rail: u8::MAX, ..about() },
        },
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
        Message::LaneLost { slot: 1 },
        Message::LaneOffer { slot: 1, address: LaneAddress::new(&[1, 2, 3]).unwrap() },
        Message::LaneOffer { slot: u8::MAX, address: LaneAddress::new(&[4; 256]).unwrap() },
        Message::LaneAnswer { slot: 1, address: LaneAddress::new(&[]).unwrap() },
        Message::LaneReady { slot: 1 },
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

/// One of the messages of the corpus, as the peer would say it, about one of the rooms that are open: there, room N is the N-th of
/// its decode side.
pub fn said(message: &Message, peer: Identity, number: u64) -> Vec<u8> {
    let mut message = message.clone();
    match &mut message {
        Message::Want { room, .. }
        | Message::Grant { room, .. }
        | Message::Regrant { room, .. }
        | Message::Finish { room, .. }
        | Message::Delivered { room }
        | Message::Cancel { room, .. } => *room = on_wire(number, number as u32),
        _ => {}
    }
    let mut frame = Vec::new();
    message.encode(peer, &mut frame);
    frame
}
