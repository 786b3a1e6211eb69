//! Dumps that are not whole, and files that are none.

use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use crossdock_flight::{Dumps, Filter, Problem, ReadError, Timeline, read, read_paths};
use crossdock_proto::flight::Reason;
use crossdock_proto::{RoleKind, Who};
use proptest::prelude::*;

use crate::node::{Node, Scratch, bound, ended, expired, sent};

fn text() -> Vec<u8> {
    let (mut node, other) = (Node::new(1, "decode-0", 5_000, 0), Node::new(2, "prefill-0", 0, 0));
    let ring = node.meet(&other);
    for room in 0..5 {
        node.note(1, ring, Some(room), bound(RoleKind::Receiving));
        node.note(2, ring, Some(room), sent(room as u32));
        node.note(3, ring, Some(room), ended(Some(expired(Who::Here)), 7, Some(9)));
    }
    node.dump(1_000, Reason::Asked).text()
}

#[test]
fn a_dump_that_ends_early_is_used_as_far_as_it_goes() {
    let whole = text();
    let full = read(Path::new("whole"), whole.as_slice()).unwrap();
    assert_eq!((full.events.len(), full.problems.len()), (15, 0));
    let header_bytes = whole.iter().position(|&byte| byte == b'\n').unwrap();
    let mut events = 0;
    for end in 0..whole.len() - 1 {
        match read(Path::new("cut"), &whole[..end]) {
            Ok(file) => {
                assert!(end >= header_bytes, "{end}");
                let cut = file.problems.iter().any(|problem| matches!(problem, Problem::Truncated { .. }));
                // The last line may be whole but for its end.
                assert!(cut, "{end} of {}: {:?}", whole.len(), file.problems);
                assert!(file.events.len() >= events && file.events == full.events[..file.events.len()]);
                events = file.events.len();
                let timeline = Timeline::merge(&[file], &Filter::default());
                assert_eq!(timeline.entries.len(), events);
            }
            Err(error) => {
                assert!(end < header_bytes, "{end}: {error}");
                assert!(matches!(error, ReadError::NotADump { .. }), "{error}");
            }
        }
    }
    assert_eq!(events, 15);
}

#[test]
fn a_line_that_cannot_be_read_is_named_and_left_out() {
    let whole = String::from_utf8(text()).unwrap();
    let mut lines: Vec<String> = whole.lines().map(str::to_owned).collect();
    lines[4] = "{\"line\":\"event\",\"event\":\"home\",".into();
    lines.insert(6, "\0\u{7f}garbage".into());
    lines.insert(7, "x".repeat(200_000));
    lines.insert(8, "[]".into());
    lines.insert(9, "{\"line\":\"event\",\"event\":7}".into());
    let file = read(Path::new("bad"), lines.join("\n").as_bytes()).unwrap();
    assert_eq!(file.events.len(), 14);
    let named: Vec<u64> = file
        .problems
        .iter()
        .filter_map(|problem| match problem {
            Problem::BadLine { line, .. } => Some(*line),
            _ => None,
        })
        .collect();
    assert_eq!(named, [5, 7, 8]);
    assert!(file.problems.contains(&Problem::MoreBadLines { lines: 2 }), "{:?}", file.problems);
    assert_eq!(file.problems.len(), 4, "the end is there");
}

/// Of a node that has met two peers: lines of the header, the node's ring, and two rings of an event each.
fn of_two_peers(names: [&str; 2]) -> String {
    let mut node = Node::new(1, "decode-0", 5_000, 0);
    for (at, name) in (0..).zip(names) {
        let ring = node.meet(&Node::new(2 + at, name, 0, 0));
        node.note(1, ring, Some(at), bound(RoleKind::Receiving));
    }
    String::from_utf8(node.dump(1_000, Reason::Asked).text()).unwrap()
}

