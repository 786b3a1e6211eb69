//! A port against peers that break the rules: the other end of the lane is played by hand. The port is one that stands on
//! this crate, of shared memory.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_shm::process_memory::PeerProcess;
use crossdock_shm::{ShmOptions, ShmPort};
use crossdock_transport::{
    Arm, DownCause, Error, Event, Events, LaneId, LaneTags, Op, PeerId, Port, RemoteKey, Token,
};

use crate::address::{Address, Key, Secret, secret};
use crate::doorbell::Doorbell;
use crate::link::{Link, Listener, Received, Sent};
use crate::medium::{Kind, OfferForm};
use crate::message::{Described, Greeting, Message, Payload};
use crate::remote::MAX_REGIONS;
use crate::ring;

/// As the shared-memory port has it.
static KIND: Kind = Kind {
    name: "shm",
    address_magic: *b"xsa\x01",
    key_magic: *b"xsk\x01",
    offers: &[
        OfferForm { number: 0, payload_bytes: 8, with_descriptor: true },
        OfferForm { number: 1, payload_bytes: 8, with_descriptor: false },
    ],
};
const OURS: [u8; 32] = [0xAA; 32];
const THEIRS: [u8; 32] = [0xBB; 32];
const IMMEDIATES: u32 = 8;
const DESCRIPTORS: usize = 12;

/// A port with one lane, and what the rogue needs to be its other end.
struct Victim {
    port: ShmPort,
    lane: LaneId,
    address: Address,
    events: Vec<Event>,
}

/// The rogue's end.
struct Rogue {
    link: Link,
    bell: Doorbell,
    /// Both rings.
    rings: Memory,
    port: Box<Secret>,
}

impl Victim {
    fn open() -> Self {
        let options = ShmOptions {
            immediates_per_lane: IMMEDIATES,
            connect_timeout: Duration::from_millis(200),
            max_lanes: 4,
            max_peer_descriptors: DESCRIPTORS,
            ..ShmOptions::default()
        };
        let mut port = ShmPort::open(options).expect("a port can be opened");
        let (lane, address) = port.open_lane(PeerId(0)).expect("a lane can be opened");
        let address = Address::decode(&KIND, &address).expect("its own address");
        Self { port, lane, address, events: Vec::new() }
    }

    fn connect(&mut self, rogue: Address) {
        let tags = LaneTags { ours: OURS, theirs: THEIRS };
        self.port.connect(self.lane, &rogue.encode(&KIND), &tags).expect("a fresh lane connects");
    }

    fn turn(&mut self) {
        let mut events = Events::with_capacity(16);
        for _ in 0..20 {
            self.port.poll(&mut events);
            self.events.extend(events.drain());
        }
    }

    fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            self.turn();
            assert!(begun.elapsed() < Duration::from_secs(5), "waited for {what}; heard {:?}", self.events);
            std::thread::yield_now();
        }
    }

    fn down(&self) -> Option<DownCause> {
        let mut causes = self.events.iter().filter_map(|event| match event {
            Event::Down { cause, .. } => Some(*cause),
            _ => None,
        });
        let cause = causes.next();
        assert_eq!(causes.next(), None, "a second Down");
        cause
    }

    fn wait_down(&mut self) -> DownCause {
        self.wait("the lane to be down", |victim| victim.down().is_some());
        self.down().expect("waited for")
    }

    /// For a while, and asleep where the port allows it.
    fn stays_not_down(&mut self) {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(50) {
            self.turn();
            assert_eq!(self.down(), None);
        }
        assert!(matches!(self.port.arm(), Arm::Sleep(_)), "waiting without end has to be asleep");
    }

    /// A lane with a rogue, which plays by the rules so far: the victim's lane is up.
    fn with_rogue() -> (Self, Rogue) {
        let mut victim = Self::open();
        let rogue = victim.meet_rogue();
        (victim, rogue)
    }

    fn meet_rogue(&mut self) -> Rogue {
        let mut rogue = Rogue::dial(self, THEIRS);
        rogue.welcome(self);
        rogue.say(&Message::Announced);
        self.wait("up", |victim| victim.events == [Event::Up { lane: victim.lane }]);
        rogue
    }

    /// Another lane of the same port, with another rogue.
    fn meet_another(&mut self) -> Rogue {
        let (lane, address) = self.port.open_lane(PeerId(1)).expect("a lane can be opened");
        (self.lane, self.address) = (lane, Address::decode(&KIND, &address).expect("its own address"));
        self.events.clear();
        self.meet_rogue()
    }

    fn misbehaviour(what: &'static str) -> DownCause {
        DownCause::PeerMisbehaved { what }
    }

    fn attach(&mut self, rogue: &Rogue, region: u32, bytes: u64) -> Result<(), Error> {
        let key = Key { port: *rogue.port, region, bytes }.encode(&KIND);
        self.port.attach(self.lane, &key).map(|_| ())
    }
}

