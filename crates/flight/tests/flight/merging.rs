//! Several nodes as one story, however wrong their clocks are.

use crossdock_flight::{Filter, Kind, Outcome, Timeline};
use crossdock_proto::flight::{RingId, What};
use crossdock_proto::{CancelWhy, End, Failure, RoleKind, SessionEnd, Stage, Who};
use proptest::prelude::*;

use crate::node::{EPOCH_NS, Node, bound, came, ended, expired, grant, sent, silent};

const MS: i64 = 1_000_000;
const S: i64 = 1_000 * MS;

/// A decode and a prefill node, and their rings for each other.
struct Pair {
    decode: Node,
    prefill: Node,
    rings: [RingId; 2],
}

impl Pair {
    /// The prefill node's wall clock is so much ahead.
    fn new(ahead_ns: i64) -> Self {
        let (mut decode, mut prefill) =
            (Node::new(1, "decode-0", 7 * S, 0), Node::new(2, "prefill-0", 900 * S, ahead_ns));
        let rings = [decode.meet(&prefill), prefill.meet(&decode)];
        Self { decode, prefill, rings }
    }

    fn decode(&mut self, at_ns: i64, room: Option<u64>, what: What) {
        self.decode.note(at_ns, self.rings[0], room, what);
    }

    fn prefill(&mut self, at_ns: i64, room: Option<u64>, what: What) {
        self.prefill.note(at_ns, self.rings[1], room, what);
    }

    /// A push that is delivered, from `at_ns` on; messages take `delay_ns`.
    fn deliver(&mut self, at_ns: i64, room: u64, delay_ns: i64) {
        let index = room as u32;
        self.decode(at_ns, Some(room), bound(RoleKind::Receiving));
        self.decode(at_ns, Some(room), sent(index));
        let at_ns = at_ns + delay_ns;
        self.prefill(at_ns, Some(room), bound(RoleKind::Sending));
        self.prefill(at_ns, Some(room), came(index));
        self.prefill(at_ns + MS, Some(room), What::Posting);
        self.decode(at_ns + 2 * MS, Some(room), What::Arriving { slot: 0 });
        self.prefill(at_ns + 3 * MS, Some(room), What::FinishSent { attempt: 0, arrivals: 9 });
        let at_ns = at_ns + 3 * MS + delay_ns;
        self.decode(at_ns, Some(room), What::FinishCame { attempt: 0, expected: 9, counted: 9 });
        self.decode(at_ns, Some(room), What::DeliveredSent);
        self.decode(at_ns, Some(room), ended(None, 9, Some(9)));
        self.prefill(at_ns + delay_ns, Some(room), What::DeliveredCame);
        self.prefill(at_ns + delay_ns, Some(room), ended(None, 0, None));
        // The next turns.
        self.decode(at_ns + delay_ns + 50_000, None, What::LaneUp { slot: 0 });
        self.prefill(at_ns + delay_ns + 50_000, None, What::LaneUp { slot: 0 });
    }

    fn merge(&self, at_ns: i64, filter: &Filter) -> Timeline {
        Timeline::merge(&[self.prefill.file(at_ns), self.decode.file(at_ns)], filter)
    }
}

fn kinds(timeline: &Timeline, room: usize) -> Vec<(String, Kind)> {
    let entry = |&at: &usize| {
        let entry = &timeline.entries[at];
        (timeline.sources[entry.source].name.clone(), entry.event.kind)
    };
    timeline.rooms[room].entries.iter().map(entry).filter(|(_, kind)| *kind != Kind::LaneUp).collect()
}

/// Nothing comes before what it is the effect of.
fn assert_causal(timeline: &Timeline) {
    let at = |room: u64, kind: Kind| {
        timeline
            .entries
            .iter()
            .position(|entry| entry.event.kind == kind && entry.event.room == Some(room))
            .unwrap()
    };
    for room in timeline.rooms.iter().map(|room| room.key.room) {
        for (cause, effect) in [
            (Kind::GrantSent, Kind::GrantCame),
            (Kind::FinishSent, Kind::FinishCame),
            (Kind::DeliveredSent, Kind::DeliveredCame),
        ] {
            assert!(at(room, cause) < at(room, effect), "{room} {cause:?}\n{}", timeline.tail(1000));
        }
    }
}

