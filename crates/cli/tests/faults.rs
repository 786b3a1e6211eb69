//! The demo while its processes are killed, stopped and continued at random moments.
//!
//! Whatever happens to one process, the others end every room once and say why, no page is lost, and nothing hangs or
//! stays behind. Every case is printed before it runs, and a failure shows it again with all that the demo said.
//!
//! `CROSSDOCK_FAULT_CASES=N` runs N cases in the place of one of each kind (`N=500` takes about twenty minutes), and
//! `CROSSDOCK_FAULT_SEED=S` chooses other moments.

mod demo;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use demo::{Demo, Ended, TraceFile};
use rustix::process::{Pid, Signal, kill_process};

/// What is done to which process, and when.
#[derive(Clone, Copy)]
struct Case {
    number: u64,
    victim: Victim,
    fault: Fault,
    port: &'static str,
    /// After the workers were started, or after the first room where the registry is the victim.
    after_ms: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    Prefill,
    Decode,
    Bootstrap,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
    /// Stopped, and continued after so long.
    Pause {
        ms: u64,
    },
}

/// One of each kind.
const KINDS: [(Victim, Fault, &str); 16] = [
    (Victim::Prefill, Fault::Stop, "shm"),
    (Victim::Prefill, Fault::Stop, "tcp"),
    (Victim::Decode, Fault::Stop, "shm"),
    (Victim::Decode, Fault::Stop, "tcp"),
    (Victim::Prefill, Fault::Pause { ms: 2_600 }, "shm"),
    (Victim::Prefill, Fault::Pause { ms: 2_600 }, "tcp"),
    (Victim::Decode, Fault::Pause { ms: 2_600 }, "shm"),
    (Victim::Decode, Fault::Pause { ms: 2_600 }, "tcp"),
    (Victim::Prefill, Fault::Pause { ms: 500 }, "shm"),
    (Victim::Decode, Fault::Pause { ms: 500 }, "tcp"),
    (Victim::Bootstrap, Fault::Kill, "shm"),
    (Victim::Bootstrap, Fault::Stop, "tcp"),
    (Victim::Prefill, Fault::Kill, "shm"),
    (Victim::Prefill, Fault::Kill, "tcp"),
    (Victim::Decode, Fault::Kill, "shm"),
    (Victim::Decode, Fault::Kill, "tcp"),
];

/// Cases that run beside each other: most of their time they wait for deadlines.
const AT_ONCE: usize = 5;
/// How long a demo begins rooms.
const WITHIN_S: u64 = 7;
/// The same where a process is stopped and continues: rooms have to begin after the last of those that it delayed.
const WITHIN_WITH_PAUSE_S: u64 = 12;
/// So many requests that no demo is done before its time is over.
const REQUESTS: usize = 500;
/// A room's deadline.
const DEADLINE_S: u64 = 3;
/// How long after that a demo may take to end: a room's deadline, what the router and the farewell wait beyond it,
/// and as much again for a machine that has too much to do.
const ENDING: Duration = Duration::from_secs(40);

#[test]
fn every_fault_ends_well() {
    let count = std::env::var("CROSSDOCK_FAULT_CASES")
        .map_or(KINDS.len() as u64, |text| text.parse().expect("CROSSDOCK_FAULT_CASES is a number"));
    let seed = std::env::var("CROSSDOCK_FAULT_SEED")
        .map_or(1, |text| text.parse().expect("CROSSDOCK_FAULT_SEED is a number"));
    println!("CROSSDOCK_FAULT_CASES={count} CROSSDOCK_FAULT_SEED={seed}");
    let cases: Vec<Case> = (0..count).map(|number| Case::new(number, seed)).collect();
    // Of 1 to 10 pages, in pools of 21.
    let lines = (0..REQUESTS as u64).map(|at| {
        let tokens = 40 + mix(seed ^ at) % 600;
        format!("{{\"timestamp\": {at}, \"input_length\": {tokens}, \"output_length\": 1}}\n")
    });
    let trace = TraceFile::new("faults", &lines.collect::<String>());
    let next = AtomicUsize::new(0);
    let failed: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                scope.spawn(|| {
                    let mut failed = Vec::new();
                    while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                        println!("{case}");
                        if catch_unwind(AssertUnwindSafe(|| case.run(&trace))).is_err() {
                            failed.push(case.to_string());
                        }
                    }
                    failed
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("cases are caught")).collect()
    });
    assert!(failed.is_empty(), "{} of {count} cases failed:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn nothing_outlives_a_killed_demo() {
    for stopped in [None, Some("prefill"), Some("decode"), Some("bootstrap")] {
        let mut demo = Demo::start(&["--requests", "1000", "--ports", "shm", "--pool-mib", "64"]);
        assert!(demo.reads("scene", Duration::from_secs(30)), "{}", demo.text);
        let ids = children(&demo.text);
        assert_eq!(ids.len(), 3, "{}", demo.text);
        if let Some(name) = stopped {
            send(ids[name], Signal::STOP);
        }
        std::thread::sleep(Duration::from_millis(300));
        send(demo.parent.id(), Signal::KILL);
        gone(ids.values().copied(), Duration::from_secs(10), &format!("stopped: {stopped:?}"));
    }
}

