//! The demo while its processes are killed, stopped and continued at random moments.
//!
//! Whatever happens to one process, the others end every room once, by its deadline, and say why, no page is lost, and
//! nothing hangs or stays behind. Each run takes other moments and, of the kinds of faults, other ones; it begins by
//! printing its seed. A failure shows its case, all that the demo said, and the command that plans the same case again.
//!
//! `CROSSDOCK_FAULT_SEED=S` chooses the plan. `CROSSDOCK_FAULT_CASES=N` runs N cases (`N=500` takes about 20 minutes), and
//! `CROSSDOCK_FAULT_ONLY=K` runs the one with number K.

mod demo;
mod registry;

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use demo::{Demo, Ended, Scratch, TraceFile};
use rustix::process::{Pid, Signal, kill_process};

/// What is done to which process, and when.
#[derive(Clone, Copy)]
struct Case {
    number: u64,
    kind: Kind,
    /// Who moves the bytes: the prefill side (`write`) or the decode side (`read`).
    op: &'static str,
    moment: Moment,
    /// After the moment.
    after_ms: u64,
    /// How long a process that is continued was stopped.
    pause_ms: u64,
}

#[derive(Clone, Copy)]
struct Kind {
    victim: Victim,
    fault: Fault,
    port: &'static str,
    /// Of the bootstrap's, either; the others come with each.
    op: Option<&'static str>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Prefill,
    Decode,
    Bootstrap,
    /// All three at once: to each of them it looks as if its clock had jumped, and the others with it.
    Everybody,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Kill,
    Stop,
    /// Stopped, and continued before its peers can take it for dead.
    Blink,
    /// Stopped, and continued about when its peers give it up.
    Pause,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The workers run, and register, find each other and shake hands.
    Meeting,
    /// Rooms have begun.
    Rooms,
}

/// Cases of an ordinary run: so many that each victim meets each fault, over one of the ports at least.
const CASES: u64 = 20;
/// Cases that run beside each other: most of their time they wait for deadlines.
const AT_ONCE: usize = 5;
/// A room's deadline.
const DEADLINE_MS: u64 = 3_000;
/// How much later than its deadline a room's end may be heard on a machine that has too much to do: a thread that has been
/// woken waits for a processor, too. Mostly it is less than 30 ms.
const MARGIN_MS: u64 = 1_500;
/// So many requests that no demo is done before its time is over.
const REQUESTS: usize = 2_000;
/// How long after its time a demo may take to end: a room's deadline, what the router and the farewell wait beyond it,
/// and as much again for a machine that has too much to do.
const ENDING: Duration = Duration::from_secs(40);

#[test]
fn every_fault_ends_well() {
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        Some(text.parse::<u64>().unwrap_or_else(|_| panic!("{name} is a number, and not '{text}'")))
    };
    let seed = number("CROSSDOCK_FAULT_SEED").unwrap_or_else(|| RandomState::new().hash_one(0) % 1_000_000);
    let count = number("CROSSDOCK_FAULT_CASES").unwrap_or(CASES);
    let chosen = match number("CROSSDOCK_FAULT_ONLY") {
        Some(only) => only..only + 1,
        None => 0..count,
    };
    println!("CROSSDOCK_FAULT_SEED={seed} CROSSDOCK_FAULT_CASES={count}");
    let cases: Vec<Case> = chosen.map(|number| Case::new(number, seed)).collect();
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
                            let number = case.number;
                            failed.push(format!(
                                "{case}: again with CROSSDOCK_FAULT_SEED={seed} CROSSDOCK_FAULT_ONLY={number}"
                            ));
                        }
                    }
                    failed
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("cases are caught")).collect()
    });
    assert!(failed.is_empty(), "{} of {} cases failed:\n{}", failed.len(), cases.len(), failed.join("\n"));
}

