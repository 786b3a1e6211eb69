//! What a rank's threads do in a life, and the rules that hold for what they get.

use std::collections::HashMap;
use std::time::Duration;

use crossdock_ep::{
    Advice, Bf16, Dispatch, EpError, Group, LatencyOutputs, LatencyStep, Payload, Report, Rows, ScaleOrder,
    ScaleRule, Scales, Slot, ThroughputOutputs, ThroughputStep, Tokens,
};

use crate::answers::{Answer, Asked, result};
use crate::plan::{Cut, Mode, Odd, Phase, Plan, Step};
use crate::reference::{self, Form, Input, Row};
use crate::stage::Stage;

/// A rule that is broken.
pub type Broken = String;

/// One slot of a rank.
pub struct Actor<'a> {
    pub plan: &'a Plan,
    pub stage: &'a Stage,
    pub rank: u32,
    pub slot: u32,
    pub outputs: Outputs,
    /// Who was masked when it was looked last.
    pub masked: Vec<u32>,
}

/// How a slot's life ended.
#[derive(Clone, Debug)]
pub struct Ended {
    pub rank: u32,
    pub slot: u32,
    /// It made all its calls, the last of them well.
    pub whole: bool,
    pub masked: Vec<u32>,
    /// Nothing has happened over its last steps, and so much before.
    pub quiet: Option<u32>,
}

/// Room for what comes, in each form.
pub struct Outputs {
    latency: Vec<((Payload, ScaleOrder), LatencyOutputs)>,
    throughput: Vec<(Payload, ThroughputOutputs)>,
}

/// How a step went.
enum Went {
    Well,
    /// It is lost for this rank; the next may begin.
    Lost,
    /// There is no further step for this rank.
    Out,
}

/// In which call an error came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Dispatch,
    Rows,
    Results,
}

impl Outputs {
    pub fn new(group: &Group, plan: &Plan) -> Outputs {
        let mut outputs = Outputs { latency: Vec::new(), throughput: Vec::new() };
        let steps = plan.slots.iter().flatten();
        for (form, order) in steps.flat_map(|s| [(payload(s.form), s.order), (OTHER, s.order)]) {
            if !outputs.latency.iter().any(|(key, _)| *key == (form, order)) {
                outputs.latency.push(((form, order), LatencyOutputs::new(group, form, order)));
            }
            if !outputs.throughput.iter().any(|(key, _)| *key == form) {
                outputs.throughput.push((form, ThroughputOutputs::new(group, form)));
            }
        }
        outputs
    }

    fn latency(&mut self, form: Payload, order: ScaleOrder) -> &mut LatencyOutputs {
        let found = self.latency.iter_mut().find(|(key, _)| *key == (form, order));
        &mut found.expect("outputs of every form").1
    }

    fn throughput(&mut self, form: Payload) -> &mut ThroughputOutputs {
        let found = self.throughput.iter_mut().find(|(key, _)| *key == form);
        &mut found.expect("outputs of every form").1
    }
}

