//! What was revoked is not written any more, and what was not granted never.

use crate::common::*;
use crate::raw::{Head, Raw};
use crossdock_memory::PageLayout;
use crossdock_transport::{
    Access, Direction, DownCause, Error, Fence, Grant, GrantId, GrantedBuffer, PeerId, Port, Shape,
};

fn misbehaved(cause: Option<DownCause>) -> bool {
    matches!(cause, Some(DownCause::PeerMisbehaved { .. }))
}

#[test]
fn a_revoke_in_the_middle_of_a_payload_is_a_fence() {
    const BYTES: u64 = 1 << 20;
    let grant = GrantId::new(3, 8);
    for first in [0, 1, 100, 40_000, 700_000, BYTES - 1] {
        let mut raw = Raw::new(BYTES as usize);
        raw.end.grant_all(grant, Access::Write, BYTES);
        raw.send(&Head::write(grant, raw.end.region.0, 0, BYTES, 5).bytes());
        raw.send(&vec![0xEE; first as usize]);
        raw.until("the first part has landed", |end| {
            end.bytes().iter().take_while(|&&byte| byte == 0xEE).count() as u64 == first
        });
        assert_eq!(raw.end.port.revoke(grant), Fence::Now);
        let before = raw.end.bytes();
        let mut socket = raw.socket.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            use std::io::Write;
            socket.write_all(&vec![0xDD; (BYTES - first) as usize]).unwrap();
            socket.write_all(&Head::notify(6).bytes()).unwrap();
        });
        raw.until("the frame behind it is told", |end| end.arrived().len() == 2);
        sender.join().unwrap();
        assert_eq!(raw.end.arrived(), [5, 6], "upper layers count by generation");
        assert_eq!(raw.end.bytes(), before, "not one byte has landed after the revoke");
        assert_eq!(raw.end.down(), None);
        assert_eq!(raw.end.port.counters().stale_frames, 1);
        assert_eq!(raw.end.port.counters().stale_bytes, BYTES - first);
    }
}

#[test]
fn pages_granted_anew_are_safe_from_the_old_grant() {
    let (old, new) = (GrantId::new(3, 8), GrantId::new(3, 9));
    let mut raw = Raw::new(8192);
    raw.end.grant_all(old, Access::Write, 4096);
    let region = raw.end.region.0;
    raw.send(&Head::write(old, region, 0, 4096, 1).bytes());
    raw.send(&[0x11; 1000]);
    raw.until("a part has landed", |end| end.bytes()[999] == 0x11);
    assert_eq!(raw.end.port.revoke(old), Fence::Now);
    raw.end.grant_all(new, Access::Write, 4096);
    raw.send(&[0x22; 3096]);
    raw.send(&Head::write(old, region, 4096, 4096, 2).bytes());
    raw.send(&[0x33; 4096]);
    raw.send(&Head::write(new, region, 4096, 10, 3).bytes());
    raw.send(&[0x44; 10]);
    raw.until("all is told", |end| end.arrived() == [1, 2, 3]);
    let mut expected = vec![0; 8192];
    expected[..1000].fill(0x11);
    expected[4096..4106].fill(0x44);
    assert_eq!(raw.end.bytes(), expected);
    assert_eq!(raw.end.port.counters().stale_frames, 2);
}

#[test]
fn a_stale_write_between_ports_is_counted_and_the_lane_lives() {
    let mut pair = Pair::new(1 << 20);
    pair.a.fill(1);
    let (old, new) = (GrantId::new(0, 1), GrantId::new(0, 2));
    pair.b.grant_all(new, Access::Write, 4096);
    let pages = shuffled(1, 256);
    let late = told(pair.pages(Direction::Write, old, 4096, &pages, &pages), Some(1), None);
    let span = told(pair.span(Direction::Write, old, (0, 0), 1 << 20), Some(2), None);
    let timely = told(pair.span(Direction::Write, new, (0, 0), 4096), Some(3), None);
    pair.post(&[late, span, timely]);
    pair.until("all is told", |pair| pair.b.arrived() == [1, 2, 3]);
    assert_eq!(pair.b.bytes()[..4096], pair.a.bytes()[..4096]);
    assert!(pair.b.bytes()[4096..].iter().all(|&byte| byte == 0));
    assert_eq!(pair.b.port.counters().stale_bytes, 2 << 20);
}

