//! One rank of an experts' scene, in a process of its own.

use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use crossdock::experts::{
    Bf16, EpError, Group, GroupOptions, LatencyOutputs, Meeting, MeetingConfig, Payload, Registered, Report,
    Rows, ScaleOrder, ScaleRule, Slot, ThroughputOutputs, ThroughputStep, Tokens,
};
use crossdock::{Authentication, now_ns};
use crossdock_bootstrap::{Client, ClientConfig};

use super::Mode;
use super::content::{Content, SETS, decoded, factor, factor_of_all};
use super::talk::{Done, Said, Tell};

#[derive(Args)]
pub struct RankOptions {
    #[arg(long)]
    mode: Mode,
    #[arg(long)]
    rank: u32,
    /// Under what name the ranks of the scene find each other
    #[arg(long)]
    group: String,
    #[arg(long)]
    registry: String,
    #[arg(long)]
    deadline_s: u64,
}

pub fn work(options: &RankOptions) -> Result<ExitCode, Box<dyn Error>> {
    super::super::end_with_parent()?;
    say(&Said::Started);
    let mut lines = std::io::stdin().lock().lines();
    let mut hear = || -> Result<Option<Tell>, Box<dyn Error>> {
        Ok(lines.next().transpose()?.map(|line| serde_json::from_str(&line)).transpose()?)
    };
    let Ok(Some(Tell::Key { key })) = hear() else {
        return Err("the parent did not begin with the key".into());
    };
    let config = options.mode.group();
    let contents: Vec<Content> = (0..SETS).map(|set| Content::new(options.mode, &config, set)).collect();
    let mut meeting = MeetingConfig::new(config, options.rank, Authentication::PreSharedKey(key.to_vec()));
    let deadline = Duration::from_secs(options.deadline_s);
    meeting.options = GroupOptions { deadline, warm_up: deadline, ..GroupOptions::default() };
    let mut registry = ClientConfig::to(&options.registry);
    // A registry that is stopped must not keep a rank that wants to leave.
    registry.call_time = Duration::from_secs(2);
    let client = Client::new(registry)?;
    let Registered { group, registration } =
        Meeting::open(meeting)?.meet_at(&client, &options.group, MEETING)?;
    let mut bench = Bench::new(options.mode, contents, group);
    say(&Said::Ready);
    while let Some(told) = hear()? {
        match told {
            Tell::Steps { count } => say(&Said::Done(bench.steps(count)?)),
            Tell::End => break,
            Tell::Key { .. } => return Err("the parent tells a second key".into()),
        }
    }
    drop(bench);
    say(&Said::Bye { regions: mapped_regions()? });
    // The registry may be gone by now; what it still lists ends with its time to live.
    let _ = registration.deregister();
    Ok(ExitCode::SUCCESS)
}

/// What a rank works with.
struct Bench {
    group: Group,
    contents: Vec<Content>,
    by_expert: LatencyOutputs,
    by_token: ThroughputOutputs,
    /// Where nothing arrives.
    nothing: ThroughputOutputs,
    mode: Mode,
    /// What comes back, by set and dead ranks.
    combined: HashMap<(usize, Vec<u32>), Vec<Bf16>>,
    out: Vec<Bf16>,
    /// Steps so far.
    steps: usize,
}

impl Bench {
    fn new(mode: Mode, contents: Vec<Content>, group: Group) -> Bench {
        let rank = group.rank();
        let combined =
            contents.iter().enumerate().map(|(set, of_set)| ((set, Vec::new()), of_set.combined(rank, &[])));
        Bench {
            combined: combined.collect(),
            by_expert: LatencyOutputs::new(&group, Payload::Fp8, ScaleOrder::ByRow),
            by_token: ThroughputOutputs::new(&group, Payload::Fp8),
            nothing: ThroughputOutputs::new(&group, Payload::Fp8),
            out: vec![Bf16::default(); contents[0].rows(rank).len()],
            mode,
            contents,
            group,
            steps: 0,
        }
    }

