//! The network over real sockets, against itself and against peers that behave badly.
#![cfg(not(loom))]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crossdock_engine::{
    LinkCause, LinkEvent, LinkId, Network, NetworkError, Pulse, SendError, Sleeper, SocketNetwork,
    SocketOptions, Woken, now_ns,
};
use crossdock_transport::Arm;

/// An event with its bytes copied.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Accepted(LinkId),
    Opened(LinkId),
    Frame(LinkId, Vec<u8>),
    Closed(LinkId, LinkCause),
}

/// A network with all that it has said, which checks the rules of each link's life as it listens.
struct Node {
    network: SocketNetwork,
    seen: Vec<Seen>,
    /// Whether a link is still alive.
    alive: HashMap<LinkId, bool>,
}

impl Node {
    fn new(options: SocketOptions) -> Self {
        let network = SocketNetwork::open(options).unwrap();
        Self { network, seen: Vec::new(), alive: HashMap::new() }
    }

    fn poll(&mut self) {
        let (seen, alive) = (&mut self.seen, &mut self.alive);
        self.network.poll(&mut |event| {
            let (link, event) = match event {
                LinkEvent::Accepted { link } => {
                    assert_eq!(alive.insert(link, true), None, "a link number came back");
                    (link, Seen::Accepted(link))
                }
                LinkEvent::Opened { link } => (link, Seen::Opened(link)),
                LinkEvent::Frame { link, bytes } => (link, Seen::Frame(link, bytes.to_vec())),
                LinkEvent::Closed { link, cause } => (link, Seen::Closed(link, cause)),
            };
            assert_eq!(alive.get(&link), Some(&true), "{event:?} of a link that is not alive");
            if matches!(event, Seen::Closed(..)) {
                alive.insert(link, false);
            }
            seen.push(event);
        });
    }

    fn address(&self) -> String {
        self.network.address().to_owned()
    }

    fn dial(&mut self, address: &str) -> LinkId {
        let link = self.network.dial(address).unwrap();
        assert_eq!(self.alive.insert(link, true), None, "a link number came back");
        link
    }

    fn accepted(&self) -> Vec<LinkId> {
        self.seen
            .iter()
            .filter_map(|s| if let Seen::Accepted(link) = s { Some(*link) } else { None })
            .collect()
    }

    fn frames(&self, of: LinkId) -> Vec<Vec<u8>> {
        let of_link = |s: &Seen| match s {
            Seen::Frame(link, bytes) if *link == of => Some(bytes.clone()),
            _ => None,
        };
        self.seen.iter().filter_map(of_link).collect()
    }

    fn end(&self, of: LinkId) -> Option<LinkCause> {
        self.seen.iter().find_map(|s| match s {
            Seen::Closed(link, cause) if *link == of => Some(*cause),
            _ => None,
        })
    }

    /// Polls until `done`, sleeping between as the engine does.
    fn until<R>(&mut self, mut done: impl FnMut(&Self) -> Option<R>) -> R {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            self.poll();
            if let Some(result) = done(self) {
                return result;
            }
            assert!(
                Instant::now() < deadline,
                "it never happened; seen: {:?}",
                self.seen.iter().rev().take(9)
            );
            self.sleep(5_000_000);
        }
    }

    fn until_ended(&mut self, link: LinkId) -> LinkCause {
        self.until(|node| node.end(link))
    }

    fn until_accepted(&mut self) -> LinkId {
        self.until(|node| node.accepted().last().copied())
    }

    fn sleep(&mut self, timeout_ns: u64) -> Woken {
        match self.network.arm() {
            Arm::Ready => Woken::Readable,
            Arm::Sleep(descriptor) => {
                let mut sleeper = Sleeper::new();
                sleeper.watch(descriptor).unwrap();
                sleeper.sleep(timeout_ns).unwrap()
            }
            Arm::Spin => panic!("sockets can wake"),
        }
    }
}

fn options() -> SocketOptions {
    SocketOptions::new("127.0.0.1:0".parse().unwrap())
}

fn node() -> Node {
    Node::new(options())
}

