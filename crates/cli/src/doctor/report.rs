//! What is told of a machine: to a person a page, to a program an object.

use std::fmt;

use serde::Serialize;

use super::checks::{self, Check, State};
use super::cuda::Cuda;
use super::facts::{Facts, Interface};
use crate::table::Table;

/// What was found, and what follows from it.
#[derive(Serialize)]
pub struct Report<'a> {
    /// The version of crossdock.
    crossdock: &'static str,
    /// The worst of the checks; a note is nothing bad.
    pub state: State,
    checks: Vec<Check>,
    /// Which ports crossdock uses here, in words.
    follows: Vec<String>,
    facts: &'a Facts,
}

impl<'a> Report<'a> {
    pub fn of(facts: &'a Facts) -> Self {
        let checks = checks::all(facts);
        Self {
            crossdock: env!("CARGO_PKG_VERSION"),
            state: match checks::worst(&checks) {
                State::Note => State::Good,
                worst => worst,
            },
            follows: follows(facts),
            checks,
            facts,
        }
    }
}

/// Which ports are used between which peers.
fn follows(facts: &Facts) -> Vec<String> {
    let tried = &facts.tried;
    let works = |what: &Option<String>| what.is_none();
    let mut lines = vec![match works(&tried.memfd) && works(&tried.unix_sockets) && works(&tried.pidfd) {
        true => "Peers on this host: shm, by stores into each other's pools.".to_owned(),
        false => "Peers on this host: not shm, for what the checks say; tcp over the loopback interface."
            .to_owned(),
    }];
    let mut reached: Vec<&Interface> =
        facts.interfaces.iter().filter(|interface| checks::can_carry(interface)).collect();
    reached.sort_by_key(|interface| std::cmp::Reverse(interface.mbit_per_s));
    let names: Vec<String> =
        reached.iter().take(INTERFACES_NAMED).map(|interface| checks::described(interface)).collect();
    lines.push(match (works(&tried.tcp_sockets), names.is_empty()) {
        (false, _) => "Peers on other hosts: none, as TCP does not work.".to_owned(),
        (true, true) => "Peers on other hosts: none, until an interface is up.".to_owned(),
        (true, false) => format!("Peers on other hosts: tcp, over {}.", names.join("; ")),
    });
    let rails = checks::rails(facts);
    if !rails.is_empty() {
        let names: Vec<String> =
            rails.iter().map(|(device, port)| format!("{}/{}", device.name, port.number)).collect();
        let speed: f64 = rails.iter().filter_map(|(_, port)| port.gbit_per_s).sum();
        lines.push(format!("Ready for RDMA: {}, together {speed} Gbit/s; used where a node names a verbs port (docs/rdma.md).", names.join(", ")));
    } else if !facts.topology.devices.is_empty() {
        lines.push("Ready for RDMA: no port, for what the checks say.".to_owned());
    }
    lines
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernel = self.facts.kernel.as_deref().unwrap_or("unknown");
        writeln!(f, "crossdock {} on Linux {kernel}, {}\n", self.crossdock, std::env::consts::ARCH)?;
        for group in groups(&self.checks) {
            group.fmt(f)?;
        }
        for table in [interfaces(self.facts), ports(self.facts), gpus(self.facts)].into_iter().flatten() {
            write!(f, "\n{table}")?;
        }
        writeln!(f)?;
        for line in &self.follows {
            writeln!(f, "{line}")?;
        }
        write!(f, "{}", self.sum())
    }
}

impl Report<'_> {
    fn sum(&self) -> String {
        let of = |state| self.checks.iter().filter(|check| check.state == state).count();
        let counts = [State::Unusable, State::Degraded, State::Note, State::Good]
            .map(|state| format!("{} {}", of(state), state.name()));
        format!("All in all: {} ({}).", self.state.name(), counts.join(", "))
    }
}

/// Checks that are told together: the same of several devices.
struct Group<'a> {
    first: &'a Check,
    of: Vec<&'a str>,
    /// Whether they say different things, all of them good.
    differs: bool,
}

fn groups(checks: &[Check]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for check in checks {
        let fits = |group: &&mut Group<'_>| {
            let is_good = check.state == State::Good && check.of.is_some();
            let is_same = group.first.says == check.says && group.first.advice == check.advice;
            group.first.name == check.name && group.first.state == check.state && (is_good || is_same)
        };
        let of = check.of.as_deref();
        match groups.iter_mut().find(fits) {
            Some(group) => {
                group.differs |= group.first.says != check.says;
                group.of.extend(of);
            }
            None => groups.push(Group { first: check, of: of.into_iter().collect(), differs: false }),
        }
    }
    groups
}

impl Group<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Check { name, state, says, advice, .. } = self.first;
        let text = match (&self.of[..], self.differs) {
            ([], _) => says.clone(),
            (of, false) => format!("{}: {says}", of.join(", ")),
            (of, true) => format!("{} (--json has each)", of.join(", ")),
        };
        let mut lines = wrapped(&text, TEXT_WIDTH);
        writeln!(f, "{:<8}  {name:<14}  {}", state.name(), lines.next().unwrap_or_default())?;
        for line in lines {
            writeln!(f, "{:26}{line}", "")?;
        }
        for (at, line) in wrapped(advice.as_deref().unwrap_or_default(), TEXT_WIDTH - 3).enumerate() {
            writeln!(f, "{:26}{} {line}", "", if at == 0 { "->" } else { "  " })?;
        }
        Ok(())
    }
}