impl Rogue {
    /// Dials as the end with the smaller cookie.
    fn dial(victim: &mut Victim, tag: [u8; 32]) -> Self {
        let from = [0; 16];
        victim.connect(Address { socket: [0; 16], cookie: from });
        let rogue = Self::unannounced(&victim.address);
        rogue.hello(from, victim.address.cookie, tag);
        rogue
    }

    fn unannounced(address: &Address) -> Self {
        Self {
            link: Link::dial(&KIND, &address.socket).expect("the victim listens"),
            bell: Doorbell::new().expect("an eventfd"),
            rings: memory(4096),
            port: Box::new(secret().expect("the kernel has entropy")),
        }
    }

    fn greeting(&self, from: Secret, to: Secret, tag: [u8; 32]) -> Greeting {
        let port_address = (&raw const *self.port).addr() as u64;
        Greeting { from, to, tag, port: *self.port, port_address, immediates: IMMEDIATES }
    }

    fn hello(&self, from: Secret, to: Secret, tag: [u8; 32]) {
        self.say_with(&Message::Hello(self.greeting(from, to, tag)), &[self.bell.as_fd()]);
    }

    /// Takes the victim's welcome, and its rings.
    fn welcome(&mut self, victim: &mut Victim) {
        let (message, [_bell, rings]) = self.hear(victim);
        let Message::Welcome(greeting) = message else { panic!("{message:?} is no welcome") };
        assert_eq!(greeting.tag, OURS);
        let bytes = 2 * ring::Place::<Memory>::bytes(IMMEDIATES);
        self.rings = Memory::from_fd(rings.expect("rings come with it"), bytes).expect("sealed rings");
        let (message, _) = self.hear(victim);
        assert_eq!(message, Message::Announced);
    }

    fn hear(&self, victim: &mut Victim) -> (Message, [Option<OwnedFd>; 2]) {
        let begun = Instant::now();
        loop {
            victim.turn();
            match self.link.receive() {
                Received::Message(message, descriptors) => return (message, descriptors),
                Received::Nothing if begun.elapsed() < Duration::from_secs(5) => std::thread::yield_now(),
                other => panic!("the victim's answer: {other:?}"),
            }
        }
    }

    fn say(&self, message: &Message) {
        self.say_with(message, &[]);
    }

    fn say_with(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) {
        assert_eq!(self.link.send(message, descriptors), Sent::Yes);
    }

    fn region(&self, number: u32, bytes: u64, fd: impl AsFd) {
        self.say_with(&Message::Region { number, bytes, offer: in_memfd() }, &[fd.as_fd()]);
    }

    /// Overwrites a word of the ring that the victim reads (`inbound`) or writes.
    fn tamper(&self, inbound: bool, line: usize, value: u32) {
        let ring = if inbound { 0 } else { ring::Place::<Memory>::bytes(IMMEDIATES) };
        self.rings.write(ring + line * 128, &value.to_ne_bytes()).expect("a word of the rings");
    }

    /// The victim has stopped and said so; the rogue answers at last.
    fn close(&self, victim: &mut Victim) {
        victim.stays_not_down();
        loop {
            let (message, _) = self.hear(victim);
            if message == Message::Closed {
                break;
            }
        }
        victim.stays_not_down();
        self.say(&Message::Closed);
    }
}

/// A region in the memfd that comes with it.
fn in_memfd() -> Described {
    Described { form: 0, payload: Payload::new(&[0; 8]), with_descriptor: true }
}

/// A region at an address of the sender.
fn at_address(address: u64) -> Described {
    Described { form: 1, payload: Payload::new(&address.to_le_bytes()), with_descriptor: false }
}

fn memory(bytes: usize) -> Memory {
    Memory::allocate(bytes, &AllocateOptions::default()).expect("memory can be allocated")
}

