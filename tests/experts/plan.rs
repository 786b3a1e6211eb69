//! A life, from one seed: a group, what its ranks do in each step, and what happens to them.

use std::time::Duration;

use crossdock_ep::{GroupConfig, GroupOptions, LostWeight, Patience, Payload, ScaleOrder};

use crate::inputs::{Random, Routing, inputs};
use crate::reference::{Form, Input};

pub struct Plan {
    pub seed: u64,
    pub config: GroupConfig,
    pub options: GroupOptions,
    pub pattern: Pattern,
    /// By slot: what all ranks do.
    pub slots: Vec<Vec<Step>>,
    pub faults: Vec<Armed>,
    /// By rank: what it does besides.
    pub ranks: Vec<Habits>,
}

#[derive(Clone, Debug)]
pub struct Step {
    pub mode: Mode,
    pub form: Form,
    pub order: ScaleOrder,
    pub cut: Cut,
    /// One rank does something else.
    pub odd: Option<(u32, Odd)>,
    pub along: bool,
    pub weighted: bool,
    pub biases: usize,
    /// By rank.
    pub inputs: Vec<Input>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Latency,
    Throughput,
}

/// Where all ranks leave a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    Nowhere,
    AfterDispatch,
    AfterRows,
    AfterCombine,
}

/// What one rank does that the others do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Odd {
    OtherForm,
    OtherMode,
    /// Its outputs are those of another form: its receive half is refused.
    WrongOutputs,
    /// Its combined rows have another length.
    WrongCombined,
    /// It leaves the step there.
    Cut(Cut),
}

#[derive(Clone, Debug, Default)]
pub struct Habits {
    /// After so many steps it makes no more.
    pub last: Option<u32>,
    /// It keeps its group then.
    pub lingers: bool,
    /// How often it tries again when it is out.
    pub tries: u32,
}

/// Who runs next.
#[derive(Clone, Copy, Debug)]
pub enum Pattern {
    /// Any; whoever runs goes on mostly.
    Even { stay: u32 },
    /// The first by an order that changes now and then.
    Ranked { change: u32 },
}

/// What a thread is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Between,
    Dispatch,
    Rows,
    Compute,
    Combine,
    Results,
}

impl Phase {
    pub const ALL: [Phase; 6] =
        [Self::Between, Self::Dispatch, Self::Rows, Self::Compute, Self::Combine, Self::Results];
}

/// A fault, and when it happens to a rank: in that phase, at a place of it, in this step or later.
#[derive(Clone, Debug)]
pub struct Armed {
    pub rank: u32,
    pub slot: u32,
    pub step: u32,
    pub phase: Phase,
    pub after: u32,
    pub fault: Fault,
}

#[derive(Clone, Debug)]
pub enum Fault {
    /// It never runs again. Some are told, after some time.
    Death {
        told: Vec<(u32, Duration)>,
    },
    Stall(Duration),
    /// All ranks stand still for a while, as after a signal to all.
    JobStopped(Duration),
    /// Some are told that it is dead.
    FalselyDead {
        told: Vec<(u32, Duration)>,
    },
    /// A bit of shared memory changes.
    Flip,
    /// Some of it becomes what it was: the first time it is only looked at.
    Stale,
}

impl Fault {
    pub const KINDS: [&'static str; 9] = [
        "death, untold",
        "death, told",
        "stall, short",
        "stall, long",
        "whole job stopped",
        "falsely dead",
        "flipped bit",
        "stale bytes",
        "leaves",
    ];
    pub const LEAVES: usize = 8;

    pub fn kind(&self) -> usize {
        match self {
            Fault::Death { told } if told.is_empty() => 0,
            Fault::Death { .. } => 1,
            Fault::Stall(time) if *time <= SHORT => 2,
            Fault::Stall(_) => 3,
            Fault::JobStopped(_) => 4,
            Fault::FalselyDead { .. } => 5,
            Fault::Flip => 6,
            Fault::Stale => 7,
        }
    }
}

