//! The flight recorder of real nodes: what failed is written down, and what is asked for is told, whatever the disk does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheKind, CacheLayout, Config, Dtype, End, FlightLimits, FolderOptions, LayoutOptions,
    Node, PagePool, Peer, Placement, PortConfig, Progress, ReceiveRequest, Received, Receiving, SendRequest,
    Sending,
};
use crossdock_flight::{File, Filter, Kind, Outcome, Timeline, read, read_paths};

const WAIT: Duration = Duration::from_secs(30);
const TOKENS: u32 = 100;

struct Worker {
    node: Node,
    pool: PagePool,
    pages: u32,
}

impl Worker {
    fn open(name: &str, change: impl FnOnce(&mut Config)) -> Self {
        let layout = CacheLayout::new(LayoutOptions {
            model: "tiny".into(),
            model_layers: 3,
            layers: 0..3,
            kind: CacheKind::Mla { latent_bytes: 512, rope_bytes: 64 },
            dtype: Dtype::Bf16,
            page_tokens: 16,
            pages: 64,
            placement: Placement::LayerMajor { region: 0 },
        })
        .unwrap();
        let (memory, pool) = crossdock::allocate(&layout).unwrap();
        let mut config = Config::new(name, layout.clone(), memory, Authentication::Off);
        config.ports = vec![PortConfig::Tcp(None)];
        change(&mut config);
        Self { node: Node::open(config).unwrap(), pool, pages: layout.pages_for(TOKENS) }
    }

    fn connect(&self, to: &Worker) -> Peer {
        let (peer, mut up) = self.node.handle().connect(to.node.address()).unwrap();
        up.wait_until(Instant::now() + WAIT).unwrap().unwrap();
        peer
    }

    fn receive(&self, peer: Peer, room: u64, deadline: Duration) -> Receiving {
        let pages = self.pool.take(self.pages).unwrap();
        let (tokens, skip_tokens, use_count) = (TOKENS, 0, 0);
        let request = ReceiveRequest { peer, room, use_count, tokens, skip_tokens, pages, deadline };
        self.node.handle().receive(request).unwrap()
    }

    fn send(&self, room: u64, deadline: Duration) -> Sending {
        let pages = self.pool.take(self.pages).unwrap().share();
        let request = SendRequest { room, use_count: 0, tokens: TOKENS, pages, deadline };
        self.node.handle().open(request).unwrap()
    }

    /// All that its recorder holds, as a reader finds it.
    fn asked(&self) -> File {
        let mut dump = self.node.handle().flight().unwrap();
        let dump = dump.wait_until(Instant::now() + WAIT).unwrap();
        read(Path::new("asked"), dump.text().as_slice()).unwrap()
    }
}

fn ended(receiving: &mut Receiving) -> Received {
    receiving.end.wait_until(Instant::now() + WAIT).unwrap()
}