/// Two nodes with a link between them: its number at each.
fn pair(a: SocketOptions, b: SocketOptions) -> (Node, LinkId, Node, LinkId) {
    let (mut a, mut b) = (Node::new(a), Node::new(b));
    let ours = a.dial(&b.address());
    a.until(|a| a.seen.contains(&Seen::Opened(ours)).then_some(()));
    let theirs = b.until_accepted();
    a.network.trust(ours);
    b.network.trust(theirs);
    (a, ours, b, theirs)
}

fn frame(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes()[..], bytes].concat()
}

/// A small generator, so that a failure can be replayed.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    fn bytes(&mut self, longest: usize) -> Vec<u8> {
        let length = self.below(longest + 1);
        (0..length).map(|_| self.below(256) as u8).collect()
    }
}

#[test]
fn frames_go_both_ways_in_order() {
    let (mut a, ours, mut b, theirs) = pair(options(), options());
    let mut seeded = Seeded(1);
    let mut sent: Vec<_> = (0..200).map(|_| seeded.bytes(300)).collect();
    sent.push(vec![7; 1 << 20]);
    sent.push(vec![]);
    for bytes in &sent {
        a.network.send(ours, bytes).unwrap();
        b.network.send(theirs, bytes).unwrap();
    }
    // One end at a time would wait for the other for ever: neither reads while it is not polled.
    let deadline = Instant::now() + Duration::from_secs(20);
    while a.frames(ours).len() < sent.len() || b.frames(theirs).len() < sent.len() {
        a.poll();
        b.poll();
        assert!(Instant::now() < deadline);
    }
    assert!(a.frames(ours) == sent && b.frames(theirs) == sent);
    assert_eq!(a.seen[0], Seen::Opened(ours));
    assert_eq!(b.seen[0], Seen::Accepted(theirs));
}

#[test]
fn frames_queued_while_dialling_leave_when_it_is_answered() {
    let (mut a, mut b) = (node(), node());
    let link = a.dial(&b.address());
    a.network.send(link, b"hello").unwrap();
    a.until(|a| a.seen.contains(&Seen::Opened(link)).then_some(()));
    let theirs = b.until_accepted();
    assert_eq!(b.until(|b| b.frames(theirs).first().cloned()), b"hello");
}

#[test]
fn a_node_can_dial_itself() {
    let mut node = node();
    let dialled = node.dial(&node.address());
    let accepted = node.until_accepted();
    node.network.send(dialled, b"to myself").unwrap();
    assert_eq!(node.until(|n| n.frames(accepted).first().cloned()), b"to myself");
    node.network.close(accepted);
    assert_eq!(node.until_ended(dialled), LinkCause::ClosedByPeer);
    assert_eq!(node.until_ended(accepted), LinkCause::ClosedHere);
    assert_eq!(node.network.links(), 0);
}

#[test]
fn streams_cut_anywhere_give_the_same_frames() {
    for seed in 0..20 {
        let mut seeded = Seeded(seed);
        let mut node = Node::new(SocketOptions { max_frame_bytes: 5_000, ..options() });
        let mut peer = TcpStream::connect(node.network.address()).unwrap();
        peer.set_nodelay(true).unwrap();
        let longest = if seed % 2 == 0 { 12 } else { 5_000 };
        let sent: Vec<_> = (0..40).map(|_| seeded.bytes(longest)).collect();
        let stream: Vec<u8> = sent.iter().flat_map(|bytes| frame(bytes)).collect();
        let mut rest = &stream[..];
        while !rest.is_empty() {
            let (now, later) =
                rest.split_at(seeded.below(rest.len().min(if seed % 4 < 2 { 9 } else { 30_000 })) + 1);
            peer.write_all(now).unwrap();
            if seeded.below(4) == 0 {
                node.poll();
            }
            rest = later;
        }
        let link = node.until_accepted();
        node.until(|n| (n.frames(link).len() == sent.len()).then_some(()));
        assert!(node.frames(link) == sent, "seed {seed}");
        drop(peer);
        assert_eq!(node.until_ended(link), LinkCause::ClosedByPeer);
    }
}

