//! Two ports that run at the same time, each on a thread of its own, as in real life.

use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

use crossdock_memory::Memory;

use super::Rig;
use super::stage::{Link, Stage};
use crate::{Event, Events, Op, Port, Token};

/// One thread writes, again and again into the same few slots, as soon as the other has acknowledged them; its
/// sources change the moment they may. The other thread finds every byte in place when it hears the immediate.
pub fn bytes_are_there_across_threads(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    let link = stage.link((SLOTS * SLOT) as usize);
    let mut port = stage.sides[0].port.take().expect("a fresh port");
    let target = link.regions[1].memory.clone();
    let (begun, patience) = (Instant::now(), stage.patience);
    let mut heard = 0;
    let (port, writer) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut writer = Writer::default();
            writer.run(&mut *port, &link, begun, patience);
            (port, writer)
        });
        let mut acknowledge = VecDeque::new();
        // This thread also moves a simulated clock, which the other may wait for.
        while !writer.is_finished() {
            for event in stage.poll(1) {
                let Event::Arrived { imm, .. } = event else { continue };
                check(&target, imm);
                heard += 1;
                acknowledge.push_back(Op::notify(imm));
            }
            let waiting = acknowledge.make_contiguous();
            let taken = stage.post(1, link.lanes[1], waiting).expect("the lane is up").ops;
            acknowledge.drain(..taken);
            stage.rig.pass();
        }
        writer.join().expect("the writing thread has ended well")
    });
    assert_eq!(heard, writer.tokens.len(), "writes heard of and made");
    stage.sides[0].port = Some(port);
    stage.expect_tokens(0, link.lanes[0], writer.tokens.into_iter());
    stage.note(0, &writer.log);
    stage.end();
}

/// The thread that writes.
#[derive(Default)]
struct Writer {
    /// Everything the port has said.
    log: Vec<Event>,
    /// The tokens of what was taken, in order.
    tokens: Vec<Token>,
    /// Which writes have been acknowledged. On a port without order they come in any.
    heard: Vec<bool>,
}

impl Writer {
    fn run(&mut self, port: &mut dyn Port, link: &Link, begun: Instant, patience: Duration) {
        let source = &link.regions[0].memory;
        let mut events = Events::with_capacity(16);
        let mut next: Option<Op<'static>> = None;
        // Writes made, done, and acknowledged without a gap.
        let (mut made, mut done, mut acknowledged) = (0, 0, 0);
        loop {
            let over = begun.elapsed() > DURATION && made >= ROUNDS_AT_LEAST;
            // A slot of the source is free once it is done, a slot of the target once it was looked at.
            if next.is_none() && !over && made < done + SLOTS && made < acknowledged + SLOTS {
                let at = made % SLOTS * SLOT;
                source.write(at as usize, &pattern(made)).expect("a slot of the source");
                let (imm, token) = (Some(made as u32), Some(Token(made)));
                next = Some(Op { imm, token, ..link.write(0, at, at, length(made)) });
                made += 1;
                self.heard.push(false);
            }
            if let Some(op) = next {
                let posted = port.post(link.lanes[0], &[op]).expect("the lane is up");
                next = (posted.ops == 0).then(|| op.advance(posted.within));
                self.tokens.extend(op.token.filter(|_| posted.ops == 1));
            }
            port.poll(&mut events);
            for event in events.drain() {
                match event {
                    Event::Done { token, .. } => {
                        done = token.0 + 1;
                        // From now on this part of the source is this thread's again.
                        let at = token.0 % SLOTS * SLOT;
                        source.fill(at as usize, SLOT as usize, 0).expect("a slot of the source");
                    }
                    Event::Arrived { imm, .. } => self.heard[imm as usize] = true,
                    Event::Up { .. } | Event::Down { .. } => {}
                }
                self.log.push(event);
            }
            while self.heard.get(acknowledged as usize) == Some(&true) {
                acknowledged += 1;
            }
            if over && next.is_none() && acknowledged == made && done == made {
                return;
            }
            assert!(begun.elapsed() < patience, "waited for {made} acknowledgements, {acknowledged} came");
            thread::yield_now();
        }
    }
}

/// What write number `round` carries.
fn pattern(round: u64) -> Vec<u8> {
    (0..length(round)).map(|at| (round * 151 + at * 7 + 1) as u8).collect()
}

fn length(round: u64) -> u64 {
    1 + round * 977 % SLOT
}

fn check(target: &Memory, imm: u32) {
    let round = u64::from(imm);
    let mut found = vec![0; length(round) as usize];
    let at = round % SLOTS * SLOT;
    target.read(at as usize, &mut found).expect("a slot of the target");
    assert!(found == pattern(round), "immediate {round} was heard before its bytes");
}

/// How long the writer begins new writes; on a busy machine, in which a turn can take milliseconds, at least so many.
const DURATION: Duration = Duration::from_millis(300);
const ROUNDS_AT_LEAST: u64 = 50;
const SLOTS: u64 = 8;
const SLOT: u64 = 2048;
