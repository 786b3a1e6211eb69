//! The verdicts: what the facts of a machine mean for crossdock, and what to do about it. Each is a function of the facts
//! alone.

mod cuda;
mod gpu;
#[cfg(test)]
mod gpu_tests;
mod host;
mod network;
mod peer;
mod rdma;

use serde::Serialize;

use super::facts::Facts;

pub use network::{can_carry, described};
pub use rdma::rails;

/// How well a thing is; the worst is the largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Good,
    /// Nothing is wrong, but it is worth knowing.
    Note,
    /// Something is there and does not work, or not as well as it could.
    Degraded,
    /// crossdock cannot run here.
    Unusable,
}

/// A thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its name, the same on every machine.
    pub name: &'static str,
    /// The device or port that it is about, where there may be several.
    pub of: Option<String>,
    pub state: State,
    /// What was found and what it means, in a sentence.
    pub says: String,
    /// What to do, where it is not good.
    pub advice: Option<String>,
}

/// All of them, in the order of the page.
pub fn all(facts: &Facts) -> Vec<Check> {
    let mut checks = host::checks(facts);
    checks.extend(network::checks(facts));
    checks.extend(rdma::checks(facts));
    checks.extend(gpu::checks(facts));
    checks.extend(peer::checks(facts));
    checks
}

/// The worst of them.
pub fn worst(checks: &[Check]) -> State {
    checks.iter().map(|check| check.state).max().unwrap_or(State::Good)
}

impl Check {
    fn good(name: &'static str, says: impl Into<String>) -> Self {
        Self { name, of: None, state: State::Good, says: says.into(), advice: None }
    }

    fn note(name: &'static str, says: impl Into<String>) -> Self {
        Self { state: State::Note, ..Self::good(name, says) }
    }

    fn degraded(name: &'static str, says: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { state: State::Degraded, advice: Some(advice.into()), ..Self::good(name, says) }
    }

    fn unusable(name: &'static str, says: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { state: State::Unusable, ..Self::degraded(name, says, advice) }
    }

    fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    fn of(mut self, of: impl Into<String>) -> Self {
        self.of = Some(of.into());
        self
    }
}

impl State {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Degraded => "degraded",
            Self::Unusable => "unusable",
        }
    }
}

/// `1 core`, `2 cores`.
fn count(number: usize, one: &str, several: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { several })
}

/// Bytes as a person reads them.
fn bytes(bytes: u64) -> String {
    let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        None => format!("{bytes} B"),
        Some((unit, name)) => {
            let text = format!("{:.1}", bytes as f64 / *unit as f64);
            format!("{} {name}", text.trim_end_matches(".0"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::tried::Tried;

    /// What is refused is what a sandbox refuses; nothing else can be known of it here.
    #[test]
    fn what_crossdock_cannot_do_without_is_unusable() {
        let why = || Some("Operation not permitted (os error 1)".to_owned());
        let cases = [
            (Tried { memfd: why(), ..Tried::default() }, "memfd", State::Unusable),
            (Tried { unix_sockets: why(), ..Tried::default() }, "unix-sockets", State::Unusable),
            (Tried { tcp_sockets: why(), ..Tried::default() }, "tcp-sockets", State::Unusable),
            (Tried { pidfd: why(), ..Tried::default() }, "pidfd", State::Degraded),
        ];
        for (tried, name, state) in cases {
            let checks = all(&Facts { tried, ..Facts::default() });
            let check = checks.iter().find(|check| check.name == name).expect("it is there");
            assert_eq!(check.state, state, "{check:?}");
            assert!(check.says.contains("not permitted") && check.advice.is_some(), "{check:?}");
            assert_eq!(worst(&checks), state);
        }
        let works = all(&Facts::default());
        for name in ["memfd", "unix-sockets", "tcp-sockets", "pidfd"] {
            assert!(
                works.iter().any(|check| check.name == name && check.state == State::Good),
                "{name}: {works:?}"
            );
        }
    }

    #[test]
    fn states_are_ordered() {
        assert!(
            State::Good < State::Note && State::Note < State::Degraded && State::Degraded < State::Unusable
        );
        assert_eq!(worst(&[]), State::Good);
    }

    #[test]
    fn bytes_have_the_largest_unit_that_fits() {
        for (number, text) in
            [(0, "0 B"), (65_536, "64 KiB"), (1 << 30, "1 GiB"), (3 << 29, "1.5 GiB"), (10 << 40, "10 TiB")]
        {
            assert_eq!(bytes(number), text);
        }
    }
}