#[test]
fn noise_ends_the_link_and_nothing_else() {
    let mut node = Node::new(SocketOptions { max_frame_bytes: 64, ..options() });
    let mut honest = TcpStream::connect(node.network.address()).unwrap();
    honest.write_all(&frame(b"first")).unwrap();
    let kept = node.until_accepted();
    for seed in 0..50 {
        let mut seeded = Seeded(seed);
        let mut peer = TcpStream::connect(node.network.address()).unwrap();
        let noise = seeded.bytes(2_000);
        // The link may be closed before all is written.
        let _ = peer.write_all(&noise);
        drop(peer);
        let link = node.until(|n| n.accepted().get(seed as usize + 1).copied());
        let cause = node.until_ended(link);
        let expected = matches!(
            cause,
            LinkCause::ClosedByPeer
                | LinkCause::PeerMisbehaved { .. }
                | LinkCause::Broken { call: "recv", errno: 0 | 104 }
        );
        assert!(expected, "seed {seed}: {cause:?}");
        assert!(node.frames(link).iter().all(|bytes| bytes.len() <= 64));
    }
    honest.write_all(&frame(b"second")).unwrap();
    node.until(|n| (n.frames(kept).len() == 2).then_some(()));
    assert_eq!(node.network.links(), 1);
}

#[test]
fn a_frame_longer_than_allowed_ends_the_link_after_those_before_it() {
    let mut node = Node::new(SocketOptions { max_frame_bytes: 8, ..options() });
    let mut peer = TcpStream::connect(node.network.address()).unwrap();
    peer.write_all(&[frame(b"good"), frame(b"too long!")].concat()).unwrap();
    let link = node.until_accepted();
    assert!(matches!(node.until_ended(link), LinkCause::PeerMisbehaved { .. }));
    assert_eq!(node.frames(link), [b"good"]);
    assert_eq!(node.network.send(link, b"x"), Err(SendError::Closed));
}

#[test]
fn a_stream_that_ends_within_a_frame_is_broken() {
    for cut in [1, 4, 6] {
        let mut node = node();
        let mut peer = TcpStream::connect(node.network.address()).unwrap();
        peer.write_all(&[frame(b"whole"), frame(b"half")[..cut].to_vec()].concat()).unwrap();
        drop(peer);
        let link = node.until_accepted();
        assert_eq!(node.until_ended(link), LinkCause::Broken { call: "recv", errno: 0 });
        assert_eq!(node.frames(link), [b"whole"]);
    }
}