/// A stall that nobody is masked for, whatever the deadline.
const SHORT: Duration = Duration::from_millis(75);

impl Plan {
    pub fn new(seed: u64) -> Plan {
        let mut random = Random::new(seed);
        let random = &mut random;
        let ranks = if random.below(10) == 0 { 1 } else { 2 + random.below(5) };
        let wide = random.below(6) == 0;
        let config = GroupConfig {
            max_tokens: (0..ranks).map(|_| random.below(5)).collect(),
            experts: 1 + random.below(9),
            top_k: 1 + random.below(3),
            hidden: if wide { 128 } else { 8 * (2 + random.below(2)) },
            payload: Payload::Bf16,
            slots: if random.below(4) == 0 { 2 } else { 1 },
            placement_version: 1,
        };
        let deadline = Duration::from_millis(600 + u64::from(random.below(900)));
        let lost = [LostWeight::Drop, LostWeight::Renormalise, LostWeight::Fail];
        let options = GroupOptions {
            deadline,
            warm_up: deadline * (1 + random.below(3)),
            patience: Some(Patience { spins: 0, yields: 0 }),
            lost: lost[random.below(3) as usize],
            least_ranks: if random.below(3) == 0 { 1 + random.below(ranks) } else { 1 },
            verify: random.below(2) == 0,
        };
        let pattern = match random.below(5) {
            0 => Pattern::Even { stay: 1 },
            1 => Pattern::Even { stay: 4 },
            2 => Pattern::Even { stay: 16 },
            3 => Pattern::Ranked { change: 16 },
            _ => Pattern::Ranked { change: 128 },
        };
        let steps = 3 + random.below(4);
        let routing = Routing::ALL[random.below(Routing::ALL.len() as u32) as usize];
        let odd = random.below(4) == 0;
        let slots = (0..config.slots)
            .map(|_| {
                let step = |_| Step::new(&config, routing, wide, odd, random);
                (0..steps).map(step).collect()
            })
            .collect();
        let mut faults = Vec::new();
        for _ in 0..random.below(4) {
            let rank = random.below(ranks);
            faults.push(Armed::new(rank, (ranks, config.slots, steps), &options, random));
        }
        if ranks > 1 && random.below(8) == 0 {
            // Two that are dead to each other, and to some of the rest.
            let one = random.below(ranks);
            let other = (one + 1 + random.below(ranks - 1)) % ranks;
            for (rank, at) in [(one, other), (other, one)] {
                let armed = Armed::new(rank, (ranks, config.slots, steps), &options, random);
                let mut told = vec![(at, Duration::from_micros(random.below(3000).into()))];
                let besides = random.below(ranks);
                if besides != one && besides != other {
                    told.push((besides, Duration::from_micros(random.below(3000).into())));
                }
                faults.push(Armed { fault: Fault::FalselyDead { told }, ..armed });
            }
        }
        if options.verify && random.below(2) == 0 {
            let stale = random.below(2) == 0;
            for _ in 0..1 + random.below(6) {
                let mut armed =
                    Armed::new(random.below(ranks), (ranks, config.slots, steps), &options, random);
                armed.fault = if stale { Fault::Stale } else { Fault::Flip };
                if stale && random.below(2) == 0 {
                    // Where results are read.
                    armed.phase = Phase::Results;
                }
                faults.push(armed);
            }
        }
        let habits = |_| Habits {
            last: (random.below(20) == 0).then(|| 1 + random.below(steps - 1)),
            lingers: random.below(3) == 0,
            tries: random.below(4),
        };
        let habits = (0..ranks).map(habits).collect();
        Plan { seed, config, options, pattern, slots, faults, ranks: habits }
    }

    pub fn steps(&self) -> u32 {
        self.slots[0].len() as u32
    }

    /// Whether ranks may come to be a step apart for a while: because one has done something else, or has seen what nobody
    /// wrote.
    pub fn may_misalign(&self) -> bool {
        self.slots.iter().flatten().any(|step| step.odd.is_some())
            || self.faults.iter().any(|armed| matches!(armed.fault, Fault::Flip | Fault::Stale))
    }

