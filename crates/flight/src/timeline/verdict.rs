//! What to think of a room: how it ended, by whose doing, and what the other side had done by then.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Entry, Timeline};
use crate::event::{Event, Kind};

/// How a room ended, all sides together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Every side that has recorded an end was delivered.
    Delivered,
    /// It was cancelled.
    Cancelled,
    /// It failed on a side at least.
    Failed,
    /// No side has recorded an end.
    Open,
}

/// A room's end in a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// How it ended.
    pub outcome: Outcome,
    /// The event that decided it, as a place in [`Timeline::entries`].
    pub deciding: Option<usize>,
    /// For people.
    pub text: String,
    /// What can be done.
    pub advice: Option<String>,
}

impl Verdict {
    pub(super) fn of(timeline: &Timeline, entries: &[usize]) -> Self {
        let story = Story { timeline, entries };
        let ends = || story.ends().into_iter();
        let failed = ends().filter(|&at| story.event_failed(at)).min_by_key(|&at| (story.is_hearsay(at), at));
        if let Some(end) = failed {
            return story.failure(end);
        }
        let cancelled = ends().filter(|&at| story.code(at) == "cancelled");
        if let Some(at) = cancelled.min_by_key(|&at| (story.is_hearsay(at), at)) {
            let text = format!("{}: {}", story.name(at), story.cause_text(at));
            return Self { outcome: Outcome::Cancelled, deciding: Some(at), text, advice: None };
        }
        match ends().next_back() {
            // The end of the node, which was asked for.
            Some(at) if story.code(at) != "delivered" => {
                let text = format!("{}: {}", story.name(at), story.cause_text(at));
                Self { outcome: Outcome::Cancelled, deciding: Some(at), text, advice: None }
            }
            Some(at) => {
                let took = story.since_first(at);
                let text = format!("delivered within {}", span(took));
                Self { outcome: Outcome::Delivered, deciding: None, text, advice: None }
            }
            None => {
                let last = story.of_room().next_back();
                let text = match last {
                    Some(at) => format!(
                        "no end is recorded; last: {} on {}, {} after the first event{}",
                        story.entry(at).event.kind.words(),
                        story.name(at),
                        span(story.since_first(at)),
                        story.others(at, usize::MAX),
                    ),
                    None => "nothing is recorded".into(),
                };
                Self { outcome: Outcome::Open, deciding: None, text, advice: None }
            }
        }
    }
}

struct Story<'a> {
    timeline: &'a Timeline,
    entries: &'a [usize],
}

