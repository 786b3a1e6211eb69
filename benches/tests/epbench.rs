//! epbench as it is called: every mode with few and small tokens, what is refused, and what a killed one leaves behind.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn every_mode_is_measured_and_verified() {
    let all: [&[&str]; 10] = [
        &[],
        &["--scales", "row", "--routing", "zipf"],
        &["--dtype", "bf16", "--routing", "masked", "--slots", "3"],
        &["--ranks", "1", "--routing", "k-hot"],
        &["--ranks", "5", "--tokens", "1"],
        &["--mode", "throughput", "--routing", "one-hot"],
        &["--mode", "throughput", "--dtype", "bf16", "--ranks", "3", "--slots", "2"],
        &["--mode", "throughput", "--ranks", "5", "--experts", "13", "--topk", "3"],
        &["--port", "tcp", "--ranks", "3", "--slots", "2"],
        &["--port", "tcp", "--mode", "throughput", "--ranks", "3"],
    ];
    for more in all {
        let small = ["--hidden", "256", "--experts", "16", "--iterations", "12", "--verify", "--json"];
        let tokens: &[&str] = if more.contains(&"--tokens") { &[] } else { &["--tokens", "9"] };
        let small: Vec<&str> =
            small.chunks(2).filter(|pair| !more.contains(&pair[0])).flatten().copied().collect();
        let (success, text, errors) = call(&[&small[..], tokens, more].concat());
        assert!(success, "{more:?}: {errors}");
        let line: serde_json::Value = serde_json::from_str(&text).expect("one object");
        let told = |flag: &str, otherwise: &str| {
            let at = more.iter().position(|argument| *argument == flag);
            at.map_or(otherwise, |at| more[at + 1]).to_owned()
        };
        assert_eq!((&line["bench"], &line["verified"]), (&"ep".into(), &true.into()), "{text}");
        assert_eq!(line["mode"], told("--mode", "latency"), "{text}");
        assert_eq!(line["ranks"].to_string(), told("--ranks", "2"), "{text}");
        assert_eq!(line["iterations"], 12, "{text}");
        for key in [
            "tokens",
            "dispatch_us_p50",
            "dispatch_us_p99",
            "combine_us_p50",
            "combine_us_p99",
            "logical_gb_per_s",
            "wire_gb_per_s",
            "floor_us",
            "efficiency",
            "efficiency_paired",
        ] {
            let value = line[key].as_f64().unwrap_or_else(|| panic!("{more:?}: no {key}: {text}"));
            assert!(value > 0.0 || key == "wire_gb_per_s", "{more:?}: {key} is {value}");
        }
    }
}

/// As between hosts, each rank on the device after that of the rank before it.
#[test]
fn both_modes_are_measured_over_rdma() {
    let Ok(devices) = std::env::var("CROSSDOCK_VERBS_DEVICES") else {
        eprintln!("SKIPPED: CROSSDOCK_VERBS_DEVICES names no RDMA device (run this in tests/rdma-vm)");
        return;
    };
    for mode in ["latency", "throughput"] {
        let arguments = ["--port", "verbs", "--devices", &devices, "--mode", mode, "--tokens", "5"];
        let few = ["--hidden", "256", "--experts", "16", "--iterations", "12", "--verify", "--json"];
        let (success, text, errors) = call(&[&arguments[..], &few[..]].concat());
        assert!(success, "{mode}: {errors}");
        let line: serde_json::Value = serde_json::from_str(&text).expect("one object");
        assert_eq!((&line["port"], &line["verified"]), (&"verbs".into(), &true.into()), "{text}");
        println!("{text}");
    }
}

#[test]
fn a_table_says_what_the_flags_say() {
    let (success, text, errors) = call(&["--hidden", "256", "--tokens", "4", "--iterations", "10"]);
    assert!(success, "{errors}");
    assert!(text.starts_with("latency mode, 2 ranks"), "{text}");
    assert!(text.contains(" 4 tokens a rank, hidden 256, 256 experts, top 8, fp8"), "{text}");
    assert!(text.ends_with("; not verified\n"), "{text}");
}

