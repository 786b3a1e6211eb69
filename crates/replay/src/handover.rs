//! What became of the requests of a replay.

use serde::{Deserialize, Serialize};

use crate::DockStats;

/// One delivered request. All times are of one clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// When it was to come.
    pub arrived_ns: u64,
    /// When the prefill side had pages for it.
    pub admitted_ns: u64,
    /// When the prefill side had computed it.
    pub ready_ns: u64,
    /// When the decode side had pages for it.
    pub granted_ns: u64,
    /// When the decode side had all of it.
    pub end_ns: u64,
    /// Its length.
    pub tokens: u32,
    /// Tokens of it that the decode side held.
    pub decode_held_tokens: u32,
    /// Tokens of it that the prefill side held.
    pub prefill_held_tokens: u32,
}

impl Handover {
    /// How long bytes could move: both sides had their pages, and there was something in them.
    pub fn moving_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.begin_ns())
    }

    /// How long it waited for pages, at either side.
    pub fn queued_ns(&self) -> u64 {
        let at_prefill = self.admitted_ns.saturating_sub(self.arrived_ns);
        at_prefill + self.granted_ns.saturating_sub(self.ready_ns.max(self.admitted_ns))
    }

    /// From its arrival until the decode side had it all.
    pub fn whole_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.arrived_ns)
    }

    /// Tokens that moved.
    pub fn moved_tokens(&self) -> u32 {
        self.tokens - self.decode_held_tokens.min(self.tokens)
    }

    /// When its bytes could begin to move.
    pub fn begin_ns(&self) -> u64 {
        self.ready_ns.max(self.granted_ns)
    }
}

/// All requests of a replay that came, whatever became of them. The times are of the hand-overs' clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Came {
    /// How many there are.
    pub requests: u64,
    /// When the first one came.
    pub first_ns: u64,
    /// When the last one was over: delivered, refused, failed or expired.
    pub last_ns: u64,
}

impl Came {
    /// A request comes.
    pub fn comes(&mut self, at_ns: u64) {
        self.first_ns = if self.requests == 0 { at_ns } else { self.first_ns.min(at_ns) };
        self.over(at_ns);
        self.requests += 1;
    }

    /// A request is over.
    pub fn over(&mut self, at_ns: u64) {
        self.last_ns = self.last_ns.max(at_ns);
    }
}

/// A whole replay in figures. Every share is between 0 and 1; GB are 10⁹ bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Requests that came.
    pub requests: u64,
    /// Those that were delivered.
    pub delivered: u64,
    /// From the first arrival until the last request was over, delivered or not.
    pub seconds: f64,
    /// Hand-over: from when both sides were ready until the decode side had it all. All quantiles are of the delivered
    /// requests.
    pub handover_ms_p50: f64,
    /// As before.
    pub handover_ms_p90: f64,
    /// As before.
    pub handover_ms_p99: f64,
    /// Waiting for pages at either side, before the hand-over.
    pub queue_ms_p50: f64,
    /// As before.
    pub queue_ms_p99: f64,
    /// From the arrival until the decode side had it all, computing in the prefill side's place included.
    pub whole_ms_p50: f64,
    /// As before.
    pub whole_ms_p99: f64,
    /// What `whole_ms` was to be.
    pub target_ms: f64,
    /// The share of all requests that met the target.
    pub met_target: f64,
    /// How many did so a second.
    pub goodput_requests_per_s: f64,
    /// The bytes that they needed, held or moved, a second.
    pub goodput_gb_per_s: f64,
    /// Tokens of the delivered requests.
    pub tokens: u64,
    /// The share of them that the decode side held.
    pub decode_hit_share: f64,
    /// The share of them that the prefill side held.
    pub prefill_hit_share: f64,
    /// The share of them that a side would hold that never evicts.
    pub possible_hit_share: f64,
    /// What the decode side needed of the delivered requests.
    pub gb_needed: f64,
    /// What was moved for it.
    pub gb_moved: f64,
    /// What was not, because the decode side held it.
    pub gb_saved: f64,
    /// While at least one hand-over was under way.
    pub gb_per_s: f64,
    /// The prefill side's pool.
    pub prefill: DockStats,
    /// The decode side's pool.
    pub decode: DockStats,
}