#[test]
fn events_of_a_ring_that_cannot_be_read_are_nobody_elses() {
    let text = of_two_peers(["prefill-0", "prefill-1"]);
    let mut lines: Vec<&str> = text.lines().collect();
    assert!(lines[4].contains("prefill-1"));
    lines[4] = "{\"line\":\"ring\",";
    let file = read(Path::new("bad"), lines.join("\n").as_bytes()).unwrap();
    let peers: Vec<Option<&str>> =
        file.events.iter().map(|(peer, _)| peer.as_ref().map(|peer| peer.name.as_str())).collect();
    assert_eq!(peers, [Some("prefill-0"), None]);
    assert!(matches!(file.problems[..], [Problem::BadLine { line: 5, .. }]), "{:?}", file.problems);
}

#[test]
fn the_longest_names_fit_into_a_line() {
    let long = "\u{1}".repeat(60_000);
    let text = of_two_peers([&long, "prefill-1"]);
    assert!(text.lines().all(|line| line.len() < 64 << 10));
    let file = read(Path::new("long"), text.as_bytes()).unwrap();
    assert!(file.problems.is_empty(), "{:?}", file.problems);
    let name = &file.events[0].0.as_ref().unwrap().name;
    assert!(long.starts_with(name.trim_end_matches('…')) && name.ends_with('…'), "{name:?}");
}

#[test]
fn a_dump_that_lacks_events_is_not_whole() {
    let whole = String::from_utf8(text()).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    let problems = |lines: &[&str]| read(Path::new("cut"), lines.join("\n").as_bytes()).unwrap().problems;
    assert_eq!(problems(&[&lines[..5], &lines[8..]].concat()), [Problem::Incomplete { events: 12, of: 15 }]);
    let twice = [&lines[..5], &lines[4..]].concat();
    assert_eq!(problems(&twice), [Problem::Incomplete { events: 16, of: 15 }]);
}

#[test]
fn of_dumps_in_one_file_the_first_is_read() {
    let (first, second) = (String::from_utf8(text()).unwrap(), of_two_peers(["prefill-0", "prefill-1"]));
    let lines = first.lines().count() as u64;
    let both = read(Path::new("both"), [first.as_str(), &second].concat().as_bytes()).unwrap();
    assert_eq!(both.events.len(), 15);
    assert_eq!(both.problems, [Problem::GoesOn { line: lines + 1 }]);
    // Also where the first ends early.
    let cut: Vec<&str> = first.lines().take(6).chain(second.lines()).collect();
    let both = read(Path::new("both"), cut.join("\n").as_bytes()).unwrap();
    assert_eq!(both.events.len(), 3);
    assert_eq!(both.problems, [Problem::GoesOn { line: 7 }, Problem::Truncated { lines: 7 }]);
}

#[test]
fn what_was_read_before_the_disk_failed_is_used() {
    struct Fails;
    impl Read for Fails {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("the disk is gone"))
        }
    }
    let whole = String::from_utf8(text()).unwrap();
    let first: String = whole.split_inclusive('\n').take(6).collect();
    let file = read(Path::new("gone"), BufReader::new(first.as_bytes().chain(Fails))).unwrap();
    assert_eq!(file.events.len(), 3);
    assert_eq!(file.problems, [Problem::BrokenOff { lines: 6, what: "the disk is gone".into() }]);
}

#[test]
fn files_that_are_no_dumps_do_not_keep_the_others() {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.0.join(name);
    std::fs::write(path("good.jsonl"), text()).unwrap();
    std::fs::write(path("empty.jsonl"), "").unwrap();
    std::fs::write(path("garbage.jsonl"), [0xff; 5000]).unwrap();
    std::fs::write(path("headless.jsonl"), "{\"line\":\"end\",\"events\":0}\n").unwrap();
    std::fs::write(path("not-looked-at.txt"), "hello").unwrap();
    let later = String::from_utf8(text()).unwrap().replacen("\"version\":1", "\"version\":2", 1);
    std::fs::write(path("later.jsonl"), later).unwrap();
    let (files, errors) = read_paths(&[scratch.0.clone(), PathBuf::from("/nonexistent/x.jsonl")]);
    assert_eq!(files.len(), 1);
    let said: Vec<String> = errors.iter().map(ReadError::to_string).collect();
    assert_eq!(said.len(), 5, "{said:#?}");
    let of = |name: &str| said.iter().find(|text| text.contains(name)).unwrap();
    assert!(of("empty").contains("it is empty") && of("headless").contains("does not begin with a header"));
    assert!(of("garbage").contains("not a dump") && of("nonexistent").contains("No such file"));
    assert!(of("later").contains("use the crossdock that wrote it"), "{said:#?}");
}