#[test]
fn turns_are_taken_when_told() {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_epbench"))
        .args(["--hidden", "256", "--tokens", "3", "--turns", "--verify"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it was built");
    let turns = "ours 1\nfloor 1\nours 3\n";
    // Its end is the end of the turns.
    bench.stdin.take().expect("a pipe").write_all(turns.as_bytes()).expect("it reads");
    let output = bench.wait_with_output().expect("it was started");
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    let [ready, turns @ .., last] = &lines[..] else { panic!("{text}") };
    assert_eq!((&ready["ready"], turns.len(), &last["verified"]), (&true.into(), 3, &true.into()), "{text}");
    for turn in turns {
        let [dispatch, combine] =
            ["dispatch_us", "combine_us"].map(|key| turn[key].as_array().map_or(0, Vec::len));
        assert!(dispatch > 0 && dispatch == combine, "{turn}");
    }
}

#[test]
fn round_trips_are_timed_and_sleeps_counted() {
    let small =
        ["--hidden", "256", "--experts", "16", "--tokens", "1", "--iterations", "12", "--verify", "--json"];
    let (success, text, errors) = call(&[&small[..], &["--round-trips"]].concat());
    if !success && errors.contains("a processor for each") {
        println!("SKIPPED: {errors}");
        return;
    }
    assert!(success, "{errors}");
    let line: serde_json::Value = serde_json::from_str(&text).expect("one object");
    for key in ["step_us_p50", "alone_us_p50", "trip_us_p50", "parked_step_us_p50", "parked_sleeps_mean"] {
        assert!(line[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {text}");
    }
    assert_eq!(line["verified"], true, "{text}");
}

#[test]
fn sizes_are_told_beside_deepeps() {
    let (success, text, errors) = call(&["--sizes", "--slots", "2", "--json"]);
    assert!(success, "{errors}");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    assert_eq!(lines.iter().map(|line| line["ranks"].as_u64()).collect::<Vec<_>>(), [8, 32, 72].map(Some));
    for line in lines {
        let ratio = line["ratio"].as_f64().expect("a number");
        assert!(ratio > 0.0 && ratio < 0.25, "{line}");
    }
}

#[test]
fn what_is_not_possible_is_refused_by_name() {
    for (arguments, words) in [
        (vec!["--devices", "rxe0"], vec!["--devices", "--port verbs"]),
        (vec!["--port", "verbs", "--devices", "none0"], vec!["--port verbs", "crossdock doctor"]),
        (vec!["--port", "tcp", "--round-trips"], vec!["--round-trips", "--port shm"]),
        (vec!["--backend", "cuda"], vec!["--backend cuda is not built yet", "--backend host"]),
        (vec!["--hidden", "100"], vec!["hidden 100", "multiple of 8", "multiple of 128"]),
        (vec!["--topk", "9", "--experts", "8"], vec!["8 experts", "9", "--topk"]),
        (vec!["--topk", "65"], vec!["top_k 65", "64"]),
        (vec!["--slots", "0"], vec!["slots 0"]),
        (vec!["--seconds", "0"], vec!["--seconds"]),
        (vec!["--round-trips", "--ranks", "1"], vec!["--round-trips", "two ranks"]),
        (vec!["--round-trips", "--mode", "throughput"], vec!["--round-trips", "latency"]),
        (vec!["--tokens", "65536", "--ranks", "64", "--experts", "64"], vec!["MB are needed", "--tokens"]),
    ] {
        let (success, _, errors) = call(&arguments);
        assert!(!success, "{arguments:?} is accepted");
        for word in words {
            assert!(errors.contains(word), "{arguments:?} does not say '{word}': {errors}");
        }
    }
}

#[test]
fn no_rank_outlives_a_killed_first_one() {
    // From before the ranks run to the middle of the measurement.
    for wait_ms in [0, 1, 2, 5, 10, 20, 50, 200, 600] {
        let mut first = start();
        std::thread::sleep(Duration::from_millis(wait_ms));
        first.kill().expect("it runs");
        first.wait().expect("it was killed");
        none_left(first.id(), &format!("killed after {wait_ms} ms"));
    }
}

#[test]
fn a_killed_rank_ends_the_benchmark() {
    let first = start();
    let begun = Instant::now();
    let rank = loop {
        if let Some(rank) = children_of(first.id()).first() {
            break *rank;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "no rank was started");
        std::thread::sleep(Duration::from_millis(5));
    };
    std::thread::sleep(Duration::from_millis(300));
    let pid = rustix::process::Pid::from_raw(rank as i32).expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it runs");
    let output = first.wait_with_output().expect("it was started");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains("has ended before the benchmark did"), "{errors}");
}

/// One that would run for long.
fn start() -> std::process::Child {
    Command::new(env!("CARGO_BIN_EXE_epbench"))
        .args(["--ranks", "4", "--tokens", "16", "--iterations", "1000000"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it was built")
}

fn none_left(parent: u32, when: &str) {
    let begun = Instant::now();
    loop {
        let left = children_of(parent);
        if left.is_empty() {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{when}, a while later there is: {left:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The processes that were started by a benchmark with this process number.
fn children_of(parent: u32) -> Vec<u32> {
    let words = format!("--parent {parent} ");
    let processes = std::fs::read_dir("/proc").expect("it is mounted").filter_map(|entry| {
        let path = entry.ok()?.path();
        let line = String::from_utf8_lossy(&std::fs::read(path.join("cmdline")).ok()?).replace('\0', " ");
        (line.contains("epbench") && line.contains(&words))
            .then(|| path.file_name()?.to_str()?.parse().ok())?
    });
    processes.collect()
}

fn call(arguments: &[&str]) -> (bool, String, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_epbench")).args(arguments).output().expect("the program starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}
