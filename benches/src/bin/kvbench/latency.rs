//! Measures single pages, each alone on its way: ours and the best means known in turn.

use crate::error::Error;
use crate::initiator::{Initiator, unexpected};
use crate::moving::Moving;
use crate::options::{OpName, Options, ProgressName};
use crate::report::{Means, Report, Wakeups};
use crate::setup::WAIT;
use crate::talk::{Answer, Ask, Pass};
use crate::trips::{self, Trips};
use crate::ways::Way;

impl Initiator {
    pub fn measure_latency(&mut self, options: &Options, report: &mut Report) -> Result<(), Error> {
        let setup = self.side.setup.clone();
        let memcpy_way = self.beside.ways(&setup)[1];
        let (mut ours, mut memcpy) = (Means::new(Way::Ours.name()), Means::new(Way::Memcpy.name()));
        let mut floor = Means::new(self.beside.bare(&setup)?.name());
        let add = |means: &mut Means, (trips, cpu_there_s): (Trips, f64), moved_each: u64| {
            let bytes = setup.slot_bytes() * trips.page_us.values().len() as u64 * moved_each;
            let seconds = trips.page_us.median() / 1e6 * (bytes / setup.slot_bytes()) as f64;
            means.add(bytes, seconds, trips.cpu_s, cpu_there_s);
            trips.page_us
        };
        for repeat in 0..=options.repeats {
            // Always the same pages: the first repeat touches them in both processes, so that no page fault is measured.
            let (one, bare, moved_each) = match setup.op {
                OpName::Write => (self.push_pages(options, report)?, self.push_bare()?, 2),
                OpName::Read => (self.pull_pages(options, report)?, self.pull_bare()?, 1),
            };
            let pass = Pass { seed: 0, ..self.next_pass(vec![self.single_pages()]) };
            let lists = setup.lists(&pass);
            let copied = self.run(memcpy_way, &pass, &lists, 1)?;
            // The first repeat warms up.
            if repeat > 0 {
                report.room_us.extend(add(&mut ours, one, moved_each).values().iter().copied());
                report.bare_us.extend(add(&mut floor, bare, moved_each).values().iter().copied());
                let bytes = setup.slot_bytes() * u64::from(pass.pages());
                memcpy.add(bytes, copied.seconds, copied.cpu_here_s, 0.0);
            }
        }
        report.take(vec![ours, memcpy, floor]);
        if setup.op == OpName::Write && setup.progress == ProgressName::Thread {
            report.wakeups = Some(self.trickle()?);
        }
        Ok(())
    }

    fn single_pages(&self) -> u32 {
        let most = if self.side.setup.op == OpName::Read { PULLS } else { TRIPS };
        most.min(self.side.setup.pool_pages / 2).max(1)
    }

    /// Two rooms, one each way, and the pages that go there.
    fn trip_passes(&mut self, pages: u32) -> (Pass, Pass) {
        let there = Pass { seed: 0, ..self.next_pass(vec![pages]) };
        self.rooms += 1;
        let both = Pass { rooms: vec![pages, pages], ..there.clone() };
        (there, both)
    }

    fn push_pages(&mut self, options: &Options, report: &mut Report) -> Result<(Trips, f64), Error> {
        let (there, both) = self.trip_passes(self.single_pages());
        let lists = self.side.setup.lists(&both);
        self.side.setup.content(there.salt).write(&self.side.memory, &lists.from[..there.pages() as usize]);
        self.talk.say(&Ask::Bounce(both.clone()))?;
        let (talk, peer) = (&self.talk, self.peer);
        let trips = trips::trips(&mut self.side, peer, &both, &lists.from, |side| {
            side.driver.hear_spinning(WAIT, talk).map(drop)
        })?;
        let cpu_there_s = self.done()?;
        let lists = self.side.setup.lists(&there);
        self.check(options, &there, &lists, report)?;
        Ok((trips, cpu_there_s))
    }

    fn push_bare(&mut self) -> Result<(Trips, f64), Error> {
        let (_, both) = self.trip_passes(self.single_pages());
        let mut bare = self.beside.bare(&self.side.setup)?;
        if !bare.needs_the_peer() {
            return Ok((bare.trips(&self.side, &both)?, 0.0));
        }
        self.talk.say(&Ask::BareBounce(both.clone()))?;
        let trips = bare.trips(&self.side, &both)?;
        Ok((trips, self.done()?))
    }

    fn pull_pages(&mut self, options: &Options, report: &mut Report) -> Result<(Trips, f64), Error> {
        let pass = Pass { seed: 0, ..self.next_pass(vec![1; self.single_pages() as usize]) };
        let lists = self.side.setup.lists(&pass);
        self.fill(&pass, &lists)?;
        let rooms: Vec<Moving> = self.open_rooms(&pass, &lists)?;
        let trips = trips::pulls(&mut self.side, rooms)?;
        let cpu_there_s = self.done()?;
        self.check(options, &pass, &lists, report)?;
        Ok((trips, cpu_there_s))
    }

    fn pull_bare(&mut self) -> Result<(Trips, f64), Error> {
        let pass = Pass { seed: 0, ..self.next_pass(vec![self.single_pages()]) };
        let mut bare = self.beside.bare(&self.side.setup)?;
        if !bare.needs_the_peer() {
            return Ok((bare.pulls(&self.side, &pass)?, 0.0));
        }
        self.talk.say(&Ask::BareServe(pass.clone()))?;
        let trips = bare.pulls(&self.side, &pass)?;
        Ok((trips, self.done()?))
    }

    /// How often each progress thread, here and there, went to sleep for a page that found both asleep.
    fn trickle(&mut self) -> Result<Wakeups, Error> {
        let (_, both) = self.trip_passes(TRICKLED.min(self.single_pages()));
        let list = self.side.setup.lists(&both).from;
        self.talk.say(&Ask::Trickle(both.clone()))?;
        let (talk, peer) = (&self.talk, self.peer);
        let here = trips::trickle(&mut self.side, peer, &both, &list, |side| {
            side.driver.hear_spinning(WAIT, talk).map(drop)
        })?;
        match self.answer()? {
            Answer::Slept { times, batches } => {
                Ok(Wakeups { here, there: times, batches, pages: both.rooms[0] })
            }
            other => Err(unexpected(other)),
        }
    }
}

/// Round trips of a repeat.
const TRIPS: u32 = 1024;
/// Pulled pages of a repeat: each is a room.
const PULLS: u32 = 512;
/// Pages that find both ends asleep.
const TRICKLED: u32 = 200;