#[test]
fn what_the_grant_does_not_cover_ends_the_lane_and_lands_nowhere() {
    let grant = GrantId::new(1, 1);
    let readable = GrantId::new(2, 1);
    let foreign = GrantId::new(4, 1);
    let page = |offset: u64, bytes: u64| Head { offset, piece: bytes, ..Head::write(grant, 0, 0, 0, 1) };
    let pages = |stride: u64, piece: u64| Head { pages: 2, stride, piece, ..page(0, 0) };
    let cases: Vec<(&str, Head, Vec<u32>)> = vec![
        ("a page that is not granted", page(4096, 1), vec![]),
        ("a page and the next", page(0, 4097), vec![]),
        ("before the buffer", page(8191, 2), vec![]),
        ("beyond the region", page(1 << 16, 1), vec![]),
        ("far beyond the region", page(u64::MAX - 7, 8), vec![]),
        ("a wrap around", page(u64::MAX - 7, 16), vec![]),
        ("another region", Head { region: 1, ..page(0, 16) }, vec![]),
        ("no region", Head { region: 77, ..page(0, 16) }, vec![]),
        ("the second piece", pages(4096, 4096), vec![0, 1]),
        ("a stride that overflows", pages(u64::MAX / 2, 1), vec![0, 3]),
        ("a stride between pages", pages(2048, 4096), vec![0, 1]),
        ("a grant to read", Head { grant: readable.bits(), ..page(0, 16) }, vec![]),
        ("another peer's grant", Head { grant: foreign.bits(), ..page(0, 16) }, vec![]),
    ];
    for (what, head, list) in cases {
        let mut raw = Raw::new(1 << 16);
        let other = crossdock_memory::Memory::allocate(4096, &Default::default()).unwrap();
        raw.end.port.register(&other).unwrap();
        raw.end.grant_pages(grant, Access::Write, 4096, &[0, 2, 5]);
        raw.end.grant_all(readable, Access::Read, 4096);
        let layout = PageLayout::dense(0, 4096, 16);
        let buffers = [GrantedBuffer { region: raw.end.region, layout }];
        let others = Grant {
            id: foreign,
            peer: PeerId(PEER.0 + 1),
            access: Access::Write,
            buffers: &buffers,
            pages: &[0],
        };
        raw.end.port.grant(&others).unwrap();
        let mut bytes = head.bytes();
        bytes.extend(list.iter().flat_map(|page| page.to_le_bytes()));
        bytes.extend(vec![0xEE; 10_000]);
        raw.send(&bytes);
        raw.until(what, |end| end.down().is_some());
        assert!(misbehaved(raw.end.down()), "{what}: {:?}", raw.end.down());
        assert!(raw.end.bytes().iter().all(|&byte| byte == 0), "{what}: a byte has landed");
        assert_eq!(raw.end.arrived(), [], "{what}");
    }
}

#[test]
fn reads_need_a_grant_that_lives() {
    let (read, write, old) = (GrantId::new(0, 1), GrantId::new(1, 1), GrantId::new(2, 1));
    for (what, grant, offset) in
        [("no such page", read, 4096), ("a grant to write", write, 0), ("a grant that is gone", old, 0)]
    {
        let mut raw = Raw::new(1 << 16);
        raw.end.fill(1);
        raw.end.grant_pages(read, Access::Read, 4096, &[0]);
        raw.end.grant_all(write, Access::Write, 4096);
        raw.send(&Head { kind: Head::READ, flags: 0, ..Head::write(grant, 0, offset, 16, 0) }.bytes());
        raw.until(what, |end| end.down().is_some());
        assert!(misbehaved(raw.end.down()), "{what}");
        let mut rest = Vec::new();
        // The connection may end by a reset: what matters is that nothing came before.
        let _ = std::io::Read::read_to_end(&mut raw.socket, &mut rest);
        assert_eq!(rest, [], "{what}");
    }
}

#[test]
fn a_reader_cannot_ask_for_more_than_it_was_told() {
    let grant = GrantId::new(0, 1);
    let mut raw = Raw::new(1 << 20);
    raw.end.grant_all(grant, Access::Read, 1 << 20);
    for number in 0..200 {
        let head = Head::write(grant, 0, 0, 1 << 20, number);
        let sent =
            std::io::Write::write_all(&mut raw.socket, &Head { kind: Head::READ, flags: 0, ..head }.bytes());
        raw.end.poll();
        if sent.is_err() {
            break;
        }
    }
    raw.until("it is too much", |end| misbehaved(end.down()));
}