#[test]
fn whoever_knows_no_lane_is_turned_away() {
    let mut victim = Victim::open();
    victim.connect(Address { socket: [0; 16], cookie: [0; 16] });
    let gone = |victim: &mut Victim, rogue: &Rogue| {
        let begun = Instant::now();
        while !matches!(rogue.link.receive(), Received::End) {
            victim.turn();
            assert!(begun.elapsed() < Duration::from_secs(5), "waited to be turned away");
        }
    };
    let cookie = victim.address.cookie;
    let wrong_to = Rogue::unannounced(&victim.address);
    wrong_to.hello([0; 16], [9; 16], THEIRS);
    gone(&mut victim, &wrong_to);
    let wrong_from = Rogue::unannounced(&victim.address);
    wrong_from.hello([9; 16], cookie, THEIRS);
    gone(&mut victim, &wrong_from);
    let out_of_turn = Rogue::unannounced(&victim.address);
    out_of_turn.say(&Message::Announced);
    gone(&mut victim, &out_of_turn);
    let (one_end, _other_end) = rustix::pipe::pipe().expect("a pipe");
    let blocking_bell = Rogue::unannounced(&victim.address);
    let greeting = blocking_bell.greeting([0; 16], cookie, THEIRS);
    blocking_bell.say_with(&Message::Hello(greeting), &[one_end.as_fd()]);
    gone(&mut victim, &blocking_bell);
    // Who says nothing is sent away in time.
    let silent = Rogue::unannounced(&victim.address);
    gone(&mut victim, &silent);
    assert_eq!(victim.port.counters().connections_refused, 5);
    // The lane itself has waited in vain by then.
    assert_eq!(victim.wait_down(), DownCause::ConnectTimedOut);
}

#[test]
fn guests_are_limited() {
    let mut victim = Victim::open();
    let guests: Vec<Rogue> = (0..6).map(|_| Rogue::unannounced(&victim.address)).collect();
    let begun = Instant::now();
    while victim.port.counters().connections_refused < 2 {
        victim.turn();
        assert!(begun.elapsed() < Duration::from_secs(5), "waited for the limit");
    }
    let ended = guests.iter().filter(|guest| matches!(guest.link.receive(), Received::End)).count();
    assert_eq!(ended, 2, "beyond the limit of four");
}

#[test]
fn a_wrong_tag_ends_the_lane() {
    let mut victim = Victim::open();
    let mut wrong = THEIRS;
    wrong[0] ^= 1;
    let _rogue = Rogue::dial(&mut victim, wrong);
    assert_eq!(victim.wait_down(), DownCause::NotAuthentic);
}

#[test]
fn an_impossible_ring_is_refused() {
    for immediates in [0, 3, u32::MAX, ring::MAX_CAPACITY * 2] {
        let mut victim = Victim::open();
        victim.connect(Address { socket: [0; 16], cookie: [0; 16] });
        let rogue = Rogue::unannounced(&victim.address);
        let greeting = Greeting { immediates, ..rogue.greeting([0; 16], victim.address.cookie, THEIRS) };
        rogue.say_with(&Message::Hello(greeting), &[rogue.bell.as_fd()]);
        assert_eq!(victim.wait_down(), Victim::misbehaviour("asked for an impossible ring"));
    }
}

