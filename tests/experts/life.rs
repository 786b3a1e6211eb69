//! Plays a life: the groups, a thread for each slot of each rank, and what holds at the end.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Once};
use std::thread;

use crossdock_ep::planted::{Planted, plant};
use crossdock_ep::{Group, Pace, Slot};
use parking_lot::Mutex;

use crate::plan::Plan;
use crate::rank::{Actor, Broken, Ended, Outputs};
use crate::stage::{Hands, Outcome, Over, Stage};

/// Plays the life of a seed, with a bug in every rank.
pub fn play(plan: &Plan, bug: Option<Planted>) -> Outcome {
    let stage = Arc::new(Stage::new(plan));
    let pace: Arc<dyn Pace> = stage.clone();
    let groups = Group::in_simulation(&plan.config, &plan.options, &pace).expect("a valid configuration");
    stage.give(Hands {
        mourners: groups.iter().map(Group::mourner).collect(),
        sealed: groups.iter().map(Group::sealed).collect(),
        ..Hands::default()
    });
    listen();
    let scene = Scene { plan, stage: &stage, bug, ends: Mutex::default(), left: Mutex::default() };
    thread::scope(|scope| {
        for group in groups {
            let scene = &scene;
            spawn(scope, move || scene.rank(group));
        }
        stage.begin();
    });
    // The groups know the stage, and the stage them.
    stage.give(Hands::default());
    let mut outcome = stage.outcome();
    if outcome.violation.is_none() {
        outcome.violation = disagreement(&scene.ends.lock());
    }
    outcome
}

/// What a life's threads share.
struct Scene<'a> {
    plan: &'a Plan,
    stage: &'a Stage,
    bug: Option<Planted>,
    ends: Mutex<Vec<Ended>>,
    /// Groups that their ranks have not dropped.
    left: Mutex<Vec<Group>>,
}

fn spawn<'scope>(scope: &'scope thread::Scope<'scope, '_>, run: impl FnOnce() + Send + 'scope) {
    let thread = thread::Builder::new().name(ACTOR.into()).stack_size(STACK_BYTES);
    thread.spawn_scoped(scope, run).expect("a thread");
}

impl Scene<'_> {
    /// The thread of a rank: its first slot, and what concerns the rank as a whole.
    fn rank(&self, mut group: Group) {
        let rank = group.rank();
        let slots = self.plan.config.slots;
        let outputs: Vec<Outputs> = (0..slots).map(|_| Outputs::new(&group, self.plan)).collect();
        let first = (rank * slots) as usize;
        thread::scope(|scope| {
            let mut actors = group.slots().iter_mut().zip(outputs).zip(0..).map(|((slot, outputs), at)| {
                let (plan, stage) = (self.plan, self.stage);
                (slot, Actor { plan, stage, rank, slot: at, outputs, masked: Vec::new() })
            });
            let own = actors.next();
            for (slot, mut actor) in actors {
                let me = first + actor.slot as usize;
                spawn(scope, move || {
                    self.acts(|| {
                        self.stage.enter(me);
                        self.play(&mut actor, slot)
                    });
                    self.stage.leave();
                });
            }
            self.acts(|| {
                self.stage.enter(first);
                let (slot, mut actor) = own.expect("a group has a slot");
                self.play(&mut actor, slot)?;
                self.stage.join();
                Ok(())
            });
        });
        if self.plan.ranks[rank as usize].lingers {
            self.left.lock().push(group);
        } else {
            self.acts(|| {
                drop(group);
                self.stage.left(rank);
                Ok(())
            });
        }
        self.stage.leave();
    }

    fn play(&self, actor: &mut Actor<'_>, slot: &mut Slot) -> Result<(), Broken> {
        let ended = actor.play(slot)?;
        self.ends.lock().push(ended);
        Ok(())
    }

    /// Does something on this thread, with the bug. What breaks a rule, or panics, ends the life.
    fn acts(&self, run: impl FnOnce() -> Result<(), Broken>) {
        plant(self.bug);
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(())) => {}
            Ok(Err(broken)) => self.stage.violate(broken),
            Err(payload) if payload.is::<Over>() => {}
            Err(_) => self.stage.violate(format!("a panic: {}", HEARD.take())),
        }
    }
}

/// Ranks that have come to the end without a fault in their last steps agree on who is masked, unless they mask each other.
fn disagreement(ends: &[Ended]) -> Option<Broken> {
    let whole = |end: &&Ended| end.whole && end.quiet.is_some();
    for one in ends.iter().filter(whole) {
        for other in ends.iter().filter(whole).filter(|other| other.slot == one.slot) {
            let see_each_other = !one.masked.contains(&other.rank) && !other.masked.contains(&one.rank);
            if see_each_other && one.quiet == other.quiet && one.masked != other.masked {
                return Some(format!("the ranks do not agree on who is masked: {one:?}, {other:?}"));
            }
        }
    }
    None
}

thread_local! {
    /// What the last panic on this thread said.
    static HEARD: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics of a life's threads are what the life comes to, and are not printed.
fn listen() {
    static LISTEN: Once = Once::new();
    LISTEN.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if thread::current().name() == Some(ACTOR) {
                HEARD.set(info.to_string());
            } else {
                others(info);
            }
        }));
    });
}

const ACTOR: &str = "actor";
const STACK_BYTES: usize = 512 << 10;
