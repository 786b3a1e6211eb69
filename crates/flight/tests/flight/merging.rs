//! Several nodes as one story, however wrong their clocks are.

use crossdock_flight::{Event, Filter, Kind, Outcome, Timeline};
use crossdock_proto::flight::{RingId, What};
use crossdock_proto::{CancelWhy, End, Failure, LinkCause, RoleKind, SessionEnd, Stage, TargetId, Who};
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
        Self::of([1, 2], ahead_ns)
    }

    fn of(nodes: [u64; 2], ahead_ns: i64) -> Self {
        let mut decode = Node::new(nodes[0], "decode-0", 7 * S, 0);
        let mut prefill = Node::new(nodes[1], "prefill-0", 900 * S, ahead_ns);
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
    let json = serde_json::to_value(timeline.json(&[room])).unwrap();
    assert_eq!(json["rooms"][0]["outcome"], "failed");
    assert_eq!(
        json["rooms"][0]["events"].as_array().unwrap().iter().filter(|e| e["decides"] == true).count(),
        1
    );
}

/// As the scenes of a demo that has shown two ports.
#[test]
fn rooms_of_nodes_that_never_met_are_not_one() {
    let (mut shm, mut tcp) = (Pair::of([1, 2], 0), Pair::of([3, 4], 0));
    shm.decode(0, Some(14), bound(RoleKind::Receiving));
    shm.decode(0, Some(14), sent(14));
    shm.decode(MS, Some(14), ended(Some(End::PeerLost { cause: silent() }), 0, None));
    tcp.deliver(10 * S, 14, MS / 10);
    // Of the prefill node of the first scene there is no dump.
    let files = [shm.decode.file(20 * S), tcp.decode.file(20 * S), tcp.prefill.file(20 * S)];
    let timeline = Timeline::merge(&files, &Filter { room: Some(14), ..Filter::default() });
    let outcomes: Vec<Outcome> = timeline.rooms.iter().map(|room| room.verdict.outcome).collect();
    assert_eq!(outcomes, [Outcome::Failed, Outcome::Delivered]);
    let text = &timeline.rooms[0].verdict.text;
    assert!(text.ends_with("there is no dump of prefill-0"), "{text}");
    assert_eq!(timeline.rooms[1].verdict.text, "delivered within 3.3 ms");
    let rooms: Vec<_> = timeline.rooms.iter().collect();
    let table = timeline.table(&rooms).to_string();
    assert!(table.contains("rooms: 1 failed, 1 delivered"), "{table}");
    for (lives, count) in [
        ("UTC, decode-0 (life 00000000000003e9)\n", 1),
        ("UTC, decode-0 (life 00000000000003eb), prefill-0 (life 00000000000003ec)\n", 1),
    ] {
        assert_eq!(table.matches(lives).count(), count, "{table}");
    }
}

#[test]
fn sides_that_name_the_same_peer_are_of_one_room() {
    let (mut pair, mut other) = (Pair::new(0), Node::new(5, "decode-1", 0, 0));
    let ring = other.meet(&pair.prefill);
    pair.decode(0, Some(14), bound(RoleKind::Receiving));
    other.note(0, ring, Some(14), bound(RoleKind::Receiving));
    let timeline = Timeline::merge(&[pair.decode.file(S), other.file(S)], &Filter::default());
    assert_eq!(timeline.rooms.len(), 1);
}

#[test]
fn a_side_that_met_nobody_belongs_to_the_room_of_whom_it_knows() {
    let (mut shm, mut tcp) = (Pair::of([1, 2], 0), Pair::of([3, 4], 0));
    for pair in [&mut shm, &mut tcp] {
        pair.deliver(0, 1, MS / 10);
        pair.decode(S, Some(14), bound(RoleKind::Receiving));
        let opened = What::Opened { role: RoleKind::Sending, pages: 4, left_ms: 30_000 };
        pair.prefill.note(S, RingId::NODE, Some(14), opened);
    }
    let nodes = [&shm.decode, &tcp.decode, &shm.prefill, &tcp.prefill];
    let files = nodes.map(|node| node.file(2 * S));
    let timeline = Timeline::merge(&files, &Filter { room: Some(14), ..Filter::default() });
    let sides = timeline.rooms.iter().map(|room| {
        let node = |&at: &usize| timeline.sources[timeline.entries[at].source].node.clone();
        let mut nodes: Vec<String> = room.entries.iter().map(node).collect();
        nodes.sort();
        nodes.iter().map(|node| node.parse().unwrap()).collect::<Vec<u64>>()
    });
    let mut sides: Vec<Vec<u64>> = sides.collect();
    sides.sort();
    assert_eq!(sides, [[1, 2], [3, 4]]);
}

