//! The form of the lines, and that everything that can be recorded has one.

use std::collections::BTreeSet;
use std::path::Path;

use crossdock_flight::{Event, Kind, read};
use crossdock_proto::flight::{Reason, RingId, What};
use crossdock_proto::{CancelWhy, LinkCause, RoleKind, SessionEnd, TargetId, Who};
use crossdock_transport::{DownCause, Fence};

use crate::node::{Node, bound, came, ended, expired, failed, grant, sent, silent};

const SPECIFICATION: &str = include_str!("../../../../docs/flight-recorder.md");

/// One of everything.
fn all() -> Vec<What> {
    let target = TargetId(1);
    let unreachable = SessionEnd::Unreachable { cause: LinkCause::ConnectTimedOut };
    let kinds = vec![
        What::Dialed { target },
        What::NotReached { target, cause: Box::new(unreachable) },
        What::SessionBegan { incarnation: 0xabc, is_dialer: true },
        What::SessionUp { lanes: 2 },
        What::SessionDown { cause: Box::new(silent()), rooms: 3, silent_ms: 2_100 },
        What::LaneUp { slot: 1 },
        What::LaneDown { slot: 1, cause: Box::new(DownCause::PeerDied) },
        What::LaneLostThere { slot: 1 },
        What::LaneOffered { slot: 1 },
        What::LaneBack { slot: 1 },
        What::Opened { role: RoleKind::Receiving, pages: 4, left_ms: 30_000 },
        bound(RoleKind::Receiving),
        What::Parked { role: RoleKind::Sending },
        What::TurnedAway { why: CancelWhy::Busy },
        What::WantSent,
        What::WantCame,
        sent(3),
        came(3),
        What::Posting,
        What::Posted { bytes: 37, of_bytes: 61, layers: 61, is_last: true },
        What::Arriving { slot: 0 },
        What::FinishSent { attempt: 1, arrivals: 9 },
        What::FinishCame { attempt: 1, expected: 9, counted: 7 },
        What::Landed { counted: 9 },
        What::DeliveredSent,
        What::DeliveredCame,
        What::CancelSent { why: CancelWhy::Expired },
        What::CancelCame { why: CancelWhy::Expired },
        ended(Some(expired(Who::Here)), 7, Some(9)),
        What::Revoked { grant: grant(3), fence: Fence::WhenDown },
        What::Quarantined,
        What::ReleaseSent { grant: grant(3) },
        What::ReleaseCame { grant: grant(3) },
        What::Home,
    ];
    // Whoever adds one has to add it above, too.
    for what in &kinds {
        match what {
            What::Dialed { .. } | What::NotReached { .. } | What::SessionBegan { .. } => {}
            What::SessionUp { .. } | What::SessionDown { .. } | What::LaneUp { .. } => {}
            What::LaneDown { .. } | What::LaneLostThere { .. } | What::LaneOffered { .. } => {}
            What::LaneBack { .. } | What::Opened { .. } => {}
            What::Bound { .. } | What::Parked { .. } | What::TurnedAway { .. } | What::WantSent => {}
            What::WantCame | What::GrantSent { .. } | What::GrantCame { .. } | What::Posting => {}
            What::Posted { .. } | What::Arriving { .. } | What::FinishSent { .. } => {}
            What::FinishCame { .. } | What::Landed { .. } | What::DeliveredSent => {}
            What::DeliveredCame | What::CancelSent { .. } | What::CancelCame { .. } => {}
            What::Ended { .. } | What::Revoked { .. } | What::Quarantined => {}
            What::ReleaseSent { .. } | What::ReleaseCame { .. } | What::Home => {}
        }
    }
    kinds
}

fn everything() -> Node {
    let (mut node, other) = (Node::new(1, "decode-0", 5_000, 0), Node::new(2, "prefill-0", 0, 0));
    let ring = node.meet(&other);
    for (at, what) in all().into_iter().enumerate() {
        node.note(at as i64, ring, Some(4711), what);
    }
    node
}