#[test]
fn demos_beside_each_other_end_well() {
    // Each has four processes.
    let demos: Vec<Demo> = ["shm", "tcp", "shm"]
        .map(|port| Demo::start(&["--requests", "8", "--ports", port, "--pool-mib", "64"]))
        .into();
    for demo in demos {
        let ended = demo.end(Duration::from_secs(90));
        assert!(ended.status.success(), "{}\n{}", ended.text, ended.errors);
        assert!(ended.text.contains("leaks: 0 "), "{}", ended.text);
        gone(children(&ended.text).into_values(), Duration::from_secs(5), &ended.text);
    }
}

impl Case {
    fn new(number: u64, seed: u64) -> Self {
        let (victim, fault, port) = KINDS[(number % KINDS.len() as u64) as usize];
        let after_ms = mix(seed << 32 ^ number) % 2_500;
        Self { number, victim, fault, port, after_ms }
    }

    fn run(&self, trace: &TraceFile) {
        let begin = Instant::now();
        let within_s = match self.fault {
            Fault::Pause { .. } => WITHIN_WITH_PAUSE_S,
            Fault::Kill | Fault::Stop => WITHIN_S,
        };
        let mut demo = Demo::start(&[
            "--requests",
            &REQUESTS.to_string(),
            "--trace",
            trace.path(),
            "--scale",
            "1",
            "--ports",
            self.port,
            "--deadline-s",
            &DEADLINE_S.to_string(),
            "--pool-mib",
            "96",
            "--within-s",
            &within_s.to_string(),
            "--each-room",
        ]);
        let sign = match self.victim {
            Victim::Bootstrap => "room 1 begins",
            Victim::Prefill | Victim::Decode => "scene",
        };
        assert!(demo.reads(sign, Duration::from_secs(40)), "{self}: no '{sign}':\n{}", demo.text);
        // The demo prints on, and is read on.
        demo.reads("\u{0}", Duration::from_millis(self.after_ms));
        let ids = children(&demo.text);
        let id = ids[self.victim.name()];
        match self.fault {
            Fault::Kill => send(id, Signal::KILL),
            Fault::Stop => send(id, Signal::STOP),
            Fault::Pause { ms } => {
                send(id, Signal::STOP);
                demo.reads("\u{0}", Duration::from_millis(ms));
                send(id, Signal::CONT);
            }
        }
        let ended = demo.end(Duration::from_secs(within_s) + ENDING);
        println!("{self}: {} after {:.1} s", ended.status, begin.elapsed().as_secs_f64());
        let shown = format!("{self}\n{}\n{}", ended.text, ended.errors);
        gone(ids.into_values(), Duration::from_secs(5), &shown);
        self.check(&ended, &shown);
    }

    fn check(&self, ended: &Ended, shown: &str) {
        let rooms = Rooms::read(&ended.text);
        assert!(ended.text.contains("leaks: 0 "), "pages leak\n{shown}");
        assert!(!ended.text.contains("wrong bytes"), "wrong bytes\n{shown}");
        for side in ["prefill", "decode"] {
            let is_cut_off = side == self.victim.name() && !matches!(self.fault, Fault::Pause { .. });
            for room in 1..=rooms.begun {
                let ends = rooms.ends.get(&(room, side)).map_or(&[][..], Vec::as_slice);
                let fits = if is_cut_off { ends.len() <= 1 } else { ends.len() == 1 };
                assert!(fits, "room {room} ended {} times at the {side}\n{shown}", ends.len());
                for how in ends {
                    assert!(is_typed(how, side), "the {side} ended room {room} with '{how}'\n{shown}");
                }
            }
        }
        let delivered = |room| {
            let ends = rooms.ends.get(&(room, "decode"));
            ends.is_some_and(|ends| ends[0].starts_with("delivered"))
        };
        let all_delivered = rooms.begun > 0 && (1..=rooms.begun).all(delivered);
        let troubles = ended.text.lines().filter(|line| line.starts_with("! ")).count();
        assert_eq!(ended.status.success(), all_delivered && troubles == 0, "exit code\n{shown}");
        let has = |words: &str| ended.text.lines().any(|line| line.starts_with("! ") && line.contains(words));
        match (self.victim, self.fault) {
            (Victim::Bootstrap, _) => assert!(ended.status.success(), "a lost registry harms\n{shown}"),
            (victim, Fault::Kill) => {
                assert!(has(&format!("the {} process", victim.name())), "the dead is not named\n{shown}");
                assert!(has("ended early: killed by signal 9"), "the death is not told\n{shown}");
            }
            (victim, Fault::Stop) => {
                assert!(has(&format!("the {} process", victim.name())), "the mute is not named\n{shown}");
                let told = rooms.begun == 0 || has("does not answer (stopped?)");
                assert!(told, "the silence is not told\n{shown}");
            }
            // What comes after the pause is handed over again, with those that it delayed out of the way.
            (_, Fault::Pause { .. }) => {
                assert!(rooms.begun == 0 || delivered(rooms.begun), "the last room was lost\n{shown}");
            }
        }
        // Only a stopped process that maps the pages can still write them.
        let writes_on = (self.victim, self.fault, self.port) == (Victim::Prefill, Fault::Stop, "shm");
        let lost =
            rooms.ends.iter().any(|((_, side), how)| *side == "decode" && how[0].starts_with("peer lost"));
        if lost || !writes_on {
            assert_eq!(has("in quarantine: prefill-0"), writes_on, "quarantine\n{shown}");
        }
    }
}

