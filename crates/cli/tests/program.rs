//! The program as a user calls it: what it prints, and what it says when it is called wrongly.

mod demo;

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use demo::{CROSSDOCK, Demo, Scratch, TraceFile};

#[test]
fn a_demo_of_everything_shows_both_tables() {
    let ended = Demo::start(&["--requests", "3", "--pool-mib", "64"]).end(Duration::from_secs(150));
    assert!(ended.status.success(), "{}\n{}", ended.text, ended.errors);
    for port in ["shm", "tcp"] {
        let row = ended.text.lines().find(|line| line.starts_with(&format!("{port}  ")));
        let cells: Vec<&str> = row.expect("a row for each port").split_whitespace().collect();
        assert_eq!(cells[1..4], ["3", "3", "3"], "{}", ended.text);
    }
    for mode in ["latency", "throughput"] {
        let row = ended.text.lines().find(|line| line.starts_with(&format!("{mode}  ")));
        let cells: Vec<&str> = row.expect("a row for each mode").split_whitespace().collect();
        assert_eq!((cells[1], cells[cells.len() - 1]), ("4", "all"), "{}", ended.text);
        let death = format!("{mode}: rank 3 was killed; the others went on after ");
        assert!(ended.text.contains(&death), "{}", ended.text);
    }
    assert!(ended.text.contains("leaks: 0 "), "{}", ended.text);
    assert!(!ended.text.contains("! "), "{}", ended.text);
}

#[test]
fn rdma_carries_the_demo() {
    let Ok(devices) = std::env::var("CROSSDOCK_VERBS_DEVICES") else {
        eprintln!("SKIPPED: CROSSDOCK_VERBS_DEVICES names no RDMA device (run this in tests/rdma-vm)");
        return;
    };
    let few = ["--requests", "3", "--pool-mib", "16", "--ports", "verbs", "--devices", &devices];
    let ended = Demo::of_kv(&few).end(Duration::from_secs(250));
    assert!(ended.status.success(), "{}\n{}", ended.text, ended.errors);
    let row = ended.text.lines().find(|line| line.starts_with("verbs  ")).expect("a row");
    assert_eq!(row.split_whitespace().collect::<Vec<_>>()[1..4], ["3", "3", "3"], "{}", ended.text);
    assert!(ended.text.contains("leaks: 0 "), "{}", ended.text);
}

#[test]
fn experts_alone_are_told_to_programs() {
    let ended = Demo::start(&["--scenes", "experts", "--json"]).end(Duration::from_secs(120));
    assert!(ended.status.success(), "{}\n{}", ended.text, ended.errors);
    let lines: Vec<serde_json::Value> =
        ended.text.lines().map(|line| serde_json::from_str(line).expect("only JSON")).collect();
    assert_eq!(lines.len(), 2, "{}", ended.text);
    for (line, (mode, tokens)) in lines.iter().zip([("latency", 32), ("throughput", 256)]) {
        assert_eq!((&line["bench"], &line["mode"]), (&"demo-experts".into(), &mode.into()), "{line}");
        assert_eq!((&line["tokens"], &line["verified"]), (&tokens.into(), &true.into()), "{line}");
        assert_eq!((&line["wrong_rows"], &line["leaks"]), (&0.into(), &0.into()), "{line}");
        let figure = |key: &str| line[key].as_f64().unwrap_or_else(|| panic!("no {key}: {line}"));
        assert!(figure("rows") > 0.0 && figure("steps") > 0.0, "{line}");
        assert!(figure("dispatch_us_p99") >= figure("dispatch_us_p50"), "{line}");
        // Of four choices three are at other ranks, and those of one rank share a row.
        assert!((0.4..0.8).contains(&figure("wire_share")), "{line}");
        // A quarter of the experts was the dead rank's.
        let lost = line["killed"]["lost_share"].as_f64().expect("a share");
        assert!((0.2..0.3).contains(&lost), "{line}");
        assert!(line["killed"]["steps"].as_u64().expect("a number") > 0, "{line}");
    }
}

#[test]
fn a_trace_is_replayed() {
    let trace = TraceFile::new(
        "good",
        r#"{"timestamp": 0, "input_length": 900, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 10, "input_length": 64, "output_length": 5, "hash_ids": [0]}
"#,
    );
    let ended =
        Demo::of_kv(&["--trace", trace.path(), "--ports", "tcp", "--pool-mib", "64", "--scale", "0.5"])
            .end(Duration::from_secs(60));
    assert!(ended.status.success(), "{}\n{}", ended.text, ended.errors);
    let row = ended.text.lines().find(|line| line.starts_with("tcp  ")).expect("a row");
    assert_eq!(row.split_whitespace().collect::<Vec<_>>()[1..4], ["2", "2", "2"], "{}", ended.text);
}