    /// Everything but the inputs.
    pub fn tell(&self) -> String {
        let mut told = format!("{:?}\n{:?}\n{:?}\n", self.config, self.options, self.pattern);
        for (slot, steps) in self.slots.iter().enumerate() {
            for (at, step) in steps.iter().enumerate() {
                let tokens: Vec<usize> =
                    step.inputs.iter().map(|i| i.choices.len() / self.config.top_k as usize).collect();
                told += &format!(
                    "slot {slot} step {at}: {:?} {:?} cut {:?} odd {:?} weighted {} tokens {tokens:?}\n",
                    step.mode, step.form, step.cut, step.odd, step.weighted
                );
            }
        }
        self.faults.iter().for_each(|armed| told += &format!("{armed:?}\n"));
        told + &format!("{:?}", self.ranks)
    }
}

impl Step {
    fn new(config: &GroupConfig, routing: Routing, wide: bool, odd: bool, random: &mut Random) -> Step {
        let forms = [Form::Bf16, Form::Fp8, Form::Fp8PowerOfTwo, Form::Fp8Ue8m0];
        let orders = [ScaleOrder::ByRow, ScaleOrder::ByColumn];
        let cut = match random.below(12) {
            0 | 1 => Cut::AfterDispatch,
            2 | 3 => Cut::AfterRows,
            4 => Cut::AfterCombine,
            _ => Cut::Nowhere,
        };
        let odd = (odd && cut == Cut::Nowhere && random.below(3) == 0).then(|| {
            let kinds = [
                Odd::OtherForm,
                Odd::OtherMode,
                Odd::WrongOutputs,
                Odd::WrongCombined,
                Odd::Cut(Cut::AfterDispatch),
                Odd::Cut(Cut::AfterRows),
                Odd::Cut(Cut::AfterCombine),
            ];
            (random.below(config.ranks()), kinds[random.below(kinds.len() as u32) as usize])
        });
        Step {
            mode: if random.below(2) == 0 { Mode::Latency } else { Mode::Throughput },
            form: if wide { forms[random.below(4) as usize] } else { Form::Bf16 },
            order: orders[random.below(2) as usize],
            cut,
            odd,
            along: random.below(4) == 0,
            weighted: random.below(3) > 0,
            biases: random.below(3) as usize,
            inputs: inputs(config, routing, random.below(2) == 0, random),
        }
    }
}

impl Armed {
    fn new(
        rank: u32,
        (ranks, slots, steps): (u32, u32, u32),
        options: &GroupOptions,
        random: &mut Random,
    ) -> Armed {
        let deadline = options.deadline;
        let told = |random: &mut Random, most: Duration| -> Vec<(u32, Duration)> {
            let all = random.below(2) == 0;
            let others: Vec<u32> =
                (0..ranks).filter(|&at| at != rank && (all || random.below(2) == 0)).collect();
            others.into_iter().map(|at| (at, most.mul_f64(random.unit()))).collect()
        };
        let fault = match random.below(8) {
            0 => Fault::Death { told: Vec::new() },
            1 => Fault::Death { told: told(random, deadline) },
            2 => Fault::Stall(SHORT.mul_f64(random.unit())),
            3 | 4 => Fault::Stall(deadline.mul_f64(0.6 + 8.0 * random.unit() * random.unit())),
            5 => Fault::JobStopped(deadline.mul_f64(0.1 + 30.0 * random.unit() * random.unit())),
            _ => Fault::FalselyDead { told: told(random, Duration::from_millis(4)) },
        };
        let most = [2, 12, 40][random.below(3) as usize];
        Armed {
            rank,
            slot: random.below(slots),
            step: random.below(steps),
            phase: Phase::ALL[random.below(6) as usize],
            after: random.below(1 + most),
            fault,
        }
    }
}
