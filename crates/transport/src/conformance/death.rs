//! Peers that stop, or die, in the middle of what they do.

use std::time::{Duration, Instant};

use super::child::{from_hex, to_hex};
use super::stage::{Region, Stage, assert_content, content};
use super::{Child, Rig};
use crate::{Access, DownCause, Fence, GrantId, LaneAddress, LaneId};

/// A peer is killed while it writes: one `Down` with an honest cause, and memory at rest after it.
pub fn a_killed_peer_ends_its_lane(rig: &mut dyn Rig) {
    let Some(mut streaming) = Streaming::begin(rig) else { return };
    let (stage, lane) = (&mut streaming.stage, streaming.lane);
    streaming.child.kill();
    stage.wait("the lane of a killed peer to be down", |s| s.log(0, lane).down.is_some());
    let cause = stage.log(0, lane).down;
    assert!(
        matches!(cause, Some(DownCause::PeerDied | DownCause::Broken { .. } | DownCause::Device(_))),
        "{cause:?}"
    );
    streaming.at_rest_from_now_on();
}

/// A peer is stopped while it writes. Whenever `Down` is said, memory is at rest, also when the peer continues.
pub fn a_stopped_peer_writes_nothing_after_down(rig: &mut dyn Rig) {
    let fence = rig.fence();
    let Some(mut streaming) = Streaming::begin(rig) else { return };
    let (stage, lane) = (&mut streaming.stage, streaming.lane);
    streaming.child.stop();
    assert_eq!(stage.port(0).revoke(GRANT), fence);
    let fenced = (fence == Fence::Now).then(|| content(&streaming.region.memory));
    stage.port(0).close(lane);
    let begun = Instant::now();
    while stage.log(0, lane).down.is_none() && begun.elapsed() < GRACE {
        stage.turn();
    }
    let mut at_rest = stage.log(0, lane).down.is_some().then(|| content(&streaming.region.memory));
    streaming.child.cont();
    stage.wait("the lane of a peer that continued to be down", |s| {
        if at_rest.is_none() && s.log(0, lane).down.is_some() {
            at_rest = Some(content(&streaming.region.memory));
        }
        at_rest.is_some()
    });
    let memory = &streaming.region.memory;
    stage.settle();
    assert_eq!(stage.log(0, lane).down, Some(DownCause::ClosedHere));
    if fence != Fence::Never {
        assert_content(memory, &at_rest.expect("waited for"), "after Down of a lane whose peer was stopped");
    }
    if let Some(fenced) = fenced {
        assert_content(memory, &fenced, "after a grant of a stopped peer was revoked");
    }
    streaming.stage.end();
}

/// A peer is stopped, this side closes, and then the peer dies without an answer: that is an end as well.
pub fn a_peer_killed_while_closing(rig: &mut dyn Rig) {
    let Some(mut streaming) = Streaming::begin(rig) else { return };
    let (stage, lane) = (&mut streaming.stage, streaming.lane);
    streaming.child.stop();
    stage.port(0).close(lane);
    for _ in 0..20 {
        stage.turn();
    }
    streaming.child.kill();
    stage.wait("a lane to be down whose peer died while it closed", |s| s.log(0, lane).down.is_some());
    streaming.at_rest_from_now_on();
}

/// A child that writes into a region of this process.
struct Streaming<'r> {
    stage: Stage<'r>,
    child: Box<dyn Child>,
    lane: LaneId,
    region: Region,
}

impl<'r> Streaming<'r> {
    fn begin(rig: &'r mut dyn Rig) -> Option<Self> {
        let mut child = rig.child()?;
        let mut stage = Stage::new(rig, 1);
        // The child's lane belongs to a peer that is no side of this stage.
        let (lane, address) = stage.open(0, CHILD);
        let answer = child.ask("open");
        let (peer_address, _key) = answer.split_once(' ').expect("an address and a key");
        let (tags, peer_tags) = stage.tags();
        let peer_address = LaneAddress::new(&from_hex(peer_address)).expect("the child's address");
        let (ours, theirs) = (to_hex(&peer_tags.ours), to_hex(&peer_tags.theirs));
        child.ask(&format!("connect {} {ours} {theirs}", to_hex(address.bytes())));
        stage.port(0).connect(lane, &peer_address, &tags).expect("a fresh lane connects");
        let region = stage.region(0, 256 << 10);
        stage.grant_all(0, &region, GRANT, CHILD, Access::Write);
        stage.wait("the lane to a child to be up", |s| s.log(0, lane).up);
        child.ask(&format!("stream {} {}", to_hex(region.key.bytes()), GRANT.bits()));
        stage.wait("the child to write", |s| s.log(0, lane).arrived.len() > 200);
        Some(Self { stage, child, lane, region })
    }

    #[track_caller]
    fn at_rest_from_now_on(mut self) {
        let at_rest = content(&self.region.memory);
        self.stage.settle();
        if self.stage.rig.fence() != Fence::Never {
            assert_content(&self.region.memory, &at_rest, "after Down of a lane whose peer died");
        }
        self.stage.end();
    }
}

/// A side that the stage does not have.
const CHILD: usize = 9;
const GRANT: GrantId = GrantId::new(3, 0);
/// How long a port may take that can tell by itself that a stopped peer writes no more.
const GRACE: Duration = Duration::from_millis(300);
