//! A timeline for people, and for programs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::verdict::{Outcome, size, span};
use super::{ClockPair, Entry, Room, RoomKey, Source, Timeline};
use crate::event::{Event, Kind};

impl Timeline {
    /// For people: a few words on all of it, then the rooms that are asked for, each with its events and its verdict.
    pub fn table<'a>(&'a self, rooms: &'a [&'a Room]) -> impl fmt::Display + 'a {
        Table { timeline: self, rooms }
    }

    /// The last events, whatever room they are of, as a table.
    pub fn tail(&self, most: usize) -> impl fmt::Display + '_ {
        let first = self.entries.len().saturating_sub(most);
        Events {
            timeline: self,
            entries: (first..self.entries.len()).collect(),
            deciding: None,
            names_rooms: true,
        }
    }

    /// For programs: the same.
    pub fn json<'a>(&'a self, rooms: &'a [&'a Room]) -> impl Serialize + 'a {
        Json { timeline: self, rooms }
    }

    /// A room's events with those of its sessions, and how many of those are too many to be told.
    fn told(&self, room: &Room) -> (Vec<usize>, usize) {
        self.around.told(&self.entries, room)
    }

    fn count(&self, outcome: Outcome) -> usize {
        self.rooms.iter().filter(|room| room.verdict.outcome == outcome).count()
    }

    fn name(&self, source: usize) -> &str {
        &self.sources[source].name
    }
}

struct Table<'a> {
    timeline: &'a Timeline,
    rooms: &'a [&'a Room],
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let timeline = self.timeline;
        for source in &timeline.sources {
            let plural = if source.files == 1 { "" } else { "s" };
            let (events, files) = (source.events, source.files);
            line(f, format_args!("{}: {events} events of {files} dump{plural}", life(source)))?;
        }
        if timeline.overwritten > 0 {
            line(f, format_args!("{} older events had been overwritten", timeline.overwritten))?;
        }
        timeline.clocks.iter().try_for_each(|pair| line(f, format_args!("{}", clocks(timeline, pair))))?;
        let [failed, delivered, cancelled, open] =
            [Outcome::Failed, Outcome::Delivered, Outcome::Cancelled, Outcome::Open]
                .map(|outcome| timeline.count(outcome));
        let counts = format_args!(
            "rooms: {failed} failed, {delivered} delivered, {cancelled} cancelled, {open} without an end"
        );
        line(f, counts)?;
        if timeline.overwritten > 0 && open > 0 {
            let hint = "(the ends of some of those may have been overwritten: raise the recorder's limits)";
            line(f, format_args!("{hint}"))?;
        }
        let mut same: BTreeMap<RoomKey, u32> = BTreeMap::new();
        timeline.rooms.iter().for_each(|room| *same.entry(room.key).or_default() += 1);
        for room in self.rooms {
            f.write_str("\n")?;
            line(f, format_args!("{}", self.heading(room, same[&room.key] > 1)))?;
            let (entries, left_out) = timeline.told(room);
            let deciding = room.verdict.deciding;
            write!(f, "{}", Events { timeline, entries, deciding, names_rooms: false })?;
            if left_out > 0 {
                line(f, format_args!("  ({left_out} earlier events of its sessions are left out)"))?;
            }
            line(f, format_args!("  ⇒ {}", room.verdict.text))?;
            if let Some(advice) = &room.verdict.advice {
                line(f, format_args!("    what to do: {advice}"))?;
            }
        }
        Ok(())
    }
}

impl Table<'_> {
    /// Where others have the same number, the lives tell them apart.
    fn heading(&self, room: &Room, names_lives: bool) -> String {
        let (key, timeline) = (room.key, self.timeline);
        let mut text = format!("room {}", key.room);
        if key.use_count > 0 {
            text.push_str(&format!(" (use {})", key.use_count));
        }
        let begin_ns = room.entries.first().map_or(0, |&at| timeline.entries[at].unix_ns);
        text.push_str(&format!(", from {}", utc(begin_ns)));
        if names_lives {
            let sides: BTreeSet<usize> = room.entries.iter().map(|&at| timeline.entries[at].source).collect();
            let sides: Vec<String> = sides.into_iter().map(|side| life(&timeline.sources[side])).collect();
            text.push_str(&format!(", {}", sides.join(", ")));
        }
        text
    }
}

fn life(source: &Source) -> String {
    format!("{} (life {})", source.name, source.incarnation)
}

fn clocks(timeline: &Timeline, pair: &ClockPair) -> String {
    let (a, b) = (timeline.name(pair.a), timeline.name(pair.b));
    let by = format!("by {} messages", pair.messages);
    if !pair.is_possible() {
        return format!(
            "clocks of {a} and {b}: cannot be brought together ({by}): one of them was set in between"
        );
    }
    let ahead = match pair.ahead_ns {
        0 => return format!("clocks of {a} and {b}: no message came before it was sent ({by})"),
        ahead if ahead > 0 => "ahead",
        _ => "behind",
    };
    let ahead_ns = i64::try_from(pair.ahead_ns.unsigned_abs()).unwrap_or(i64::MAX);
    let within = match (pair.least_ns, pair.most_ns) {
        (Some(least), Some(most)) => format!(", give or take {}", span(most.saturating_sub(least) / 2)),
        _ => String::new(),
    };
    format!("clocks: {b} is {} {ahead} of {a} ({by}{within}); corrected below", span(ahead_ns))
}

