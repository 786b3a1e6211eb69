//! Grants: what `revoke` promises, generations, and what was never granted.

use crossdock_memory::PageLayout;

use super::Rig;
use super::stage::{Feed, Link, READS, Region, Stage, WRITES, assert_content, content, peer_id};
use crate::{
    Access, Direction, DownCause, Error, Fence, Grant, GrantId, GrantedBuffer, LaneId, Op, RemoteId, Shape,
};

/// While the peer writes without pause, its grant is revoked: from the promised moment on not a byte changes.
pub fn revoke_keeps_its_promise(rig: &mut dyn Rig) {
    const BYTES: u64 = 1 << 20;
    let fence = rig.fence();
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(BYTES as usize);
    let target = link.regions[1].memory.clone();
    let ops: Vec<Op<'_>> = (0..4000u64)
        .map(|at| Op { imm: Some(0), ..link.write(0, at * 37, at * 251 % (BYTES / 2), 9000) })
        .collect();
    let mut feed = Feed::new(&ops);
    stage.wait("a stream of writes to begin", |s| {
        feed.offer(s, 0, link.lanes[0], 50);
        s.log(1, link.lanes[1]).arrived.len() > 100
    });
    assert_eq!(stage.port(1).revoke(link.grant(Direction::Write)), fence);
    let mut after = content(&target);
    for _ in 0..200 {
        feed.offer(&mut stage, 0, link.lanes[0], 50);
        stage.turn();
        if fence == Fence::Now {
            // Nothing but the honest late immediates may come of what was revoked.
            assert!(stage.log(1, link.lanes[1]).down.is_none(), "a late write is no misbehaviour");
        }
    }
    if fence != Fence::Now {
        stage.port(1).close(link.lanes[1]);
        stage.wait("the receiving end to be down", |s| s.log(1, link.lanes[1]).down.is_some());
        after = content(&target);
    }
    if fence == Fence::Now {
        stage.wait("the peer's late writes to be gone", |s| feed.offer(s, 0, link.lanes[0], 500));
    }
    stage.settle();
    assert_content(&target, &after, &format!("after the fence of a revoked grant ({fence:?})"));
    stage.end();
}

/// Where the port checks, an index with a new generation is a new grant: old writes are dropped, but their
/// immediates are heard, since those who count know by the generation what to count.
pub fn a_new_generation_replaces_the_old(rig: &mut dyn Rig) {
    if !rig.checks() {
        return;
    }
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(4096);
    let target = &link.regions[1];
    assert_eq!(stage.port(1).revoke(GrantId::new(WRITES, 0)), Fence::Now);
    let (old, new) = (GrantId::new(WRITES, 0), GrantId::new(WRITES, 1));
    stage.grant_all(1, target, new, 0, Access::Write);
    let mut expected = content(&target.memory);
    let sent = content(&link.regions[0].memory);
    let early = GrantId::new(WRITES, 2);
    let unknown = GrantId::new(12_345, 0);
    let ops = [old, new, early, unknown, new].map(|grant| Op { grant, ..link.write(0, 0, 0, 1) });
    for (at, op) in ops.into_iter().enumerate() {
        let at = at as u64;
        let op = Op { grant: op.grant, imm: Some(at as u32), ..link.write(0, at * 512, at * 600, 512) };
        if op.grant == new {
            let (from, to) = (at as usize * 512, at as usize * 600);
            expected[to..to + 512].copy_from_slice(&sent[from..from + 512]);
        }
        stage.post_all(0, link.lanes[0], &[op]);
    }
    stage.wait("the immediates of old and new", |s| s.log(1, link.lanes[1]).arrived.len() == 5);
    assert_content(&target.memory, &expected, "after writes of several generations");
    assert!(stage.log(1, link.lanes[1]).down.is_none(), "a stale write is no misbehaviour");
    stage.end();
}

