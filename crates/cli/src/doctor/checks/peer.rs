//! What goes between this machine and a peer.

use super::Check;
use crate::doctor::facts::Facts;
use crate::doctor::peer::Pair;

pub fn checks(facts: &Facts) -> Vec<Check> {
    let Some(peer) = &facts.peer else { return Vec::new() };
    let works = |rail: &str| peer.pairs.iter().any(|pair| pair.ours == rail && pair.error.is_none());
    let mut checks: Vec<Check> = peer.pairs.iter().map(|one| pair(one, works(&one.ours))).collect();
    checks.extend(peer.alone.iter().map(|alone| {
        let advice = "open a port of the same kind on both machines; see the checks of both";
        Check::degraded("peer", format!("not tried: {}", alone.why), advice).of(&alone.rail)
    }));
    if let Some(error) = &peer.error {
        let advice = "run `crossdock doctor --listen ADDR` there, of the same version, and let TCP through";
        checks.push(Check::degraded("peer", format!("{}: {error}", peer.address), advice));
    }
    checks
}

/// Where each rail has a switch of its own, it reaches the peer's rail of the same place and no other: a pair that fails is
/// no fault as long as the rail has one that works.
fn pair(pair: &Pair, works: bool) -> Check {
    let of = format!("{} {} -> {}", pair.kind, pair.ours, pair.theirs);
    let check = match (&pair.error, &pair.measured) {
        (Some(trouble), _) if works => {
            Check::note("peer", format!("{}; this rail reaches another of the peer's", trouble.says))
        }
        (Some(trouble), _) => Check::degraded("peer", trouble.says.clone(), trouble.advice.clone()),
        (None, Some(measured)) => Check::good(
            "peer",
            format!(
                "{} arrived as they were sent; {:.2} GB/s, {:.1} us",
                super::bytes(measured.verified_bytes),
                measured.gb_per_s,
                measured.latency_us_p50
            ),
        ),
        (None, None) => Check::degraded("peer", "nothing was measured", "ask again"),
    };
    check.of(of)
}