#[test]
fn clocks_that_are_right_are_believed() {
    let mut pair = Pair::new(0);
    (0..5).for_each(|room| pair.deliver(room * 20 * MS, room as u64, MS / 10));
    let timeline = pair.merge(S, &Filter::default());
    assert_causal(&timeline);
    assert_eq!(timeline.sources.iter().map(|source| source.correction_ns).collect::<Vec<_>>(), [0, 0]);
    assert_eq!((timeline.clocks.len(), timeline.clocks[0].messages), (1, 15));
    assert!(timeline.rooms.iter().all(|room| room.verdict.outcome == Outcome::Delivered));
    assert_eq!(timeline.entries[0].unix_ns, EPOCH_NS);
    let names = |words: &str| timeline.table(&[]).to_string().contains(words);
    assert!(names("no message came before it was sent (by 15 messages)") && names("5 delivered"));
}

#[test]
fn a_clock_that_is_ahead_is_found_and_corrected() {
    for ahead_ns in [3 * S, -3 * S, 5 * MS, -700 * S] {
        let mut pair = Pair::new(ahead_ns);
        (0..5).for_each(|room| pair.deliver(room * 20 * MS, room as u64, MS / 10));
        let timeline = pair.merge(S, &Filter::default());
        assert_causal(&timeline);
        // Sources are in the order of their names.
        let clocks = &timeline.clocks[0];
        assert!((clocks.ahead_ns - ahead_ns).abs() < MS, "{ahead_ns}: {clocks:?}");
        let told = timeline.table(&[]).to_string();
        let way = if ahead_ns > 0 { "ahead" } else { "behind" };
        assert!(
            told.contains("clocks: prefill-0 is ") && told.contains(&format!(" {way} of decode-0")),
            "{told}"
        );
        // The same story as with clocks that are right.
        let mut right = Pair::new(0);
        (0..5).for_each(|room| right.deliver(room * 20 * MS, room as u64, MS / 10));
        assert_eq!(kinds(&timeline, 2), kinds(&right.merge(S, &Filter::default()), 2));
    }
}

#[test]
fn a_clock_that_was_set_in_between_is_told_of() {
    let mut pair = Pair::new(0);
    pair.deliver(0, 1, MS / 10);
    pair.deliver(20 * MS, 2, MS / 10);
    // The prefill's monotonic time of the second room is a second early: no one offset fits both.
    let mut files = [pair.prefill.file(S), pair.decode.file(S)];
    for (_, event) in files[0].events.iter_mut().skip(7) {
        event.at_ns -= 1_000_000_000;
    }
    let timeline = Timeline::merge(&files, &Filter::default());
    assert!(!timeline.clocks[0].is_possible());
    let told = timeline.table(&[]).to_string();
    assert!(told.contains("cannot be brought together"), "{told}");
    assert_causal(&timeline);
}

#[test]
fn dumps_of_one_node_overlap() {
    let mut pair = Pair::new(0);
    pair.deliver(0, 1, MS / 10);
    let early = pair.decode.file(10 * MS);
    pair.deliver(20 * MS, 2, MS / 10);
    let late = pair.decode.file(40 * MS);
    let timeline = Timeline::merge(&[early.clone(), late.clone(), early], &Filter::default());
    assert_eq!((timeline.sources.len(), timeline.sources[0].files), (1, 3));
    assert_eq!(timeline.entries.len(), late.events.len());
    assert_eq!(timeline.rooms.len(), 2);
}