/// Where the port checks, an access that a living grant does not cover changes nothing and ends the lane.
pub fn what_was_not_granted_is_out_of_reach(rig: &mut dyn Rig) {
    if !rig.checks() {
        return;
    }
    let mut stage = Stage::new(rig, 3);
    // Pages 1, 4 and 5 of 8, 100 bytes each, 28 bytes of padding between them.
    let layout = PageLayout { offset: 50, stride_bytes: 128, page_bytes: 100, pages: 8 };
    let at = |page: u64| 50 + page * 128;
    let attempts: [(&str, Attempt); 10] = [
        ("a page that was not granted", Attempt::write(at(2), 100)),
        ("the padding behind a page", Attempt::write(at(1) + 100, 1)),
        ("a page and one byte", Attempt::write(at(1), 101)),
        ("the byte before a page", Attempt::write(at(1) - 1, 2)),
        ("two granted pages with their padding", Attempt::write(at(4), 228)),
        ("the region before the buffer", Attempt::write(0, 1)),
        ("the region behind the buffer", Attempt::write(1500, 1)),
        ("another region", Attempt { other_region: true, ..Attempt::write(at(1), 1) }),
        ("the other direction", Attempt { direction: Direction::Read, ..Attempt::write(at(1), 1) }),
        ("another peer's grant", Attempt { grant: 3, ..Attempt::write(at(1), 1) }),
    ];
    for (what, attempt) in attempts {
        let lanes = stage.connect([0, 1]);
        let source = stage.region(0, 4096);
        let target = stage.region(1, 4096);
        let other = stage.region(1, 4096);
        let buffers = [GrantedBuffer { region: target.local, layout }];
        for (index, peer) in [(2, 0), (3, 2)] {
            let (id, peer) = (GrantId::new(index, 0), peer_id(peer));
            let grant = Grant { id, peer, access: Access::Write, buffers: &buffers, pages: &[5, 1, 4] };
            stage.port(1).grant(&grant).expect("a good grant");
        }
        let remotes = [stage.attach(0, lanes[0], &target.key), stage.attach(0, lanes[0], &other.key)];
        let mut expected = content(&target.memory);
        let others = content(&other.memory);
        let good = Attempt::write(at(4) + 3, 97).op(&source, remotes);
        let sent = content(&source.memory);
        expected[at(4) as usize + 3..at(4) as usize + 100].copy_from_slice(&sent[..97]);
        stage.post_all(0, lanes[0], &[Op { imm: Some(1), ..good }]);
        stage.wait("a write into a granted page", |s| s.log(1, lanes[1]).arrived == [1]);
        let whole = misbehave(&mut stage, lanes[0], attempt.op(&source, remotes));
        forbidden(&mut stage, lanes, what);
        if !whole {
            // Each part is judged apart, and one that lies within a granted page is welcome.
            let found = content(&target.memory);
            for byte in 0..attempt.bytes {
                let to = (attempt.offset + byte) as usize;
                let granted = [1, 4, 5].iter().any(|&page| (at(page)..at(page) + 100).contains(&(to as u64)));
                if attempt.is_granted() && granted && found[to] == sent[byte as usize] {
                    expected[to] = found[to];
                }
            }
        }
        assert_content(&target.memory, &expected, what);
        assert_content(&other.memory, &others, what);
        for index in [2, 3] {
            stage.port(1).revoke(GrantId::new(index, 0));
        }
    }
    stage.end();
}

/// Where the port checks, a read under a grant that is gone ends the lane: a source page is taken back only after
/// its reader has released it, so an honest reader never comes late.
pub fn a_late_read_is_misbehaviour(rig: &mut dyn Rig) {
    if !rig.checks() {
        return;
    }
    let mut stage = Stage::new(rig, 2);
    let link: Link = stage.link(4096);
    let before = content(&link.regions[0].memory);
    stage.port(1).revoke(GrantId::new(READS, 0));
    misbehave(&mut stage, link.lanes[0], link.read(0, 0, 0, 4096));
    forbidden(&mut stage, link.lanes, "a read under a revoked grant");
    assert_content(&link.regions[0].memory, &before, "after a refused read");
    stage.end();
}

/// What a misbehaving peer tries.
#[derive(Clone, Copy)]
struct Attempt {
    direction: Direction,
    grant: u32,
    other_region: bool,
    offset: u64,
    bytes: u64,
}

impl Attempt {
    fn write(offset: u64, bytes: u64) -> Self {
        Self { direction: Direction::Write, grant: 2, other_region: false, offset, bytes }
    }

    /// Whether only the place is wrong, so that a part of it may be right.
    fn is_granted(&self) -> bool {
        self.direction == Direction::Write && self.grant == 2 && !self.other_region
    }

    fn op(&self, source: &Region, remotes: [RemoteId; 2]) -> Op<'static> {
        Op {
            direction: self.direction,
            grant: GrantId::new(self.grant, 0),
            shape: Shape::Span {
                local: source.local,
                local_offset: 0,
                remote: remotes[usize::from(self.other_region)],
                remote_offset: self.offset,
                bytes: self.bytes,
            },
            imm: None,
            token: None,
        }
    }
}

/// Side 0 posts an op that will end the lane; whether the port took it at once. Of an op that is taken in parts the
/// first may end the lane before the last is offered.
#[track_caller]
fn misbehave(stage: &mut Stage<'_>, lane: LaneId, op: Op<'_>) -> bool {
    let mut feed = Feed::new(&[op]);
    let mut taken = None;
    let mut offers = 0;
    stage.wait("an op that is not allowed to be taken", |s| {
        offers += 1;
        taken = Some(feed.try_offer(s, 0, lane, 1));
        taken != Some(Ok(false))
    });
    match taken {
        Some(Ok(_) | Err(Error::LaneDown { .. })) => offers == 1,
        other => panic!("an op that is not allowed: {other:?}"),
    }
}

#[track_caller]
fn forbidden(stage: &mut Stage<'_>, lanes: [LaneId; 2], what: &str) {
    stage.wait(&format!("both ends to be down after {what}"), |s| {
        s.log(0, lanes[0]).down.is_some() && s.log(1, lanes[1]).down.is_some()
    });
    let cause = stage.log(1, lanes[1]).down;
    assert!(matches!(cause, Some(DownCause::PeerMisbehaved { .. })), "{what}: {cause:?}");
    stage.settle();
}
