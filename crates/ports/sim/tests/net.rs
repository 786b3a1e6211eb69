//! Control streams and datagrams.

use crossdock_sim::{
    CloseCause, Fabric, FabricOptions, NodeId, OneIn, SendError, SimNet, StreamEvent, StreamId,
};

const A: NodeId = NodeId(0);
const B: NodeId = NodeId(1);
const SOON_NS: u64 = 10_000_000;

#[test]
fn frames_come_once_and_in_order_both_ways() {
    let mut two = Two::open(1);
    let (near, far) = two.streams;
    for number in 0..200u32 {
        two.a.send(near, &number.to_le_bytes()).expect("there is room");
        two.b.send(far, &[number as u8]).expect("there is room");
        two.run_for(3_000);
    }
    two.run_for(SOON_NS);
    assert_eq!(frames(&two.heard_b, far), (0..200u32).map(|n| n.to_le_bytes().to_vec()).collect::<Vec<_>>());
    assert_eq!(frames(&two.heard_a, near), (0..200).map(|n| vec![n as u8]).collect::<Vec<_>>());
    assert!(two.fabric.next_event_ns().is_none(), "nothing is left to happen");
}

#[test]
fn frames_may_be_sent_before_somebody_answers() {
    let mut two = Two::new(2);
    let stream = two.a.dial("b");
    two.a.send(stream, b"early").expect("a stream that may open");
    two.run_for(SOON_NS);
    assert_eq!(two.heard_a, [StreamEvent::Opened { stream }]);
    let StreamEvent::Accepted { stream: far } = two.heard_b[0] else { panic!("{:?}", two.heard_b) };
    assert_eq!(two.heard_b[1..], [StreamEvent::Frame { stream: far, bytes: b"early".to_vec() }]);
}

#[test]
fn who_does_not_read_holds_back_who_sends() {
    let mut two = Two::open(3);
    let near = two.streams.0;
    let limit = FabricOptions::default().stream_frames;
    for _ in 0..limit {
        assert_eq!(two.a.send(near, b"x"), Ok(()));
    }
    assert_eq!(two.a.send(near, b"x"), Err(SendError::Full));
    two.fabric.advance_to(two.fabric.now_ns() + SOON_NS);
    assert_eq!(two.a.send(near, b"x"), Err(SendError::Full), "they have come, but nobody has read them");
    assert_eq!(two.b.events().count(), limit);
    assert_eq!(two.a.send(near, b"x"), Ok(()));
}

#[test]
fn a_closed_stream_delivers_what_was_sent_and_then_its_end() {
    let mut two = Two::open(4);
    let (near, far) = two.streams;
    two.b.send(far, b"on its way").expect("there is room");
    two.a.send(near, b"last").expect("there is room");
    two.a.close(near);
    assert_eq!(two.a.send(near, b"late"), Err(SendError::Closed));
    two.run_for(SOON_NS);
    let closed = StreamEvent::Closed { stream: far, cause: CloseCause::ByPeer };
    assert_eq!(two.heard_b, [StreamEvent::Frame { stream: far, bytes: b"last".to_vec() }, closed]);
    assert_eq!(two.heard_a, [], "who closes hears nothing more");
    assert_eq!(two.b.send(far, b"late"), Err(SendError::Closed));
    assert_eq!(two.b.send(StreamId(77), b"x"), Err(SendError::Closed), "a stream that never was");
}

#[test]
fn nobody_answers_for_an_unknown_address() {
    let mut two = Two::new(5);
    let stream = two.a.dial("c");
    two.run_for(SOON_NS);
    assert_eq!(two.heard_a, [StreamEvent::Closed { stream, cause: CloseCause::Refused }]);
}

#[test]
fn a_short_partition_only_delays() {
    let mut two = Two::open(6);
    let (near, far) = two.streams;
    two.fabric.partition(A, B);
    two.a.send(near, b"held up").expect("there is room");
    two.run_for(100_000_000);
    assert_eq!(two.heard_b, []);
    two.fabric.heal(A, B);
    two.run_for(SOON_NS);
    assert_eq!(two.heard_b, [StreamEvent::Frame { stream: far, bytes: b"held up".to_vec() }]);
}

#[test]
fn a_long_partition_ends_streams_and_calls() {
    let mut two = Two::open(7);
    let (near, far) = two.streams;
    two.fabric.partition(A, B);
    let call = two.a.dial("b");
    two.run_for(5_000_000_000);
    let cause = CloseCause::TimedOut;
    let closed = |stream| StreamEvent::Closed { stream, cause };
    assert_eq!(two.heard_a, [closed(near), closed(call)]);
    assert_eq!(two.heard_b, [closed(far)]);
}

#[test]
fn a_call_during_a_short_partition_is_answered_after_it() {
    let mut two = Two::new(8);
    two.fabric.partition(A, B);
    let stream = two.a.dial("b");
    two.run_for(200_000_000);
    assert_eq!(two.heard_a, []);
    two.fabric.heal(A, B);
    two.run_for(500_000_000);
    assert_eq!(two.heard_a, [StreamEvent::Opened { stream }]);
}