/// Rooms, grants and attempts have the same names in each life of a node.
#[test]
fn messages_of_an_earlier_life_are_its_own() {
    for knows_first in [true, false] {
        let mut pair = Pair::new(0);
        if knows_first {
            pair.rings = [pair.decode.begin(0, &pair.prefill), pair.prefill.begin(0, &pair.decode)];
        }
        pair.deliver(0, 1, MS / 10);
        let early = pair.decode.file(S);
        // An hour later.
        pair.decode = pair.decode.again();
        let later = 3_600 * S;
        pair.rings = [pair.decode.begin(later, &pair.prefill), pair.prefill.begin(later, &pair.decode)];
        pair.deliver(later, 1, MS / 10);
        let late = [pair.decode.file(later + S), pair.prefill.file(later + S)];
        let timeline = Timeline::merge(&[&[early][..], &late].concat(), &Filter::default());
        assert!(timeline.sources.iter().all(|source| source.correction_ns == 0), "{:?}", timeline.sources);
        assert!(timeline.clocks.iter().all(|pair| pair.is_possible() && pair.messages == 3));
        // Where it is not recorded any more with which life the first session was, its messages say nothing.
        assert_eq!(timeline.clocks.len(), if knows_first { 2 } else { 1 });
    }
}

/// What happened between two nodes is told with each of their rooms, and is not held with each of them.
#[test]
fn sessions_are_told_with_rooms_as_far_as_a_reader_wants() {
    let (mut pair, rooms) = (Pair::new(0), 50);
    (0..rooms).for_each(|room| pair.decode(0, Some(room), bound(RoleKind::Receiving)));
    let mut file = pair.decode.file(S);
    let (peer, last) = file.events[0].clone();
    for serial in 1..=1_000 {
        let session = Event { kind: Kind::LaneUp, serial: 1_000 + serial, ..Event::default() };
        file.events.push((peer.clone(), session));
    }
    for room in 0..rooms {
        let serial = 3_000 + room;
        file.events.push((peer.clone(), Event { room: Some(room), serial, ..last.clone() }));
    }
    let timeline = Timeline::merge(&[file], &Filter::default());
    assert_eq!(timeline.rooms.iter().map(|room| room.entries.len()).sum::<usize>(), 2 * rooms as usize);
    let room = &timeline.rooms[0];
    let table = timeline.table(&[room]).to_string();
    assert_eq!(table.matches("lane up").count(), 256, "{table}");
    assert!(table.contains("(744 earlier events of its sessions are left out)"), "{table}");
    let json = serde_json::to_value(timeline.json(&[room])).unwrap();
    assert_eq!(json["rooms"][0]["events"].as_array().unwrap().len(), 258);
    assert_eq!(json["rooms"][0]["left_out"], 744);
}

/// Whatever a peer calls itself.
#[test]
fn nothing_that_was_recorded_moves_the_cursor() {
    let table = |name: &'static str| {
        let (mut here, mut there) = (Node::new(1, name, 0, 0), Node::new(2, name, 0, 0));
        let rings = [here.meet(&there), there.meet(&here)];
        here.note(0, rings[0], Some(1), bound(RoleKind::Receiving));
        here.note(0, rings[0], Some(1), sent(1));
        there.note(MS, rings[1], Some(1), came(1));
        let cause = SessionEnd::Unreachable { cause: LinkCause::BadAddress { reason: name } };
        here.note(
            S,
            RingId::NODE,
            None,
            What::NotReached { target: TargetId(1), cause: Box::new(cause.clone()) },
        );
        here.note(S, rings[0], None, What::SessionDown { cause: Box::new(cause), rooms: 1, silent_ms: 0 });
        here.note(S, rings[0], Some(1), ended(Some(End::PeerLost { cause: silent() }), 0, None));
        let timeline = Timeline::merge(&[here.file(2 * S), there.file(2 * S)], &Filter::default());
        let rooms: Vec<_> = timeline.rooms.iter().collect();
        format!("{}{}", timeline.table(&rooms), timeline.tail(100))
    };
    let (plain, wild) = (table("x"), table("\u{1b}[2J\r\n✗ forged\u{9b}1A\u{7f}\u{202e}\u{2028}"));
    assert!(!wild.contains(|letter: char| letter.is_control() && letter != '\n'), "{wild:?}");
    assert!(!wild.contains(['\u{202e}', '\u{2028}']), "{wild:?}");
    assert!(wild.contains("\u{fffd}[2J\u{fffd}\u{fffd}✗ forged"), "{wild:?}");
    assert_eq!(wild.lines().count(), plain.lines().count(), "{wild}");
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