impl Summary {
    /// Adds up what came, and was delivered so.
    pub fn of(came: Came, handovers: &[Handover], token_bytes: u64, target_ms: f64) -> Self {
        let sum = |each: fn(&Handover) -> u32| handovers.iter().map(|one| u64::from(each(one))).sum::<u64>();
        let gb = |tokens: u64| (tokens * token_bytes) as f64 / 1e9;
        let seconds = came.last_ns.saturating_sub(came.first_ns) as f64 / 1e9;
        let good: Vec<&Handover> =
            handovers.iter().filter(|one| one.whole_ns() as f64 / 1e6 <= target_ms).collect();
        let good_tokens = good.iter().map(|one| u64::from(one.tokens)).sum();
        let tokens = sum(|one| one.tokens);
        let held = sum(|one| one.decode_held_tokens);
        let moved_gb = gb(sum(Handover::moved_tokens));
        let moving = Milliseconds::of(handovers, Handover::moving_ns);
        let queued = Milliseconds::of(handovers, Handover::queued_ns);
        let whole = Milliseconds::of(handovers, Handover::whole_ns);
        Self {
            requests: came.requests,
            delivered: handovers.len() as u64,
            seconds,
            handover_ms_p50: moving.quantile(0.5),
            handover_ms_p90: moving.quantile(0.9),
            handover_ms_p99: moving.quantile(0.99),
            queue_ms_p50: queued.quantile(0.5),
            queue_ms_p99: queued.quantile(0.99),
            whole_ms_p50: whole.quantile(0.5),
            whole_ms_p99: whole.quantile(0.99),
            target_ms,
            met_target: share(good.len() as f64, came.requests as f64),
            goodput_requests_per_s: share(good.len() as f64, seconds),
            goodput_gb_per_s: share(gb(good_tokens), seconds),
            tokens,
            decode_hit_share: share(held as f64, tokens as f64),
            prefill_hit_share: share(sum(|one| one.prefill_held_tokens) as f64, tokens as f64),
            possible_hit_share: 0.0,
            gb_needed: gb(tokens),
            gb_moved: moved_gb,
            gb_saved: gb(held),
            gb_per_s: share(moved_gb, busy_s(handovers)),
            prefill: DockStats::default(),
            decode: DockStats::default(),
        }
    }

    /// What there is to read, line by line: what it is, and the figure with its unit.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let percent = |share: f64| format!("{:.1} %", share * 100.0);
        let pool = |stats: &DockStats| {
            let pressure = share(stats.pressure_ns as f64 / 1e9, self.seconds);
            let (peak, all, evicted) = (stats.peak_pages, stats.pages, stats.evicted_pages);
            format!("{peak} of {all}, {evicted}, {}", percent(pressure))
        };
        vec![
            ("requests: came, delivered", format!("{}, {}", self.requests, self.delivered)),
            ("seconds", format!("{:.1}", self.seconds)),
            (
                "hand-over ms of the delivered: p50, p90, p99",
                format!(
                    "{:.2}, {:.2}, {:.2}",
                    self.handover_ms_p50, self.handover_ms_p90, self.handover_ms_p99
                ),
            ),
            (
                "queueing ms of the delivered: p50, p99",
                format!("{:.2}, {:.2}", self.queue_ms_p50, self.queue_ms_p99),
            ),
            (
                "arrival to held ms of the delivered: p50, p99",
                format!("{:.2}, {:.2}", self.whole_ms_p50, self.whole_ms_p99),
            ),
            (
                "target ms, met by so many of all",
                format!("{:.0}, {}", self.target_ms, percent(self.met_target)),
            ),
            (
                "goodput: requests/s, GB/s needed",
                format!("{:.1}, {:.2}", self.goodput_requests_per_s, self.goodput_gb_per_s),
            ),
            (
                "prefix hits of the delivered: decode, prefill, unlimited pool",
                format!(
                    "{}, {}, {}",
                    percent(self.decode_hit_share),
                    percent(self.prefill_hit_share),
                    percent(self.possible_hit_share)
                ),
            ),
            ("GB: needed, moved, saved", {
                format!("{:.2}, {:.2}, {:.2}", self.gb_needed, self.gb_moved, self.gb_saved)
            }),
            ("GB/s while moving", format!("{:.2}", self.gb_per_s)),
            ("decode pages: peak use, evicted, pressed for", pool(&self.decode)),
            ("prefill pages: peak use, evicted, pressed for", pool(&self.prefill)),
        ]
    }
}

/// Times of one kind, the shortest first.
struct Milliseconds(Vec<f64>);

impl Milliseconds {
    fn of(handovers: &[Handover], each: fn(&Handover) -> u64) -> Self {
        let mut sorted: Vec<f64> = handovers.iter().map(|one| each(one) as f64 / 1e6).collect();
        sorted.sort_by(f64::total_cmp);
        Self(sorted)
    }

    fn quantile(&self, share: f64) -> f64 {
        quantile(&self.0, share)
    }
}

/// The least of the values that this share of them does not exceed (the nearest rank); 0 of none. They are sorted, the
/// smallest first.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    // With a hair of tolerance: a rank that is whole need not be so in floating point.
    let rank = (share * sorted.len() as f64 - 1e-9).ceil() as usize;
    let at = rank.clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).copied().unwrap_or(0.0)
}

/// Time in which at least one hand-over was under way.
fn busy_s(handovers: &[Handover]) -> f64 {
    let mut spans: Vec<(u64, u64)> = handovers.iter().map(|one| (one.begin_ns(), one.end_ns)).collect();
    spans.sort_unstable();
    let (mut busy_ns, mut covered_ns) = (0, 0);
    for (begin, end) in spans {
        let begin = begin.max(covered_ns);
        if end > begin {
            busy_ns += end - begin;
            covered_ns = end;
        }
    }
    busy_ns as f64 / 1e9
}