/// The victim dials; the rogue answers with something that is no welcome.
#[test]
fn bad_welcomes_are_refused() {
    let unsealed = || {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("unsealed", flags).expect("a memfd");
        rustix::fs::ftruncate(&fd, 1 << 20).expect("a longer memfd");
        fd
    };
    let short = memory(64);
    let enough = memory(1 << 16);
    type Bend = fn(&mut Greeting);
    let cases: [(Bend, Option<&Memory>, DownCause); 6] = [
        (|_| {}, None, Victim::misbehaviour("passed rings that could be cut short")),
        (|_| {}, Some(&short), Victim::misbehaviour("passed rings that could be cut short")),
        (|g| g.tag[5] ^= 4, Some(&enough), DownCause::NotAuthentic),
        (|g| g.to[0] ^= 1, Some(&enough), Victim::misbehaviour("answered for another lane")),
        (|g| g.from[0] ^= 1, Some(&enough), Victim::misbehaviour("answered for another lane")),
        (|g| g.immediates = 5, Some(&enough), Victim::misbehaviour("asked for an impossible ring")),
    ];
    for (bend, rings, cause) in cases {
        let mut victim = Victim::open();
        let socket = secret().expect("the kernel has entropy");
        let listener = Listener::bind(&KIND, &socket).expect("a name can be bound");
        // The largest cookie: the victim dials.
        let cookie = [0xff; 16];
        victim.connect(Address { socket, cookie });
        let link = listener.accept().expect("accept works").expect("the victim has dialed");
        let bell = Doorbell::new().expect("an eventfd");
        let rogue = Rogue { link, bell, rings: memory(1), port: Box::new([7; 16]) };
        let (message, _) = rogue.hear(&mut victim);
        assert!(matches!(message, Message::Hello(hello) if hello.tag == OURS && hello.to == cookie));
        let mut greeting = rogue.greeting(cookie, victim.address.cookie, THEIRS);
        bend(&mut greeting);
        let unsealed = unsealed();
        let rings = rings.map_or(unsealed.as_fd(), |rings| rings.fd().expect("shared memory"));
        rogue.say_with(&Message::Welcome(greeting), &[rogue.bell.as_fd(), rings]);
        assert_eq!(victim.wait_down(), cause);
        // The rogue had a right to believe that the victim looks at its memory, and hears that it does not.
        assert_eq!(rogue.hear(&mut victim).0, Message::Closed);
    }
}

#[test]
fn an_end_without_a_word_is_no_proof() {
    let (mut victim, rogue) = Victim::with_rogue();
    drop(rogue.link);
    victim.stays_not_down();
    let notify = [Op::notify(1)];
    assert_eq!(victim.port.post(victim.lane, &notify), Err(Error::LaneDown { lane: victim.lane }));
    victim.stays_not_down();
}

#[test]
fn the_rings_may_hold_anything() {
    const READS: &str = "wrote an impossible position into the ring that it writes";
    const WRITES: &str = "wrote an impossible position into the ring that it reads";
    for tail in [IMMEDIATES + 1, 1 << 31, u32::MAX] {
        let (mut victim, rogue) = Victim::with_rogue();
        rogue.tamper(true, 0, tail);
        rogue.close(&mut victim);
        assert_eq!(victim.wait_down(), Victim::misbehaviour(READS));
    }
    for head in [IMMEDIATES + 1, u32::MAX] {
        let (mut victim, rogue) = Victim::with_rogue();
        let full = [Op { token: Some(Token(1)), ..Op::notify(1) }; IMMEDIATES as usize];
        assert_eq!(victim.port.post(victim.lane, &full).map(|posted| posted.ops), Ok(full.len()));
        victim.turn();
        rogue.tamper(false, 1, head);
        let refused = victim.port.post(victim.lane, &[Op::notify(2)]);
        assert_eq!(refused, Err(Error::LaneDown { lane: victim.lane }));
        rogue.close(&mut victim);
        assert_eq!(victim.wait_down(), Victim::misbehaviour(WRITES));
        let dones = victim.events.iter().filter(|event| matches!(event, Event::Done { .. })).count();
        assert_eq!(dones, full.len(), "each token ends once");
    }
    // Waits that nobody announced cost a wake, and nothing else.
    let (mut victim, rogue) = Victim::with_rogue();
    rogue.tamper(false, 2, u32::MAX);
    assert_eq!(victim.port.post(victim.lane, &[Op::notify(3)]).map(|posted| posted.ops), Ok(1));
    assert_eq!(victim.port.counters().wakes_sent, 1);
    assert_eq!(victim.down(), None);
}

#[test]
fn bad_packets_end_the_lane() {
    let shared = memory(4096);
    let fd = || shared.fd().expect("shared memory");
    let region = |number, bytes, offer| (Message::Region { number, bytes, offer }, offer.with_descriptor);
    let cases = [
        (vec![(Message::Announced, false)], "announced itself twice"),
        (vec![region(1, 4096, in_memfd()), region(1, 4096, in_memfd())], "announced a region twice"),
        (vec![region(2, 4096, in_memfd()), region(1, 4096, in_memfd())], "announced a region twice"),
        (vec![region(1, 0, in_memfd())], "announced a region of an impossible length"),
        (vec![region(1, u64::MAX, in_memfd())], "announced a region of an impossible length"),
        (vec![region(1, 4096, at_address(u64::MAX - 4000))], "announced a region at an impossible place"),
    ];
    for (messages, what) in cases {
        let (mut victim, rogue) = Victim::with_rogue();
        for (message, with_fd) in messages {
            if with_fd {
                rogue.say_with(&message, &[fd()]);
            } else {
                rogue.say(&message);
            }
        }
        rogue.close(&mut victim);
        assert_eq!(victim.wait_down(), Victim::misbehaviour(what));
    }
    let (mut victim, rogue) = Victim::with_rogue();
    rustix::net::send(&rogue.link, b"what is this", rustix::net::SendFlags::empty()).expect("sent");
    rogue.close(&mut victim);
    assert_eq!(victim.wait_down(), Victim::misbehaviour("sent a packet that cannot be read"));
}