/// The text in lines of so many letters, cut between words.
fn wrapped(text: &str, width: usize) -> impl Iterator<Item = String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines.into_iter()
}

fn interfaces(facts: &Facts) -> Option<Table> {
    let mut table = Table::new(&["interface", "Gbit/s", "MTU", "addresses"]);
    let shown: Vec<&Interface> =
        facts.interfaces.iter().filter(|one| one.is_loopback || checks::can_carry(one)).collect();
    for interface in &shown {
        table.row(vec![
            interface.name.clone(),
            or_dash(interface.mbit_per_s.map(|speed| speed as f64 / 1000.0)),
            or_dash(interface.mtu_bytes),
            interface.addresses.join(" "),
        ]);
    }
    (!shown.is_empty()).then_some(table)
}

fn ports(facts: &Facts) -> Option<Table> {
    let mut table = Table::new(&[
        "RDMA port",
        "state",
        "layer",
        "Gbit/s",
        "GID",
        "interface",
        "MTU",
        "node",
        "PCI",
        "PCIe",
        "firmware",
    ]);
    let devices = &facts.topology.devices;
    let every = devices.iter().flat_map(|device| device.ports.iter().map(move |port| (device, port)));
    for (device, port) in every {
        let pci = device.pci.as_ref();
        let gid = port.best_gid().map(|gid| {
            let address = gid.ipv4().map_or_else(|| gid.address.to_string(), |address| address.to_string());
            format!("{} {address}", gid.index)
        });
        table.row(vec![
            format!("{}/{}", device.name, port.number),
            port.state.name().into(),
            port.link_layer.name().into(),
            or_dash(port.gbit_per_s),
            or_dash(gid),
            or_dash(port.interfaces.first()),
            or_dash(port.interface_mtu),
            or_dash(device.node()),
            or_dash(pci.map(|pci| pci.address)),
            or_dash(pci.and_then(|pci| pci.link).map(|link| link.current)),
            or_dash(device.firmware.as_ref()),
        ]);
    }
    (!devices.is_empty()).then_some(table)
}

/// What the CUDA driver calls each GPU, and how far it is from each RDMA device.
fn gpus(facts: &Facts) -> Option<Table> {
    let topology = &facts.topology;
    let devices: Vec<_> =
        topology.devices.iter().filter_map(|device| Some((device, device.pci.as_ref()?))).collect();
    let known = facts.cuda.as_ref().map_or(&[][..], Cuda::devices);
    let mut header = vec!["GPU", "model", "node"];
    header.extend((!known.is_empty()).then_some("CUDA"));
    header.extend(devices.iter().map(|(device, _)| device.name.as_str()));
    let mut table = Table::new(&header);
    for gpu in &topology.gpus {
        let mut row = vec![gpu.pci.address.to_string(), or_dash(gpu.model.as_ref()), or_dash(gpu.pci.node)];
        if !known.is_empty() {
            let address = gpu.pci.address.to_string();
            let device = known.iter().find(|device| device.pci_address == address);
            row.push(or_dash(device.map(|device| format!("cuda:{}", device.ordinal))));
        }
        row.extend(devices.iter().map(|(_, pci)| topology.distance(&gpu.pci, pci).to_string()));
        table.row(row);
    }
    (!topology.gpus.is_empty()).then_some(table)
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// What is left of a line of 110 letters.
const TEXT_WIDTH: usize = 84;
const INTERFACES_NAMED: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &'static str, of: Option<&str>, state: State, says: &str) -> Check {
        Check { name, of: of.map(str::to_owned), state, says: says.into(), advice: None }
    }

    #[test]
    fn what_is_said_of_several_is_said_once() {
        let checks = [
            check("port", Some("a"), State::Good, "400"),
            check("gid", Some("a"), State::Degraded, "empty"),
            check("port", Some("b"), State::Good, "200"),
            check("gid", Some("b"), State::Degraded, "empty"),
            check("gid", Some("c"), State::Degraded, "old"),
            check("cpu", None, State::Good, "two cores"),
        ];
        let told: Vec<_> = groups(&checks)
            .iter()
            .map(|group| (group.first.name, group.of.join(" "), group.differs))
            .collect();
        let wanted = [("port", "a b", true), ("gid", "a b", false), ("gid", "c", false), ("cpu", "", false)];
        assert_eq!(told, wanted.map(|(name, of, differs)| (name, of.to_owned(), differs)));
    }

    #[test]
    fn lines_are_cut_between_words() {
        assert_eq!(wrapped("one two  three", 7).collect::<Vec<_>>(), ["one two", "three"]);
        assert_eq!(wrapped("longer_than_that x", 4).collect::<Vec<_>>(), ["longer_than_that", "x"]);
        assert_eq!(wrapped("", 4).count(), 0);
    }
}