#[test]
fn requests_of_a_trace_share_their_prefixes() {
    // Conversations of four turns: each goes on where the one before has ended, a while later.
    let lines = (0..24u64).map(|at| {
        let (conversation, turn) = (at % 6, at / 6);
        let ids: Vec<u64> = (0..=turn).map(|block| conversation * 10 + block).collect();
        let (at_ms, tokens) = (at * 400, 512 * (turn + 1) + 70);
        format!("{{\"timestamp\": {at_ms}, \"input_length\": {tokens}, \"output_length\": 2, \"hash_ids\": {ids:?}}}\n")
    });
    let trace = TraceFile::new("turns", &lines.collect::<String>());
    let picture = std::env::temp_dir().join(format!("crossdock-{}-turns.svg", std::process::id()));
    let picture = picture.to_str().expect("a plain path");
    for op in ["write", "read"] {
        let ended = Demo::of_kv(&[
            "--trace",
            trace.path(),
            "--scale",
            "0.5",
            "--time-scale",
            "0.2",
            "--pool-mib",
            "512",
            "--op",
            op,
            "--json",
            "--svg",
            picture,
        ])
        .end(Duration::from_secs(120));
        assert!(ended.status.success(), "{}\n{}", ended.text, ended.errors);
        let lines: Vec<serde_json::Value> =
            ended.text.lines().map(|line| serde_json::from_str(line).expect("only JSON")).collect();
        assert_eq!(lines.len(), 2, "{}", ended.text);
        for line in &lines {
            assert_eq!((&line["delivered"], &line["verified"]), (&24.into(), &true.into()), "{line}");
            // A machine that has too much to do may begin a turn before the one before has arrived.
            let possible = line["possible_hit_share"].as_f64().expect("a number");
            for side in ["decode_hit_share", "prefill_hit_share"] {
                let share = line[side].as_f64().expect("a number");
                assert!(share > 0.1 && share <= possible + 1e-9, "{op}: {side} {share} of {possible}");
            }
            let (needed, moved) = (line["gb_needed"].as_f64(), line["gb_moved"].as_f64());
            assert!(moved < needed, "{line}");
        }
        let svg = std::fs::read_to_string(picture).expect("a picture is written");
        assert!(svg.contains("shm: hand-over") && svg.contains("tcp: hand-over"), "{svg}");
    }
    std::fs::remove_file(picture).expect("it is there");
}

#[test]
fn a_trace_that_comes_too_fast_is_refused_in_part() {
    let line = "{\"timestamp\": 0, \"input_length\": 300, \"output_length\": 2}\n";
    let trace = TraceFile::new("burst", &line.repeat(40));
    let ended = Demo::of_kv(&[
        "--trace",
        trace.path(),
        "--scale",
        "1",
        "--ports",
        "shm",
        "--pool-mib",
        "64",
        "--queue",
        "8",
    ])
    .end(Duration::from_secs(90));
    assert!(!ended.status.success(), "{}", ended.text);
    assert!(ended.text.contains("router: refused: 8 requests are under way or wait"), "{}", ended.text);
    assert!(!ended.text.contains("was not told"), "{}", ended.text);
    assert!(ended.text.contains("leaks: 0 "), "{}", ended.text);
}

#[test]
fn wrong_calls_are_explained() {
    let bad =
        TraceFile::new("bad", "{\"timestamp\": 0, \"input_length\": 9, \"output_length\": 5}\n{\"no\": 1}\n");
    let empty = TraceFile::new("empty", "\n");
    let long = TraceFile::new("long", "{\"timestamp\": 0, \"input_length\": 9000, \"output_length\": 5}\n");
    for (arguments, words) in [
        (vec!["demo", "--requests", "0"], vec!["--requests 0", "nothing to hand over"]),
        (vec!["demo", "--in-flight", "0"], vec!["--in-flight", "1..=64"]),
        (vec!["demo", "--scale", "0"], vec!["--scale 0", "0.0001 to 1"]),
        (vec!["demo", "--scale", "nan"], vec!["--scale NaN", "0.0001 to 1"]),
        (vec!["demo", "--scale", "1e300"], vec!["--scale 1e300:", "0.0001 to 1"]),
        (vec!["demo", "--scale", "1e-9"], vec!["--scale 1e-9:", "0.0001 to 1"]),
        (vec!["demo", "--time-scale", "2"], vec!["--time-scale 2.0", "0.0001 to 1"]),
        (vec!["demo", "--pool-mib", "1"], vec!["--pool-mib 1", "two pages take 9 MiB"]),
        (vec!["demo", "--pool-mib", "0"], vec!["--pool-mib", "1..=1048576"]),
        (vec!["demo", "--scenes", "none"], vec!["--scenes", "kv, experts"]),
        (vec!["demo", "--ports", "cuda"], vec!["--ports", "shm, tcp, verbs"]),
        (vec!["demo", "--ports", "verbs", "--devices", "none0"], vec!["--ports verbs: ", "doctor"]),
        (vec!["demo", "--devices", "none0"], vec!["--devices", "--ports verbs"]),
        (vec!["demo", "--trace", "/nowhere"], vec!["cannot open /nowhere", "No such file"]),
        (vec!["demo", "--trace", bad.path()], vec![bad.path(), "line 2"]),
        (vec!["demo", "--trace", empty.path()], vec!["no request"]),
        (
            vec!["demo", "--trace", long.path(), "--scale", "1", "--pool-mib", "64"],
            vec!["9000 tokens", "--scale", "--pool-mib"],
        ),
        (vec!["bootstrap", "--listen", "here"], vec!["--listen", "socket address"]),
        (vec!["bootstrap", "--listen", "127.0.0.1:0", "--token", ""], vec!["token"]),
        (vec!["bootstrap", "--listen", "127.0.0.1:0", "--workers", "0"], vec!["0 workers"]),
        (
            vec!["bootstrap", "--listen", "127.0.0.1:0", "--connections", "1"],
            vec!["--connections", "2..=65536"],
        ),
    ] {
        let (success, text) = call(&arguments);
        assert!(!success, "{arguments:?} is accepted: {text}");
        for word in words {
            assert!(text.contains(word), "{arguments:?} does not say '{word}': {text}");
        }
    }
}