#[test]
fn announcements_are_limited() {
    let (mut victim, rogue) = Victim::with_rogue();
    for number in 0..=MAX_REGIONS as u32 {
        let region = Message::Region { number, bytes: 1, offer: at_address(4096) };
        while rogue.link.send(&region, &[]) == Sent::Full {
            victim.turn();
        }
    }
    rogue.close(&mut victim);
    assert_eq!(victim.wait_down(), Victim::misbehaviour("announced more regions than a port can have"));
}

/// All that peers pass counts together, until it is retired, unmapped, or goes with its lane.
#[test]
fn descriptors_of_peers_are_limited() {
    let limit = DownCause::LimitReached { what: "descriptors of peers' regions", limit: DESCRIPTORS as u64 };
    let shared = memory(4096);
    let pass = |rogue: &Rogue, numbers: std::ops::Range<u32>| {
        numbers.for_each(|number| rogue.region(number, 4096, shared.fd().expect("shared memory")));
    };
    let (mut victim, first) = Victim::with_rogue();
    let open_at_first = descriptors_of(&shared);
    pass(&first, 0..8);
    victim.turn();
    assert_eq!(victim.attach(&first, 3, 4096), Ok(()));
    assert_eq!(victim.attach(&first, 4, 4096), Ok(()));
    // Mapped, a region still counts, and once only; retired, it does not.
    pass(&first, 8..12);
    victim.turn();
    assert_eq!((victim.down(), descriptors_of(&shared) - open_at_first), (None, DESCRIPTORS));
    for number in [3, 9] {
        first.say(&Message::Retire { number });
    }
    pass(&first, 12..14);
    victim.turn();
    assert_eq!((victim.down(), descriptors_of(&shared) - open_at_first), (None, DESCRIPTORS));

    // Another peer finds nothing left, and only its own lane ends.
    let second = victim.meet_another();
    pass(&second, 0..40);
    second.close(&mut victim);
    assert_eq!(victim.wait_down(), limit);
    assert_eq!(descriptors_of(&shared) - open_at_first, DESCRIPTORS);

    // What goes with the first lane is there for others.
    first.say(&Message::Closed);
    victim.events.clear();
    assert_eq!(victim.wait_down(), DownCause::ClosedByPeer);
    assert_eq!(descriptors_of(&shared), open_at_first);
    let third = victim.meet_another();
    pass(&third, 0..DESCRIPTORS as u32);
    victim.turn();
    assert_eq!(victim.down(), None);
    pass(&third, 100..101);
    third.close(&mut victim);
    assert_eq!(victim.wait_down(), limit);
    assert_eq!(descriptors_of(&shared), open_at_first);
}

/// How many descriptors of this process are of this memory.
fn descriptors_of(memory: &Memory) -> usize {
    let stat = |fd| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    let of = stat(memory.fd().expect("shared memory")).expect("a memfd has numbers");
    let open = std::fs::read_dir("/proc/self/fd").expect("a list of descriptors");
    open.filter_map(|entry| rustix::fs::stat(entry.ok()?.path()).ok())
        .filter(|stat| (stat.st_dev, stat.st_ino) == of)
        .count()
}