#[test]
fn a_full_link_takes_nothing_until_the_peer_reads() {
    let small = SocketOptions { max_frame_bytes: 60_000, send_buffer_bytes: 70_000, ..options() };
    let (mut a, ours, mut b, theirs) = pair(small.clone(), small);
    assert_eq!(a.network.send(ours, &[0; 60_001]), Err(SendError::TooLong { bytes: 60_001, limit: 60_000 }));
    let mut sent = 0u32;
    let mut frame = vec![0; 60_000];
    let full_at = loop {
        frame[..4].copy_from_slice(&sent.to_le_bytes());
        match a.network.send(ours, &frame) {
            Ok(()) => sent += 1,
            Err(error) => {
                assert_eq!(error, SendError::Full);
                // The kernel may take more once it has handed some to the peer's side.
                a.poll();
                std::thread::sleep(Duration::from_millis(20));
                a.poll();
                if a.network.send(ours, &frame) == Err(SendError::Full) {
                    break sent;
                }
                sent += 1;
            }
        }
        assert!(sent < 10_000, "the link never fills");
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while sent < full_at + 50 {
        frame[..4].copy_from_slice(&sent.to_le_bytes());
        sent += u32::from(a.network.send(ours, &frame).is_ok());
        a.poll();
        b.poll();
        assert!(Instant::now() < deadline);
    }
    while b.frames(theirs).len() < sent as usize {
        a.poll();
        b.poll();
        assert!(Instant::now() < deadline);
    }
    let numbers: Vec<_> =
        b.frames(theirs).iter().map(|f| u32::from_le_bytes(f[..4].try_into().unwrap())).collect();
    assert_eq!(numbers, (0..sent).collect::<Vec<_>>());
}

#[test]
fn closing_sends_what_is_queued() {
    let (mut a, ours, mut b, theirs) = pair(options(), options());
    let sent: Vec<_> = (0..4).map(|n| vec![n; 1_000_000]).collect();
    for bytes in &sent {
        a.network.send(ours, bytes).unwrap();
    }
    // What the peer says after the close is not given to anybody.
    b.network.send(theirs, b"too late").unwrap();
    b.poll();
    a.network.close(ours);
    a.network.close(ours);
    assert_eq!(a.network.send(ours, b"x"), Err(SendError::Closed));
    let deadline = Instant::now() + Duration::from_secs(20);
    while a.end(ours).is_none() || b.end(theirs).is_none() {
        a.poll();
        b.poll();
        assert!(Instant::now() < deadline);
    }
    assert!(b.frames(theirs) == sent);
    assert_eq!((a.end(ours), b.end(theirs)), (Some(LinkCause::ClosedHere), Some(LinkCause::ClosedByPeer)));
    assert!(a.frames(ours).is_empty());
}

#[test]
fn closing_a_link_whose_peer_does_not_read_is_bounded() {
    let patient = SocketOptions { close_timeout: Duration::from_millis(100), ..options() };
    let mut node = Node::new(patient);
    let peer = TcpStream::connect(node.network.address()).unwrap();
    let link = node.until_accepted();
    while node.network.send(link, &[0; 1 << 20]).is_ok() {
        node.poll();
    }
    let began = Instant::now();
    node.network.close(link);
    assert_eq!(node.until_ended(link), LinkCause::ClosedHere);
    assert!((100..5_000).contains(&began.elapsed().as_millis()));
    drop(peer);
}

#[test]
fn closing_while_dialling_says_only_that() {
    let (mut a, mut b) = (node(), node());
    let link = a.dial(&b.address());
    a.network.close(link);
    assert_eq!(a.until_ended(link), LinkCause::ClosedHere);
    assert_eq!(a.seen.len(), 1);
    let theirs = b.until_accepted();
    b.until_ended(theirs);
}

#[test]
fn dialling_a_port_where_nobody_listens_is_answered() {
    let mut node = node();
    for _ in 0..20 {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let link = node.dial(&free.to_string());
        let cause = node.until_ended(link);
        assert!(matches!(cause, LinkCause::Broken { call: "connect", errno: 111 }), "{cause:?}");
    }
}

#[test]
fn dialling_has_a_deadline() {
    // A listener whose backlog is full answers nobody.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = TcpStream::connect(address).unwrap();
    let mut node = Node::new(SocketOptions { connect_timeout: Duration::from_millis(150), ..options() });
    let links: Vec<_> = (0..3).map(|_| node.dial(&address.to_string())).collect();
    let began = Instant::now();
    let causes: Vec<_> = links.iter().map(|&link| node.until_ended(link)).collect();
    assert_eq!(causes, [LinkCause::ConnectTimedOut; 3]);
    assert!((140..5_000).contains(&began.elapsed().as_millis()));
}

#[test]
fn deadlines_end_a_sleep() {
    let mut node = Node::new(SocketOptions { first_frame_timeout: Duration::from_millis(150), ..options() });
    let _peer = TcpStream::connect(node.network.address()).unwrap();
    let link = node.until_accepted();
    // Asleep for far longer than the deadline: only the timer can wake it.
    let began = Instant::now();
    while node.end(link).is_none() {
        assert_eq!(node.sleep(30_000_000_000), Woken::Readable);
        node.poll();
    }
    assert_eq!(node.end(link), Some(LinkCause::Silent));
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(node.sleep(20_000_000), Woken::NotReadable, "nothing is left that could wake it");
}

#[test]
fn arming_is_a_promise() {
    let (mut a, ours, mut b, theirs) = pair(options(), options());
    assert_eq!(b.sleep(20_000_000), Woken::NotReadable);
    // Arming sends what was queued, and the frame wakes the other.
    a.network.send(ours, b"wake").unwrap();
    a.sleep(0);
    assert_eq!(b.sleep(20_000_000_000), Woken::Readable);
    assert_eq!(b.until(|b| b.frames(theirs).first().cloned()), b"wake");
    // What has ended here is found without sleep.
    let link = b.dial(&a.address());
    b.network.close(link);
    assert!(matches!(b.network.arm(), Arm::Ready));
    b.poll();
    assert_eq!(b.end(link), Some(LinkCause::ClosedHere));
}

#[test]
fn the_last_words_of_a_peer_that_hangs_up_are_heard() {
    for round in 0..20 {
        let mut node = node();
        let mut peer = TcpStream::connect(node.network.address()).unwrap();
        peer.write_all(&frame(b"hello")).unwrap();
        let link = node.until(|n| n.accepted().first().copied());
        node.until(|n| n.frames(link).first().cloned());
        // The peer refuses with a reason and closes, with bytes of ours unread: the kernel answers what we send
        // from then on with a reset, which our next send may notice before we have read the reason.
        node.network.send(link, &[1; 100_000]).unwrap();
        node.network.flush();
        peer.write_all(&frame(b"dtype bf16 here, fp8_e4m3 there")).unwrap();
        drop(peer);
        std::thread::sleep(Duration::from_millis(round % 4));
        for _ in 0..3 {
            let _ = node.network.send(link, &[2; 100_000]);
            node.network.flush();
        }
        let cause = node.until_ended(link);
        assert!(matches!(cause, LinkCause::ClosedByPeer | LinkCause::Broken { .. }), "{cause:?}");
        assert_eq!(node.frames(link).len(), 2, "round {round}: {cause:?}");
    }
}

#[test]
fn the_silent_are_bounded_and_make_room() {
    let mut node = Node::new(SocketOptions { max_silent_links: 2, ..options() });
    let silent: Vec<_> = (0..2).map(|_| TcpStream::connect(node.network.address()).unwrap()).collect();
    node.until(|n| (n.accepted().len() == 2).then_some(()));
    let mut honest = TcpStream::connect(node.network.address()).unwrap();
    honest.write_all(&frame(b"honest")).unwrap();
    let began = Instant::now();
    let link = node.until(|n| n.accepted().get(2).copied());
    assert!(began.elapsed() < Duration::from_secs(2), "it does not wait for the time-out of the silent");
    node.until(|n| n.frames(link).first().cloned());
    let first = node.accepted()[0];
    assert_eq!(node.end(first), Some(LinkCause::Silent), "the oldest makes room");
    assert_eq!(node.network.links(), 2);
    drop(silent);
}

/// Peers that say a good first word, begin a long frame, and never prove who they are.
#[test]
fn strangers_hold_little_and_make_room() {
    let mut node = Node::new(SocketOptions { max_stranger_links: 3, max_links: 16, ..options() });
    let address = node.address();
    let stranger = |node: &mut Node, at: usize| {
        let mut peer = TcpStream::connect(&address).unwrap();
        peer.write_all(&[frame(b"hello"), (1u32 << 20).to_le_bytes().to_vec(), vec![1; 100]].concat())
            .unwrap();
        let link = node.until(|n| n.accepted().get(at).copied());
        node.until(|n| n.frames(link).first().cloned());
        (peer, link)
    };
    let mut proven = TcpStream::connect(&address).unwrap();
    proven.write_all(&frame(b"hello")).unwrap();
    let trusted = node.until_accepted();
    node.until(|n| n.frames(trusted).first().cloned());
    node.network.trust(trusted);
    let strangers: Vec<_> = (1..4).map(|at| stranger(&mut node, at)).collect();
    // One more takes the place of the oldest, and not of who has proven itself.
    let (_late, late) = stranger(&mut node, 4);
    assert_eq!(node.end(strangers[0].1), Some(LinkCause::Unproven));
    assert_eq!([trusted, strangers[1].1, strangers[2].1, late].map(|link| node.end(link)), [None; 4]);
    // A long frame of a stranger ends its link; a trusted one's is taken.
    let (mut peer, link) = (&strangers[1].0, strangers[1].1);
    let _ = peer.write_all(&[1; 200_000]);
    assert!(matches!(node.until_ended(link), LinkCause::PeerMisbehaved { .. }));
    let long = vec![3; 1 << 20];
    let sent = frame(&long);
    let writer = std::thread::spawn(move || proven.write_all(&sent).map(|()| proven));
    node.until(|n| (n.frames(trusted).len() == 2).then_some(()));
    assert!(node.frames(trusted)[1] == long);
    drop(writer.join());
}

/// Those that were refused and never hang up are strangers, too.
#[test]
fn who_is_being_closed_makes_room_as_well() {
    let mut node = Node::new(SocketOptions {
        max_stranger_links: 2,
        close_timeout: Duration::from_secs(600),
        ..options()
    });
    let address = node.address();
    let mut refused = Vec::new();
    for at in 0..4 {
        let mut peer = TcpStream::connect(&address).unwrap();
        peer.write_all(&frame(b"hello")).unwrap();
        let link = node.until(|n| n.accepted().get(at).copied());
        node.until(|n| n.frames(link).first().cloned());
        node.network.close(link);
        refused.push((peer, link));
    }
    assert_eq!(node.network.links(), 2);
    assert_eq!(node.end(refused[0].1), Some(LinkCause::ClosedHere));
}

#[test]
fn a_crowd_that_speaks_is_never_turned_away() {
    let mut node = Node::new(SocketOptions { max_silent_links: 4, ..options() });
    let address = node.address();
    let crowd = std::thread::spawn(move || {
        let mut peers: Vec<_> = (0..100).map(|_| TcpStream::connect(&address).unwrap()).collect();
        for peer in &mut peers {
            peer.write_all(&frame(b"hello")).unwrap();
        }
        // Each is answered: none was closed to make room.
        for peer in &mut peers {
            peer.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut answer = [0; 6];
            peer.read_exact(&mut answer).unwrap();
            assert_eq!(answer[4..], *b"ok");
        }
    });
    let mut answered = 0;
    while answered < 100 {
        node.until(|n| n.seen.iter().skip(answered).any(|s| matches!(s, Seen::Frame(..))).then_some(()));
        let spoken: Vec<_> = node
            .seen
            .iter()
            .filter_map(|s| if let Seen::Frame(link, _) = s { Some(*link) } else { None })
            .collect();
        for link in &spoken[answered..] {
            node.network.send(*link, b"ok").unwrap();
        }
        answered = spoken.len();
    }
    node.poll();
    crowd.join().unwrap();
}

#[test]
fn too_many_links_are_turned_away() {
    let mut node = Node::new(SocketOptions { max_links: 2, ..options() });
    let address = node.address();
    let mut peers: Vec<_> = (0..3).map(|_| TcpStream::connect(&address).unwrap()).collect();
    node.until(|n| (n.network.turned_away() == 1).then_some(()));
    assert_eq!(node.network.links(), 2);
    assert_eq!(node.network.dial(&address), Err(NetworkError::Limit { what: "links", limit: 2 }));
    peers[2].set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(peers[2].read(&mut [0]).unwrap(), 0);
    let first = node.accepted()[0];
    peers.remove(0);
    node.until_ended(first);
    let _another = TcpStream::connect(&address).unwrap();
    node.until(|n| (n.accepted().len() == 3).then_some(()));
}

/// Whatever two nodes do, each link ends once, and nothing is said of it afterwards: [`Node::poll`] checks it.
#[test]
fn any_order_of_calls_keeps_the_rules() {
    for seed in 0..30 {
        let mut seeded = Seeded(seed);
        let limits = SocketOptions {
            max_links: 12,
            max_frame_bytes: 20_000,
            send_buffer_bytes: 40_000,
            close_timeout: Duration::from_millis(20),
            first_frame_timeout: Duration::from_millis(20),
            connect_timeout: Duration::from_millis(500),
            ..options()
        };
        let mut nodes = [Node::new(limits.clone()), Node::new(limits)];
        for _ in 0..400 {
            let here = seeded.below(2);
            let there = nodes[1 - here].address();
            let node = &mut nodes[here];
            let known: Vec<_> = node.alive.keys().copied().collect();
            let some = (!known.is_empty()).then(|| known[seeded.below(known.len().max(1))]);
            match (seeded.below(12), some) {
                (0, _) => {
                    if let Ok(link) = node.network.dial(&there) {
                        assert_eq!(node.alive.insert(link, true), None);
                    }
                }
                (1..4, Some(link)) => {
                    let _ = node.network.send(link, &seeded.bytes(20_000));
                }
                (4, Some(link)) => node.network.close(link),
                (5, _) => node.network.flush(),
                (6, _) => {
                    node.sleep(1_000_000);
                }
                _ => node.poll(),
            }
        }
        for here in [0, 1] {
            let links: Vec<_> = nodes[here].alive.keys().copied().collect();
            for link in links {
                nodes[here].network.close(link);
            }
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while nodes.iter().any(|n| n.network.links() > 0) {
            assert!(Instant::now() < deadline, "seed {seed}: links never end");
            for node in &mut nodes {
                node.poll();
                for link in node.accepted() {
                    node.network.close(link);
                }
            }
        }
        assert!(nodes.iter().all(|n| n.alive.values().all(|alive| !alive)), "seed {seed}");
    }
}

#[test]
fn heartbeats_are_heard_while_nobody_polls() {
    let (mut a, mut b) = (node(), node());
    let pulse = |peer: &Node, send_token, expect_token| Pulse {
        peer_address: peer.network.pulse_address().to_owned(),
        interval_ns: 5_000_000,
        send_token,
        expect_token,
    };
    let (to_b, to_a) = (pulse(&b, 1, 2), pulse(&a, 2, 1));
    a.network.watch(7, to_b).unwrap();
    b.network.watch(7, to_a).unwrap();
    let began_ns = now_ns();
    let deadline = Instant::now() + Duration::from_secs(20);
    while a.network.heard_ns(7).unwrap() < began_ns + 200_000_000 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(a.network.listened_ns() > began_ns + 200_000_000);
    a.network.unwatch(7);
    assert_eq!(a.network.heard_ns(7), None);
}

#[test]
fn bad_options_and_addresses_are_refused() {
    let refused = |change: fn(&mut SocketOptions)| {
        let mut changed = options();
        change(&mut changed);
        match SocketNetwork::open(changed).map(|_| ()) {
            Err(NetworkError::BadOption { option, .. }) => option,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(|o| o.max_links = 0), "max_links");
    assert_eq!(refused(|o| o.max_silent_links = 0), "max_silent_links");
    assert_eq!(refused(|o| o.max_stranger_links = 0), "max_stranger_links");
    assert_eq!(refused(|o| o.max_frame_bytes = 1 << 33), "max_frame_bytes");
    assert_eq!(refused(|o| o.send_buffer_bytes = o.max_frame_bytes), "send_buffer_bytes");
    assert_eq!(refused(|o| o.unacknowledged_timeout = Duration::ZERO), "unacknowledged_timeout");
    assert_eq!(refused(|o| o.bind = "0.0.0.0:0".parse().unwrap()), "bind");
    let mut node = node();
    for address in ["", "127.0.0.1", "localhost:80", "127.0.0.1:70000"] {
        assert!(matches!(node.network.dial(address), Err(NetworkError::BadAddress { .. })));
    }
    let taken = SocketOptions { bind: node.network.address().parse().unwrap(), ..options() };
    let error = SocketNetwork::open(taken).map(|_| ()).unwrap_err();
    assert!(matches!(error, NetworkError::Os(os) if os.call == "bind"), "{error:?}");
    assert_eq!(node.network.send(LinkId(99), b""), Err(SendError::Closed));
    node.network.close(LinkId(99));
    node.poll();
    assert_eq!(node.seen, []);
}