#[test]
fn nothing_outlives_a_killed_demo() {
    for stopped in [None, Some("prefill"), Some("decode"), Some("bootstrap")] {
        let mut demo = Demo::of_kv(&["--requests", "1000", "--ports", "shm", "--pool-mib", "64"]);
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
fn no_rank_outlives_a_killed_demo() {
    let mut demo = Demo::start(&["--scenes", "experts"]);
    assert!(demo.reads("scene experts, latency", Duration::from_secs(30)), "{}", demo.text);
    let ids = ranks(&demo.text);
    send(ids[2], Signal::STOP);
    send(demo.parent.id(), Signal::KILL);
    gone(ids.into_iter().chain(children(&demo.text).into_values()), Duration::from_secs(5), &demo.text);
}

/// Before the ranks have met, or while they step.
#[test]
fn a_rank_that_dies_is_named() {
    for after_ms in [0, 700] {
        let mut demo = Demo::start(&["--scenes", "experts"]);
        assert!(demo.reads("scene experts, latency", Duration::from_secs(30)), "{}", demo.text);
        demo.reads("\u{0}", Duration::from_millis(after_ms));
        let id = ranks(&demo.text)[1];
        send(id, Signal::KILL);
        let ended = demo.end(Duration::from_secs(120));
        assert!(!ended.status.success(), "{}", ended.text);
        let told =
            format!("! experts, latency: the latency rank 1 process ({id}) ended early: killed by signal 9");
        assert!(ended.text.contains(&told), "{}", ended.text);
        // That is nothing to the other scene.
        assert!(ended.text.contains("\nthroughput: rank 3 was killed; the others went on"), "{}", ended.text);
        assert!(!ended.text.contains("! experts, throughput"), "{}", ended.text);
    }
}

#[test]
fn demos_beside_each_other_end_well() {
    // Each has four processes.
    let demos: Vec<Demo> = ["shm", "tcp", "shm"]
        .map(|port| Demo::of_kv(&["--requests", "8", "--ports", port, "--pool-mib", "64"]))
        .into();
    for demo in demos {
        let ended = demo.end(Duration::from_secs(90));
        assert!(ended.status.success(), "{}\n{}", ended.text, ended.errors);
        assert!(ended.text.contains("leaks: 0 "), "{}", ended.text);
        gone(children(&ended.text).into_values(), Duration::from_secs(5), &ended.text);
    }
}

#[test]
fn a_dead_registry_is_named_first() {
    let mut demo = Demo::of_kv(&["--requests", "1000", "--ports", "shm,tcp", "--pool-mib", "64"]);
    assert!(demo.reads("registry at", Duration::from_secs(30)), "{}", demo.text);
    let id = children(&demo.text)["bootstrap"];
    send(id, Signal::KILL);
    let ended = demo.end(Duration::from_secs(60));
    assert!(!ended.status.success(), "{}", ended.text);
    for port in ["shm", "tcp"] {
        let first = ended.text.lines().find(|line| line.starts_with(&format!("! {port}: ")));
        let told = format!("! {port}: the bootstrap process ({id}) ended early: killed by signal 9");
        assert_eq!(first, Some(told.as_str()), "{}", ended.text);
        let row: Vec<&str> = row(&ended.text, port);
        assert_eq!(row[1..4], ["1000", "0", "0"], "{}", ended.text);
        assert_eq!(row[6..9], ["–", "–", "–"], "{}", ended.text);
    }
}

#[test]
fn the_time_that_was_given_is_not_blamed_on_a_process() {
    let arguments = ["--requests", "1000", "--ports", "tcp", "--pool-mib", "64", "--within-s", "3"];
    let mut demo = Demo::of_kv(&arguments);
    assert!(demo.reads("registry at", Duration::from_secs(30)), "{}", demo.text);
    send(children(&demo.text)["bootstrap"], Signal::STOP);
    let ended = demo.end(Duration::from_secs(60));
    assert!(!ended.status.success(), "{}", ended.text);
    let told = "! tcp: the time of --within-s 3 (all scenes together) is over; still waiting for the prefill process (";
    assert!(ended.text.contains(told), "{}", ended.text);
}

#[test]
fn the_numbers_of_a_table_add_up_when_a_worker_dies() {
    let arguments =
        ["--requests", "1000", "--ports", "shm", "--deadline-s", "3", "--pool-mib", "64", "--each-room"];
    let mut demo = Demo::of_kv(&arguments);
    assert!(demo.reads("room 5 begins", Duration::from_secs(40)), "{}", demo.text);
    send(children(&demo.text)["decode"], Signal::KILL);
    let ended = demo.end(Duration::from_secs(90));
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let row = row(&ended.text, "shm");
    let (begun, delivered) = (number(row[2]), number(row[3]));
    assert!(row[1] == "1000" && (5..1000).contains(&begun), "{}", ended.text);
    let others = ended.text.lines().filter_map(|line| line.split_once(" × decode: "));
    let others: u64 = others.map(|(times, _)| number(times.rsplit(' ').next().expect("a word"))).sum();
    assert_eq!(begun, delivered + others, "{}", ended.text);
}

/// What the surviving side has recorded says which peer, which rooms and why; and so do both, where both live.
#[test]
fn a_timeline_names_what_happened_to_a_worker() {
    for (port, dies) in [("shm", true), ("tcp", true), ("tcp", false)] {
        let folder = Scratch::new(&format!("{port}-{dies}"));
        let mut demo = Demo::of_kv(&[
            "--requests",
            &REQUESTS.to_string(),
            "--ports",
            port,
            "--deadline-s",
            "3",
            "--pool-mib",
            "96",
            "--within-s",
            "8",
            "--each-room",
            "--flight-dir",
            folder.path(),
        ]);
        assert!(demo.reads("room 5 begins", Duration::from_secs(40)), "{}", demo.text);
        let id = children(&demo.text)["prefill"];
        // Stopped first: rooms begin and none of them ends, so that some are open when it dies.
        send(id, Signal::STOP);
        let (stopped, then) = if dies { (1, Signal::KILL) } else { (4, Signal::CONT) };
        demo.reads("\u{0}", Duration::from_secs(stopped));
        send(id, then);
        let ended = demo.end(Duration::from_secs(90));
        // As the decode side has told its user.
        let reason = ended.text.lines().find_map(|line| {
            let (_, reason) = line.split_once(" × decode: peer lost: ")?;
            Some(reason.split_once(" (peer prefill-0").map_or(reason, |(reason, _)| reason))
        });
        let reason = reason.unwrap_or_else(|| panic!("no room was open at the moment:\n{}", ended.text));
        let (told, errors) = timeline(&[folder.path()]);
        assert!(errors.is_empty(), "{errors}");
        let shown = format!("{port}, dies: {dies}\n{told}\n{}", ended.text);
        let verdict = told.lines().find(|line| line.starts_with("  ⇒ decode-0 lost prefill-0: "));
        let verdict = verdict.unwrap_or_else(|| panic!("no verdict: {shown}"));
        let other = if dies { "there is no dump of prefill-0" } else { "prefill-0" };
        assert!(verdict.contains(reason) && verdict.contains(other), "{shown}");
        let decided = told.lines().find(|line| line.starts_with('✗')).unwrap_or_default();
        assert!(decided.contains("decode-0") && decided.contains("session down"), "{shown}");
        let has_peer = told.lines().any(|line| line.starts_with("prefill-0 (life "));
        assert_eq!(has_peer, !dies, "{shown}");
        // One of the rooms alone, and for programs.
        let room =
            told.lines().find_map(|line| line.strip_prefix("room ")?.split(',').next()).expect("a room");
        let (json, _) = timeline(&[folder.path(), "--room", room, "--peer", "prefill-0", "--json"]);
        let json: serde_json::Value = serde_json::from_str(&json).expect("it is JSON");
        let rooms = json["rooms"].as_array().expect("a list");
        assert!(rooms.len() == 1 && rooms[0]["outcome"] == "failed", "{json:#}");
        assert_eq!(rooms[0]["room"].to_string(), room);
    }
}

/// What `crossdock timeline` prints, and what it complains of.
fn timeline(arguments: &[&str]) -> (String, String) {
    let run = Command::new(demo::CROSSDOCK).arg("timeline").args(arguments).output().expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("it is text");
    let (told, errors) = (text(run.stdout), text(run.stderr));
    assert!(run.status.success(), "{errors}");
    (told, errors)
}

/// The cells of a scene's row.
fn row<'a>(text: &'a str, port: &str) -> Vec<&'a str> {
    let row = text.lines().find(|line| line.starts_with(&format!("{port}  ")));
    row.unwrap_or_else(|| panic!("no row for {port}:\n{text}")).split_whitespace().collect()
}