/// Prints a line, whatever the dumps have in it: names and causes came from other machines, and are to move no cursor and
/// begin no line.
fn line(f: &mut fmt::Formatter<'_>, text: fmt::Arguments<'_>) -> fmt::Result {
    Plain(f).write_fmt(text)?;
    f.write_str("\n")
}

struct Plain<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for Plain<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut parts = text.split(is_command);
        self.0.write_str(parts.next().unwrap_or_default())?;
        parts.try_for_each(|part| {
            self.0.write_char(char::REPLACEMENT_CHARACTER)?;
            self.0.write_str(part)
        })
    }
}

/// What tells a terminal to do something: control characters, ends of lines and paragraphs, and turns of the direction.
fn is_command(letter: char) -> bool {
    let is_turn =
        matches!(letter, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    letter.is_control() || matches!(letter, '\u{2028}' | '\u{2029}') || is_turn
}

struct Events<'a> {
    timeline: &'a Timeline,
    entries: Vec<usize>,
    deciding: Option<usize>,
    names_rooms: bool,
}

impl fmt::Display for Events<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let timeline = self.timeline;
        let entry = |at: &usize| &timeline.entries[*at];
        let begin_ns = self.entries.first().map_or(0, |at| entry(at).unix_ns);
        let times: Vec<String> = self
            .entries
            .iter()
            .map(|at| format!("{:+.3}", entry(at).unix_ns.saturating_sub(begin_ns) as f64 / 1e6))
            .collect();
        let width = |lengths: &mut dyn Iterator<Item = usize>| lengths.max().unwrap_or(0);
        let time_width = width(&mut times.iter().map(String::len));
        let names = || self.entries.iter().map(|at| timeline.name(entry(at).source));
        let name_width = width(&mut names().map(|name| name.chars().count()));
        let kind_width =
            width(&mut self.entries.iter().map(|at| entry(at).event.kind.words().chars().count()));
        for (at, time) in self.entries.iter().zip(&times) {
            let mark = if self.deciding == Some(*at) { "✗" } else { " " };
            let entry = entry(at);
            let (name, kind) = (timeline.name(entry.source), entry.event.kind.words());
            let details = details(entry, self.names_rooms);
            let text =
                format!("{mark} {time:>time_width$} ms  {name:name_width$}  {kind:kind_width$}  {details}");
            line(f, format_args!("{}", text.trim_end()))?;
        }
        Ok(())
    }
}

fn details(entry: &Entry, names_room: bool) -> String {
    let event = &entry.event;
    let mut parts: Vec<String> = Vec::new();
    let mut say = |part: String| parts.push(part);
    let ms = |ms: u32| if ms == 0 { "<1 ms".into() } else { span(i64::from(ms) * 1_000_000) };
    if let (true, Some(room)) = (names_room, event.room) {
        say(format!("room {room}"));
    }
    if let Some(share) = event.share {
        say(format!("share {share}"));
    }
    let with_peer = |words: &str| entry.peer.as_ref().map(|peer| format!("{words} {}", peer.name));
    match event.kind {
        Kind::Bound => {
            if let Some(peer) = &entry.peer {
                say(format!("{} over {}", peer.name, peer.port));
            }
        }
        Kind::SessionBegan | Kind::SessionUp | Kind::SessionDown | Kind::LaneDown | Kind::Parked => {
            if let Some(peer) = with_peer("with") {
                say(peer);
            }
        }
        _ => {}
    }
    match (event.kind, event.by.as_deref()) {
        (Kind::SessionBegan, Some("here")) => say("dialed here".into()),
        (Kind::SessionBegan, Some(_)) => say("dialed by the peer".into()),
        _ => {}
    }
    if let Some(cause) = &event.cause {
        say(cause.text.clone());
    }
    said(event, &mut say);
    if let (Some(bytes), Some(of_bytes)) = (event.bytes, event.of_bytes) {
        say(format!("{} of {}", size(bytes), size(of_bytes)));
    }
    if let Some(layers) = event.layers {
        say(plural(layers.into(), "layer"));
    }
    if let Some(waited) = event.waited_ms.filter(|&waited| waited > 0) {
        say(format!("waited {}", ms(waited)));
    }
    if let Some(left) = event.left_ms {
        say(format!("{} left", ms(left)));
    }
    if let (Kind::Ended, Some(quiet), true) = (event.kind, event.quiet_ms, event.counted > Some(0)) {
        say(format!("last arrival {} before", ms(quiet)));
    }
    if let (Kind::Ended, Some(age)) = (event.kind, event.age_ms) {
        say(format!("opened {} before", ms(age)));
    }
    let is_delivered = event.cause.as_ref().is_some_and(|cause| cause.code == "delivered");
    if let Some(silent) = event.silent_ms.filter(|&silent| silent > 0 && !is_delivered) {
        say(format!("peer last heard {} before", ms(silent)));
    }
    parts.join(", ")
}