    fn steps(&mut self, count: u32) -> Result<Done, EpError> {
        let mut done = Done { masked: self.group.masked(), ..Done::default() };
        let mut lost = 0.0;
        for _ in 0..count {
            let report = match self.mode {
                Mode::Latency => self.latency(&mut done)?,
                Mode::Throughput => self.throughput(&mut done)?,
            };
            count_bytes(&report, &mut done);
            if !report.lost.is_empty() {
                done.steps_without += 1;
            }
            lost += self.verify(&report, &mut done);
            self.steps += 1;
        }
        done.lost_share = lost / f64::from(done.steps_without.max(1));
        Ok(done)
    }

    fn latency(&mut self, done: &mut Done) -> Result<Report, EpError> {
        let (rank, content) = (self.group.rank(), &self.contents[self.steps % SETS]);
        let (first, hidden) = (content.first_of(rank), content.hidden());
        let rows = Rows::Fp8(content.rows(rank), ScaleRule::Plain);
        let tokens = Tokens { rows, choices: content.choices(rank), weights: None };
        let (slot, meeting) = split(&mut self.group);
        let outputs = &mut self.by_expert;

        let met = meet(meeting, &mut self.nothing)?;
        let begin_ns = now_ns();
        let mut step = slot.dispatch(&tokens)?.latency(outputs)?;
        done.dispatch_ns.push(now_ns() - begin_ns);
        part(met)?;
        note_masks(step.report(), done);
        count_bytes(step.report(), done);

        for (at, expert) in (0..outputs.counts().len()).zip(first..) {
            check_expert(content, expert, at, outputs, &step.report().masked, done);
            for (row, result) in step.results_mut(at).chunks_exact_mut(hidden).enumerate() {
                multiply((outputs.row(at, row), &outputs.scales_of(at, row)), factor(expert), result);
            }
        }

        let met = meet(meeting, &mut self.nothing)?;
        let begin_ns = now_ns();
        let report = step.combine().receive(content.weights(rank), &mut self.out)?;
        done.combine_ns.push(now_ns() - begin_ns);
        part(met)?;
        Ok(report)
    }

    fn throughput(&mut self, done: &mut Done) -> Result<Report, EpError> {
        let (rank, content) = (self.group.rank(), &self.contents[self.steps % SETS]);
        let (first, hidden, top_k) = (content.first_of(rank), content.hidden(), content.top_k());
        let rows = Rows::Fp8(content.rows(rank), ScaleRule::Plain);
        let weights = Some(content.weights(rank));
        let tokens = Tokens { rows, choices: content.choices(rank), weights };
        let (slot, meeting) = split(&mut self.group);
        let outputs = &mut self.by_token;

        let met = meet(meeting, &mut self.nothing)?;
        let begin_ns = now_ns();
        let mut step = slot.dispatch(&tokens)?.throughput(outputs)?;
        done.dispatch_ns.push(now_ns() - begin_ns);
        part(met)?;
        note_masks(step.report(), done);
        count_bytes(step.report(), done);

        for source in 0..content.ranks() {
            check_source(content, rank, source, outputs, &step.report().masked, done);
        }
        let values = outputs.values().chunks_exact(hidden);
        let rows = values.zip(outputs.scales().chunks_exact(content.scale_bytes()));
        let chosen = outputs.experts().chunks_exact(top_k).zip(outputs.weights().chunks_exact(top_k));
        let results = step.results_mut().chunks_exact_mut(hidden);
        for (result, (row, (experts, weights))) in results.zip(rows.zip(chosen)) {
            multiply(row, factor_of_all(first, experts, weights).unwrap_or(0.0), result);
        }

        let met = meet(meeting, &mut self.nothing)?;
        let begin_ns = now_ns();
        let report = step.combine(None)?.receive(&[], None, &mut self.out)?;
        done.combine_ns.push(now_ns() - begin_ns);
        part(met)?;
        Ok(report)
    }