impl Actor<'_> {
    /// All steps of a slot.
    pub fn play(&mut self, slot: &mut Slot) -> Result<Ended, Broken> {
        let habits = &self.plan.ranks[self.rank as usize];
        let steps = self.plan.steps();
        let last = habits.last.unwrap_or(steps);
        let mut before = None;
        let mut well = false;
        for at in 0..last {
            if at + 2 == steps {
                before = Some(self.stage.disturbances());
            }
            self.stage.phase(at, Phase::Between);
            match self.step(slot, at)? {
                Went::Out => {
                    self.stage.quits(self.rank);
                    self.try_again(slot, at, habits.tries)?;
                    return Ok(self.ended(false, None));
                }
                went => well = matches!(went, Went::Well),
            }
        }
        if last < steps {
            self.stage.met(crate::plan::Fault::LEAVES, Phase::Between);
            self.stage.quits(self.rank);
        }
        self.stage.finishes(self.rank);
        let quiet = before.filter(|&before| before == self.stage.disturbances());
        Ok(self.ended(well && last == steps, quiet))
    }

    fn ended(&self, whole: bool, quiet: Option<u32>) -> Ended {
        Ended { rank: self.rank, slot: self.slot, whole, masked: self.masked.clone(), quiet }
    }

    fn input<'s>(&self, step: &'s Step) -> &'s Input {
        &step.inputs[self.rank as usize]
    }

    fn odd(&self, step: &Step) -> Option<Odd> {
        step.odd.filter(|(rank, _)| *rank == self.rank).map(|(_, odd)| odd)
    }

    /// Whoever is out stays out.
    fn try_again(&mut self, slot: &mut Slot, at: u32, tries: u32) -> Result<(), Broken> {
        for _ in 0..tries {
            self.stage.phase(at, Phase::Between);
            let step = &self.plan.slots[self.slot as usize][at as usize];
            let made = self.dispatch(slot, step).map(|_| ());
            match made {
                Err(error) if error.advice() == Advice::NewGroup => self.stage.count("tried again when out"),
                made => return Err(self.broken(at, format!("out of the group, and then {made:?}"))),
            }
        }
        Ok(())
    }

    fn broken(&self, at: u32, what: impl std::fmt::Display) -> Broken {
        format!("rank {} slot {} step {at}: {what}", self.rank, self.slot)
    }

    fn dispatch<'s>(&self, slot: &'s mut Slot, step: &Step) -> Result<Dispatch<'s>, EpError> {
        let input = self.input(step);
        let other = vec![7_u8; input.choices.len() / self.plan.config.top_k as usize * 16];
        let rows = match self.odd(step) {
            Some(Odd::OtherForm) => Rows::Made { payload: OTHER, values: &other, scales: Scales::NONE },
            _ => rows(step.form, &input.rows),
        };
        let weights = step.weighted.then_some(&input.weights[..]);
        let made = if step.along {
            let route = slot.route(&input.choices)?;
            slot.dispatch_along(&route, rows, weights)
        } else {
            slot.dispatch(&Tokens { rows, choices: &input.choices, weights })
        };
        self.stage.pass_here();
        made
    }

    fn step(&mut self, slot: &mut Slot, at: u32) -> Result<Went, Broken> {
        let plan = self.plan;
        let step = &plan.slots[self.slot as usize][at as usize];
        let mut tries = 0;
        let dispatched = loop {
            self.stage.phase(at, Phase::Dispatch);
            self.stage.call();
            let made = self.dispatch(slot, step);
            self.stage.call_ends();
            match made {
                Ok(dispatched) => break dispatched,
                Err(error) => match self.judge(at, &error, Place::Dispatch)? {
                    // Nothing was sent: the same step is dispatched again.
                    Went::Lost if tries < 2 => tries += 1,
                    Went::Lost => return Err(self.broken(at, format!("a third dispatch fails: {error}"))),
                    went => return Ok(went),
                },
            }
        };
        self.see(at, &dispatched.report().masked.clone())?;
        self.say();
        let odd = self.odd(step);
        if self.is_cut(step, Cut::AfterDispatch) {
            return Ok(Went::Well);
        }
        self.stage.phase(at, Phase::Rows);
        let mode = match (odd, step.mode) {
            (Some(Odd::OtherMode), Mode::Latency) => Mode::Throughput,
            (Some(Odd::OtherMode), Mode::Throughput) => Mode::Latency,
            (_, mode) => mode,
        };
        match mode {
            Mode::Latency => self.latency(dispatched, step, at),
            Mode::Throughput => self.throughput(dispatched, step, at),
        }
    }

    fn is_cut(&self, step: &Step, cut: Cut) -> bool {
        step.cut == cut || self.odd(step) == Some(Odd::Cut(cut))
    }

    /// In which form this rank expects rows.
    fn expects(&self, step: &Step) -> Payload {
        match self.odd(step) {
            Some(Odd::OtherForm) => OTHER,
            Some(Odd::WrongOutputs) => OTHER,
            _ => payload(step.form),
        }
    }

    fn latency(&mut self, dispatched: Dispatch<'_>, step: &Step, at: u32) -> Result<Went, Broken> {
        let form = self.expects(step);
        self.stage.call();
        let came = dispatched.latency(self.outputs.latency(form, step.order));
        let gone = self.stage.call_ends();
        let mut came = match came {
            Ok(came) => came,
            Err(error) => return self.judge(at, &error, Place::Rows),
        };
        let masked = came.report().masked.clone();
        self.see(at, &masked)?;
        self.check_waits(at, &gone, came.report())?;
        self.check_odd_rows(step, at)?;
        self.stage.phase(at, Phase::Compute);
        let is_usual = self.odd(step).is_none_or(|odd| odd != Odd::OtherForm);
        if is_usual {
            self.compute_latency(&mut came, step, at, &masked)?;
        }
        if self.is_cut(step, Cut::AfterRows) {
            return Ok(Went::Well);
        }
        self.stage.phase(at, Phase::Combine);
        self.stage.call();
        let combined = came.combine();
        self.stage.call_ends();
        self.say();
        if self.is_cut(step, Cut::AfterCombine) {
            return Ok(Went::Well);
        }
        self.stage.phase(at, Phase::Results);
        let input = self.input(step);
        let mut out = vec![NOTHING; self.out_len(step)];
        self.stage.call();
        let report = combined.receive(&input.weights, &mut out);
        let gone = self.stage.call_ends();
        report.iter().try_for_each(|report| self.check_waits(at, &gone, report))?;
        self.check_combined(step, at, &masked, report, (out, &[], None))
    }

    fn throughput(&mut self, dispatched: Dispatch<'_>, step: &Step, at: u32) -> Result<Went, Broken> {
        let form = self.expects(step);
        self.stage.call();
        let came = dispatched.throughput(self.outputs.throughput(form));
        let gone = self.stage.call_ends();
        let mut came = match came {
            Ok(came) => came,
            Err(error) => return self.judge(at, &error, Place::Rows),
        };
        let masked = came.report().masked.clone();
        self.see(at, &masked)?;
        self.check_waits(at, &gone, came.report())?;
        self.check_odd_rows(step, at)?;
        self.stage.phase(at, Phase::Compute);
        let is_usual = self.odd(step).is_none_or(|odd| odd != Odd::OtherForm);
        if is_usual {
            self.compute_throughput(&mut came, step, at, &masked)?;
        }
        if self.is_cut(step, Cut::AfterRows) {
            return Ok(Went::Well);
        }
        self.stage.phase(at, Phase::Combine);
        let outputs = self.outputs.throughput(form);
        let back = outputs.weights()[..outputs.len() * self.plan.config.top_k as usize].to_vec();
        self.stage.call();
        let combined = came.combine(Some(&back));
        self.stage.call_ends();
        let combined = match combined {
            Ok(combined) => combined,
            Err(error) => return self.judge(at, &error, Place::Results),
        };
        self.say();
        if self.is_cut(step, Cut::AfterCombine) {
            return Ok(Went::Well);
        }
        self.stage.phase(at, Phase::Results);
        let input = self.input(step);
        let len = self.out_len(step);
        let bias = |which: u32| (0..len).map(move |at| reference::result(which, 9, 9, 9, at));
        let biases: Vec<Vec<Bf16>> = (0..step.biases as u32).map(|which| bias(which).collect()).collect();
        let biases: Vec<&[Bf16]> = biases.iter().map(|bias| &bias[..]).collect();
        let (mut out, mut weights) = (vec![NOTHING; len], vec![-1.0; input.weights.len()]);
        self.stage.call();
        let report = combined.receive(&biases, Some(&mut weights), &mut out);
        let gone = self.stage.call_ends();
        report.iter().try_for_each(|report| self.check_waits(at, &gone, report))?;
        self.check_combined(step, at, &masked, report, (out, &biases, Some(weights)))
    }

    fn out_len(&self, step: &Step) -> usize {
        let wrong = usize::from(self.odd(step) == Some(Odd::WrongCombined));
        self.input(step).rows.len() + wrong
    }

    /// Whether the ranks of this step whose calls differ from those of the others are all out of sight.
    fn is_alike(&self, step: &Step, differs: impl Fn(Odd) -> bool) -> bool {
        let Some((rank, _)) = step.odd.filter(|(_, odd)| differs(*odd)) else { return true };
        let sees = |other: u32| other != self.rank && !self.masked.contains(&other);
        if rank == self.rank { !(0..self.plan.config.ranks()).any(sees) } else { !sees(rank) }
    }

    /// A dispatch in two forms is received by nobody.
    fn check_odd_rows(&self, step: &Step, at: u32) -> Result<(), Broken> {
        if self.is_alike(step, |odd| odd == Odd::OtherForm) {
            return Ok(());
        }
        Err(self.broken(at, format!("rows of two forms were received alike: {:?}", step.odd)))
    }

    /// Which sources' rows have come, by how many there are of each: those of others have to be masked.
    fn sources(
        &self,
        at: u32,
        masked: &[u32],
        (expected, found): (&dyn Fn(u32) -> usize, &dyn Fn(u32) -> usize),
    ) -> Result<Vec<bool>, Broken> {
        let mut came = Vec::new();
        for source in 0..self.plan.config.ranks() {
            let has_come = found(source) > 0 || expected(source) == 0;
            if !has_come && !masked.contains(&source) {
                return Err(self.broken(at, format!("no rows of rank {source}, which is not masked")));
            }
            came.push(has_come);
        }
        Ok(came)
    }

    fn compute_latency(
        &mut self,
        came: &mut LatencyStep<'_>,
        step: &Step,
        at: u32,
        masked: &[u32],
    ) -> Result<(), Broken> {
        let (config, rank) = (&self.plan.config, self.rank);
        let broken = |what: String| self.broken(at, what);
        let outputs = &self.outputs.latency.iter().find(|(key, _)| *key == (payload(step.form), step.order));
        let outputs = &outputs.expect("outputs of every form").1;
        let all = reference::by_expert(config, &step.inputs, step.form, rank, &vec![true; step.inputs.len()]);
        let expected = |source: u32| all.iter().flatten().filter(|row| row.source == source).count();
        let found = |source: u32| (0..all.len()).map(|expert| outputs.range(expert, source).len()).sum();
        let alive = self.sources(at, masked, (&expected, &found))?;
        let salt = self.salt(at);
        for (local, rows) in all.into_iter().enumerate() {
            let rows: Vec<Row> = rows.into_iter().filter(|row| alive[row.source as usize]).collect();
            if outputs.counts()[local] as usize != rows.len() {
                let count = outputs.counts()[local];
                return Err(broken(format!("{count} rows for local expert {local}, not {}", rows.len())));
            }
            let first = (0..config.experts).find(|&e| reference::place(config, e.into()).0 == rank);
            let expert = first.unwrap_or(0) + local as u32;
            let mut again: HashMap<(u32, u32), u32> = HashMap::new();
            let mut results = Vec::new();
            for (at, row) in rows.iter().enumerate() {
                let is_right = outputs.range(local, row.source).contains(&(at as u32))
                    && outputs.sources()[local * outputs.rows() + at] == row.token
                    && outputs.row(local, at) == row.values
                    && outputs.scales_of(local, at) == row.scales;
                if !is_right {
                    return Err(broken(format!("row {at} of local expert {local} is not that of {row:?}")));
                }
                let same = again.entry((row.source, row.token)).or_default();
                let hidden = 0..config.hidden as usize;
                results.extend(hidden.map(|c| result(salt, expert, row.source, row.token, *same, c)));
                *same += 1;
            }
            self.stage.pass_here();
            came.results_mut(local).copy_from_slice(&results);
        }
        self.stage.count("rows received, latency");
        Ok(())
    }

    fn compute_throughput(
        &mut self,
        came: &mut ThroughputStep<'_>,
        step: &Step,
        at: u32,
        masked: &[u32],
    ) -> Result<(), Broken> {
        let (config, rank) = (&self.plan.config, self.rank);
        let top_k = config.top_k as usize;
        let broken = |what: String| self.broken(at, what);
        let outputs = &self.outputs.throughput.iter().find(|(key, _)| *key == payload(step.form));
        let outputs = &outputs.expect("outputs of every form").1;
        let all = reference::by_token(config, &step.inputs, step.form, rank, &vec![true; step.inputs.len()]);
        let expected = |source: u32| all.iter().filter(|(row, ..)| row.source == source).count();
        let found = |source: u32| outputs.range(source).len();
        let alive = self.sources(at, masked, (&expected, &found))?;
        let rows: Vec<_> = all.into_iter().filter(|(row, ..)| alive[row.source as usize]).collect();
        if outputs.len() != rows.len() {
            return Err(broken(format!("{} rows and not {}", outputs.len(), rows.len())));
        }
        for (at, (row, experts, weights)) in rows.iter().enumerate() {
            let zeros = vec![0.0; top_k];
            let weights = if step.weighted { weights } else { &zeros };
            let is_right = outputs.range(row.source).contains(&at)
                && outputs.tokens()[at] == row.token
                && outputs.values()[at * row.values.len()..][..row.values.len()] == row.values
                && outputs.scales()[at * row.scales.len()..][..row.scales.len()] == row.scales
                && outputs.experts()[at * top_k..][..top_k] == experts[..]
                && outputs.weights()[at * top_k..][..top_k] == weights[..];
            if !is_right {
                return Err(broken(format!("row {at} is not that of {row:?}")));
            }
        }
        self.stage.pass_here();
        let salt = self.salt(at);
        let results: Vec<Bf16> = rows
            .iter()
            .flat_map(|(row, ..)| {
                (0..config.hidden as usize).map(move |c| result(salt, rank, row.source, row.token, 0, c))
            })
            .collect();
        came.results_mut().copy_from_slice(&results);
        self.stage.count("rows received, throughput");
        Ok(())
    }

    /// Of results: those of each slot and step differ.
    fn salt(&self, at: u32) -> u32 {
        1 + at + 16 * self.slot
    }

    /// The combined rows are those of the ranks that have answered, and those that have not are masked and told of.
    fn check_combined(
        &mut self,
        step: &Step,
        at: u32,
        before: &[u32],
        report: Result<Report, EpError>,
        (out, biases, weights): (Vec<Bf16>, &[&[Bf16]], Option<Vec<f32>>),
    ) -> Result<Went, Broken> {
        let config = &self.plan.config;
        let asked = Asked {
            config,
            step,
            lost: self.plan.options.lost,
            salt: self.salt(at),
            rank: self.rank,
            biases,
        };
        let report = match report {
            Ok(report) => report,
            Err(EpError::WeightLost { tokens, masked }) => {
                self.see(at, &masked)?;
                let fits = |answered: &[bool]| asked.answer(answered).short == tokens;
                if self.plan.options.lost != crossdock_ep::LostWeight::Fail
                    || tokens == 0
                    || !self.possible(before, &masked).iter().any(|answered| fits(answered))
                {
                    return Err(self.broken(at, format!("{tokens} tokens lost weight with {masked:?}")));
                }
                self.stage.count("weight lost, an error");
                return Ok(Went::Lost);
            }
            Err(error) => return self.judge(at, &error, Place::Results),
        };
        self.see(at, &report.masked)?;
        self.check_number(at)?;
        let differs = |odd: Odd| !matches!(odd, Odd::WrongCombined | Odd::Cut(Cut::AfterCombine));
        if !self.is_alike(step, differs) {
            return Err(self.broken(at, format!("different calls were combined: {:?}", step.odd)));
        }
        if self.odd(step).is_some() {
            return Ok(Went::Well);
        }
        let lost = report.lost.clone();
        let got = |answer: &Answer| {
            answer.out == out
                && answer.lost == lost
                && weights.as_ref().is_none_or(|weights| *weights == answer.weights)
                && (answer.short == 0 || self.plan.options.lost != crossdock_ep::LostWeight::Fail)
        };
        let possible = self.possible(before, &report.masked);
        if !possible.iter().any(|answered| got(&asked.answer(answered))) {
            let what = format!(
                "the {:?} rows are of no ranks that can have answered: masked {before:?} before and {:?} now, lost {lost:?}",
                step.mode, report.masked
            );
            return Err(self.broken(at, what));
        }
        self.stage.count(if report.masked.is_empty() { "combined, of all" } else { "combined, some masked" });
        if !lost.is_empty() {
            self.stage.count("weight lost, reported");
        }
        let hash = out.iter().fold(0_u64, |hash, value| hash.rotate_left(5) ^ u64::from(value.to_bits()));
        self.stage.note(hash);
        Ok(Went::Well)
    }

    /// Who can have answered: whoever was masked before has not, and whoever is not masked now has.
    fn possible(&self, before: &[u32], now: &[u32]) -> Vec<Vec<bool>> {
        let open: Vec<u32> = now.iter().copied().filter(|rank| !before.contains(rank)).collect();
        (0..1_u32 << open.len())
            .map(|bits| {
                let open_answered =
                    |rank: &u32| open.iter().position(|o| o == rank).map(|at| bits >> at & 1 != 0);
                let ranks = 0..self.plan.config.ranks();
                ranks.map(|rank| open_answered(&rank).unwrap_or(!before.contains(&rank))).collect()
            })
            .collect()
    }

    /// Masks only grow, and only of ranks to which something has happened.
    fn see(&mut self, at: u32, masked: &[u32]) -> Result<(), Broken> {
        if let Some(back) = self.masked.iter().find(|rank| !masked.contains(rank)) {
            return Err(self.broken(at, format!("rank {back} was masked, and is not any more")));
        }
        for &rank in masked {
            if !self.stage.is_guilty(rank) {
                return Err(self.broken(at, format!("rank {rank} is masked, and nothing happened to it")));
            }
        }
        if self.masked.len() < masked.len() {
            self.masked = masked.to_vec();
            self.stage.disturb();
        }
        Ok(())
    }

    /// A call has been made with the masks of before. Of several slots each has calls of its own.
    fn say(&self) {
        if self.plan.config.slots == 1 {
            self.stage.says(self.rank, &self.masked);
        }
    }

    /// Too few ranks do not go on.
    fn check_number(&self, at: u32) -> Result<(), Broken> {
        let alive = self.plan.config.ranks() - self.masked.len() as u32;
        if alive >= self.plan.options.least_ranks || self.plan.config.slots > 1 {
            return Ok(());
        }
        Err(self.broken(at, format!("{alive} ranks go on")))
    }

    /// Nobody waits for whom it knows to be gone.
    fn check_waits(&self, at: u32, gone: &[(u32, Duration)], report: &Report) -> Result<(), Broken> {
        for (rank, learnt) in gone {
            let waited = report.waits[*rank as usize].saturating_sub(*learnt);
            if waited > A_LOOK {
                let what = format!("it has waited {waited:?} for rank {rank}, which it knew to be gone");
                return Err(self.broken(at, what));
            }
        }
        Ok(())
    }

    fn judge(&mut self, at: u32, error: &EpError, place: Place) -> Result<Went, Broken> {
        let steps = &self.plan.slots[self.slot as usize];
        let step = &steps[at as usize];
        let flips = self.stage.flips() > 0;
        let was_odd = at > 0 && steps[at as usize - 1].odd.is_some();
        let options = &self.plan.options;
        let (is_possible, went, what) = match error {
            EpError::Masked { .. } => (self.stage.is_guilty(self.rank), Went::Out, "error: Masked"),
            EpError::TooFewRanks { alive, least, masked } => {
                self.see(at, masked)?;
                let is_so = alive < least && *least == options.least_ranks;
                (is_so, Went::Out, "error: TooFewRanks")
            }
            EpError::Mismatch { .. } => {
                let odd = if place == Place::Dispatch { was_odd } else { step.odd.is_some() };
                (flips || odd, Went::Lost, "error: Mismatch")
            }
            EpError::Corrupted { .. } => (flips, Went::Lost, "error: Corrupted"),
            EpError::Nonsense { .. } => (flips, Went::Lost, "error: Nonsense"),
            EpError::Unfit { .. } => {
                let is_so = match self.odd(step) {
                    Some(Odd::WrongOutputs) => place == Place::Rows,
                    Some(Odd::WrongCombined) => place == Place::Results,
                    _ => false,
                };
                (is_so, Went::Lost, "error: Unfit")
            }
            _ => (false, Went::Out, "error: another"),
        };
        if !is_possible {
            return Err(self.broken(at, format!("{place:?} fails without a reason: {error}")));
        }
        self.stage.count(what);
        let told = error.to_string();
        self.stage.note(told.bytes().fold(0, |hash: u64, byte| hash.rotate_left(7) ^ u64::from(byte)));
        Ok(went)
    }
}

fn payload(form: Form) -> Payload {
    match form {
        Form::Bf16 => Payload::Bf16,
        Form::Fp8 | Form::Fp8PowerOfTwo => Payload::Fp8,
        Form::Fp8Ue8m0 => Payload::Fp8Ue8m0,
    }
}

fn rows(form: Form, rows: &[Bf16]) -> Rows<'_> {
    match form {
        Form::Bf16 => Rows::Bf16(rows),
        Form::Fp8 => Rows::Fp8(rows, ScaleRule::Plain),
        Form::Fp8PowerOfTwo => Rows::Fp8(rows, ScaleRule::PowerOfTwo),
        Form::Fp8Ue8m0 => Rows::Fp8Ue8m0(rows),
    }
}

/// A form that no step has but an odd one.
const OTHER: Payload = Payload::Opaque { row_bytes: 16, scale_bytes: 0 };
/// Who sleeps looks again after this, and once more.
const A_LOOK: Duration = Duration::from_millis(45);
const NOTHING: Bf16 = Bf16::from_bits(0x7fff);
