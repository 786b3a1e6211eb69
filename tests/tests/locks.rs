//! The data path takes no lock. The only locks of the library are those listed here, and each has its reason: where a
//! room or a session is opened or ended. What a turn does in between reaches none of them. Queues between threads are
//! `crossbeam`'s and `oneshot`'s, which have no locks, or rings of atomics.

use std::path::{Path, PathBuf};

/// Files that may lock, and when they do.
const LOCKS: &[(&str, &str)] = &[
    (
        "crates/memory/src/pool.rs",
        "pages are taken, granted, shared, given back: when rooms are opened and ended",
    ),
    (
        "crates/engine/src/heart/shared.rs",
        "a session comes or goes; what was heard of it is read from an atomic",
    ),
    ("crates/ports/cuda/src/driver/host.rs", "memory of the host is registered, or let go"),
    (
        "crates/ports/cuda/src/gpu.rs",
        "bytes of a GPU's memory are copied for the CPU, or it is exported: not when pages move",
    ),
    ("crates/ep/src/meet.rs", "a group is met"),
    ("crates/ep/src/keeper.rs", "a group is met"),
];

/// The crates that a turn runs through. The simulated port, which is one world for all nodes, is not for speed.
const DATA_PATH: &[&str] = &[
    "crates/memory",
    "crates/transport",
    "crates/proto",
    "crates/engine",
    "crates/flight",
    "crates/kv",
    "crates/ep",
    "crates/xfer",
    "crates/crossdock",
    "crates/ports/host",
    "crates/ports/shm",
    "crates/ports/tcp",
    "crates/ports/verbs",
    "crates/ports/cuda",
];

/// The types that make a thread wait until another lets go.
const WORDS: &[&str] =
    &["Mutex", "RwLock", "Condvar", "OnceLock", "LazyLock", "Barrier", "parking_lot", "mpsc"];

#[test]
fn nothing_on_the_data_path_takes_a_lock() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = Vec::new();
    for krate in DATA_PATH {
        let mut files = Vec::new();
        sources(&root.join(krate).join("src"), &mut files);
        assert!(!files.is_empty(), "{krate} has no sources");
        for file in files {
            let name = file.strip_prefix(&root).unwrap().to_str().unwrap().to_string();
            let text = std::fs::read_to_string(&file).unwrap();
            let lines = shipped(&text).filter(|(_, line)| WORDS.iter().any(|word| line.contains(word)));
            found.extend(lines.map(|(number, line)| (name.clone(), number, line.trim().to_string())));
        }
    }
    let may = |name: &str| LOCKS.iter().any(|(file, _)| *file == name);
    let wrong: Vec<_> = found.iter().filter(|(name, ..)| !may(name)).collect();
    assert!(wrong.is_empty(), "a lock on the data path, or one whose reason is missing in LOCKS: {wrong:#?}");
    for (file, _) in LOCKS {
        assert!(found.iter().any(|(name, ..)| name == file), "{file} locks no more: take it out of LOCKS");
    }
}

/// The lines that are code outside of tests and of the model checker's stand-ins.
fn shipped(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let next = text.lines().skip(1).chain([""]);
    let of_tests = text.lines().zip(next).position(|(line, next)| {
        line.starts_with("#[cfg(") && line.contains("test") && next.contains("mod ") && next.ends_with('{')
    });
    let lines = text.lines().take(of_tests.unwrap_or(usize::MAX)).enumerate();
    lines.map(|(at, line)| (at + 1, line)).filter(|(_, line)| {
        let line = line.trim_start();
        !line.starts_with("//") && !line.contains("loom::")
    })
}

fn sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // `conformance` is a test suite, though a library, and `fake` a network for tests.
        match path.is_dir() {
            true if !["conformance", "fake"].contains(&name) => sources(&path, files),
            false if name.ends_with(".rs") && !name.ends_with("tests.rs") => files.push(path),
            _ => {}
        }
    }
}