#[test]
fn a_reader_that_loses_its_grant_in_the_middle_loses_the_lane() {
    let grant = GrantId::new(0, 1);
    let options = crossdock_tcp::TcpOptions { send_buffer_bytes: Some(4096), ..Default::default() };
    let mut raw = Raw::with(options, 32 << 20);
    raw.end.grant_all(grant, Access::Read, 32 << 20);
    let head = Head::write(grant, 0, 0, 32 << 20, 0);
    raw.send(&Head { kind: Head::READ, flags: 0, ..head }.bytes());
    raw.until("it is being sent", |end| end.port.counters().bytes_sent > 200);
    assert_eq!(raw.end.port.deregister(raw.end.region), Err(Error::RegionInUse { by: "a grant" }));
    assert_eq!(raw.end.port.revoke(grant), Fence::Now);
    raw.until("the lane is down", |end| misbehaved(end.down()));
    assert_eq!(raw.end.port.deregister(raw.end.region), Ok(()), "nothing reads the region any more");
}

#[test]
fn a_reply_to_no_request_is_refused() {
    for (number, bytes) in [(0, 16), (1, 4096), (0, 4097), (0, u64::MAX)] {
        let mut raw = Raw::new(1 << 16);
        let key = raw.end.key.bytes().to_vec();
        let mut forged = key.clone();
        forged[16..24].copy_from_slice(&99u64.to_le_bytes());
        let forged = crossdock_transport::RemoteKey::new(&forged).unwrap();
        let remote = raw.end.port.attach(raw.end.lane, &forged).unwrap();
        let shape = Shape::Span {
            local: raw.end.region,
            local_offset: 0,
            remote: remote.id,
            remote_offset: 0,
            bytes: 4096,
        };
        let op = crossdock_transport::Op {
            direction: Direction::Read,
            grant: GrantId::new(0, 0),
            shape,
            imm: None,
            token: None,
        };
        raw.end.port.post(raw.end.lane, &[op]).unwrap();
        let reply = Head { kind: Head::REPLY, word: number, piece: bytes, ..Head::default() };
        let mut sent = reply.bytes();
        sent.extend([0xEE; 4096]);
        raw.send(&sent);
        raw.until("the lane is down", |end| misbehaved(end.down()));
        assert!(raw.end.bytes().iter().all(|&byte| byte == 0));
    }
}

#[test]
fn keys_of_other_ports_are_refused() {
    let mut pair = Pair::new(4096);
    let own = pair.a.key.clone();
    let refused = pair.a.port.attach(pair.a.lane, &own);
    assert!(matches!(refused, Err(Error::BadKey { .. })), "{refused:?}");
    let twice = pair.a.port.attach(pair.a.lane, &pair.b.key).unwrap();
    assert_eq!(twice.id, pair.b_at_a.id, "attaching twice gives the same name");
}

#[test]
fn a_region_in_use_stays() {
    let small = |options: &mut crossdock_tcp::TcpOptions| options.send_buffer_bytes = Some(4096);
    let mut pair = Pair::with(small, 4 << 20);
    let grant = GrantId::new(0, 0);
    pair.b.grant_all(grant, Access::Write, 4 << 20);
    let op = told(pair.span(Direction::Write, grant, (0, 0), 4 << 20), None, Some(1));
    let posted = pair.a.port.post(pair.a.lane, &[op]).unwrap();
    assert_eq!(posted.ops, 0, "the socket is small");
    assert_eq!(pair.a.port.deregister(pair.a.region), Err(Error::RegionInUse { by: "an op" }));
    pair.post(&[op.advance(posted.within)]);
    pair.until("it is sent", |pair| pair.a.done() == [1]);
    assert_eq!(pair.a.port.deregister(pair.a.region), Ok(()));
    let gone = pair.a.region;
    assert_eq!(pair.a.port.deregister(gone), Err(Error::UnknownRegion { side: "local", region: gone.0 }));
    assert_eq!(pair.b.port.deregister(pair.b.region), Err(Error::RegionInUse { by: "a grant" }));
    assert_eq!(pair.b.port.revoke(grant), Fence::Now);
    assert_eq!(pair.b.port.revoke(grant), Fence::Now, "nothing can land under an unknown grant");
    assert_eq!(pair.b.port.deregister(pair.b.region), Ok(()));
}