#[test]
fn the_verdict_names_who_gave_up_and_what_the_other_had_done() {
    let mut pair = Pair::new(2 * S);
    pair.deliver(0, 1, MS / 10);
    let begin = 100 * MS;
    pair.decode(begin, Some(4711), bound(RoleKind::Receiving));
    pair.decode(begin, Some(4711), sent(50));
    pair.prefill(begin + MS, Some(4711), bound(RoleKind::Sending));
    pair.prefill(begin + MS, Some(4711), came(50));
    pair.prefill(begin + 2 * MS, Some(4711), What::Posting);
    pair.decode(begin + 3 * MS, Some(4711), What::Arriving { slot: 0 });
    let end = begin + 30 * S;
    pair.decode(end, Some(4711), ended(Some(expired(Who::Here)), 12, None));
    pair.decode(end, Some(4711), What::CancelSent { why: CancelWhy::Expired });
    pair.decode(end, Some(4711), What::Quarantined);
    pair.prefill(end + MS, Some(4711), What::CancelCame { why: CancelWhy::Expired });
    pair.prefill(end + MS, Some(4711), ended(Some(expired(Who::Peer)), 0, None));
    let posted = What::Posted { bytes: 37 << 20, of_bytes: 61 << 20, layers: 61, is_last: true };
    pair.prefill(end + MS, Some(4711), posted);
    pair.prefill(end + MS, None, What::ReleaseSent { grant: grant(50) });
    pair.decode(end + 3 * MS, Some(4711), What::ReleaseCame { grant: grant(50) });
    pair.decode(end + 3 * MS, Some(4711), What::Home);
    let timeline = pair.merge(end + S, &Filter::default());
    let room = &timeline.rooms[0];
    assert_eq!((room.key.room, room.verdict.outcome), (4711, Outcome::Failed), "failed ones come first");
    assert_eq!(
        room.verdict.text,
        "decode-0 gave up on prefill-0: deadline of this side passed while bytes moved; 12 arrivals had been counted, \
         the last 1.50 s before; the peer was last heard 2.10 s before; prefill-0 had posted 37 of 61 layers (37.0 MiB \
         of 61.0 MiB); its pages came home 3.0 ms later"
    );
    assert_eq!(room.verdict.advice.as_deref(), Some("allow more time, or send less at once"));
    let deciding = &timeline.entries[room.verdict.deciding.unwrap()];
    assert_eq!((deciding.event.kind, deciding.source), (Kind::Ended, 0));
    let table = timeline.table(&[room]).to_string();
    let marked: Vec<&str> = table.lines().filter(|line| line.starts_with('✗')).collect();
    assert!(marked.len() == 1 && marked[0].contains("decode-0") && marked[0].contains("ended"), "{table}");
    assert!(table.contains("release →"), "what gives the room's grant back is part of it: {table}");
    let json = timeline.json(&[room]);
    assert_eq!(json["rooms"][0]["outcome"], "failed");
    assert_eq!(
        json["rooms"][0]["events"].as_array().unwrap().iter().filter(|e| e["decides"] == true).count(),
        1
    );
}

#[test]
fn a_peer_that_left_no_dump_is_named_with_the_reason() {
    let mut pair = Pair::new(0);
    pair.decode(0, Some(9), bound(RoleKind::Receiving));
    pair.decode(0, Some(9), sent(1));
    pair.decode(3 * S, None, What::SessionDown { cause: Box::new(silent()), rooms: 1, silent_ms: 2_100 });
    pair.decode(3 * S, Some(9), ended(Some(End::PeerLost { cause: silent() }), 0, None));
    let timeline = Timeline::merge(&[pair.decode.file(4 * S)], &Filter::default());
    let verdict = &timeline.rooms[0].verdict;
    assert_eq!(timeline.entries[verdict.deciding.unwrap()].event.kind, Kind::SessionDown);
    assert_eq!(
        verdict.text,
        "decode-0 lost prefill-0: nothing heard for 2100 ms, while bytes moved; the peer was last heard 2.10 s before; \
         there is no dump of prefill-0"
    );
}

