//! What a user of the facade, or of the registry, can name, against what was last agreed on: `facade.txt` beside this file.
//!
//! A change of it fails this test until `UPDATE_API=1` writes the file anew, so that it shows in the diff of the commit that
//! makes it. The list comes from rustdoc's JSON, which needs a nightly toolchain; so this is no part of `cargo test`, but of
//! `.ci/run api`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use public_api::PublicApi;
use serde_json::Value;

#[test]
fn the_facade_is_as_agreed() {
    let found = Facade::read().to_string();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("api/facade.txt");
    if std::env::var_os("UPDATE_API").is_some() {
        std::fs::write(&file, &found).expect("the list can be written");
        return;
    }
    let agreed = std::fs::read_to_string(&file).expect("the list is there");
    let (new, gone) = (lines_missing_from(&agreed, &found), lines_missing_from(&found, &agreed));
    assert!(
        new.is_empty() && gone.is_empty(),
        "the public API has changed.\nNew:\n  {}\nGone, which breaks users:\n  {}\nIf that is meant: UPDATE_API=1 .ci/run api",
        new.join("\n  "),
        gone.join("\n  ")
    );
}

/// The facade's own items, and of what it hands on from other crates those that it hands on. The registry is a crate that users
/// name themselves.
struct Facade {
    /// The items by crate.
    items: BTreeMap<String, BTreeSet<String>>,
}

impl Facade {
    fn read() -> Self {
        let json = rustdoc_json("crossdock");
        let mut items = BTreeMap::from([("crossdock".to_owned(), listed(&json).collect())]);
        items
            .insert("crossdock_bootstrap".to_owned(), listed(&rustdoc_json("crossdock-bootstrap")).collect());
        for (krate, names) in handed_on(&json) {
            let json = rustdoc_json(&krate.replace('_', "-"));
            let is_handed_on = |item: &String| names.iter().any(|name| is_of(item, &krate, name));
            let of_facade = listed(&json).filter(is_handed_on).collect();
            items.insert(krate, of_facade);
        }
        Self { items }
    }
}

impl std::fmt::Display for Facade {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (krate, items) in &self.items {
            writeln!(f, "# {krate}")?;
            items.iter().try_for_each(|item| writeln!(f, "{item}"))?;
        }
        Ok(())
    }
}

/// The names that the facade takes from each other crate of ours.
fn handed_on(json: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let text = std::fs::read_to_string(json).expect("rustdoc has written it");
    let docs: Value = serde_json::from_str(&text).expect("it is JSON");
    let mut names = BTreeMap::<String, BTreeSet<String>>::new();
    for item in docs["index"].as_object().expect("the items of the crate").values() {
        if let Some((krate, name)) =
            item["inner"]["use"]["source"].as_str().and_then(|source| source.split_once("::"))
            && krate.starts_with("crossdock_")
        {
            names.entry(krate.to_owned()).or_default().insert(name.to_owned());
        }
    }
    assert!(!names.is_empty(), "the facade hands nothing on: has the format of the JSON changed?");
    names
}

/// The public items of a crate, one a line, without what the compiler adds by itself.
fn listed(json: &Path) -> impl Iterator<Item = String> + use<> {
    let api: PublicApi = public_api::Builder::from_rustdoc_json(json)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .build()
        .unwrap_or_else(|error| panic!("the nightly toolchain and the public-api crate do not fit: {error}"));
    api.into_items().map(|item| item.to_string())
}

/// Whether an item is this one, or a part of it, or an implementation for it.
fn is_of(item: &str, krate: &str, name: &str) -> bool {
    let item = item.split_once(" for ").map_or(item, |(_, implementer)| implementer);
    let Some((_, path)) = item.split_once(&format!("{krate}::")) else {
        return false;
    };
    let rest = path.strip_prefix(name);
    rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_alphanumeric() || next == '_'))
}

fn rustdoc_json(krate: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = root.join("target/api");
    let asked = Command::new("cargo")
        // Of the toolchain that runs this test; the one that is asked for sets its own.
        .env_remove("CARGO")
        .env_remove("RUSTC")
        .env_remove("RUSTDOC")
        .env_remove("RUSTUP_TOOLCHAIN")
        .current_dir(&root)
        .args(["+nightly", "rustdoc", "--quiet", "--locked", "--lib", "--package", krate, "--target-dir"])
        .arg(&target)
        .args(["--", "-Zunstable-options", "--output-format=json", "--cap-lints=allow"])
        .output()
        .expect("cargo runs");
    assert!(asked.status.success(), "rustdoc of {krate}: {}", String::from_utf8_lossy(&asked.stderr));
    target.join("doc").join(krate.replace('-', "_")).with_extension("json")
}

fn lines_missing_from<'a>(text: &str, of: &'a str) -> Vec<&'a str> {
    let there: BTreeSet<&str> = text.lines().collect();
    of.lines().filter(|line| !there.contains(line)).collect()
}
