//! What the nodes' flight recorders say of a run that has broken a rule.

use std::path::Path;

use crossdock_flight::{Clocks, Dump, File, Filter, Room, Timeline, read};
use crossdock_proto::flight::Reason;

use crate::world::World;

impl World {
    /// Keeps what a process has recorded, before it goes.
    pub fn keep_records(&mut self, node: usize) {
        if let Some(past) = &mut self.past
            && let Some(process) = &mut self.nodes[node].process
        {
            let proto = process.worker.engine().proto();
            let rings = proto.recorder().rings() as u32;
            let snapshot = proto.snapshot(Reason::Asked, 0..rings);
            // All nodes have the wall clock of the run.
            let clocks = Clocks { monotonic_ns: self.now_ns, unix_ns: self.now_ns };
            past.push(Dump { snapshot, clocks });
        }
    }

    /// The timelines of the rooms that a violation names, or else of those that failed last.
    pub fn story(&mut self, violation: &str) -> String {
        (0..self.nodes.len()).for_each(|node| self.keep_records(node));
        let files: Vec<File> = self.past.iter().flatten().map(file).collect();
        let timeline = Timeline::merge(&files, &Filter::default());
        let named = self.named(violation);
        let is_named = |room: &&Room| named == Some((room.key.room, room.key.use_count));
        let mut rooms: Vec<&Room> = timeline.rooms.iter().filter(is_named).collect();
        if rooms.is_empty() {
            rooms = timeline.rooms.iter().rev().take(ROOMS_TOLD).collect();
        }
        timeline.table(&rooms).to_string()
    }

    /// The room that a violation begins with, by its name on the wire.
    fn named(&self, violation: &str) -> Option<(u64, u32)> {
        let (_, after) = violation.split_once("room ")?;
        let digits = after.split(|letter: char| !letter.is_ascii_digit()).next()?;
        let plan = &self.rooms.get(digits.parse::<usize>().ok()?)?.plan;
        Some((plan.number, plan.use_count))
    }
}

fn file(dump: &Dump) -> File {
    read(Path::new(&*dump.snapshot.name), dump.text().as_slice()).expect("what was just written can be read")
}

const ROOMS_TOLD: usize = 3;
