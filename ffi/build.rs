//! Names the shared library as programs that are linked against it ask for it, and leaves the header for Python's cffi
//! where maturin looks for one.

use std::path::{Path, PathBuf};
use std::{env, fs, process};

const HEADER: &str = "include/crossdock.h";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={HEADER}");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcrossdock.so.1");

    let to = target_directory().join("header.h");
    // Made again when somebody has deleted it.
    println!("cargo:rerun-if-changed={}", to.display());
    let header = fs::read_to_string(HEADER).unwrap_or_else(|error| panic!("{HEADER}: {error}"));
    write(&to, &declarations(&header)).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
}

/// The root of the target directory, to which `OUT_DIR` leads by `PROFILE/build/…`, behind the name of the target where
/// one was chosen.
fn target_directory() -> PathBuf {
    let variable = |name: &str| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let out = PathBuf::from(variable("OUT_DIR"));
    let is_build = |directory: &&Path| directory.file_name().is_some_and(|name| name == "build");
    let profile = out.ancestors().skip(1).find(is_build).and_then(Path::parent);
    let within = profile.and_then(Path::parent).unwrap_or_else(|| panic!("{} is no OUT_DIR", out.display()));
    match within.file_name().is_some_and(|name| name == variable("TARGET")) {
        true => within.parent().unwrap_or(within).to_owned(),
        false => within.to_owned(),
    }
}

/// The header without what cffi cannot parse: comments, includes, what is for C++ alone, and constants other than
/// integers that are written out.
fn declarations(header: &str) -> String {
    let mut kept = String::new();
    let mut is_cpp = false;
    for line in without_comments(header).lines().map(str::trim_end) {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["#ifdef", "__cplusplus"] => is_cpp = true,
            ["#endif", ..] => is_cpp = false,
            _ if is_cpp => {}
            ["#define", _, value] if value.parse::<u64>().is_err() => {}
            ["#define", _, _] => kept.extend([line, "\n"]),
            [] => {}
            [first, ..] if first.starts_with('#') => {}
            _ => kept.extend([line, "\n"]),
        }
    }
    kept
}

fn without_comments(header: &str) -> String {
    let (mut kept, mut rest) = (String::new(), header);
    while let Some(at) = rest.find("//").into_iter().chain(rest.find("/*")).min() {
        kept.push_str(&rest[..at]);
        let end = match rest[at..].starts_with("//") {
            true => rest[at..].find('\n'),
            false => rest[at..].find("*/").map(|end| end + 2),
        };
        rest = end.map_or("", |end| &rest[at + end..]);
    }
    kept + rest
}

/// Only where something has changed, so that builds of several profiles leave each other alone; and at once, so that
/// none reads half of it.
fn write(to: &Path, text: &str) -> std::io::Result<()> {
    if fs::read_to_string(to).is_ok_and(|found| found == text) {
        return Ok(());
    }
    let new = to.with_extension(format!("h.{}", process::id()));
    fs::write(&new, text)?;
    fs::rename(new, to)
}
