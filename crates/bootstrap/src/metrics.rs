//! What `GET /metrics` tells, in Prometheus' text format.
//!
//! The figures are a dozen counters and one histogram, most of them kept by the registry itself, so they are written
//! out here: a metrics library would have to be fed with them at each request.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::problem::ErrorCode;
use crate::registry::{Registered, Tally};
use crate::worker::{Role, State};

/// What a server counts beside its registry. Each figure only grows.
#[derive(Default)]
pub(crate) struct Metrics {
    registered: [AtomicU64; REGISTERED.len()],
    deregistered: AtomicU64,
    refused: [AtomicU64; ErrorCode::ALL.len()],
    times: [Histogram; Request::ALL.len()],
}

/// Requests whose times are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Register,
    Renew,
    Deregister,
    Worker,
    Workers,
    Group,
    Groups,
    TellRooms,
    AskRooms,
    /// One that may be kept waiting, whatever it asks for: its time says nothing about the server.
    Wait,
    Health,
    Metrics,
    /// One that was refused before it could be told what it is.
    Other,
}

impl Request {
    const ALL: [Request; 13] = [
        Request::Register,
        Request::Renew,
        Request::Deregister,
        Request::Worker,
        Request::Workers,
        Request::Group,
        Request::Groups,
        Request::TellRooms,
        Request::AskRooms,
        Request::Wait,
        Request::Health,
        Request::Metrics,
        Request::Other,
    ];

    fn name(self) -> &'static str {
        match self {
            Request::Register => "register",
            Request::Renew => "renew",
            Request::Deregister => "deregister",
            Request::Worker => "worker",
            Request::Workers => "workers",
            Request::Group => "group",
            Request::Groups => "groups",
            Request::TellRooms => "tell_rooms",
            Request::AskRooms => "ask_rooms",
            Request::Wait => "wait",
            Request::Health => "health",
            Request::Metrics => "metrics",
            Request::Other => "other",
        }
    }
}

/// What is there at the moment of the request.
pub(crate) struct Present<'a> {
    pub(crate) workers: &'a [(Role, State)],
    pub(crate) groups_complete: usize,
    pub(crate) groups_incomplete: usize,
    pub(crate) rooms: usize,
    pub(crate) waiting: usize,
    pub(crate) tally: Tally,
    pub(crate) uptime: Duration,
}