/// The numbers and words that need no thought.
fn said(event: &Event, say: &mut impl FnMut(String)) {
    let words = [("", &event.role), ("why: ", &event.why), ("fence: ", &event.fence)];
    for (before, word) in words {
        if let Some(word) = word {
            say(format!("{before}{word}"));
        }
    }
    if let Some(address) = &event.address {
        say(address.clone());
    }
    if let Some(pages) = event.pages {
        say(plural(pages, "page"));
    }
    if let Some(grant) = &event.grant {
        say(format!("grant {grant}"));
    }
    if let Some(attempt) = event.attempt.filter(|&attempt| attempt > 0) {
        say(format!("attempt {attempt}"));
    }
    if let Some(lane) = event.lane {
        say(format!("lane {lane}"));
    }
    if let Some(lanes) = event.lanes {
        say(plural(lanes.into(), "lane"));
    }
    if let Some(rooms) = event.rooms.filter(|&rooms| rooms > 0) {
        say(plural(rooms, "room"));
    }
    match (event.counted.filter(|_| event.kind != Kind::Landed || event.counted > Some(0)), event.expected) {
        (Some(counted), Some(expected)) => say(format!("{counted} of {expected} arrivals")),
        (Some(counted), None) if counted > 0 => say(plural(counted, "arrival")),
        (None, Some(expected)) => say(plural(expected, "arrival")),
        _ => {}
    }
}

/// Written as it is made: all rooms at once may be much.
struct Json<'a> {
    timeline: &'a Timeline,
    rooms: &'a [&'a Room],
}

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let Self { timeline, rooms } = *self;
        let mut fields = to.serialize_struct("Timeline", 4)?;
        fields.serialize_field("sources", &timeline.sources)?;
        fields.serialize_field("clocks", &timeline.clocks)?;
        fields.serialize_field("overwritten", &timeline.overwritten)?;
        fields.serialize_field("rooms", &Rooms { timeline, rooms })?;
        fields.end()
    }
}

struct Rooms<'a> {
    timeline: &'a Timeline,
    rooms: &'a [&'a Room],
}

impl Serialize for Rooms<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.rooms.iter().map(|room| RoomJson::of(self.timeline, room)))
    }
}

#[derive(Serialize)]
struct RoomJson<'a> {
    room: u64,
    use_count: u32,
    outcome: Outcome,
    verdict: &'a str,
    advice: Option<&'a str>,
    #[serde(skip_serializing_if = "is_zero")]
    left_out: usize,
    events: Vec<EventJson<'a>>,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

#[derive(Serialize)]
struct EventJson<'a> {
    unix_ns: i64,
    node: &'a str,
    life: &'a str,
    peer: Option<&'a str>,
    decides: bool,
    event: &'a Event,
}

impl<'a> RoomJson<'a> {
    fn of(timeline: &'a Timeline, room: &'a Room) -> Self {
        let (entries, left_out) = timeline.told(room);
        let verdict = &room.verdict;
        let event = |at: usize| {
            let entry = &timeline.entries[at];
            let source = &timeline.sources[entry.source];
            EventJson {
                unix_ns: entry.unix_ns,
                node: &source.name,
                life: &source.incarnation,
                peer: entry.peer.as_ref().map(|peer| peer.name.as_str()),
                decides: verdict.deciding == Some(at),
                event: &entry.event,
            }
        };
        Self {
            room: room.key.room,
            use_count: room.key.use_count,
            outcome: verdict.outcome,
            verdict: &verdict.text,
            advice: verdict.advice.as_deref(),
            left_out,
            events: entries.into_iter().map(event).collect(),
        }
    }
}

fn plural(count: u32, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// A moment of the wall clock, by the calendar.
fn utc(unix_ns: i64) -> String {
    let (seconds, ns) = (unix_ns.div_euclid(1_000_000_000), unix_ns.rem_euclid(1_000_000_000));
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years begin in March here, so that the day that is sometimes missing is the last one.
    let (era, day) = ((days + 719_468).div_euclid(146_097), (days + 719_468).rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let date = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, late) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    let year = year + era * 400 + late;
    format!("{year:04}-{month:02}-{date:02} {hour:02}:{minute:02}:{second:02}.{:06} UTC", ns / 1_000)
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn moments_are_told_by_the_calendar() {
        let at = |seconds: i64| utc(seconds * 1_000_000_000 + 123_456_789);
        assert_eq!(at(0), "1970-01-01 00:00:00.123456 UTC");
        assert_eq!(at(951_782_399), "2000-02-28 23:59:59.123456 UTC");
        assert_eq!(at(951_782_400), "2000-02-29 00:00:00.123456 UTC");
        assert_eq!(at(1_735_689_599), "2024-12-31 23:59:59.123456 UTC");
        assert_eq!(at(4_107_542_400), "2100-03-01 00:00:00.123456 UTC");
    }
}