impl Kind {
    /// All of them, in an order that depends on `seed`; the first ones have every victim meet every fault.
    fn all(seed: u64) -> Vec<Kind> {
        let mut kinds = Vec::new();
        for port in ["shm", "tcp"] {
            for fault in [Fault::Kill, Fault::Stop, Fault::Blink, Fault::Pause] {
                for op in [Some("write"), Some("read")] {
                    kinds.push(Kind { victim: Victim::Prefill, fault, port, op });
                    kinds.push(Kind { victim: Victim::Decode, fault, port, op });
                }
                kinds.push(Kind { victim: Victim::Bootstrap, fault, port, op: None });
                if matches!(fault, Fault::Blink | Fault::Pause) {
                    kinds.push(Kind { victim: Victim::Everybody, fault, port, op: None });
                }
            }
        }
        for last in (1..kinds.len()).rev() {
            let other = mix(seed ^ (last as u64) << 32) % (last as u64 + 1);
            kinds.swap(last, other as usize);
        }
        let mut met = BTreeMap::new();
        let mut turns: Vec<(u32, Kind)> = Vec::new();
        for kind in kinds {
            let turn = met.entry((kind.victim, kind.fault)).or_insert(0);
            *turn += 1;
            turns.push((*turn, kind));
        }
        turns.sort_by_key(|(turn, _)| *turn);
        turns.into_iter().map(|(_, kind)| kind).collect()
    }
}