impl Metrics {
    pub(crate) fn registered(&self, outcome: Registered) {
        self.registered[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn deregistered(&self) {
        self.deregistered.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn refused(&self, code: ErrorCode) {
        self.refused[code as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn answered(&self, request: Request, time: Duration) {
        self.times[request as usize].add(time);
    }

    pub(crate) fn text(&self, present: &Present) -> String {
        let mut page = Page(String::with_capacity(8 * 1024));
        page.workers(present.workers);
        page.family(
            "groups",
            "gauge",
            "Groups with any member registered, by whether all their ranks are ready.",
        );
        page.sample("groups", &[("complete", "true")], present.groups_complete as u64);
        page.sample("groups", &[("complete", "false")], present.groups_incomplete as u64);
        page.one(
            "rooms",
            "gauge",
            "Rooms whose data-parallel rank is known because it was told.",
            present.rooms as u64,
        );
        page.one("waiting", "gauge", "Requests that are kept waiting.", present.waiting as u64);

        page.family(
            "registrations_total",
            "counter",
            "Registrations and renewals that were granted, by what they did.",
        );
        for (outcome, name) in REGISTERED {
            let count = self.registered[outcome as usize].load(Ordering::Relaxed);
            page.sample("registrations_total", &[("outcome", name)], count);
        }
        let deregistered = self.deregistered.load(Ordering::Relaxed);
        let Tally { expired, replaced, moved, overdue, rooms_told, rooms_expired } = present.tally;
        for (name, help, count) in [
            ("deregistrations_total", "Workers that were taken out by their own wish.", deregistered),
            ("expiries_total", "Workers that did not renew in time.", expired),
            ("replacements_total", "Nodes that were taken over by another incarnation.", replaced),
            ("moves_total", "Nodes whose address changed.", moved),
            (
                "warm_ups_overdue_total",
                "Workers whose time to warm up ended before they were ready.",
                overdue,
            ),
            ("rooms_told_total", "Rooms whose data-parallel rank was told.", rooms_told),
            ("rooms_expired_total", "Rooms that were forgotten when their time was over.", rooms_expired),
        ] {
            page.one(name, "counter", help, count);
        }
        page.family("refusals_total", "counter", "Requests that were refused, by cause.");
        for code in ErrorCode::ALL {
            let count = self.refused[code as usize].load(Ordering::Relaxed);
            page.sample("refusals_total", &[("cause", code.name())], count);
        }
        page.family(
            "request_seconds",
            "histogram",
            "Time from a request's head to its answer, by what was asked.",
        );
        for request in Request::ALL {
            self.times[request as usize].write(&mut page, request.name());
        }
        let help = "Time since the server started.";
        page.family("uptime_seconds", "gauge", help);
        page.line("uptime_seconds", &[], &present.uptime.as_secs_f64().to_string());
        page.0
    }
}

/// Counts times by how long they were.
#[derive(Default)]
struct Histogram {
    /// One for each bound, and one for what is longer than all of them.
    buckets: [AtomicU64; BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    fn add(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_US.iter().position(|bound| us <= *bound).unwrap_or(BOUNDS_US.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    fn write(&self, page: &mut Page, request: &str) {
        let mut count = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            count += bucket.load(Ordering::Relaxed);
            let bound = BOUNDS_US.get(index).map(|us| (*us as f64 / 1e6).to_string());
            let bound = bound.as_deref().unwrap_or("+Inf");
            page.sample("request_seconds_bucket", &[("request", request), ("le", bound)], count);
        }
        let sum = self.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        page.line("request_seconds_sum", &[("request", request)], &sum.to_string());
        page.sample("request_seconds_count", &[("request", request)], count);
    }
}

struct Page(String);

impl Page {
    fn workers(&mut self, workers: &[(Role, State)]) {
        self.family("workers", "gauge", "Workers that are registered, by role and state.");
        // A deployment may name its own roles; together they are one line, so that there are never many.
        for role in ["prefill", "decode", "both", "other"] {
            for state in [State::Ready, State::Warming] {
                let is = |(is, at): &&(Role, State)| {
                    let name = if matches!(is, Role::Other(_)) { "other" } else { is.as_str() };
                    name == role && *at == state
                };
                let count = workers.iter().filter(is).count() as u64;
                self.sample("workers", &[("role", role), ("state", state.as_str())], count);
            }
        }
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {PREFIX}{name} {help}\n# TYPE {PREFIX}{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        self.line(name, labels, &value.to_string());
    }

    /// No label's value here has a character that would need a backslash.
    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: &str) {
        let _ = write!(self.0, "{PREFIX}{name}");
        for (index, (label, is)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"{is}\"", if index == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }
}

pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
const PREFIX: &str = "crossdock_bootstrap_";
const REGISTERED: [(Registered, &str); 4] = [
    (Registered::Created, "created"),
    (Registered::Renewed, "renewed"),
    (Registered::Updated, "updated"),
    (Registered::Replaced, "replaced"),
];
const BOUNDS_US: [u64; 10] = [50, 100, 250, 500, 1_000, 2_500, 10_000, 50_000, 250_000, 1_000_000];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_has_a_place_of_its_own() {
        for (index, request) in Request::ALL.into_iter().enumerate() {
            assert_eq!(request as usize, index);
        }
        for (index, code) in ErrorCode::ALL.into_iter().enumerate() {
            assert_eq!(code as usize, index);
        }
        for (index, (outcome, _)) in REGISTERED.into_iter().enumerate() {
            assert_eq!(outcome as usize, index);
        }
    }

    #[test]
    fn a_histogram_counts_each_time_in_its_bucket_and_all_above() {
        let histogram = Histogram::default();
        for us in [1, 50, 51, 1_000, 2_000_000] {
            histogram.add(Duration::from_micros(us));
        }
        let mut page = Page(String::new());
        histogram.write(&mut page, "x");
        for line in [
            r#"request_seconds_bucket{request="x",le="0.00005"} 2"#,
            r#"request_seconds_bucket{request="x",le="0.0001"} 3"#,
            r#"request_seconds_bucket{request="x",le="1"} 4"#,
            r#"request_seconds_bucket{request="x",le="+Inf"} 5"#,
            r#"request_seconds_count{request="x"} 5"#,
            r#"request_seconds_sum{request="x"} 2.001102"#,
        ] {
            assert!(page.0.contains(&format!("{PREFIX}{line}\n")), "{line} is not in\n{}", page.0);
        }
    }
}
