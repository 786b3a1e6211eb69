//! The demo on a host in trouble. Nothing can be written: what it prints is on a disk that is full, or has been read by
//! nobody. Or somebody sets the clock, twenty times a second. The pages are handed over all the same; the program ends, leaves
//! nobody behind and says what is missing, where it can.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const CROSSDOCK: &str = env!("CARGO_BIN_EXE_crossdock");
/// For a whole demo, on a machine that has too much to do.
const SOON: Duration = Duration::from_secs(90);

fn demo(output: Stdio, errors: Stdio, log: &str) -> Output {
    let arguments = ["demo", "--requests", "8", "--ports", "shm,tcp", "--pool-mib", "64", "--each-room"];
    let mut child = Command::new(CROSSDOCK)
        .args(arguments)
        .env("CROSSDOCK_LOG", log)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .expect("the program starts");
    ends(&mut child);
    child.wait_with_output().expect("it has ended")
}

fn ends(child: &mut Child) {
    let until = Instant::now() + SOON;
    while child.try_wait().expect("it is our child").is_none() {
        if Instant::now() >= until {
            let _ = child.kill();
            panic!("the demo hangs");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn full() -> Stdio {
    File::options().write(true).open("/dev/full").expect("Linux has a full disk").into()
}

#[test]
fn what_cannot_be_printed_is_told_at_the_end() {
    let ended = demo(full(), Stdio::piped(), "error");
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{errors}");
    let told = "crossdock: not everything could be printed: No space left on device";
    assert!(errors.lines().all(|line| line.starts_with(told)) && !errors.is_empty(), "{errors}");
}

#[test]
fn a_reader_that_goes_is_no_reason_to_stop() {
    let mut child = Command::new(CROSSDOCK)
        .args(["demo", "--requests", "8", "--ports", "shm", "--pool-mib", "64", "--each-room"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    ends(&mut child);
    let ended = child.wait_with_output().expect("it has ended");
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{errors}");
    assert!(errors.contains("not everything could be printed: Broken pipe"), "{errors}");
}

#[test]
fn a_log_that_cannot_be_written_harms_nothing() {
    let ended = demo(Stdio::piped(), full(), "trace");
    let text = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success(), "{text}");
    all_delivered(&text, "8");
}

/// By hours and days, back and forth: no registration is taken for old, and no deadline comes early or never. A library of
/// this test's own, loaded before libc, changes what processes hear of the wall clock.
#[test]
fn a_clock_that_jumps_harms_nothing() {
    let scratch = std::env::temp_dir().join(format!("crossdock-{}-clock", std::process::id()));
    let jumped = scratch.join("jumped");
    fs::create_dir_all(&jumped).expect("the folder for temporary files takes folders");
    let library = scratch.join("jumps.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/troubled_host/jumps.c");
    let compiled = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()))
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
        .args([&library, &source])
        .status()
        .expect("a C compiler is there: Rust links with it");
    assert!(compiled.success());
    let jumping = |program: &str| {
        let mut command = Command::new(program);
        command.env("LD_PRELOAD", &library).env("CLOCK_JUMPS", &jumped).stdin(Stdio::null());
        command
    };

    let mut hours = BTreeSet::new();
    for _ in 0..20 {
        let said = jumping("date").arg("+%s").output().expect("date is everywhere").stdout;
        let seconds: u64 = String::from_utf8_lossy(&said).trim().parse().expect("a number");
        hours.insert(seconds / 3600);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(hours.len() > 2, "the clock stands still: {hours:?}");
    for file in fs::read_dir(&jumped).expect("it was made here") {
        fs::remove_file(file.expect("a file").path()).expect("it was made here");
    }

    let mut child = jumping(CROSSDOCK)
        .args(["demo", "--requests", "200", "--ports", "shm,tcp", "--pool-mib", "64", "--deadline-s", "20"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    ends(&mut child);
    let ended = child.wait_with_output().expect("it has ended");
    let (text, errors) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "{text}{errors}");
    all_delivered(&text, "200");
    let processes = fs::read_dir(&jumped).expect("it was made here").count();
    assert!(processes >= 4, "only {processes} processes heard of a clock that jumps");
    fs::remove_dir_all(&scratch).expect("it was made here");
}

fn all_delivered(text: &str, requests: &str) {
    assert!(text.contains("leaks: 0 ") && !text.contains("! "), "{text}");
    for port in ["shm", "tcp"] {
        let row =
            text.lines().find(|line| line.starts_with(&format!("{port}  "))).expect("a row for each port");
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(cells[1..4], [requests; 3], "{text}");
    }
}
