//! Whatever a peer sends, this side neither panics nor lets a byte land where it must not.

use std::io::Write;

use crate::common::*;
use crate::raw::{Head, Raw};
use crossdock_transport::{Access, DownCause, GrantId};
use proptest::prelude::*;

const GRANT: u32 = 5 << 12 | 7;
/// Pages of 256 bytes that the peer may write; it may read the others.
const WRITABLE: [u32; 4] = [1, 2, 5, 9];
const READABLE: u32 = 6 << 12 | 7;

/// Frames of an honest peer, as bytes.
fn honest() -> impl Strategy<Value = Vec<u8>> {
    let page = prop::sample::select(&WRITABLE[..]);
    let span = (page.clone(), 1..=256u64, any::<u32>()).prop_map(|(page, bytes, imm)| {
        let mut frame = Head::write(GrantId::from_bits(GRANT), 0, u64::from(page) * 256, bytes, imm).bytes();
        frame.extend(pattern(u64::from(imm), bytes as usize));
        frame
    });
    let pages = (prop::collection::vec(page, 1..20), any::<bool>()).prop_map(|(pages, told)| {
        let head = Head {
            flags: told.into(),
            pages: pages.len() as u16,
            stride: 256,
            piece: 256,
            ..Head::write(GrantId::from_bits(GRANT), 0, 0, 0, 0)
        };
        let mut frame = head.bytes();
        frame.extend(pages.iter().flat_map(|page| page.to_le_bytes()));
        frame.extend(pattern(9, 256 * pages.len()));
        frame
    });
    let read = any::<u32>().prop_map(|number| {
        let head = Head::write(GrantId::from_bits(READABLE), 0, 3 * 256, 256, number);
        Head { kind: Head::READ, flags: 0, ..head }.bytes()
    });
    let notify = any::<u32>().prop_map(|imm| Head::notify(imm).bytes());
    let stale = Just({
        let mut frame = Head::write(GrantId::from_bits(GRANT + 1), 0, 0, 100, 1).bytes();
        frame.extend([1; 100]);
        frame
    });
    prop_oneof![3 => span, 3 => pages, 1 => read, 2 => notify, 1 => stale]
}

/// Sends it all, in pieces, and hangs up. The lane must end; the rest of the memory must be as it was.
fn survive(stream: &[u8], cuts: &[usize]) -> Option<DownCause> {
    let mut raw = Raw::new(4096);
    let before = raw.end.fill(3);
    raw.end.grant_pages(GrantId::from_bits(GRANT), Access::Write, 256, &WRITABLE);
    raw.end.grant_pages(GrantId::from_bits(READABLE), Access::Read, 256, &[3, 4]);
    let mut from = 0;
    for &cut in cuts {
        let to = (from + cut).min(stream.len());
        // It fails when the lane has ended already.
        let _ = raw.socket.write_all(&stream[from..to]);
        raw.end.poll();
        from = to;
    }
    let _ = raw.socket.write_all(&stream[from..]);
    raw.socket.shutdown(std::net::Shutdown::Write).ok();
    raw.until("the lane is down", |end| end.down().is_some());
    let after = raw.end.bytes();
    for page in (0..16).filter(|page| !WRITABLE.contains(page)) {
        let range = page as usize * 256..(page as usize + 1) * 256;
        assert_eq!(after[range.clone()], before[range], "page {page} was written");
    }
    raw.end.down()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn damaged_streams_do_no_harm(
        frames in prop::collection::vec(honest(), 1..12),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
        cuts in prop::collection::vec(1usize..600, 0..6),
    ) {
        let mut stream = frames.concat();
        for (at, byte) in damage {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        survive(&stream, &cuts);
    }

    #[test]
    fn random_streams_do_no_harm(stream in prop::collection::vec(any::<u8>(), 0..400), kind in 0u8..7) {
        let mut stream = stream;
        // Most random first bytes are refused at once; these get further.
        if let Some(first) = stream.first_mut() {
            *first = kind;
        }
        survive(&stream, &[]);
    }

    #[test]
    fn honest_streams_are_understood(
        frames in prop::collection::vec(honest(), 1..30),
        cuts in prop::collection::vec(1usize..600, 0..6),
    ) {
        let end = survive(&frames.concat(), &cuts);
        prop_assert!(matches!(end, Some(DownCause::Broken { errno: 0, .. })), "{end:?}");
    }
}

#[test]
fn a_length_that_nobody_can_send_allocates_nothing() {
    let mut raw = Raw::new(4096);
    // A stale write of almost 2^64 bytes: it is discarded as it comes, and nobody waits with memory for it.
    raw.send(&Head::write(GrantId::from_bits(GRANT), 0, 0, u64::MAX, 1).bytes());
    for _ in 0..20 {
        raw.send(&[7; 100_000]);
        raw.end.poll();
    }
    assert_eq!(raw.end.events, []);
    assert_eq!(raw.end.port.counters().stale_frames, 1);
    assert!(raw.end.bytes().iter().all(|&byte| byte == 0));
}