/// A folder of this test's own; removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("crossdock-recorded-{name}-{}", std::process::id())))
    }

    /// Waits until there are so many dumps.
    fn files(&self, least: usize) -> Vec<File> {
        let until = Instant::now() + WAIT;
        loop {
            let (files, _) = read_paths(std::slice::from_ref(&self.0));
            if files.len() >= least {
                return files;
            }
            assert!(Instant::now() < until, "{} dumps of {least}", files.len());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn what_failed_is_written_down_and_the_rest_is_not() {
    let scratch = Scratch::new("failed");
    let writes = |config: &mut Config| config.flight_folder = Some(FolderOptions::new(&scratch.0));
    let (decode, prefill) = (Worker::open("decode-0", writes), Worker::open("prefill-0", writes));
    let peer = decode.connect(&prefill);
    let mut good = decode.receive(peer, 1, WAIT);
    let mut sending = prefill.send(1, WAIT);
    sending.send_layers(0..3).unwrap();
    sending.finish(Vec::new()).unwrap();
    assert!(ended(&mut good).ended.is_delivered());
    let mut cancelled = decode.receive(peer, 2, WAIT);
    cancelled.cancel().unwrap();
    assert!(matches!(ended(&mut cancelled).ended.end, End::Cancelled { .. }));
    assert!(!scratch.0.exists(), "nothing has failed yet");
    // The prefill side sends one layer of three, and computes on.
    let mut late = decode.receive(peer, 4711, Duration::from_secs(2));
    let mut sending = prefill.send(4711, WAIT);
    sending.send_layers(0..1).unwrap();
    assert!(matches!(ended(&mut late).ended.end, End::Expired { .. }));
    let failed = sending.end.wait_until(Instant::now() + WAIT).unwrap();
    assert!(matches!(failed.end, End::Expired { .. }));
    drop(late.pages.wait_until(Instant::now() + WAIT).unwrap());
    let files = scratch.files(2);
    assert!(files.iter().all(|file| file.header.reason == "room-failed" && file.header.room == Some(4711)));
    // Dropped, nodes write what has come of it since.
    drop((decode, prefill));
    let files = scratch.files(2);
    assert!(files.len() == 2 && files.iter().all(|file| file.problems.is_empty()));
    let timeline = Timeline::merge(&files, &Filter::default());
    let room = &timeline.rooms[0];
    assert_eq!((room.key.room, room.verdict.outcome), (4711, Outcome::Failed));
    let text = &room.verdict.text;
    // The prefill side's room ends no later than the decode side's, and may be the first to.
    let gave_up = ["decode-0 gave up on prefill-0: ", "prefill-0 gave up on decode-0: "];
    assert!(gave_up.iter().any(|words| text.starts_with(words)), "{text}");
    assert!(
        text.contains("deadline of this side passed") && text.contains("had posted 1 of 3 layers"),
        "{text}"
    );
    assert!(text.contains("its pages came home"), "{text}");
    let other = |outcome| timeline.rooms.iter().filter(|room| room.verdict.outcome == outcome).count();
    assert_eq!((other(Outcome::Delivered), other(Outcome::Cancelled)), (1, 1));
}

#[test]
fn all_of_it_is_told_to_whoever_asks() {
    let decode = Worker::open("decode-0", |config| config.flight = FlightLimits { peers: 40, records: 64 });
    // More peers than a turn copies.
    let prefills: Vec<Worker> = (0..20).map(|at| Worker::open(&format!("prefill-{at}"), |_| ())).collect();
    for prefill in &prefills {
        decode.connect(prefill);
    }
    let file = decode.asked();
    assert!(file.problems.is_empty() && file.header.reason == "asked" && file.header.name == "decode-0");
    for at in 0..20 {
        let name = format!("prefill-{at}");
        let is_up =
            |(peer, event): &(Option<std::sync::Arc<crossdock_flight::Peer>>, crossdock_flight::Event)| {
                event.kind == Kind::SessionUp && peer.as_ref().is_some_and(|peer| peer.name == name)
            };
        assert_eq!(file.events.iter().filter(|event| is_up(event)).count(), 1, "{name}");
    }
    let dialed: Vec<_> = file.events.iter().filter(|(_, event)| event.kind == Kind::Dialed).collect();
    assert!(dialed.len() >= 20 && dialed.iter().all(|(_, event)| event.address.is_some()));
    // Several who ask at once hear all of it, or that too many do.
    let mut asked: Vec<_> = (0..40).map(|_| decode.node.handle().flight().unwrap()).collect();
    let told: Vec<_> = asked.iter_mut().map(|ticket| ticket.wait_until(Instant::now() + WAIT)).collect();
    let rings = |dump: &crossdock::Dump| dump.snapshot.rings.len();
    assert!(told.iter().flatten().all(|dump| rings(dump) == 21), "{told:?}");
    assert!(told.iter().flatten().count() >= 16);
}

#[test]
fn peers_that_are_lost_together_each_leave_a_dump() {
    let scratch = Scratch::new("together");
    let writes = |config: &mut Config| config.flight_folder = Some(FolderOptions::new(&scratch.0));
    let decode = Worker::open("decode-0", writes);
    let prefills: Vec<Worker> = (0..4).map(|at| Worker::open(&format!("prefill-{at}"), |_| ())).collect();
    let mut rooms: Vec<Receiving> = (0..)
        .zip(&prefills)
        .flat_map(|(at, prefill)| {
            let peer = decode.connect(prefill);
            [decode.receive(peer, 10 * at, WAIT), decode.receive(peer, 10 * at + 1, WAIT)]
        })
        .collect();
    drop(prefills);
    assert!(rooms.iter_mut().all(|room| !ended(room).ended.is_delivered()));
    drop(scratch.files(4));
    drop(decode);
    let files = scratch.files(4);
    assert_eq!(files.len(), 4, "the rooms with one peer are one incident");
    let timeline = Timeline::merge(&files, &Filter::default());
    assert_eq!(timeline.rooms.len(), 8);
    assert!(timeline.rooms.iter().all(|room| room.verdict.text.contains("closed by the peer")));
}

#[test]
fn a_disk_that_takes_nothing_hurts_no_room() {
    let writes = |config: &mut Config| config.flight_folder = Some(FolderOptions::new("/dev/full"));
    let (decode, prefill) = (Worker::open("decode-0", writes), Worker::open("prefill-0", writes));
    let peer = decode.connect(&prefill);
    for room in 0..20 {
        let mut failing = decode.receive(peer, 100 + room, Duration::from_millis(1));
        let mut good = decode.receive(peer, room, WAIT);
        let mut sending = prefill.send(room, WAIT);
        sending.send_layers(0..3).unwrap();
        sending.finish(Vec::new()).unwrap();
        assert!(ended(&mut good).ended.is_delivered());
        assert!(!ended(&mut failing).ended.is_delivered());
    }
}

#[test]
fn a_recorder_that_is_off_records_nothing() {
    let scratch = Scratch::new("off");
    let decode = Worker::open("decode-0", |config| {
        config.flight = FlightLimits::OFF;
        config.flight_folder = Some(FolderOptions::new(&scratch.0));
    });
    let (peer, _up) = decode.node.handle().connect("127.0.0.1:9").unwrap();
    assert!(!ended(&mut decode.receive(peer, 1, Duration::from_millis(50))).ended.is_delivered());
    assert!(decode.asked().events.is_empty());
    drop(decode);
    assert!(!scratch.0.exists());
}

#[test]
fn a_panic_of_the_loop_leaves_a_dump() {
    let scratch = Scratch::new("panic");
    let path = scratch.0.clone();
    let prefill = Worker::open("prefill-0", |_| ());
    let address = prefill.node.address().to_owned();
    let thread = std::thread::spawn(move || {
        let mut decode = Worker::open("decode-0", |config| {
            config.progress = Progress::Caller;
            config.flight_folder = Some(FolderOptions::new(path));
        });
        let (_, mut up) = decode.node.handle().connect(address).unwrap();
        let until = Instant::now() + WAIT;
        while matches!(up.poll(), Ok(None)) {
            assert!(Instant::now() < until, "no session");
            decode.node.progress();
        }
        panic!("as a bug of the library's would");
    });
    assert!(thread.join().is_err());
    let files = scratch.files(1);
    assert_eq!(files[0].header.reason, "panicked");
    assert!(files[0].events.iter().any(|(_, event)| event.kind == Kind::SessionUp));
}
