//! A benchmark that is killed leaves no process behind.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn no_child_outlives_a_killed_initiator() {
    // From before the child runs to the middle of the measurement.
    for wait_ms in [0, 1, 2, 5, 10, 20, 50, 200, 600] {
        let mut initiator = Command::new(env!("CARGO_BIN_EXE_kvbench"))
            .args(["--pool-mib", "16", "--page-bytes", "4096", "--hog", "1", "--seconds", "10"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it was built");
        std::thread::sleep(Duration::from_millis(wait_ms));
        initiator.kill().expect("it runs");
        initiator.wait().expect("it was killed");
        let parent = initiator.id().to_string();
        let killed = Instant::now();
        loop {
            let left = children_of(&parent);
            if left.is_empty() {
                break;
            }
            let limit = Duration::from_secs(1);
            assert!(killed.elapsed() < limit, "killed after {wait_ms} ms, a second later there is: {left:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The command lines of processes that were started by a benchmark with this process number.
fn children_of(parent: &str) -> Vec<String> {
    let lines = std::fs::read_dir("/proc").expect("it is mounted").filter_map(|entry| {
        let line = std::fs::read(entry.ok()?.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).replace('\0', " "))
    });
    lines.filter(|line| line.contains(&format!("--parent {parent} "))).collect()
}