    /// Compares what came back with what has to. Gives the part of their weight that the tokens have lost.
    fn verify(&mut self, report: &Report, done: &mut Done) -> f64 {
        note_masks(report, done);
        let (rank, set) = (self.group.rank(), self.steps % SETS);
        let content = &self.contents[set];
        // The step in which a rank dies may still have had its answers.
        let dead = if report.lost.is_empty() { Vec::new() } else { report.masked.clone() };
        let lost = content.lost(rank, &dead);
        let expected =
            self.combined.entry((set, dead)).or_insert_with_key(|(_, dead)| content.combined(rank, dead));
        let rows = self.out.chunks_exact(content.hidden()).zip(expected.chunks_exact(content.hidden()));
        done.rows += rows.len() as u64;
        done.wrong += rows.filter(|(row, expected)| row != expected).count() as u64;
        if report.lost.is_empty() {
            return 0.0;
        }
        done.wrong += report.lost.iter().zip(&lost).filter(|(told, lost)| told != lost).count() as u64;
        let shares = lost.iter().enumerate().map(|(token, &lost)| content.lost_share(rank, token, lost));
        shares.map(f64::from).sum::<f64>() / lost.len() as f64
    }
}

/// The slot of the tokens, and the one in which the ranks wait for each other.
fn split(group: &mut Group) -> (&mut Slot, &mut Slot) {
    let [slot, meeting] = group.slots() else { unreachable!("the scene's groups have two slots") };
    (slot, meeting)
}

/// Goes on when all ranks are here: none of them has a token.
fn meet<'slot>(
    meeting: &'slot mut Slot,
    nothing: &mut ThroughputOutputs,
) -> Result<ThroughputStep<'slot>, EpError> {
    let nobody = Tokens { rows: Rows::Fp8(&[], ScaleRule::Plain), choices: &[], weights: None };
    meeting.dispatch(&nobody)?.throughput(nothing)
}

/// Goes on when all ranks have done what they met for.
fn part(met: ThroughputStep<'_>) -> Result<(), EpError> {
    met.combine(None)?.receive(&[], None, &mut []).map(drop)
}

fn count_bytes(report: &Report, done: &mut Done) {
    done.logical_bytes += report.logical_bytes;
    done.wire_bytes += report.wire_bytes;
}

fn note_masks(report: &Report, done: &mut Done) {
    if report.masked != done.masked {
        done.masked_ns.get_or_insert_with(now_ns);
        done.masked.clone_from(&report.masked);
    }
}

/// What an expert makes of a row.
fn multiply(row: (&[u8], &[u8]), factor: f32, result: &mut [Bf16]) {
    for (result, value) in result.iter_mut().zip(decoded(row)) {
        *result = Bf16::from_f32(value * factor);
    }
}

/// Compares the rows that came to an expert, which is this rank's one `at`.
fn check_expert(
    content: &Content,
    expert: u32,
    at: usize,
    outputs: &LatencyOutputs,
    masked: &[u32],
    done: &mut Done,
) {
    for source in 0..content.ranks() {
        let range = outputs.range(at, source);
        if range.is_empty() && masked.contains(&source) {
            continue;
        }
        let expected: Vec<usize> = content.who_chose(expert, source).collect();
        let is_right = |row: usize, token: usize| {
            outputs.sources()[at * outputs.rows() + row] as usize == token
                && (outputs.row(at, row), &outputs.scales_of(at, row)[..]) == content.row(source, token)
        };
        let rows = range.start as usize..range.end as usize;
        let right = rows.clone().zip(&expected).filter(|(row, token)| is_right(*row, **token)).count();
        let all = rows.len().max(expected.len());
        done.rows += all as u64;
        done.wrong += (all - right) as u64;
    }
}

/// Compares the rows that came to this rank from one.
fn check_source(
    content: &Content,
    rank: u32,
    source: u32,
    outputs: &ThroughputOutputs,
    masked: &[u32],
    done: &mut Done,
) {
    let rows = outputs.range(source);
    if rows.is_empty() && masked.contains(&source) {
        return;
    }
    let (hidden, scale_bytes, top_k) = (content.hidden(), content.scale_bytes(), content.top_k());
    let seen = (0..content.tokens(source)).map(|token| (token, content.as_seen_by(rank, source, token)));
    let expected: Vec<_> =
        seen.filter(|(_, (experts, _))| experts.iter().any(|&expert| expert >= 0)).collect();
    let is_right = |row: usize, (token, (experts, weights)): &(usize, (Vec<i64>, Vec<f32>))| {
        let values = &outputs.values()[row * hidden..][..hidden];
        let scales = &outputs.scales()[row * scale_bytes..][..scale_bytes];
        outputs.tokens()[row] as usize == *token
            && (values, scales) == content.row(source, *token)
            && outputs.experts()[row * top_k..][..top_k] == experts[..]
            && outputs.weights()[row * top_k..][..top_k] == weights[..]
    };
    let right = rows.clone().zip(&expected).filter(|(row, expected)| is_right(*row, expected)).count();
    let all = rows.len().max(expected.len());
    done.rows += all as u64;
    done.wrong += (all - right) as u64;
}

