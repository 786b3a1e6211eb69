//! Control messages as bytes: each has one form, and no bytes at all do harm.

use crossdock_proto::{CancelWhy, DecodeError, Message, Refusal, Released, RoleKind, RoomName, RoomOnWire};
use crossdock_transport::{Access, GrantId, LaneAddress};
use proptest::prelude::*;

use crate::corpus::{FROM, ROOM, about, corpus, encoded, mutated};
use crate::world::Chance;

/// What holds for any bytes.
fn check(frame: &[u8]) -> bool {
    let Ok((from, message)) = Message::decode(frame) else { return false };
    let mut again = Vec::new();
    message.encode(from, &mut again);
    assert_eq!(again, frame, "{message:?} has two forms");
    true
}

#[test]
fn every_kind_is_read_as_it_was_written() {
    let mut kinds = std::collections::BTreeSet::new();
    for message in corpus() {
        let frame = encoded(&message);
        kinds.insert(frame[2]);
        assert_eq!(Message::decode(&frame), Ok((FROM, message)));
    }
    assert_eq!(kinds, (1..=21).collect());
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
        room: RoomOnWire { name: RoomName { room: 0x0a0b, use_count: 2, share: 3 }, serial: 7 },
        access: Access::Write,
        attempt: 3,
        grant: GrantId::new(1, 4),
        duration_ns: 5,
        params: vec![6, 7],
        pages: vec![8, 9],
    };
    let expected = [
        &head[..],
        &[0x0b, 0x0a, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 7, 0, 0, 0],
        &[1],
        &[3, 0, 0, 0],
        &[4, 0x10, 0, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0],
        &[2, 0, 0, 0, 6, 7],
        &[2, 0, 0, 0, 4, 0x98],
    ]
    .concat();
    assert_eq!(encoded(&grant), expected);
    let cancel = Message::Cancel { room: ROOM, from: RoleKind::Serving, why: CancelWhy::Mismatch };
    assert_eq!(encoded(&cancel)[20..], [7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0, 3, 5]);
    let released = vec![Released { grant: GrantId::new(1, 4), down_lanes: 0x0102 }];
    let release = Message::Release { released, delivered: true };
    assert_eq!(encoded(&release)[20..], [1, 1, 0, 0, 0, 4, 0x10, 0, 0, 2, 1]);
}

/// A page list takes as many bits an id as the largest needs, or as many ids need to differ.
#[test]
fn page_lists_are_packed() {
    let lists: [(&[u32], &[u8]); 8] = [
        (&[], &[0]),
        (&[0], &[0]),
        (&[1], &[1, 1]),
        (&[0, 0, 0], &[2, 0]),
        (&[1, 0, 1, 0, 1, 0, 1, 0], &[3, 0b0100_0001, 0b0001_0000, 0b0000_0100]),
        (&[0x1_0000, 1], &[17, 0, 0, 3, 0, 0]),
        (&[u32::MAX, 5], &[32, 0xff, 0xff, 0xff, 0xff, 5, 0, 0, 0]),
        (&[0x7f, 0], &[7, 0x7f, 0]),
    ];
    for (ids, bytes) in lists {
        assert_eq!(page_list(ids)[4..], *bytes, "{ids:?}");
    }
    let bad =
        |count: u32, bytes: &[u8]| read_page_list(&[&count.to_le_bytes()[..], bytes].concat()).unwrap_err();
    let impossible = |bits| DecodeError::BadValue { field: "pages", value: bits };
    assert_eq!(bad(1, &[2, 1]), impossible(2), "wider than need be");
    assert_eq!(bad(1, &[1, 3]), impossible(1), "something behind the last id");
    assert_eq!(bad(3, &[1, 0]), impossible(1), "three ids of one bit");
    assert_eq!(bad(1, &[33, 0, 0, 0, 0, 1]), impossible(33));
    assert_eq!(bad(u32::MAX, &[31, 1]), impossible(31));
    assert_eq!(bad(u32::MAX, &[32, 1]), DecodeError::Truncated { field: "pages" });
}

/// A grant's frame up to its page list, and that, the last field.
fn grant_frame(pages: &[u32]) -> (Vec<u8>, Vec<u8>) {
    let room = RoomOnWire { name: RoomName { room: 1, use_count: 0, share: 0 }, serial: 1 };
    let (access, grant, params) = (Access::Read, GrantId::new(0, 0), Vec::new());
    let pages = pages.to_vec();
    let mut frame =
        encoded(&Message::Grant { room, access, attempt: 0, grant, duration_ns: 0, params, pages });
    let list = frame.split_off(20 + 20 + 1 + 4 + 4 + 8 + 4);
    (frame, list)
}

fn page_list(pages: &[u32]) -> Vec<u8> {
    grant_frame(pages).1
}

fn read_page_list(bytes: &[u8]) -> Result<Vec<u32>, DecodeError> {
    match Message::decode(&[&grant_frame(&[]).0, bytes].concat())?.1 {
        Message::Grant { pages, .. } => Ok(pages),
        other => panic!("{other:?}"),
    }
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
    assert_eq!(with(Message::Ready, 2, 22), bad("kind", 22));
    let cancel = Message::Cancel { room: ROOM, from: RoleKind::Sending, why: CancelWhy::Failed };
    assert_eq!(with(cancel.clone(), 40, 4), bad("role", 4));
    assert_eq!(with(cancel, 41, 6), bad("why", 6));
    let regrant = Message::Regrant { room: ROOM, attempt: 1, grant: GrantId::new(0, 0) };
    assert_eq!(with(regrant, 47, 0x40), bad("grant", 0x4000_0000));
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

    #[test]
    fn any_page_list_is_read_as_it_was_written(
        bits in 0u32..=32,
        ids in prop::collection::vec(any::<u32>(), 0..300),
    ) {
        let ids: Vec<u32> = ids.into_iter().map(|id| (u64::from(id) & ((1 << bits) - 1)) as u32).collect();
        let list = page_list(&ids);
        prop_assert!(list.len() <= 4 + 1 + 4 * ids.len());
        prop_assert_eq!(read_page_list(&list), Ok(ids));
    }

    #[test]
    fn any_bytes_are_one_page_list_or_none(count in 0u32..40, bytes in prop::collection::vec(0u8..34, 1..20)) {
        let bytes = [&count.to_le_bytes()[..], &bytes].concat();
        if let Ok(ids) = read_page_list(&bytes) {
            prop_assert_eq!(page_list(&ids), bytes);
        }
    }
}