#[test]
fn everything_is_written_and_read_and_specified() {
    let node = everything();
    let file = node.file(1_000);
    assert!(file.problems.is_empty(), "{:?}", file.problems);
    let kinds: BTreeSet<Kind> = file.events.iter().map(|(_, event)| event.kind).collect();
    assert_eq!(kinds.len(), all().len(), "each has a kind of its own");
    assert!(!kinds.contains(&Kind::Unknown));
    for kind in kinds {
        let word = serde_json::to_string(&kind).unwrap();
        let word = format!("`{}`", word.trim_matches('"'));
        assert!(SPECIFICATION.contains(&word), "docs/flight-recorder.md does not name {word}");
        assert_ne!(kind.words(), "?");
    }
    let ring = node.recorder.copy(RingId(1)).unwrap();
    let written: Vec<Event> =
        ring.records.iter().map(|record| Event::of(record, |_| Some("10.0.0.7:7000".into()))).collect();
    let was_read: Vec<Event> = file.events.iter().map(|(_, event)| event.clone()).collect();
    assert_eq!(written, was_read);
    // Every field that is written is specified.
    for line in String::from_utf8(node.dump(1_000, failed(7, RingId(1))).text()).unwrap().lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        for field in line.as_object().unwrap().keys() {
            assert!(SPECIFICATION.contains(&format!("`{field}`")), "docs/flight-recorder.md lacks `{field}`");
        }
    }
}

/// What a reader of this version relies on.
#[test]
fn the_form_stays() {
    let (mut node, other) = (Node::new(1, "decode-0", 5_000, 0), Node::new(2, "prefill-0", 0, 0));
    let ring = node.meet(&other);
    node.note(0, ring, Some(4711), ended(Some(expired(Who::Here)), 7, Some(9)));
    let text = String::from_utf8(node.dump(1_000, failed(7, ring)).text()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let expected = [
        r#"{"line":"header","version":1,"software":"crossdock 0.1.0","name":"decode-0","node":"0000000000000001","incarnation":"00000000000003e9","reason":"room-failed","room":4711,"use_count":0,"monotonic_ns":6000,"unix_ns":1750000000000001000}"#,
        r#"{"line":"ring","ring":0,"overwritten":0}"#,
        r#"{"line":"ring","ring":1,"peer":{"name":"prefill-0","node":"0000000000000002","incarnation":"00000000000003ea","port":"tcp"},"overwritten":0}"#,
        r#"{"line":"event","event":"ended","serial":1,"at_ns":5000,"session":1,"room":4711,"use_count":0,"failed":true,"by":"here","counted":7,"expected":9,"stage":"transfer","age_ms":30000,"met_ms":29900,"quiet_ms":1500,"silent_ms":2100,"cause":{"code":"expired/transfer","text":"deadline of this side passed while bytes moved","advice":"allow more time, or send less at once","retryable":true}}"#,
        r#"{"line":"end","events":1}"#,
    ];
    assert_eq!(lines, expected);
}

#[test]
fn a_later_version_of_the_same_form_is_read() {
    let text = r#"{"line":"header","version":1,"software":"crossdock 9","name":"d","node":"1","incarnation":"2","reason":"felt-like-it","monotonic_ns":1,"unix_ns":2,"weather":"fine"}
{"line":"poem","verse":1}
{"line":"event","event":"sang","serial":1,"at_ns":1,"pitch":440}
{"line":"event","event":"home","serial":2,"at_ns":1,"room":3,"pitch":440}
{"line":"end","events":2,"applause":true}
"#;
    let file = read(Path::new("later"), text.as_bytes()).unwrap();
    let kinds: Vec<Kind> = file.events.iter().map(|(_, event)| event.kind).collect();
    assert_eq!((kinds, file.problems), (vec![Kind::Unknown, Kind::Home], vec![]));
}

#[test]
fn reasons_are_told_in_the_header() {
    let node = everything();
    let reason = |reason| {
        let text = node.dump(1, reason).text();
        read(Path::new("x"), text.as_slice()).unwrap().header.reason.into_owned()
    };
    assert_eq!(reason(Reason::Asked), "asked");
    assert_eq!(reason(Reason::Panicked), "panicked");
    assert_eq!(reason(failed(1, RingId(1))), "room-failed");
}
