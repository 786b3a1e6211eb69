//! Network interfaces, for TCP.

use super::{Check, count};
use crate::doctor::facts::{Facts, Interface};

pub fn checks(facts: &Facts) -> Vec<Check> {
    let up: Vec<&Interface> = facts.interfaces.iter().filter(|interface| can_carry(interface)).collect();
    let Some(fastest) = up.iter().max_by_key(|interface| (interface.mbit_per_s, interface.is_physical))
    else {
        return vec![
            Check::note("network", "no interface but the loopback is up: peers are on this host alone")
                .advice("ip link set NAME up, and give it an address"),
        ];
    };
    let what = format!(
        "{} up, the fastest {}",
        count(up.len(), "interface is", "interfaces are"),
        described(fastest)
    );
    let small = up.iter().filter(|interface| {
        interface.mbit_per_s.is_some_and(|speed| speed >= FAST_MBIT_PER_S)
            && interface.mtu_bytes.is_some_and(|mtu| mtu < JUMBO)
    });
    let small: Vec<&str> = small.map(|interface| interface.name.as_str()).collect();
    vec![match small.first() {
        None => Check::good("network", what),
        Some(first) => {
            Check::note("network", format!("{what}; small packets cost TCP speed on {}", small.join(", ")))
                .advice(format!(
                    "ip link set {first} mtu 9000, where the switches allow it, and the same on the others"
                ))
        }
    }]
}

/// Whether peers elsewhere could be reached over it. Software interfaces that carry nothing have no address.
pub fn can_carry(interface: &Interface) -> bool {
    interface.is_up && !interface.is_loopback && (interface.is_physical || !interface.addresses.is_empty())
}

/// Its name and speed.
pub fn described(interface: &Interface) -> String {
    match interface.mbit_per_s {
        Some(speed) => format!("{} at {} Gbit/s", interface.name, speed as f64 / 1000.0),
        None => format!("{}, which tells no speed", interface.name),
    }
}

const FAST_MBIT_PER_S: u64 = 50_000;
const JUMBO: u32 = 4200;