/// What the demo has printed about its rooms.
struct Rooms {
    begun: u64,
    ends: BTreeMap<(u64, &'static str), Vec<String>>,
}

impl Rooms {
    fn read(text: &str) -> Self {
        let mut rooms = Self { begun: 0, ends: BTreeMap::new() };
        for line in text.lines() {
            let Some((_, rest)) = line.split_once(": room ") else { continue };
            let digits = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
            let Ok(room) = rest[..digits].parse() else { continue };
            let rest = &rest[digits..];
            for side in ["prefill", "decode"] {
                if let Some(how) = rest.strip_prefix(&format!(", {side}: ")) {
                    rooms.ends.entry((room, side)).or_default().push(how.to_owned());
                }
            }
            if rest.starts_with(" begins") {
                assert_eq!(room, rooms.begun + 1, "rooms begin in order");
                rooms.begun = room;
            }
        }
        rooms
    }
}

/// Whether a room's end has one of the library's reasons, with the peer where there was one; or its pages could not
/// even be had from the pool before the deadline, because those of others did not come home.
fn is_typed(how: &str, side: &str) -> bool {
    let peer = if side == "decode" { "(peer prefill-0" } else { "(peer decode-0" };
    match how.split_once([':', ' ']).map_or(how, |(first, _)| first) {
        "delivered" | "cancelled" | "failed" => how.contains(peer),
        "peer" => how.starts_with("peer lost: ") && how.contains(peer),
        "deadline" => how.contains(" passed while ") && (how.contains(peer) || how.contains("while waiting")),
        "refused" => how.starts_with("refused by "),
        _ => how.contains(" pages wanted, "),
    }
}

impl Victim {
    fn name(self) -> &'static str {
        match self {
            Victim::Prefill => "prefill",
            Victim::Decode => "decode",
            Victim::Bootstrap => "bootstrap",
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.fault {
            Fault::Kill => "killed".to_owned(),
            Fault::Stop => "stopped".to_owned(),
            Fault::Pause { ms } => format!("stopped for {ms} ms"),
        };
        let (number, port, name) = (self.number, self.port, self.victim.name());
        write!(f, "case {number}: {port}, {name} {how} after {} ms", self.after_ms)
    }
}

/// Panics unless none of the processes runs any more in a while.
fn gone(ids: impl IntoIterator<Item = u32>, within: Duration, shown: &str) {
    let ids: Vec<u32> = ids.into_iter().collect();
    let until = Instant::now() + within;
    while !running(ids.iter().copied()).is_empty() {
        assert!(Instant::now() < until, "processes of a demo are left: {:?}\n{shown}", running(ids));
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The process ids in a demo's output.
fn children(text: &str) -> BTreeMap<&'static str, u32> {
    let number = |after: &str| -> Option<u32> {
        let rest = &text[text.find(after)? + after.len()..];
        rest.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
    };
    let registry = text.find("registry at ").and_then(|at| {
        let line = text[at..].lines().next()?;
        line.rsplit(' ').next()?.parse().ok()
    });
    [
        ("bootstrap", registry),
        ("prefill", number("prefill is process ")),
        ("decode", number("decode is process ")),
    ]
    .into_iter()
    .filter_map(|(name, id)| Some((name, id?)))
    .collect()
}

/// Sends a signal; a process that has ended does not get it.
fn send(id: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(id as i32) {
        let _ = kill_process(pid, signal);
    }
}

/// Those of the processes that still run. One that has ended and was not waited for does not.
fn running(ids: impl IntoIterator<Item = u32>) -> Vec<u32> {
    ids.into_iter()
        .filter(|id| {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            // The name stands in brackets and the state is the letter after it.
            let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
            stat.contains("crossdock") && !matches!(state, Some('Z' | 'X'))
        })
        .collect()
}

fn mix(mut word: u64) -> u64 {
    word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}
