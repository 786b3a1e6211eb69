//! The bootstrap server is killed and started again at the same address, under workers that go on.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossdock_bootstrap::{Client, ClientConfig, Listed, Query};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::demo::{CROSSDOCK, Demo};
use crate::{children, gone, send};

/// For everything that should come soon, on a machine that has too much to do.
const SOON: Duration = Duration::from_secs(40);
/// Of 4.5 MiB; a room takes 4.
const PAGES: &str = "14";
const TOKENS: u64 = 250;

#[test]
fn workers_outlive_their_registry_and_register_again() {
    for (port, op) in [("shm", "write"), ("tcp", "read")] {
        let registry = Registry::start("127.0.0.1:0");
        let address = registry.address.clone();
        let start = |role, number| Worker::start(role, number, port, op, &address);
        let [mut prefill, mut decode] =
            [("prefill", 0), ("decode", 0)].map(|(role, number)| start(role, number));
        [&mut prefill, &mut decode].into_iter().for_each(Worker::is_ready);
        let before = registry.lists(2);
        [&mut prefill, &mut decode].into_iter().for_each(|worker| worker.takes(1..3));
        [&mut prefill, &mut decode].into_iter().for_each(|worker| worker.delivers(1..3));

        // Rooms are under way when it dies, and others begin while there is none.
        [&mut prefill, &mut decode].into_iter().for_each(|worker| worker.takes(3..9));
        registry.kill();
        [&mut prefill, &mut decode].into_iter().for_each(|worker| worker.takes(9..12));
        [&mut prefill, &mut decode].into_iter().for_each(|worker| worker.delivers(3..12));
        [&mut prefill, &mut decode].into_iter().for_each(|worker| worker.takes(12..15));
        let registry = Registry::start(&address);

        // It finds the prefill worker once that has registered again.
        let mut late = start("decode", 1);
        late.is_ready();
        let after = registry.lists(3);
        for worker in ["prefill-0", "decode-0"] {
            assert_eq!(before.get(worker), after.get(worker), "{worker} is another start of it");
        }
        assert!(after.contains_key("decode-1"), "{after:?}");
        prefill.takes(15..21);
        decode.takes(15..18);
        late.takes(18..21);
        prefill.delivers(12..21);
        decode.delivers(12..18);
        late.delivers(18..21);
        // Who leaves is taken out of the new registry, too.
        [decode, late, prefill].into_iter().for_each(Worker::leaves);
        assert_eq!(registry.lists(0), BTreeMap::new());
    }
}