impl Case {
    fn new(number: u64, seed: u64) -> Self {
        let mut chance = mix(seed << 32 ^ number);
        let mut draw = |range: std::ops::Range<u64>| {
            chance = mix(chance);
            range.start + chance % (range.end - range.start)
        };
        // Once each kind has been, all come again in another order.
        let kinds = Kind::all(seed ^ ((number / KINDS) << 40));
        let kind = kinds[(number % KINDS) as usize];
        let op = kind.op.unwrap_or_else(|| ["write", "read"][draw(0..2) as usize]);
        let meets = match kind.victim {
            Victim::Bootstrap => draw(0..2) == 0,
            Victim::Everybody | Victim::Prefill | Victim::Decode => draw(0..4) == 0,
        };
        let (moment, after_ms) = match meets {
            true => (Moment::Meeting, draw(0..250)),
            false => (Moment::Rooms, draw(0..2_000)),
        };
        let pause_ms = match kind.fault {
            Fault::Blink => draw(50..1_000),
            _ => draw(2_000..3_000),
        };
        Self { number, kind, op, moment, after_ms, pause_ms }
    }

    /// How long the demo begins rooms, counted from its start, which takes seconds itself on a busy machine. One with a
    /// fault that ends it begins none after that.
    fn within_s(&self) -> u64 {
        match (self.kind.victim, self.kind.fault, self.moment) {
            // Rooms begin after the last of those that the fault delays.
            (_, Fault::Pause, _) => 16,
            (_, Fault::Blink, _) => 12,
            (Victim::Bootstrap, _, _) | (_, _, Moment::Meeting) => 10,
            _ => 30,
        }
    }

    /// Whether the victim never says another word.
    fn is_for_good(&self) -> bool {
        matches!(self.kind.fault, Fault::Kill | Fault::Stop)
    }