impl<'a> Story<'a> {
    fn entry(&self, at: usize) -> &'a Entry {
        &self.timeline.entries[at]
    }

    fn name(&self, at: usize) -> &'a str {
        &self.timeline.sources[self.entry(at).source].name
    }

    fn of_room(&self) -> impl DoubleEndedIterator<Item = usize> {
        self.entries.iter().copied().filter(|&at| self.entry(at).event.room.is_some())
    }

    fn of_kind(&self, kind: Kind) -> impl DoubleEndedIterator<Item = usize> {
        self.entries.iter().copied().filter(move |&at| self.entry(at).event.kind == kind)
    }

    /// The last end of each share on each side: a request may be tried again under its name.
    fn ends(&self) -> Vec<usize> {
        let ends: BTreeMap<(usize, Option<u32>), usize> = self
            .of_kind(Kind::Ended)
            .map(|at| ((self.entry(at).source, self.entry(at).event.share), at))
            .collect();
        let mut ends: Vec<usize> = ends.into_values().collect();
        ends.sort_unstable();
        ends
    }

    fn code(&self, at: usize) -> &'a str {
        self.entry(at).event.cause.as_ref().map_or("", |cause| &cause.code)
    }

    fn cause_text(&self, at: usize) -> &'a str {
        self.entry(at).event.cause.as_ref().map_or("no cause is recorded", |cause| &cause.text)
    }

    fn event_failed(&self, at: usize) -> bool {
        self.entry(at).event.failed == Some(true)
    }

    /// What was only heard from the peer comes after what was found or done here.
    fn is_hearsay(&self, at: usize) -> bool {
        let heard = ["peer-lost/closed-by-peer", "peer-lost/restarted"];
        self.entry(at).event.by.as_deref() == Some("peer") || heard.contains(&self.code(at))
    }

    fn since_first(&self, at: usize) -> i64 {
        let first = self.of_room().next().unwrap_or(at);
        self.entry(at).unix_ns.saturating_sub(self.entry(first).unix_ns)
    }

    fn failure(&self, end: usize) -> Verdict {
        let entry = self.entry(end);
        let code = self.code(end);
        // A room that is lost with its session was decided by what ended the session.
        let lost = self.entries.first().filter(|_| code.starts_with("peer-lost/"));
        let lost =
            lost.and_then(|&first| self.timeline.around.session_down(&self.timeline.entries, first, end));
        let mut text = self.name(end).to_owned();
        let peer = entry.peer.as_ref().map(|peer| peer.name.as_str());
        match (code.starts_with("peer-lost/"), peer) {
            (true, Some(peer)) => {
                let why = self.cause_text(lost.unwrap_or(end));
                let why = why.strip_prefix("peer lost: ").unwrap_or(why);
                text.push_str(&format!(" lost {peer}: {why}{}", stage_words(entry)));
            }
            (_, Some(peer)) => text.push_str(&format!(" gave up on {peer}: {}", self.cause_text(end))),
            (_, None) => text.push_str(&format!(" gave up: {}", self.cause_text(end))),
        }
        text.push_str(&self.here(end));
        text.push_str(&self.others(end, end));
        text.push_str(&self.pages(end));
        let advice = entry.event.cause.as_ref().and_then(|cause| cause.advice.as_deref()).map(str::to_owned);
        Verdict { outcome: Outcome::Failed, deciding: Some(lost.unwrap_or(end)), text, advice }
    }

    /// What the side that gave up knew.
    fn here(&self, end: usize) -> String {
        let event = &self.entry(end).event;
        let mut text = String::new();
        match (event.counted.unwrap_or(0), event.expected) {
            (counted, Some(expected)) => {
                text.push_str(&format!("; {counted} of {expected} arrivals had been counted"));
            }
            (0, None) => {}
            (counted, None) => text.push_str(&format!("; {counted} arrivals had been counted")),
        }
        if event.counted.unwrap_or(0) > 0 {
            text.push_str(&format!(", the last {} before", span(millis(event.quiet_ms))));
        }
        if let Some(silent) = event.silent_ms.filter(|&silent| silent >= WORTH_SAYING_MS) {
            text.push_str(&format!("; the peer was last heard {} before", span(millis(Some(silent)))));
        }
        if let Some(posted) = self.posted(self.entry(end).source) {
            text.push_str(&format!("; it had posted {posted}"));
        }
        text
    }

    /// What each other side had done by then.
    fn others(&self, end: usize, until: usize) -> String {
        let here = self.entry(end).source;
        let mut text = String::new();
        let mut sides: Vec<usize> =
            self.of_room().map(|at| self.entry(at).source).filter(|&source| source != here).collect();
        sides.sort_unstable();
        sides.dedup();
        for &side in &sides {
            let name = &self.timeline.sources[side].name;
            let last = self.of_room().rfind(|&at| self.entry(at).source == side && at < until);
            match (self.posted(side), last) {
                (Some(posted), _) => text.push_str(&format!("; {name} had posted {posted}")),
                (None, Some(at)) => {
                    text.push_str(&format!("; last on {name}: {}", self.entry(at).event.kind.words()));
                }
                (None, None) => text.push_str(&format!("; {name} had not begun")),
            }
        }
        if let (true, Some(peer)) = (sides.is_empty(), self.peer_of_room(here)) {
            let has_dump = self.timeline.sources.iter().any(|source| source.node == peer.node);
            text.push_str(&match has_dump {
                true => format!("; what there is of {} does not name this room", peer.name),
                false => format!("; there is no dump of {}", peer.name),
            });
        }
        text
    }

    fn peer_of_room(&self, source: usize) -> Option<&'a crate::event::Peer> {
        let mut entries = self.of_room().map(|at| self.entry(at)).filter(|entry| entry.source == source);
        entries.find_map(|entry| entry.peer.as_deref())
    }

    /// How far a side had come when it stopped, which it records after its end.
    fn posted(&self, source: usize) -> Option<String> {
        let last: BTreeMap<Option<u32>, &Event> = self
            .of_kind(Kind::Posted)
            .map(|at| self.entry(at))
            .filter(|entry| entry.source == source)
            .map(|entry| (entry.event.share, &*entry.event))
            .collect();
        let sum = |number: fn(&Event) -> Option<u64>| {
            last.values().filter_map(|event| number(event)).fold(0, u64::saturating_add)
        };
        let (bytes, of_bytes) = (sum(|event| event.bytes), sum(|event| event.of_bytes));
        let layers = u64::from(last.values().filter_map(|event| event.layers).max()?);
        Some(
            match (bytes >= of_bytes, u128::from(bytes) * u128::from(layers) / u128::from(of_bytes.max(1))) {
                (true, _) => format!("everything ({layers} layers, {})", size(bytes)),
                (false, whole) => {
                    format!("{whole} of {layers} layers ({} of {})", size(bytes), size(of_bytes))
                }
            },
        )
    }

    /// What became of the pages of the side that gave up.
    fn pages(&self, end: usize) -> String {
        let source = self.entry(end).source;
        let after = |kind| self.of_kind(kind).find(|&at| at > end && self.entry(at).source == source);
        match (after(Kind::Home), after(Kind::Quarantined)) {
            (Some(home), _) => {
                let after_ns = self.entry(home).unix_ns.saturating_sub(self.entry(end).unix_ns);
                match after_ns {
                    ..SOON_NS => "; its pages came home at once".into(),
                    _ => format!("; its pages came home {} later", span(after_ns)),
                }
            }
            (None, Some(_)) => "; its pages were still in quarantine when this was recorded".into(),
            (None, None) => String::new(),
        }
    }
}

fn stage_words(entry: &Entry) -> &'static str {
    match entry.event.stage.as_deref() {
        Some("session") => ", before there was a session",
        Some("grant") => ", while waiting for the other side of the room",
        Some("transfer") => ", while bytes moved",
        Some("confirm") => ", while waiting for confirmation",
        Some("verify") => ", while what had landed was checked",
        _ => "",
    }
}

fn millis(ms: Option<u32>) -> i64 {
    i64::from(ms.unwrap_or(0)) * 1_000_000
}

/// A length of time, with the unit that suits it.
pub(super) fn span(ns: i64) -> String {
    match ns.unsigned_abs() {
        0..1_000_000 => format!("{:.0} µs", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        1_000_000_000..120_000_000_000 => format!("{:.2} s", ns as f64 / 1e9),
        _ => format!("{:.1} min", ns as f64 / 60e9),
    }
}

/// A number of bytes.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

/// Silence that is more than the pause between two heartbeats.
const WORTH_SAYING_MS: u32 = 300;

/// A turn or two.
const SOON_NS: i64 = 1_000_000;