#[test]
fn what_was_found_here_comes_before_what_was_heard() {
    let mut pair = Pair::new(0);
    pair.deliver(0, 1, MS / 10);
    // The prefill hears of the end first, by its own clock.
    let corrupt = |by| End::Failed { by, stage: Stage::Verify, cause: Failure::Checksum };
    pair.prefill(S, Some(2), ended(Some(corrupt(Who::Peer)), 0, None));
    pair.decode(S + MS, Some(2), ended(Some(corrupt(Who::Here)), 9, Some(9)));
    let closed = End::PeerLost { cause: SessionEnd::ClosedByPeer };
    pair.prefill(S, Some(3), ended(Some(closed), 0, None));
    pair.decode(S + MS, Some(3), ended(Some(End::PeerLost { cause: silent() }), 0, None));
    let timeline = pair.merge(2 * S, &Filter::default());
    for room in &timeline.rooms[..2] {
        assert!(room.verdict.text.starts_with("decode-0 "), "{}", room.verdict.text);
    }
}

#[test]
fn a_room_that_was_tried_again_ended_as_its_last_try() {
    let mut pair = Pair::new(0);
    pair.decode(0, Some(1), ended(Some(expired(Who::Here)), 0, None));
    pair.deliver(S, 1, MS / 10);
    let timeline = pair.merge(2 * S, &Filter::default());
    assert_eq!(timeline.rooms[0].verdict.outcome, Outcome::Delivered);
}

#[test]
fn a_room_that_has_not_ended_is_told_as_far_as_it_is() {
    let mut pair = Pair::new(0);
    pair.decode(0, Some(5), bound(RoleKind::Receiving));
    pair.decode(0, Some(5), sent(1));
    let timeline = pair.merge(S, &Filter::default());
    let verdict = &timeline.rooms[0].verdict;
    assert_eq!(verdict.outcome, Outcome::Open);
    assert!(verdict.text.contains("last: grant → on decode-0"), "{}", verdict.text);
}

#[test]
fn filters_leave_out_what_is_not_asked_for() {
    let mut pair = Pair::new(0);
    (0..5).for_each(|room| pair.deliver(room * S, room as u64, MS / 10));
    let mut stranger = Node::new(3, "prefill-9", 0, 0);
    let ring = stranger.meet(&pair.decode);
    stranger.note(4 * S, ring, Some(77), What::Posting);
    let files = [pair.prefill.file(5 * S), pair.decode.file(5 * S), stranger.file(5 * S)];
    let rooms = |filter: Filter| -> Vec<u64> {
        let mut rooms: Vec<u64> =
            Timeline::merge(&files, &filter).rooms.iter().map(|room| room.key.room).collect();
        rooms.sort_unstable();
        rooms
    };
    assert_eq!(rooms(Filter::default()), [0, 1, 2, 3, 4, 77]);
    assert_eq!(rooms(Filter { room: Some(3), ..Filter::default() }), [3]);
    assert_eq!(rooms(Filter { peer: Some("prefill-0".into()), ..Filter::default() }), [0, 1, 2, 3, 4]);
    assert_eq!(rooms(Filter { peer: Some("0000000000000003".into()), ..Filter::default() }), [77]);
    assert_eq!(rooms(Filter { peer: Some("nobody".into()), ..Filter::default() }), Vec::<u64>::new());
    assert_eq!(rooms(Filter { last_ns: Some(1_500_000_000), ..Filter::default() }), [3, 4, 77]);
}

proptest! {
    /// Whatever the clocks say and however long messages take, the story is causal, and with messages both ways the
    /// offset is found as exactly as they allow.
    #[test]
    fn stories_are_causal(ahead_ms in -100_000..100_000i64, delays in prop::collection::vec(1..5_000i64, 1..8)) {
        let mut pair = Pair::new(ahead_ms * MS);
        for (room, delay_us) in delays.iter().enumerate() {
            pair.deliver(room as i64 * 100 * MS, room as u64, delay_us * 1_000);
        }
        let timeline = pair.merge(10 * S, &Filter::default());
        assert_causal(&timeline);
        let clocks = &timeline.clocks[0];
        prop_assert!(clocks.is_possible());
        prop_assert!((clocks.least_ns.unwrap()..=clocks.most_ns.unwrap()).contains(&(ahead_ms * MS)), "{clocks:?}");
    }
}
