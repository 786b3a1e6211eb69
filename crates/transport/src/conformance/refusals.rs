//! What a port refuses: bad ops, keys, addresses and grants, with the right error and before anything has moved.

use crossdock_memory::PageLayout;

use super::Rig;
use super::stage::{Link, Stage, assert_content, content, peer_id};
use crate::{
    Access, Direction, Error, Fence, Grant, GrantId, GrantedBuffer, LaneAddress, LocalId, Op, Posted,
    RemoteId, RemoteKey, Shape, Token,
};

/// Each kind of bad op has its error. No byte moves, no immediate is sent, and the lane stays good.
pub fn bad_ops_are_refused_before_anything_moves(rig: &mut dyn Rig) {
    const BYTES: u64 = 8192;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(BYTES as usize);
    let before = [0, 1].map(|side| content(&link.regions[side].memory));
    let far = |side, end| Error::OutOfRange { side, end, region_bytes: BYTES };
    let pages = |strides: [u64; 2], local: &'static [u32], remote: &'static [u32], piece_bytes| Op {
        imm: Some(9),
        shape: Shape::Pages {
            local: link.regions[0].local,
            local_offset: 10,
            local_stride_bytes: strides[0],
            local_pages: local,
            remote: link.remotes[0],
            remote_offset: 20,
            remote_stride_bytes: strides[1],
            remote_pages: remote,
            piece_bytes,
        },
        ..link.write(0, 0, 0, 0)
    };
    let span = |local, remote| Op {
        shape: Shape::Span { local, local_offset: 0, remote, remote_offset: 0, bytes: 1 },
        ..link.write(0, 0, 0, 0)
    };
    let (no_local, no_remote) = (LocalId(u32::MAX), RemoteId(u32::MAX));
    let refused = [
        ("a local span too long", link.write(0, 1, 0, BYTES), far("local", BYTES + 1)),
        ("a remote span too long", link.write(0, 0, 1, BYTES), far("remote", BYTES + 1)),
        ("a read beyond the peer's region", link.read(0, 0, BYTES, 1), far("remote", BYTES + 1)),
        ("a read beyond the local region", link.read(0, BYTES, 0, 1), far("local", BYTES + 1)),
        ("a local page too far", pages([100, 100], &[0, 82, 5], &[0, 1, 2], 100), far("local", 8310)),
        ("a remote page too far", pages([100, 100], &[0, 1, 2], &[3, 81, 2], 100), far("remote", 8220)),
        ("pieces longer than what is left", pages([1, 1], &[0], &[0], BYTES), far("local", BYTES + 10)),
        ("a region that is not here", span(no_local, link.remotes[0]), unknown("local")),
        ("a region that is not there", span(link.regions[0].local, no_remote), unknown("remote")),
    ];
    for (what, op, error) in refused {
        let op = Op { token: Some(Token(1)), ..op };
        assert_eq!(stage.post(0, link.lanes[0], &[op]), Err(error), "{what}");
    }
    let senseless = [
        ("a span that overflows here", link.write(0, u64::MAX, 0, 1)),
        ("a span that overflows there", link.write(0, 0, u64::MAX - 3, 8)),
        ("pages that overflow by their stride", pages([u64::MAX / 2, 1], &[3], &[3], 1)),
        ("pages that overflow by their length", pages([1, 1], &[0, 1], &[0, 1], u64::MAX - 15)),
        ("lists of different lengths", pages([16, 16], &[0, 1, 2], &[0, 1], 16)),
        ("a read with an immediate", Op { imm: Some(3), ..link.read(0, 0, 0, 8) }),
    ];
    for (what, op) in senseless {
        let answer = stage.post(0, link.lanes[0], &[op]);
        assert!(matches!(answer, Err(Error::BadOp { .. })), "{what}: {answer:?}");
    }
    stage.settle();
    for side in [0, 1] {
        assert_content(&link.regions[side].memory, &before[side], "after refused ops");
        let log = stage.log(side, link.lanes[side]);
        assert!(log.arrived.is_empty() && log.done.is_empty(), "refused ops were heard of: {log:?}");
    }
    still_good(&mut stage, &link);
    stage.end();
}