#[test]
fn events_beyond_the_limit_are_counted_and_left_out() {
    let scratch = Scratch::new();
    let path = scratch.0.join("dump.jsonl");
    std::fs::write(&path, text()).unwrap();
    let mut all = Dumps::default();
    assert_eq!((all.read(&path).unwrap(), all.read(&path).unwrap()), (vec![], vec![]));
    assert_eq!(Timeline::of(all, &Filter::default()).entries.len(), 15);
    let mut some = Dumps::within(4_000);
    let problems = some.read(&path).unwrap();
    let [Problem::LeftOut { events }] = problems[..] else { panic!("{problems:?}") };
    assert!((1..15).contains(&events), "{events}");
    // What is held already takes no more room.
    assert_eq!(some.read(&path).unwrap(), problems);
    let timeline = Timeline::of(some, &Filter::default());
    assert_eq!((timeline.entries.len() as u64, timeline.sources[0].files), (15 - events, 2));
}

proptest! {
    #[test]
    fn nothing_that_is_read_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..600), at in any::<prop::sample::Index>()) {
        let _ = read(Path::new("noise"), bytes.as_slice());
        // The same in the middle of a dump.
        let mut whole = text();
        let at = at.index(whole.len());
        let end = (at + bytes.len()).min(whole.len());
        whole[at..end].copy_from_slice(&bytes[..end - at]);
        if let Ok(file) = read(Path::new("noisy"), whole.as_slice()) {
            let timeline = Timeline::merge(&[file], &Filter::default());
            let rooms: Vec<_> = timeline.rooms.iter().collect();
            prop_assert!(!timeline.table(&rooms).to_string().is_empty());
            prop_assert!(serde_json::to_value(timeline.json(&rooms)).unwrap().is_object());
        }
        bytes.clear();
    }

    /// Numbers of a broken dump may be anything.
    #[test]
    fn wild_numbers_do_no_harm(numbers in prop::collection::vec(any::<u64>(), 12)) {
        let header = |node: u64, monotonic: u64, unix: u64| format!(
            r#"{{"line":"header","version":1,"software":"","name":"n{node}","node":"{node}","incarnation":"","reason":"","monotonic_ns":{monotonic},"unix_ns":{unix}}}"#
        );
        let ring = |peer: u64| format!(
            r#"{{"line":"ring","ring":1,"peer":{{"name":"n{peer}","node":"{peer}","incarnation":"","port":""}},"overwritten":{}}}"#,
            numbers[0]
        );
        let event = |kind: &str, serial: u64, at: u64| format!(
            r#"{{"line":"event","event":"{kind}","serial":{serial},"at_ns":{at},"session":1,"room":1,"grant":"1/1","bytes":{serial},"of_bytes":{at},"layers":3}}"#
        );
        let a = [header(1, numbers[1], numbers[2]), ring(2), event("grant-sent", numbers[3], numbers[4]), event("delivered-came", numbers[5], numbers[6])];
        let b = [header(2, numbers[7], numbers[8]), ring(1), event("grant-came", numbers[9], numbers[10]), event("delivered-sent", numbers[11], numbers[0]), event("posted", 5, 0)];
        let files = [a.join("\n"), b.join("\n")].map(|text| read(Path::new("wild"), text.as_bytes()).unwrap());
        let timeline = Timeline::merge(&files, &Filter { last_ns: Some(numbers[3]), ..Filter::default() });
        let rooms: Vec<_> = timeline.rooms.iter().collect();
        prop_assert!(!timeline.table(&rooms).to_string().is_empty());
    }
}
