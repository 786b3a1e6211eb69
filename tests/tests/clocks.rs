//! Nothing that waits or counts reads the wall clock: a deadline, a timer or a lease that did would end early, or never,
//! when somebody sets it. Times are those of `Instant` and of the monotonic clock, which are one.

use std::path::{Path, PathBuf};

/// What reads, or waits by, a clock that can be set.
const WORDS: &[&str] = &[
    "SystemTime",
    "UNIX_EPOCH",
    "CLOCK_REALTIME",
    "ClockId::Realtime",
    "TimerfdClockId::Realtime",
    "gettimeofday",
    "Utc::now",
    "Local::now",
];

/// Files that may, and what for.
const MAY: &[(&str, &str)] = &[
    (
        "flight/src/dump.rs",
        "a dump says when it was written, so that those of several nodes can be laid side by side",
    ),
    (
        "flight/src/folder.rs",
        "the oldest files of a folder go first, and what was left of a write goes when it is old",
    ),
    ("flight/tests/flight/folder.rs", "the test that makes files old"),
];

#[test]
fn nobody_reads_the_wall_clock() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
    let mut files = Vec::new();
    sources(&crates, &mut files);
    assert!(files.len() > 100, "{} files: the sources are elsewhere", files.len());
    let mut found = Vec::new();
    let may = |file: &Path| MAY.iter().any(|(name, _)| file.ends_with(name));
    for (name, _) in MAY {
        assert!(files.iter().any(|file| file.ends_with(name)), "{name} is gone: take it out of MAY");
    }
    for file in files.into_iter().filter(|file| !may(file)) {
        let text = std::fs::read_to_string(&file).unwrap();
        let lines = (1..).zip(text.lines()).filter(|(_, line)| WORDS.iter().any(|word| line.contains(word)));
        found.extend(lines.map(|(number, line)| format!("{}:{number}: {}", file.display(), line.trim())));
    }
    assert!(found.is_empty(), "a clock that somebody may set is read:\n{}", found.join("\n"));
}

fn sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, files),
            false if path.extension().is_some_and(|ending| ending == "rs") => files.push(path),
            false => {}
        }
    }
}
