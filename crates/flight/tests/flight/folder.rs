//! Dumps on a disk: within limits, and whatever is wrong with it.

use std::io::Read;
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant, SystemTime};

use crossdock_flight::{Folder, FolderOptions, read_paths};
use crossdock_proto::flight::{Reason, RingId, What};
use crossdock_proto::{End, SessionEnd};

use crate::node::{Node, Scratch, ended, failed, silent};

fn node(name: &str, events: u64) -> Node {
    let (mut node, other) = (Node::new(name.len() as u64, name, 5_000, 0), Node::new(99, "prefill-0", 0, 0));
    let ring = node.meet(&other);
    for room in 0..events {
        node.note(1, ring, Some(room), ended(Some(End::PeerLost { cause: silent() }), 1, None));
    }
    node
}

fn options(scratch: &Scratch, max_files: usize, max_bytes: u64) -> FolderOptions {
    FolderOptions { max_files, max_bytes, ..FolderOptions::new(&scratch.0) }
}

/// One after the other, so that the queue is never full.
fn put_all(folder: &FolderOptions, node: &Node, numbers: std::ops::Range<u64>) {
    for number in numbers {
        Folder::open(folder.clone()).unwrap().put(node.dump(10, failed(number, RingId(1))));
    }
}

#[test]
fn the_oldest_of_this_node_go_first() {
    let scratch = Scratch::new();
    let others =
        ["crossdock-decode10-00000000000003e9-000001.jsonl", "notes.txt", "crossdock-decode1-x.jsonl"];
    others.iter().for_each(|name| std::fs::write(scratch.0.join(name), "not mine").unwrap());
    put_all(&options(&scratch, 3, 1 << 20), &node("decode1", 4), 1..8);
    let names = scratch.names();
    for number in 1..8 {
        let name = format!("crossdock-decode1-00000000000003ef-{number:06}.jsonl");
        assert_eq!(names.contains(&name), number >= 5, "{names:#?}");
    }
    assert_eq!(names.len(), 3 + others.len(), "what is not ours is left alone: {names:#?}");
    let (files, _) = read_paths(std::slice::from_ref(&scratch.0));
    assert!(files.iter().all(|file| file.problems.is_empty() && file.events.len() == 4));
}

#[test]
fn so_many_bytes_and_no_more() {
    let scratch = Scratch::new();
    let node = node("decode-1", 10);
    let length = node.dump(10, failed(1, RingId(1))).text().len() as u64;
    put_all(&options(&scratch, 100, 2 * length + length / 2), &node, 1..6);
    assert_eq!(scratch.names().len(), 2);
    // One that is too long alone is not written, and costs no other its place.
    put_all(&options(&scratch, 100, length - 1), &node, 7..8);
    assert_eq!(scratch.names().len(), 2);
}

#[test]
fn names_that_look_alike_are_not_alike() {
    let scratch = Scratch::new();
    let long = "d".repeat(64);
    let names =
        ["decode_1", "decode-1", "decode.1", "décode1", &long, &format!("{long}1"), &format!("{long}2")];
    for name in names {
        put_all(&options(&scratch, 2, 1 << 20), &node(name, 1), 1..4);
    }
    assert_eq!(scratch.names().len(), 2 * names.len(), "{:#?}", scratch.names());
}

#[test]
fn what_a_killed_process_has_begun_is_removed() {
    let scratch = Scratch::new();
    let part = |name: &str, age_s: u64| {
        let path = scratch.0.join(name);
        std::fs::write(&path, [b'x'; 1_000]).unwrap();
        let modified = SystemTime::now() - Duration::from_secs(age_s);
        std::fs::File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
    };
    let (old, others) =
        ("crossdock-decode1-0000000000000001-000001.part", "crossdock-decode2-0000000000000001-panic.part");
    let young = "crossdock-decode1-0000000000000002-panic.part";
    [old, others].into_iter().for_each(|name| part(name, 90));
    part(young, 0);
    let node = node("decode1", 1);
    let length = node.dump(10, failed(1, RingId(1))).text().len() as u64;
    // One that may still be written takes room, too.
    put_all(&options(&scratch, 10, 2 * length + 999), &node, 1..4);
    let names = scratch.names();
    assert!(!names.iter().any(|name| name == old), "{names:#?}");
    assert!([others, young].iter().all(|left| names.iter().any(|name| name == left)), "{names:#?}");
    assert_eq!(names.len(), 3, "{names:#?}");
}

#[test]
fn what_came_of_an_incident_takes_its_place() {
    let scratch = Scratch::new();
    let options = options(&scratch, 10, 1 << 20);
    let mut node = node("decode-1", 1);
    put_all(&options, &node, 1..2);
    node.note(2, RingId(1), Some(0), What::Home);
    put_all(&options, &node, 1..2);
    let (files, errors) = read_paths(std::slice::from_ref(&scratch.0));
    assert!(errors.is_empty() && files.len() == 1);
    assert_eq!(files[0].events.len(), 2);
}