#[test]
fn workers_outlive_a_registry_that_talks_nonsense() {
    let registry = Registry::start("127.0.0.1:0");
    let address = registry.address.clone();
    let start = |role, number| Worker::start(role, number, "tcp", "write", &address);
    let [mut prefill, mut decode] = [("prefill", 0), ("decode", 0)].map(|(role, number)| start(role, number));
    [&mut prefill, &mut decode].into_iter().for_each(Worker::is_ready);
    let before = registry.lists(2);
    registry.kill();
    let liar = Liar::start(&address);
    // Rooms come and go all the while; the workers renew about once a second.
    let until = Instant::now() + Duration::from_secs(6);
    let mut room = 1;
    while Instant::now() < until || liar.heard() < 5 {
        assert!(Instant::now() < until + SOON, "nobody asks the registry");
        [&mut prefill, &mut decode].into_iter().for_each(|worker| worker.takes(room..room + 2));
        [&mut prefill, &mut decode].into_iter().for_each(|worker| worker.delivers(room..room + 2));
        room += 2;
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(liar);
    let registry = Registry::start(&address);
    assert_eq!(registry.lists(2), before, "other starts, or not the same workers");
    let mut late = start("decode", 1);
    late.is_ready();
    prefill.takes(room..room + 1);
    late.takes(room..room + 1);
    [&mut prefill, &mut late].into_iter().for_each(|worker| worker.delivers(room..room + 1));
    [decode, late, prefill].into_iter().for_each(Worker::leaves);
}

#[test]
fn a_demo_goes_on_with_a_registry_that_was_started_again() {
    let mut demo =
        Demo::of_kv(&["--requests", "40", "--ports", "shm,tcp", "--pool-mib", "64", "--each-room"]);
    assert!(demo.reads("room 1 begins", SOON), "{}", demo.text);
    let ids = children(&demo.text);
    let line = demo.text.lines().find_map(|line| line.strip_prefix("registry at http://"));
    let address = line.and_then(|line| line.split(',').next()).expect("where the registry is").to_owned();
    send(ids["bootstrap"], Signal::KILL);
    gone([ids["bootstrap"]], SOON, &demo.text);
    let _registry = Registry::start(&address);
    // The second scene's workers meet through the new one.
    let ended = demo.end(Duration::from_secs(120));
    let shown = format!("{}\n{}", ended.text, ended.errors);
    assert!(ended.status.success(), "{shown}");
    assert!(ended.text.contains("leaks: 0 ") && !ended.text.contains("! "), "{shown}");
    for port in ["shm", "tcp"] {
        let row = ended.text.lines().find(|line| line.starts_with(&format!("{port}  ")));
        let cells: Vec<&str> = row.expect("a row for each port").split_whitespace().collect();
        assert_eq!(cells[1..4], ["40", "40", "40"], "{shown}");
    }
}

#[test]
fn a_demo_meets_at_a_registry_that_is_there() {
    let registry = Registry::start("127.0.0.1:0");
    let address = registry.address.clone();
    let requests = ["--requests", "3", "--ports", "tcp", "--pool-mib", "64", "--registry", &address];
    let demo = Demo::of_kv(&requests);
    let ended = demo.end(Duration::from_secs(120));
    let shown = format!("{}\n{}", ended.text, ended.errors);
    assert!(ended.status.success() && shown.contains(&format!("registry at {address}\n")), "{shown}");
    assert_eq!(registry.lists(0), BTreeMap::new(), "who met there has left");
    // Where nobody is, it says so and ends.
    registry.kill();
    let demo = Demo::of_kv(&requests);
    let ended = demo.end(Duration::from_secs(120));
    assert!(!ended.status.success(), "{}", ended.text);
    assert!(ended.text.contains("! tcp: ") || !ended.errors.is_empty(), "{}\n{}", ended.text, ended.errors);
}

/// A bootstrap server. Dropping it kills it.
struct Registry {
    process: Process,
    address: String,
}

impl Registry {
    /// Starts one, and again where another program has just taken the port.
    fn start(listen: &str) -> Self {
        let until = Instant::now() + SOON;
        loop {
            let process = Process::start(&["bootstrap", "--until-stdin-ends", "--listen", listen]);
            match process.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(address) => return Self { process, address },
                Err(_) => assert!(Instant::now() < until, "no registry at {listen}"),
            }
        }
    }

    fn kill(mut self) {
        self.process.child.kill().expect("it is our child");
        let status = self.process.child.wait().expect("it is our child");
        assert!(status.code().is_none(), "it was not killed, but ended: {status}");
    }

    /// Waits until it lists so many workers; says which starts of which.
    fn lists(&self, count: usize) -> BTreeMap<String, String> {
        let client = Client::new(ClientConfig::to(&self.address)).expect("an address");
        let found = match count {
            0 => client.find(&Query::all()).expect("it answers"),
            _ => client.wait_for(&Query::all(), count, SOON).expect("they register"),
        };
        assert_eq!(found.len(), count, "{found:?}");
        let start =
            |Listed { worker, .. }: Listed| (worker.node.to_string(), format!("{:?}", worker.incarnation));
        found.into_iter().map(start).collect()
    }
}