    fn run(&self, trace: &TraceFile) {
        let begin = Instant::now();
        let mut demo = Demo::of_kv(&[
            "--requests",
            &REQUESTS.to_string(),
            "--trace",
            trace.path(),
            "--closed-loop",
            "--scale",
            "1",
            "--ports",
            self.kind.port,
            "--op",
            self.op,
            "--deadline-s",
            &(DEADLINE_MS / 1_000).to_string(),
            "--pool-mib",
            "96",
            "--within-s",
            &self.within_s().to_string(),
            "--each-room",
        ]);
        let sign = match self.moment {
            Moment::Meeting => "scene",
            Moment::Rooms => "room 1 begins",
        };
        assert!(demo.reads(sign, Duration::from_secs(40)), "{self}: no '{sign}':\n{}", demo.text);
        // The demo prints on, and is read on.
        demo.reads("\u{0}", Duration::from_millis(self.after_ms));
        let ids = children(&demo.text);
        let victims = match self.kind.victim {
            Victim::Everybody => ids.values().copied().collect(),
            one => vec![ids[one.name()]],
        };
        let send_all = |signal| victims.iter().for_each(|&id| send(id, signal));
        match self.kind.fault {
            Fault::Kill => send_all(Signal::KILL),
            Fault::Stop => send_all(Signal::STOP),
            Fault::Blink | Fault::Pause => {
                send_all(Signal::STOP);
                demo.reads("\u{0}", Duration::from_millis(self.pause_ms));
                send_all(Signal::CONT);
            }
        }
        let ended = demo.end(Duration::from_secs(self.within_s()) + ENDING);
        let shown = format!("{self}\n{}\n{}", ended.text, ended.errors);
        gone(ids.into_values(), Duration::from_secs(5), &shown);
        let rooms = Rooms::read(&ended.text);
        let latest = rooms.ends.values().flatten().map(|end| end.after_ms).max().unwrap_or(0);
        println!(
            "{self}: {} after {:.1} s, {} rooms, the longest {latest} ms",
            ended.status,
            begin.elapsed().as_secs_f64(),
            rooms.begun
        );
        self.check(&ended, &rooms, &shown);
    }

    fn check(&self, ended: &Ended, rooms: &Rooms, shown: &str) {
        assert!(ended.text.contains("leaks: 0 "), "pages leak\n{shown}");
        assert!(!ended.text.contains("wrong bytes"), "wrong bytes\n{shown}");
        if self.moment == Moment::Rooms || !self.is_for_good() {
            assert!(rooms.begun > 0, "no room has begun\n{shown}");
        }
        for side in ["prefill", "decode"] {
            self.check_side(rooms, side, shown);
        }
        let delivered = |room| rooms.ends.get(&(room, "decode")).is_some_and(|ends| ends[0].is("delivered"));
        let all_delivered = rooms.begun > 0 && (1..=rooms.begun).all(delivered);
        let troubles = ended.text.lines().filter(|line| line.starts_with("! ")).count();
        assert_eq!(ended.status.success(), all_delivered && troubles == 0, "exit code\n{shown}");
        let has = |words: &str| ended.text.lines().any(|line| line.starts_with("! ") && line.contains(words));
        match (self.kind.victim, self.kind.fault) {
            // Nobody can meet without the registry, and who has met needs it no more.
            (Victim::Bootstrap, Fault::Kill | Fault::Stop) if rooms.begun == 0 => {
                let told = match self.kind.fault {
                    Fault::Kill => {
                        has(" the bootstrap process (") && has(") ended early: killed by signal 9")
                    }
                    _ => has("was not ready after") || has(WAITED) || has("ended early: exit status: 1"),
                };
                assert!(told, "that nobody has met is not told\n{shown}");
                if has("ended early: exit status: 1") {
                    assert!(ended.errors.contains("registry"), "the reason is not told\n{shown}");
                }
            }
            (Victim::Bootstrap, _) => assert!(ended.status.success(), "a lost registry harms\n{shown}"),
            (victim, Fault::Kill) => {
                assert!(has(&format!("the {} process", victim.name())), "the dead is not named\n{shown}");
                // On a machine that has far too much to do the demo's time may be over before anybody dies.
                let is_late = rooms.begun == 0 && has("was not ready after");
                let is_told = has("ended early: killed by signal 9");
                assert!(is_told || is_late, "the death is not told\n{shown}");
            }
            (victim, Fault::Stop) => {
                assert!(has(&format!("the {} process", victim.name())), "the mute is not named\n{shown}");
                let told = match rooms.begun {
                    0 => has("was not ready after") || has(WAITED),
                    _ => has("does not answer (stopped?)"),
                };
                assert!(told, "the silence is not told\n{shown}");
            }
            // What comes after the pause is handed over again, with those that it delayed out of the way.
            (_, Fault::Blink | Fault::Pause) => {
                assert!(delivered(rooms.begun), "the last room was lost\n{shown}");
            }
        }
        self.check_quarantine(rooms, has("in quarantine: "), shown);
    }