/// A post that holds good ops before a bad one takes the good ones; the error comes when the bad one is first.
pub fn a_bad_op_stops_only_what_follows_it(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(4096);
    let mut expected = content(&link.regions[1].memory);
    let sent = content(&link.regions[0].memory);
    let good = [0, 1].map(|at| Op { imm: Some(at as u32), ..link.write(0, at * 64, at * 64, 64) });
    let bad = link.write(0, 0, 4096, 1);
    let after = Op { imm: Some(99), ..link.write(0, 1024, 1024, 64) };
    let mut left: Vec<Op<'_>> = vec![good[0], good[1], bad, after];
    let mut failed = None;
    stage.wait("the bad op to be refused", |s| {
        match s.post(0, link.lanes[0], &left) {
            Ok(posted) => {
                left.drain(..posted.ops);
                if posted.within > 0 {
                    left[0] = left[0].advance(posted.within);
                }
                assert!(left.len() >= 2, "the bad op was taken");
            }
            Err(error) => failed = Some((left.len(), error)),
        }
        failed.is_some()
    });
    let error = Error::OutOfRange { side: "remote", end: 4097, region_bytes: 4096 };
    assert_eq!(failed, Some((2, error)), "the error speaks of the first op of the slice");
    stage.wait("the good ops before it", |s| s.log(1, link.lanes[1]).arrived.len() == 2);
    stage.settle();
    assert_eq!(stage.log(1, link.lanes[1]).arrived.len(), 2, "what follows a bad op is not taken");
    expected[..128].copy_from_slice(&sent[..128]);
    assert_content(&link.regions[1].memory, &expected, "after the good ops");
    assert_eq!(stage.post(0, link.lanes[0], &[]), Ok(Posted::default()), "no ops are fine");
    still_good(&mut stage, &link);
    stage.end();
}

/// A key that no port of this kind made is refused, and does no harm.
pub fn garbage_keys_are_refused(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(4096);
    for garbage in garbage(&mut stage, link.regions[1].key.bytes(), RemoteKey::MAX_BYTES) {
        let key = RemoteKey::new(&garbage).expect("not longer than a key may be");
        let answer = stage.port(0).attach(link.lanes[0], &key).map(|attached| attached.id);
        assert!(matches!(answer, Err(Error::BadKey { .. })), "{answer:?} to a key of {garbage:02x?}");
    }
    still_good(&mut stage, &link);
    stage.end();
}

/// An address that no port of this kind made is refused, and the lane can still be connected.
pub fn garbage_addresses_are_refused(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    let (at_0, address_0) = stage.open(0, 1);
    let (at_1, address_1) = stage.open(1, 0);
    let (tags_0, tags_1) = stage.tags();
    for garbage in garbage(&mut stage, address_1.bytes(), LaneAddress::MAX_BYTES) {
        let address = LaneAddress::new(&garbage).expect("not longer than an address may be");
        let answer = stage.port(0).connect(at_0, &address, &tags_0);
        assert!(
            matches!(answer, Err(Error::BadAddress { .. })),
            "{answer:?} to an address of {garbage:02x?}"
        );
    }
    stage.port(0).connect(at_0, &address_1, &tags_0).expect("the lane is still fresh");
    stage.port(1).connect(at_1, &address_0, &tags_1).expect("a fresh lane connects");
    stage.wait("both ends to be up", |s| s.log(0, at_0).up && s.log(1, at_1).up);
    stage.end();
}

/// Grants that make no sense are refused; revoking what is not there promises everything.
pub fn bad_grants_are_refused(rig: &mut dyn Rig) {
    const BYTES: u64 = 4096;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(BYTES as usize);
    let region = link.regions[1].local;
    let layout = PageLayout::dense(0, 512, 8);
    let mut grant = |id: GrantId, region, layout, pages: &[u32]| {
        let buffers = [GrantedBuffer { region, layout }];
        let (peer, access) = (peer_id(0), Access::Write);
        stage.port(1).grant(&Grant { id, peer, access, buffers: &buffers, pages })
    };
    let free = GrantId::new(100, 7);
    assert_eq!(grant(free, LocalId(u32::MAX), layout, &[0]), Err(unknown("local")));
    let beyond = PageLayout::dense(1, 512, 8);
    let error = Error::OutOfRange { side: "local", end: BYTES + 1, region_bytes: BYTES };
    assert_eq!(grant(free, region, beyond, &[0]), Err(error));
    let overflows = PageLayout::dense(u64::MAX, 512, 8);
    assert!(matches!(grant(free, region, overflows, &[0]), Err(Error::BadGrant { .. })));
    assert!(matches!(grant(free, region, layout, &[0, 8]), Err(Error::BadGrant { .. })));
    assert_eq!(grant(free, region, layout, &[7, 2]), Ok(()), "a good grant after bad ones");
    assert!(matches!(grant(free, region, layout, &[1]), Err(Error::BadGrant { .. })), "granted twice");
    let next = GrantId::new(100, 8);
    assert!(matches!(grant(next, region, layout, &[1]), Err(Error::BadGrant { .. })), "an index used twice");

    assert_eq!(stage.port(1).revoke(GrantId::new(101, 0)), Fence::Now, "an unknown grant");
    assert_eq!(stage.port(1).revoke(next), Fence::Now, "another generation than the one that is granted");
    let fence = stage.rig.fence();
    assert_eq!(stage.port(1).revoke(free), fence, "the grant itself");
    assert_eq!(stage.port(1).revoke(free), Fence::Now, "a grant that is revoked already");
    still_good(&mut stage, &link);
    stage.end();
}

