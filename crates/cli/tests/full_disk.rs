//! The demo where nothing can be written: what it prints is on a disk that is full, or has been read by nobody. The pages
//! are handed over all the same; the program ends, leaves nobody behind and says what is missing, where it can.

use std::fs::File;
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
    assert!(text.contains("leaks: 0 ") && !text.contains("! "), "{text}");
    for port in ["shm", "tcp"] {
        let row =
            text.lines().find(|line| line.starts_with(&format!("{port}  "))).expect("a row for each port");
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(cells[1..4], ["8", "8", "8"], "{text}");
    }
}