/// 0 of nothing.
fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn handover(times_ms: [u64; 5], tokens: u32, held: u32) -> Handover {
        let [arrived_ns, admitted_ns, ready_ns, granted_ns, end_ns] = times_ms.map(|ms| ms * MS);
        Handover {
            arrived_ns,
            admitted_ns,
            ready_ns,
            granted_ns,
            end_ns,
            tokens,
            decode_held_tokens: held,
            prefill_held_tokens: 2 * held,
        }
    }

    #[test]
    fn a_request_waits_computes_and_moves() {
        // The decode side is ready first.
        let one = handover([10, 12, 15, 11, 20], 100, 0);
        assert_eq!((one.queued_ns(), one.moving_ns(), one.whole_ns()), (2 * MS, 5 * MS, 10 * MS));
        // The prefill side is.
        let one = handover([10, 12, 15, 18, 20], 100, 0);
        assert_eq!((one.queued_ns(), one.moving_ns(), one.whole_ns()), (5 * MS, 2 * MS, 10 * MS));
    }

    #[test]
    fn figures_add_up() {
        let handovers = [
            handover([1000, 1000, 1000, 1000, 1010], 1000, 0),
            handover([1000, 1000, 1000, 1000, 1020], 1000, 500),
            handover([2500, 2500, 2500, 2980, 3000], 2000, 500),
        ];
        let mut came = Came::default();
        [1000, 1000, 2500, 1700, 2600].iter().for_each(|at_ms| came.comes(at_ms * MS));
        handovers.iter().for_each(|one| came.over(one.end_ns));
        let summary = Summary::of(came, &handovers, 1_000_000, 100.0);
        assert_eq!((summary.requests, summary.delivered, summary.seconds), (5, 3, 2.0));
        assert_eq!((summary.handover_ms_p50, summary.handover_ms_p99), (20.0, 20.0));
        assert_eq!((summary.queue_ms_p50, summary.queue_ms_p99), (0.0, 480.0));
        assert_eq!((summary.met_target, summary.goodput_requests_per_s), (0.4, 1.0));
        assert_eq!(summary.goodput_gb_per_s, 1.0);
        assert_eq!((summary.gb_needed, summary.gb_moved, summary.gb_saved), (4.0, 3.0, 1.0));
        assert_eq!((summary.decode_hit_share, summary.prefill_hit_share), (0.25, 0.5));
        // 20 ms twice.
        assert_eq!(summary.gb_per_s, 75.0);
    }

    #[test]
    fn requests_that_are_not_delivered_take_their_time() {
        // The first of a hundred is held at once, the others wait for a minute; the pool is full all the time.
        let mut came = Came::default();
        (0..100).for_each(|_| came.comes(0));
        came.over(10 * MS);
        came.over(60_000 * MS);
        let summary = Summary {
            decode: DockStats { pressure_ns: 59_000 * MS, ..DockStats::default() },
            ..Summary::of(came, &[handover([0, 0, 0, 0, 10], 1000, 0)], 1_000_000, 100.0)
        };
        assert_eq!((summary.seconds, summary.met_target), (60.0, 0.01));
        assert_eq!((summary.goodput_requests_per_s, summary.goodput_gb_per_s), (1.0 / 60.0, 1.0 / 60.0));
        let pressed = summary.lines().into_iter().find(|(what, _)| what.starts_with("decode pages"));
        assert!(pressed.is_some_and(|(_, figure)| figure.ends_with(", 98.3 %")));
        // All were refused as they came.
        let mut came = Came::default();
        [7, 3].into_iter().for_each(|at_ns| came.comes(at_ns));
        assert_eq!(came, Came { requests: 2, first_ns: 3, last_ns: 7 });
    }

    #[test]
    fn a_quantile_is_the_nearest_rank() {
        let sorted: Vec<f64> = (1..=100).map(f64::from).collect();
        for (share, value) in
            [(0.0, 1.0), (0.005, 1.0), (0.07, 7.0), (0.5, 50.0), (0.901, 91.0), (0.99, 99.0), (1.0, 100.0)]
        {
            assert_eq!(quantile(&sorted, share), value, "{share}");
        }
        let two = |share| quantile(&[1.0, 2.0], share);
        assert_eq!((two(0.5), two(0.51), two(0.99), quantile(&[], 0.5)), (1.0, 2.0, 2.0, 0.0));
    }

    #[test]
    fn nothing_is_no_division_by_zero() {
        let summary = Summary::of(Came::default(), &[], 1, 1.0);
        assert_eq!(summary, Summary { target_ms: 1.0, ..Summary::default() });
        assert!(summary.lines().iter().all(|(_, figure)| !figure.contains("NaN")));
    }
}