/// A region cannot be taken from under an op or a grant, and goes when both are gone.
pub fn regions_in_use_stay(rig: &mut dyn Rig) {
    const BYTES: usize = 4 << 20;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(BYTES);
    let nobody = LocalId(u32::MAX);
    assert_eq!(stage.port(0).deregister(nobody), Err(unknown("local")));
    let in_use = Err(Error::RegionInUse { by: "a grant" });
    let granted = stage.region(0, 4096);
    stage.grant_all(0, &granted, GrantId::new(10, 0), 1, Access::Write);
    assert_eq!(stage.port(0).deregister(granted.local), in_use, "a granted region");
    let fence = stage.port(0).revoke(GrantId::new(10, 0));
    match stage.port(0).deregister(granted.local) {
        Ok(()) => assert_eq!(
            stage.port(0).deregister(granted.local),
            Err(Error::UnknownRegion { side: "local", region: granted.local.0 })
        ),
        // The peer may write there by itself until its lanes are down.
        Err(Error::RegionInUse { .. }) if fence != Fence::Now => {}
        other => panic!("deregistering after the grant: {other:?}"),
    }

    for direction in [Direction::Write, Direction::Read] {
        let busy = stage.region(0, BYTES);
        let earlier = stage.log(0, link.lanes[0]).done.len();
        let op = Op {
            token: Some(Token(direction as u64)),
            shape: Shape::Span {
                local: busy.local,
                local_offset: 0,
                remote: link.remotes[0],
                remote_offset: 0,
                bytes: BYTES as u64,
            },
            ..link.span(0, direction, 0, 0, 0)
        };
        let imm = (direction == Direction::Write).then_some(1);
        stage.post_all(0, link.lanes[0], &[Op { imm, ..op }]);
        let heard = stage.log(0, link.lanes[0]).done.len() > earlier;
        match stage.port(0).deregister(busy.local) {
            Err(Error::RegionInUse { by: "an op" }) if !heard => {
                stage.wait("the op to be done", |s| s.log(0, link.lanes[0]).done.len() > earlier);
                assert_eq!(stage.port(0).deregister(busy.local), Ok(()), "after the op's Done");
            }
            // The port has already done with the memory, and only the event is on its way.
            Ok(()) => {}
            other => panic!("deregistering under an op: {other:?}"),
        }
        let expected = content(&busy.memory);
        busy.memory.fill(0, BYTES, 0xEE).expect("memory that no port knows may change");
        match direction {
            Direction::Write => {
                stage.wait("the write", |s| s.log(1, link.lanes[1]).arrived.len() == 1);
                assert_content(&link.regions[1].memory, &expected, "after the source was deregistered");
            }
            Direction::Read => {
                stage.settle();
                assert_content(&busy.memory, &vec![0xEE; BYTES], "after the target was deregistered");
            }
        }
    }
    still_good(&mut stage, &link);
    stage.end();
}

/// The lane still carries bytes.
#[track_caller]
fn still_good(stage: &mut Stage<'_>, link: &Link) {
    let mut expected = content(&link.regions[1].memory);
    let sent = content(&link.regions[0].memory);
    expected[5..1005].copy_from_slice(&sent[1000..2000]);
    stage.write(link, 0, &[link.write(0, 1000, 5, 1000)]);
    assert_content(&link.regions[1].memory, &expected, "a good op after refusals");
}

fn unknown(side: &'static str) -> Error {
    Error::UnknownRegion { side, region: u32::MAX }
}

/// Bytes that are nearly `good`, and bytes that are not at all.
fn garbage(stage: &mut Stage<'_>, good: &[u8], longest: usize) -> Vec<Vec<u8>> {
    let mut random = vec![0; longest];
    stage.rng.fill(&mut random);
    let mut all = vec![Vec::new(), random[..1].to_vec(), random[..good.len()].to_vec(), random.clone()];
    all.push(good[..good.len() - 1].to_vec());
    all.push(good[..good.len() / 2].to_vec());
    all.push([&[0], good].concat()[..good.len()].to_vec());
    if good.len() < longest {
        all.push([good, &[0]].concat());
    }
    all
}