#[test]
fn a_registry_says_that_its_address_is_taken() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = taken.local_addr().expect("it is bound").to_string();
    let (success, text) = call(&["bootstrap", "--listen", &address]);
    assert!(!success, "{text}");
    assert!(text.contains(&address) && text.contains("in use"), "{text}");
}

#[test]
fn a_worker_of_the_demo_does_not_begin_without_a_key() {
    let (success, text) = call(&[
        "demo-worker",
        "--role=prefill",
        "--port=tcp",
        "--registry=127.0.0.1:9",
        "--pages=2",
        "--deadline-s=1",
        "--in-flight=1",
        "--op=write",
    ]);
    assert!(!success && text.contains("did not begin with the key"), "{text}");
}

#[test]
fn a_rank_of_the_demo_does_not_begin_without_a_key() {
    let (success, text) = call(&[
        "demo-rank",
        "--mode=latency",
        "--rank=0",
        "--group=nobody",
        "--registry=127.0.0.1:9",
        "--deadline-s=1",
    ]);
    assert!(!success && text.contains("did not begin with the key"), "{text}");
}

/// What a call that ends by itself says.
fn call(arguments: &[&str]) -> (bool, String) {
    let output =
        Command::new(CROSSDOCK).args(arguments).stdin(Stdio::null()).output().expect("the program starts");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_demo_that_goes_well_has_a_timeline() {
    let folder = Scratch::new("flight");
    let arguments =
        ["--requests", "3", "--pool-mib", "64", "--ports", "shm,tcp", "--flight-dir", folder.path()];
    let ended = Demo::of_kv(&arguments).end(Duration::from_secs(90));
    assert!(ended.status.success(), "{}\n{}", ended.text, ended.errors);
    let (told, errors, succeeds) = timeline(&[folder.path(), "--all"]);
    assert!(succeeds && errors.is_empty(), "{errors}");
    // Both scenes have nodes of the same names and rooms of the same numbers.
    assert!(told.contains("rooms: 0 failed, 6 delivered, 0 cancelled, 0 without an end"), "{told}");
    assert!(told.contains("decode-0 (life ") && told.contains("prefill-0 (life "), "{told}");
    assert_eq!(told.matches("⇒ delivered within").count(), 6, "{told}");
    assert_eq!(told.matches("\nroom 2, from ").count(), 2, "{told}");
    let (told, _, succeeds) = timeline(&[folder.path()]);
    assert!(succeeds && told.contains("no room failed; the last events:"), "{told}");
    let (_, errors, succeeds) = timeline(&[folder.path(), "--room", "77"]);
    assert!(!succeeds && errors.contains("no dump names room 77"), "{errors}");
}

#[test]
fn a_timeline_of_nothing_says_why() {
    let trace = TraceFile::new("no-dump", "{\"timestamp\": 0}\n");
    let (_, errors, succeeds) = timeline(&[trace.path(), "/nonexistent"]);
    assert!(!succeeds, "{errors}");
    assert!(errors.contains("not a dump of the flight recorder"), "{errors}");
    assert!(errors.contains("/nonexistent: No such file"), "{errors}");
    assert!(errors.contains("there is no dump to read"), "{errors}");
    let (_, errors, succeeds) = timeline(&[trace.path(), "--last", "soon"]);
    assert!(!succeeds && errors.contains("10s, 500ms or 2m"), "{errors}");
}

fn timeline(arguments: &[&str]) -> (String, String, bool) {
    let run = Command::new(CROSSDOCK).arg("timeline").args(arguments).output().expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("it is text");
    (text(run.stdout), text(run.stderr), run.status.success())
}