#[test]
fn only_sealed_memory_of_the_right_length_is_mapped() {
    let (mut victim, rogue) = Victim::with_rogue();
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let unsealed = rustix::fs::memfd_create("unsealed", flags).expect("a memfd");
    rustix::fs::ftruncate(&unsealed, 4096).expect("a longer memfd");
    let half_sealed = rustix::fs::memfd_create("half", flags).expect("a memfd");
    rustix::fs::ftruncate(&half_sealed, 4096).expect("a longer memfd");
    rustix::fs::fcntl_add_seals(&half_sealed, rustix::fs::SealFlags::GROW).expect("a seal");
    let file = std::fs::File::open("/proc/self/exe").expect("a file");
    let good = memory(4096);
    rogue.region(1, 4096, &unsealed);
    rogue.region(2, 4096, &half_sealed);
    rogue.region(3, 4096, &file);
    rogue.region(4, 8192, good.fd().expect("shared memory"));
    rogue.region(5, 4096, good.fd().expect("shared memory"));
    for (region, bytes) in [(1, 4096), (2, 4096), (3, 4096), (4, 8192), (5, 8192), (5, 4095)] {
        let refused = victim.attach(&rogue, region, bytes);
        assert!(matches!(refused, Err(Error::BadKey { .. })), "region {region}: {refused:?}");
    }
    assert_eq!(victim.attach(&rogue, 5, 4096), Ok(()));
    assert_eq!(victim.attach(&rogue, 6, 4096), Err(Error::NotYet));
    let foreign = Key { port: [1; 16], region: 5, bytes: 4096 }.encode(&KIND);
    assert!(matches!(victim.port.attach(victim.lane, &foreign), Err(Error::BadKey { .. })));
    let garbage = RemoteKey::new(b"garbage").expect("short enough");
    assert!(matches!(victim.port.attach(victim.lane, &garbage), Err(Error::BadKey { .. })));
    rogue.say(&Message::Retire { number: 5 });
    victim.turn();
    assert!(matches!(victim.attach(&rogue, 5, 4096), Err(Error::BadKey { .. })));
    assert_eq!(victim.down(), None, "bad regions are no use, and no harm");
}

#[test]
fn private_memory_has_to_be_where_the_peer_says() {
    if let Err(why) = PeerProcess::new(rustix::process::getpid()).probe() {
        eprintln!("skipped: {why}");
        return;
    }
    let there = [0u8; 64];
    let address = (&raw const there).addr() as u64;
    let (mut victim, rogue) = Victim::with_rogue();
    let region = |number, address| {
        rogue.say(&Message::Region { number, bytes: 64, offer: at_address(address) });
    };
    region(1, address);
    region(2, 64);
    assert_eq!(victim.attach(&rogue, 1, 64), Ok(()));
    assert!(matches!(victim.attach(&rogue, 2, 64), Err(Error::BadKey { .. })), "nothing is at 64");

    // A process number that leads elsewhere: the port's name is not found there.
    let mut victim = Victim::open();
    victim.connect(Address { socket: [0; 16], cookie: [0; 16] });
    let mut rogue = Rogue::unannounced(&victim.address);
    let greeting =
        Greeting { port_address: address, ..rogue.greeting([0; 16], victim.address.cookie, THEIRS) };
    rogue.say_with(&Message::Hello(greeting), &[rogue.bell.as_fd()]);
    rogue.welcome(&mut victim);
    rogue.say(&Message::Announced);
    rogue.say(&Message::Region { number: 1, bytes: 64, offer: at_address(address) });
    victim.wait("up", |victim| !victim.events.is_empty());
    assert_eq!(
        victim.attach(&rogue, 1, 64),
        Err(Error::BadKey { reason: "the peer's process is not where its process number leads" })
    );
}

#[test]
fn a_peer_that_stops_in_the_handshake_has_to_say_so() {
    let mut victim = Victim::open();
    let mut rogue = Rogue::dial(&mut victim, THEIRS);
    rogue.welcome(&mut victim);
    // The victim has shown its memory; the rogue never announces anything.
    std::thread::sleep(Duration::from_millis(250));
    rogue.close(&mut victim);
    assert_eq!(victim.wait_down(), DownCause::ConnectTimedOut);
}

#[test]
fn immediates_sent_before_the_close_are_heard() {
    let (mut victim, rogue) = Victim::with_rogue();
    for (slot, imm) in [(0usize, 11u32), (1, 22)] {
        rogue.rings.write(4 * 128 + slot * 4, &imm.to_ne_bytes()).expect("a slot of the rings");
    }
    rogue.tamper(true, 0, 2);
    rogue.say(&Message::Closed);
    assert_eq!(victim.wait_down(), DownCause::ClosedByPeer);
    let lane = victim.lane;
    assert_eq!(victim.events[1..3], [Event::Arrived { lane, imm: 11 }, Event::Arrived { lane, imm: 22 }]);
    assert_eq!(rogue.hear(&mut victim).0, Message::Closed);
}