/// Answers at a registry's address, each caller in another way, and never as a registry that is well.
struct Liar {
    is_over: Arc<AtomicBool>,
    heard: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Liar {
    fn start(address: &str) -> Self {
        let until = Instant::now() + SOON;
        let listener = loop {
            match TcpListener::bind(address) {
                Ok(listener) => break listener,
                Err(error) => assert!(Instant::now() < until, "{address}: {error}"),
            }
        };
        listener.set_nonblocking(true).expect("a socket of our own");
        let (is_over, heard) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (ends, hears) = (is_over.clone(), heard.clone());
        let thread = std::thread::spawn(move || {
            // Callers that are left hanging hang as long as their stream is kept.
            let mut hanging = Vec::new();
            while !ends.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => hanging.extend(lie(stream, hears.fetch_add(1, Ordering::Relaxed))),
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Self { is_over, heard, thread: Some(thread) }
    }

    /// How many have asked.
    fn heard(&self) -> usize {
        self.heard.load(Ordering::Relaxed)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic has been printed.
            let _ = thread.join();
        }
    }
}

/// Answers one caller; gives back the stream of one that is left hanging.
fn lie(mut stream: TcpStream, number: usize) -> Option<TcpStream> {
    let lies: [&[u8]; 7] = [
        b"\x00\xff\x13\x37 no HTTP at all \xfe\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n{\"workers\":[]",
        b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\n[",
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
        // It has forgotten everybody.
        b"HTTP/1.1 404 Not Found\r\ncontent-type: application/json\r\ncontent-length: 59\r\n\r\n\
          {\"error\":\"unknown_worker\",\"message\":\"who?\",\"advice\":\"none\"}",
        b"",
        b"HTTP/1.1 200 O",
    ];
    let lie = number % lies.len();
    // A caller that is not read to its end may hear of a reset instead; that is an answer too.
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_read_timeout(Some(Duration::from_millis(100)));
    let _ = stream.read(&mut [0; 4096]);
    let _ = stream.write_all(lies[lie]);
    // The last one begins to answer and stops.
    (lie == lies.len() - 1).then_some(stream)
}

/// One of the demo's workers, which takes its orders from the test.
struct Worker {
    name: String,
    process: Process,
    /// Rooms that have been delivered, until the test asks for them.
    delivered: Vec<u64>,
}

impl Worker {
    fn start(role: &str, number: u32, port: &str, op: &str, registry: &str) -> Self {
        let (name, number) = (format!("{role}-{number}"), number.to_string());
        let mut process = Process::start(&[
            "demo-worker",
            "--role",
            role,
            "--number",
            &number,
            "--port",
            port,
            "--op",
            op,
            "--registry",
            registry,
            "--pages",
            PAGES,
            "--deadline-s",
            "30",
            "--in-flight",
            "3",
        ]);
        process.tell(&json!({"key": {"key": vec![7; 32]}}));
        Self { name, process, delivered: Vec::new() }
    }

    fn says(&self) -> Value {
        let line = self.process.lines.recv_timeout(SOON);
        let line = line.unwrap_or_else(|error| panic!("{}: not a word more: {error}", self.name));
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("{} says '{line}'", self.name))
    }

    fn is_ready(&mut self) {
        assert_eq!(self.says(), "started", "{}", self.name);
        assert_eq!(self.says(), "ready", "{}", self.name);
    }

    fn takes(&mut self, rooms: std::ops::Range<u64>) {
        for room in rooms {
            let arrival = json!({"at_ns": 0, "tokens": TOKENS, "blocks": [], "decode_ns": 0});
            self.process.tell(&json!({"go": {"room": room, "arrival": arrival}}));
        }
    }

    /// Waits until all of these have been.
    fn delivers(&mut self, rooms: std::ops::Range<u64>) {
        for room in rooms {
            while !self.delivered.contains(&room) {
                let said = self.says();
                let ended = &said["ended"];
                assert!(ended["delivered"] == true && ended["right"] == true, "{}: {said}", self.name);
                self.delivered.push(ended["room"].as_u64().expect("a room's number"));
            }
        }
    }

    /// Nothing is left with it.
    fn leaves(mut self) {
        self.process.tell(&json!("end"));
        let said = self.says();
        for what in ["pages", "rooms", "grants", "quarantined"] {
            assert_eq!(said["bye"][what], 0, "{}: {said}", self.name);
        }
        let rest = self.process.lines.recv_timeout(SOON);
        assert!(rest.is_err(), "{} says more: {rest:?}", self.name);
        let status = self.process.child.wait().expect("it is our child");
        assert!(status.success(), "{}: {status}", self.name);
    }
}

/// One of the program's processes. Dropping it kills it.
struct Process {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Process {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(CROSSDOCK)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let input = child.stdin.take().expect("stdin is piped");
        let output = child.stdout.take().expect("stdout is piped");
        let (said, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if said.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, input, lines }
    }

    fn tell(&mut self, what: &Value) {
        writeln!(self.input, "{what}").expect("it listens");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