    /// Each room has ended once, by its deadline, with one of the library's reasons.
    fn check_side(&self, rooms: &Rooms, side: &'static str, shown: &str) {
        let is_victim = self.kind.victim == Victim::Everybody || side == self.kind.victim.name();
        let is_cut_off = is_victim && self.is_for_good();
        // Only a process that is stopped itself may be late by as much.
        let stopped_ms = if is_victim && !self.is_for_good() { self.pause_ms } else { 0 };
        let latest_ms = DEADLINE_MS + MARGIN_MS + stopped_ms;
        for room in 1..=rooms.begun {
            let ends = rooms.ends.get(&(room, side)).map_or(&[][..], Vec::as_slice);
            let fits = if is_cut_off { ends.len() <= 1 } else { ends.len() == 1 };
            assert!(fits, "room {room} ended {} times at the {side}\n{shown}", ends.len());
            for End { how, after_ms } in ends {
                assert!(is_typed(how, side), "the {side} ended room {room} with '{how}'\n{shown}");
                let late = format!("the {side} ended room {room} after {after_ms} ms of {DEADLINE_MS}");
                assert!(*after_ms <= latest_ms, "{late}\n{shown}");
            }
        }
    }

    /// Only a stopped process that maps the pages can still reach them: a writer its peer's, a reader its source's.
    fn check_quarantine(&self, rooms: &Rooms, is_told: bool, shown: &str) {
        let reaches = self.kind.fault == Fault::Stop
            && self.kind.port == "shm"
            && matches!((self.kind.victim, self.op), (Victim::Prefill, "write") | (Victim::Decode, "read"));
        let owner = if self.op == "write" { "decode" } else { "prefill" };
        let mut ends = rooms.ends.iter().filter(|((_, side), _)| *side == owner);
        if !reaches {
            assert!(!is_told, "pages in quarantine that nobody can reach\n{shown}");
        } else if ends.any(|(_, ends)| ends[0].is("peer lost")) {
            assert!(is_told, "pages at home that a stopped process can still reach\n{shown}");
        }
    }
}

/// What a demo says whose time was over before its workers had met.
const WAITED: &str = "is over; still waiting for ";

/// As many kinds as there are.
const KINDS: u64 = 2 * (4 * 5 + 2);

/// What the demo has printed about its rooms.
struct Rooms {
    begun: u64,
    ends: BTreeMap<(u64, &'static str), Vec<End>>,
}

/// How a room ended on one side, and how long after it was taken up there.
struct End {
    how: String,
    after_ms: u64,
}

impl End {
    fn is(&self, what: &str) -> bool {
        self.how.starts_with(what)
    }
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
                let end = rest.strip_prefix(&format!(", {side}, ")).and_then(|end| end.split_once(" ms: "));
                if let Some((after_ms, how)) = end {
                    let after_ms = after_ms.parse().expect("a number of milliseconds");
                    rooms.ends.entry((room, side)).or_default().push(End { how: how.to_owned(), after_ms });
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
            Victim::Everybody => "everybody",
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, kind: Kind { victim, fault, port, .. }, op, moment, after_ms, pause_ms } = self;
        let how = match fault {
            Fault::Kill => "killed".to_owned(),
            Fault::Stop => "stopped".to_owned(),
            Fault::Blink | Fault::Pause => format!("stopped for {pause_ms} ms"),
        };
        let moment = match moment {
            Moment::Meeting => "the start of the workers",
            Moment::Rooms => "the first room",
        };
        write!(f, "case {number}: {port} {op}, {} {how} {after_ms} ms after {moment}", victim.name())
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

/// The processes of the last scene with experts.
fn ranks(text: &str) -> Vec<u32> {
    let line = text.lines().rev().find_map(|line| line.split_once("the ranks are processes "));
    let ids = line.expect("a scene with experts").1.split(", ");
    ids.map(|id| id.parse().expect("a number")).collect()
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