#[test]
fn a_death_resets_streams_and_loses_a_tail() {
    let mut came = Vec::new();
    for seed in 0..40 {
        let mut two = Two::open(seed);
        let (near, far) = two.streams;
        for number in 0..20 {
            two.a.send(near, &[number]).expect("there is room");
        }
        two.fabric.kill(A);
        two.run_for(SOON_NS);
        let got = frames(&two.heard_b, far);
        assert!(got.iter().map(|frame| frame[0]).eq(0..got.len() as u8), "in order, without a gap");
        came.push(got.len());
        let reset = StreamEvent::Closed { stream: far, cause: CloseCause::Reset };
        assert_eq!(two.heard_b.last(), Some(&reset));
        let call = two.b.dial("a");
        two.run_for(SOON_NS);
        let refused = StreamEvent::Closed { stream: call, cause: CloseCause::Refused };
        assert_eq!(two.heard_b.last(), Some(&refused), "nobody answers for the dead");
        two.fabric.restart(A);
        two.a = two.fabric.net(A, "a");
        two.b.dial("a");
        two.run_for(SOON_NS);
        assert!(
            matches!(two.heard_a.last(), Some(StreamEvent::Accepted { .. })),
            "the new process is dialled"
        );
    }
    came.sort_unstable();
    assert!(came[0] < 20 && came[39] > 0, "{came:?}");
}

#[test]
fn a_break_is_heard_at_both_ends() {
    let mut two = Two::open(9);
    let (near, far) = two.streams;
    two.fabric.break_streams(B, A);
    two.run_for(SOON_NS);
    let cause = CloseCause::Reset;
    assert_eq!(two.heard_a, [StreamEvent::Closed { stream: near, cause }]);
    assert_eq!(two.heard_b, [StreamEvent::Closed { stream: far, cause }]);
}

#[test]
fn a_dropped_net_closes_its_streams() {
    let mut two = Two::open(10);
    let far = two.streams.1;
    two.a = two.fabric.net(A, "a");
    two.run_for(SOON_NS);
    assert_eq!(two.heard_b, [StreamEvent::Closed { stream: far, cause: CloseCause::ByPeer }]);
}

#[test]
fn datagrams_are_lost_sometimes_and_never_pile_up() {
    let options = FabricOptions { datagram_loss: OneIn(10), datagrams_unread: 500, ..Default::default() };
    let fabric = Fabric::new(11, options);
    let mut two = Two::on(fabric);
    for number in 0..400u32 {
        two.a.datagram("b", &number.to_le_bytes());
    }
    two.fabric.advance_to(SOON_NS);
    let came: Vec<_> = two.b.datagrams().collect();
    assert!((200..400).contains(&came.len()), "{} of 400 came", came.len());
    assert!(came.iter().all(|datagram| &*datagram.from == "a"));
    let numbers: Vec<u32> =
        came.iter().map(|d| u32::from_le_bytes(d.bytes[..].try_into().unwrap())).collect();
    assert!(!numbers.is_sorted(), "some overtake others");

    for _ in 0..2000 {
        two.a.datagram("b", b"");
    }
    two.fabric.advance_to(2 * SOON_NS);
    assert_eq!(two.b.datagrams().count(), 500, "no more are kept than the limit");

    two.fabric.partition(A, B);
    two.a.datagram("b", b"");
    two.fabric.advance_to(3 * SOON_NS);
    two.fabric.heal(A, B);
    two.fabric.advance_to(4 * SOON_NS);
    assert_eq!(two.b.datagrams().count(), 0, "datagrams do not wait for a partition to heal");
}

/// Two processes.
struct Two {
    fabric: Fabric,
    a: SimNet,
    b: SimNet,
    /// A stream's end at `a` and at `b`.
    streams: (StreamId, StreamId),
    heard_a: Vec<StreamEvent>,
    heard_b: Vec<StreamEvent>,
}

impl Two {
    fn new(seed: u64) -> Self {
        Self::on(Fabric::new(seed, FabricOptions::default()))
    }

    fn on(fabric: Fabric) -> Self {
        let (a, b) = (fabric.net(A, "a"), fabric.net(B, "b"));
        let streams = (StreamId(0), StreamId(0));
        Self { fabric, a, b, streams, heard_a: Vec::new(), heard_b: Vec::new() }
    }

    /// With a stream that is open.
    fn open(seed: u64) -> Self {
        let mut two = Self::new(seed);
        let near = two.a.dial("b");
        two.run_for(SOON_NS);
        assert_eq!(two.heard_a, [StreamEvent::Opened { stream: near }]);
        let [StreamEvent::Accepted { stream: far }] = two.heard_b[..] else { panic!("{:?}", two.heard_b) };
        two.streams = (near, far);
        two.heard_a.clear();
        two.heard_b.clear();
        two
    }

    fn run_for(&mut self, ns: u64) {
        let until = self.fabric.now_ns() + ns;
        while let Some(next) = self.fabric.next_event_ns().filter(|&next| next <= until) {
            self.fabric.advance_to(next);
            self.heard_a.extend(self.a.events());
            self.heard_b.extend(self.b.events());
        }
        self.fabric.advance_to(until);
    }
}

fn frames(heard: &[StreamEvent], of: StreamId) -> Vec<Vec<u8>> {
    let frame = |event: &StreamEvent| match event {
        StreamEvent::Frame { stream, bytes } if *stream == of => Some(bytes.clone()),
        _ => None,
    };
    heard.iter().filter_map(frame).collect()
}