#[test]
fn several_nodes_write_beside_each_other() {
    let scratch = Scratch::new();
    let begin = Arc::new(Barrier::new(8));
    std::thread::scope(|scope| {
        for at in 0..8 {
            let (begin, options) = (begin.clone(), options(&scratch, 4, 1 << 20));
            // Two writers for each name, as when a node was started again and the last one still writes.
            scope.spawn(move || {
                let node = node(&"decode".chars().chain("-".repeat(at / 2).chars()).collect::<String>(), 5);
                begin.wait();
                put_all(&options, &node, at as u64 * 10..at as u64 * 10 + 10);
            });
        }
    });
    let (files, errors) = read_paths(std::slice::from_ref(&scratch.0));
    assert!(errors.is_empty(), "{errors:?}");
    // Two that look at the same time may each leave one more than there should be.
    assert!((16..=20).contains(&files.len()), "{:#?}", scratch.names());
    assert!(files.iter().all(|file| file.problems.is_empty() && file.events.len() == 5));
    assert!(scratch.names().iter().all(|name| name.ends_with(".jsonl")), "{:#?}", scratch.names());
}

#[test]
fn a_queue_that_is_full_waits_for_nothing() {
    let scratch = Scratch::new();
    let node = node("decode1", 2);
    let first = scratch.0.join("crossdock-decode1-00000000000003ef-000000.part");
    // Whoever writes into a pipe waits for a reader: so the first dump takes as long as the test likes.
    assert!(Command::new("mkfifo").arg(&first).status().unwrap().success());
    let folder = Folder::open(options(&scratch, 1000, 1 << 30)).unwrap();
    let dumps: Vec<_> = (0..400).map(|number| node.dump(10, failed(number, RingId(1)))).collect();
    let putting = std::thread::spawn(move || {
        dumps.into_iter().for_each(|dump| folder.put(dump));
        folder
    });
    let until = Instant::now() + Duration::from_secs(20);
    while !putting.is_finished() {
        assert!(Instant::now() < until, "what is put waits for the disk");
        std::thread::sleep(Duration::from_millis(1));
    }
    let folder = putting.join().unwrap();
    // One is being written, or was not yet looked at when the queue was full.
    let left_out = folder.left_out() as usize;
    assert!((383..=384).contains(&left_out), "{left_out}");
    std::fs::File::open(&first).unwrap().read_to_end(&mut Vec::new()).unwrap();
    drop(folder);
    assert_eq!(scratch.names().len(), 400 - left_out);
}

#[test]
fn a_folder_that_cannot_be_written_hurts_nothing() {
    let scratch = Scratch::new();
    let file = scratch.0.join("a-file");
    std::fs::write(&file, "").unwrap();
    // A file where the folder should be; a device that is always full; a folder that cannot be made.
    for path in [file.clone(), file.join("below"), "/dev/full".into(), "/proc/crossdock".into()] {
        let folder = Folder::open(FolderOptions::new(&path)).unwrap();
        folder.put(node("decode-1", 3).dump(10, Reason::Asked));
        folder.put(node("decode-1", 3).dump(10, Reason::Panicked));
    }
    assert_eq!(scratch.names(), ["a-file"]);
}

/// A disk with room for a beginning only: the process may write files of so many blocks.
#[test]
fn a_full_disk_leaves_nothing_behind() {
    const FOLDER: &str = "CROSSDOCK_TEST_FULL_DISK";
    if let Some(folder) = std::env::var_os(FOLDER) {
        // In the child, under the limit.
        let scratch = Scratch(folder.into());
        put_all(&options(&scratch, 10, 1 << 20), &node("decode1", 100), 1..3);
        put_all(&options(&scratch, 10, 1 << 20), &node("decode2", 0), 3..4);
        std::mem::forget(scratch);
        return;
    }
    let scratch = Scratch::new();
    let child = Command::new("sh")
        .args([
            "-c",
            "trap '' XFSZ; ulimit -f 2; exec \"$0\" --exact folder::a_full_disk_leaves_nothing_behind",
        ])
        .arg(std::env::current_exe().unwrap())
        .env(FOLDER, &scratch.0)
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    // What fits is written afterwards as if nothing had been.
    assert_eq!(scratch.names(), ["crossdock-decode2-00000000000003ef-000003.jsonl"]);
}

#[test]
fn what_was_closed_in_order_is_no_incident() {
    let (mut node, other) = (Node::new(1, "decode-0", 5_000, 0), Node::new(2, "prefill-0", 0, 0));
    let ring = node.meet(&other);
    for cause in [SessionEnd::ClosedHere, SessionEnd::ClosedByPeer] {
        node.note(1, ring, None, What::SessionDown { cause: Box::new(cause), rooms: 0, silent_ms: 0 });
    }
    assert_eq!(node.recorder.next_incident(u64::MAX), None);
}
