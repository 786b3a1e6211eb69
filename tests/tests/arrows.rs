//! The house rules that `cargo metadata` can show: which crate may know which, and what no crate may be called.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Each crate of the library, and the crates of the library that it may depend on: the diagram of
/// `docs/architecture.md`, arrow by arrow.
const ARROWS: &[(&str, &[&str])] = &[
    ("crossdock-memory", &[]),
    ("crossdock-transport", &["crossdock-memory"]),
    ("crossdock-sim", PORT),
    ("crossdock-host", PORT),
    ("crossdock-shm", &["crossdock-memory", "crossdock-transport", "crossdock-host"]),
    ("crossdock-tcp", PORT),
    ("crossdock-verbs", PORT),
    ("crossdock-cuda", &["crossdock-memory", "crossdock-transport", "crossdock-host"]),
    ("crossdock-proto", &["crossdock-memory", "crossdock-transport"]),
    ("crossdock-engine", &["crossdock-memory", "crossdock-transport", "crossdock-proto"]),
    ("crossdock-flight", &["crossdock-transport", "crossdock-proto"]),
    (
        "crossdock-kv",
        &[
            "crossdock-memory",
            "crossdock-transport",
            "crossdock-proto",
            "crossdock-engine",
            "crossdock-flight",
        ],
    ),
    ("crossdock-ep", &["crossdock-memory", "crossdock-transport", "crossdock-proto", "crossdock-engine"]),
    ("crossdock-xfer", &["crossdock-memory", "crossdock-transport", "crossdock-proto", "crossdock-engine"]),
    ("crossdock-bootstrap", &[]),
    ("crossdock-replay", &["crossdock-memory", "crossdock-kv"]),
    (
        "crossdock",
        &[
            "crossdock-memory",
            "crossdock-transport",
            "crossdock-proto",
            "crossdock-engine",
            "crossdock-flight",
            "crossdock-kv",
            "crossdock-ep",
            "crossdock-xfer",
            "crossdock-bootstrap",
            "crossdock-cuda",
            "crossdock-shm",
            "crossdock-tcp",
            "crossdock-verbs",
        ],
    ),
];

/// A port depends on transport and memory alone, and on no other port. One that moves bytes between the processes of a host
/// also stands on the lanes between them.
const PORT: &[&str] = &["crossdock-memory", "crossdock-transport"];

/// Programs, examples and tests stand on top: nothing depends on them.
const TOPS: &[&str] = &[
    "crossdock-cli",
    "crossdock-ffi",
    "crossdock-benches",
    "crossdock-examples",
    "crossdock-tests",
    "crossdock-faults",
];

/// A crate with such a name has no idea of its own.
const NAMES_FOR_NOTHING: &[&str] = &["common", "util", "utils", "base", "core", "helpers", "misc", "shared"];

/// Crates that bring threads and an executor: they stay at the edges.
const EDGES_ONLY: &[(&str, &[&str])] = &[("tokio", &["crossdock-bootstrap", "crossdock-cli"])];

#[test]
fn arrows_point_down_only() {
    let house = House::read();
    let mut wrong = Vec::new();
    for (name, uses) in &house.arrows {
        if TOPS.contains(&name.as_str()) {
            continue;
        }
        let Some((_, may)) = ARROWS.iter().find(|(of, _)| of == name) else {
            wrong.push(format!("{name} is not in the diagram: add it there and to ARROWS"));
            continue;
        };
        let unexpected = uses.iter().filter(|used| !may.contains(&used.as_str()));
        wrong.extend(unexpected.map(|used| format!("{name} must not depend on {used}; it may use {may:?}")));
    }
    for (name, _) in ARROWS {
        if !house.arrows.contains_key(*name) {
            wrong.push(format!("{name} is in the diagram, and not in the workspace"));
        }
    }
    assert!(wrong.is_empty(), "the arrows of docs/architecture.md do not hold:\n{}", wrong.join("\n"));
}

#[test]
fn nothing_is_planted_into_what_is_shipped() {
    let house = House::read();
    let planting: Vec<&String> =
        house.features.iter().filter(|(_, f)| f.contains("planted-bugs")).map(|(n, _)| n).collect();
    assert_eq!(planting, ["crossdock-tests"], "only the tests may ask for planted bugs");
}

#[test]
fn every_crate_has_an_idea_of_its_own() {
    for name in House::read().arrows.keys() {
        let word = name.strip_prefix("crossdock-").unwrap_or(name);
        assert!(!NAMES_FOR_NOTHING.contains(&word), "{name}: a crate is named after its one idea");
    }
}

#[test]
fn the_executor_stays_at_the_edges() {
    let house = House::read();
    for (dependency, may) in EDGES_ONLY {
        let users = house.outside.iter().filter(|(_, uses)| uses.contains(*dependency));
        for (name, _) in users {
            let may_use = may.contains(&name.as_str()) || TOPS.contains(&name.as_str());
            assert!(may_use, "{name} must not depend on {dependency}: only {may:?} may, off the data path");
        }
    }
}

/// The workspace as cargo sees it. Dependencies of tests and benchmarks alone do not count: they may look up.
struct House {
    /// Crates of the workspace by what they use of it.
    arrows: BTreeMap<String, BTreeSet<String>>,
    /// The same, by what they use of others.
    outside: BTreeMap<String, BTreeSet<String>>,
    /// The features that a crate asks of crates of the workspace, for its tests too.
    features: BTreeMap<String, BTreeSet<String>>,
}

impl House {
    fn read() -> Self {
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let asked = Command::new(cargo)
            .args(["metadata", "--format-version=1", "--no-deps", "--offline", "--manifest-path", manifest])
            .output()
            .expect("cargo runs");
        assert!(asked.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&asked.stderr));
        let metadata: Value = serde_json::from_slice(&asked.stdout).expect("cargo metadata is JSON");
        let mut house = Self { arrows: BTreeMap::new(), outside: BTreeMap::new(), features: BTreeMap::new() };
        for package in list(&metadata["packages"]) {
            let name = text(&package["name"]);
            let (mut here, mut outside, mut features) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            for dependency in list(&package["dependencies"]) {
                let used = text(&dependency["name"]);
                let is_ours = !dependency["path"].is_null();
                // "dev" or "build"; nothing for what is shipped.
                let is_shipped = dependency["kind"].is_null();
                match (is_ours, is_shipped) {
                    (true, true) => drop(here.insert(used)),
                    (false, true) => drop(outside.insert(used)),
                    _ => {}
                }
                if is_ours {
                    features.extend(list(&dependency["features"]).iter().map(text));
                }
            }
            house.arrows.insert(name.clone(), here);
            house.outside.insert(name.clone(), outside);
            house.features.insert(name, features);
        }
        house
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