/// How many regions of groups this process maps.
fn mapped_regions() -> std::io::Result<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    Ok(maps.lines().filter(|line| line.contains("crossdock-ep-")).count() as u64)
}

fn say(what: &Said) {
    if let Ok(line) = serde_json::to_string(what) {
        // A parent that is gone ends this process.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}

/// How long the ranks may take to meet.
const MEETING: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use crossdock::experts::GroupConfig;

    use super::*;

    fn config() -> GroupConfig {
        GroupConfig { max_tokens: vec![7, 5, 9], experts: 10, top_k: 3, hidden: 256, ..Mode::Latency.group() }
    }

    /// Each rank on a thread, with the tokens that it takes for everybody's. `kill` leaves after its first steps.
    fn played(mode: Mode, sets_of: fn(u32) -> [usize; SETS], kill: Option<u32>) -> Vec<Vec<Done>> {
        let deadline = Duration::from_secs(60);
        let options = GroupOptions { deadline, warm_up: deadline, ..GroupOptions::default() };
        let groups = Group::in_process(&config(), &options).expect("the group is possible");
        std::thread::scope(|scope| {
            let rank = |group: Group| {
                scope.spawn(move || {
                    let rank = group.rank();
                    let contents =
                        sets_of(rank).into_iter().map(|set| Content::new(mode, &config(), set)).collect();
                    let mut bench = Bench::new(mode, contents, group);
                    let first = bench.steps(4).expect("all ranks are here");
                    if kill == Some(rank) {
                        return vec![first];
                    }
                    vec![first, bench.steps(4).expect("the others go on")]
                })
            };
            let ranks: Vec<_> = groups.into_iter().map(rank).collect();
            ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
        })
    }

    fn in_turn(_: u32) -> [usize; SETS] {
        [0, 1, 2]
    }

    #[test]
    fn every_row_is_compared_and_right() {
        for mode in [Mode::Latency, Mode::Throughput] {
            let told = played(mode, in_turn, None);
            let all: Vec<&Done> = told.iter().flatten().collect();
            assert!(all.iter().all(|done| done.wrong == 0 && done.steps_without == 0), "{all:?}");
            // In eight steps 21 tokens; in the latency mode a row for each of three choices, and one back.
            let rows: u64 = all.iter().map(|done| done.rows).sum();
            match mode {
                Mode::Latency => assert_eq!(rows, 8 * 21 * 4),
                Mode::Throughput => assert!((8 * 21 * 2..=8 * 21 * 4).contains(&rows), "{rows}"),
            }
        }
    }

    #[test]
    fn rows_of_another_step_are_wrong() {
        // One rank's sets take turns in another order: it sends what the others do not expect, and the other way round.
        let other = |rank| if rank == 1 { [0, 2, 1] } else { [0, 1, 2] };
        for mode in [Mode::Latency, Mode::Throughput] {
            let told = played(mode, other, None);
            assert!(told.iter().all(|of_rank| of_rank[0].wrong > 0), "{told:?}");
        }
    }

    #[test]
    fn what_a_dead_rank_costs_is_told() {
        for mode in [Mode::Latency, Mode::Throughput] {
            let told = played(mode, in_turn, Some(2));
            for done in [0, 1].map(|rank: usize| &told[rank][1]) {
                assert_eq!((done.wrong, &done.masked[..], done.steps_without), (0, &[2][..], 4));
                assert!(done.masked_ns.is_some() && (0.1..0.6).contains(&done.lost_share), "{done:?}");
            }
        }
    }

    #[test]
    fn regions_that_are_still_mapped_are_counted() {
        let groups = Group::in_process(&config(), &GroupOptions::default()).expect("the group is possible");
        assert!(mapped_regions().expect("the maps are there") >= 3);
        drop(groups);
    }
}
