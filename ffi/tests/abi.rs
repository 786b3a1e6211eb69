//! The header, the symbols and the programs that are compiled against them.

mod compiled;
mod header;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use compiled::{Built, library};
use header::Header;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn text(path: &str) -> String {
    std::fs::read_to_string(here(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn the_header_is_what_the_sources_say() {
    let config = cbindgen::Config::from_file(here("cbindgen.toml")).expect("a configuration");
    let mut made = Vec::new();
    // With the modules that it names.
    let builder = cbindgen::Builder::new().with_config(config).with_src(here("src/lib.rs"));
    builder.generate().expect("the sources are understood").write(&mut made);
    let made = header::tidied(&String::from_utf8(made).expect("text"));
    if std::env::var_os("UPDATE_HEADER").is_some() {
        std::fs::write(here("include/crossdock.h"), &made).expect("it can be written");
    }
    assert!(
        made == text("include/crossdock.h"),
        "include/crossdock.h is not what the sources say: UPDATE_HEADER=1 cargo test -p crossdock-ffi --test abi header_is"
    );
}

/// Everything that is declared, and nothing else.
#[test]
fn the_library_exports_what_the_header_declares() {
    let nm = Command::new("nm").args(["-D", "--defined-only"]).arg(library()).output().expect("nm runs");
    let told = String::from_utf8(nm.stdout).expect("text");
    let exported: BTreeSet<&str> = told.lines().filter_map(|line| line.split_whitespace().last()).collect();
    let header = Header::of(&text("include/crossdock.h"));
    let declared: BTreeSet<&str> = header.functions.keys().map(String::as_str).collect();
    assert_eq!(exported, declared);
    assert!(declared.len() > 50, "{declared:?}");
}

#[test]
fn the_library_has_its_name_and_version() {
    let elf = Command::new("readelf").arg("-d").arg(library()).output().expect("readelf runs");
    let told = String::from_utf8(elf.stdout).expect("text");
    assert!(told.contains("Library soname: [libcrossdock.so.1]"), "{told}");
}

/// It is what programs were compiled against: what is new stands in include/crossdock.h alone, under another minor version.
#[test]
fn the_first_header_is_never_written_again() {
    // FNV-1a.
    let sum = text("abi/1/crossdock.h")
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    assert_eq!(sum, 0x234c_68ee_b7d5_f731);
    let (first, now) = (Header::of(&text("abi/1/crossdock.h")), Header::of(&text("include/crossdock.h")));
    let minor = |header: &Header| header.constants["CROSSDOCK_ABI_MINOR"].clone();
    let is_grown = now.functions.len() > first.functions.len();
    assert_eq!(is_grown, minor(&first) != minor(&now), "the minor version counts what has been added");
}

/// A program that was compiled against the first header of this ABI finds everything where it was: functions and constants
/// as they were, fields at the same places, and no structure smaller.
#[test]
fn nothing_of_the_first_header_has_changed() {
    let (first, now) = (Header::of(&text("abi/1/crossdock.h")), Header::of(&text("include/crossdock.h")));
    for (name, declaration) in &first.functions {
        assert_eq!(Some(declaration), now.functions.get(name), "{name}");
    }
    for (name, value) in &first.constants {
        // The minor version counts what has been added.
        if name != "CROSSDOCK_ABI_MINOR" {
            assert_eq!(Some(value), now.constants.get(name), "{name}");
        }
    }
    for (name, target) in &first.typedefs {
        assert_eq!(Some(target), now.typedefs.get(name), "{name}");
    }
    let places = |header: &Header, folder: &str| -> Vec<(String, usize, usize)> {
        let program = Built::c_of(&header.places_program(), &here(folder));
        let told = program.run(&[]);
        let place = |line: &str| {
            let mut words = line.split_whitespace();
            let name = words.next().expect("a name").to_owned();
            let mut number = || words.next().expect("a number").parse().expect("a number");
            (name, number(), number())
        };
        told.lines().map(place).collect()
    };
    let (before, after) = (places(&first, "abi/1"), places(&now, "include"));
    assert!(before.len() > 150);
    for (name, offset, bytes) in before {
        let found = after.iter().find(|(known, ..)| *known == name);
        let (_, offset_now, bytes_now) = found.unwrap_or_else(|| panic!("{name} is gone"));
        assert_eq!(offset, *offset_now, "{name}");
        let is_whole = !name.contains('.');
        let is_fixed = first.fixed.contains(&name);
        assert!(bytes == *bytes_now || is_whole && !is_fixed && bytes < *bytes_now, "{name}");
    }
}

/// The smallest sizes that the library takes are those of the first header.
#[test]
fn structures_of_the_first_header_are_taken() {
    let first = Header::of(&text("abi/1/crossdock.h"));
    let sources: String = [
        "status",
        "memory",
        "layout",
        "pool",
        "peer",
        "room/structures",
        "node",
        "group",
        "outputs",
        "step",
        "endpoint",
    ]
    .iter()
    .map(|module| text(&format!("src/{module}.rs")))
    .collect();
    let program = Built::c_of(&first.places_program(), &here("abi/1"));
    let told = program.run(&[]);
    let mut found = 0;
    for (name, bytes) in
        told.lines().filter_map(|line| line.split_once(" 0 ")).filter(|(name, _)| !name.contains('.'))
    {
        let Some((_, rest)) = sources.split_once(&format!("Sized for {name} {{")) else { continue };
        let (_, rest) = rest.split_once("FIRST_BYTES: usize = ").expect("it says so");
        let (said, _) = rest.split_once(';').expect("a statement");
        assert_eq!(said, bytes, "{name}");
        found += 1;
    }
    assert!(found >= 20, "only {found} structures were found");
}

/// With the header of today, and with the first one.
#[test]
fn a_c_program_hands_pages_over() {
    for folder in ["include", "abi/1"] {
        let told = Built::c(&here("examples/hand_over.c"), &here(folder)).run(&[]);
        assert!(told.ends_with("pages moved, and every byte is right\n"), "{told}");
    }
}

#[test]
fn a_c_program_links_the_static_library() {
    let told = Built::c_static(&here("examples/hand_over.c"), &here("include")).run(&[]);
    assert!(told.ends_with("pages moved, and every byte is right\n"), "{told}");
}

/// Where valgrind is installed: no access that is wrong, and nothing that is lost.
#[test]
fn a_c_program_is_clean_under_valgrind() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        eprintln!("skipped: valgrind is not installed");
        return;
    }
    let program = Built::c(&here("examples/hand_over.c"), &here("include"));
    let told = program.run_under(&[
        "valgrind",
        "--quiet",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite",
        "--error-exitcode=9",
    ]);
    assert!(told.ends_with("pages moved, and every byte is right\n"), "{told}");
}

/// Of these two at least one is there.
fn cpp_compilers() -> Vec<&'static str> {
    let is_installed = |compiler: &&str| {
        let found = Command::new(compiler).arg("--version").output().is_ok();
        if !found {
            eprintln!("skipped: {compiler} is not installed");
        }
        found
    };
    let found: Vec<&str> = ["g++", "clang++"].into_iter().filter(is_installed).collect();
    assert!(!found.is_empty(), "no C++ compiler is installed");
    found
}

#[test]
fn a_cpp_program_hands_pages_over_under_every_compiler() {
    for compiler in cpp_compilers() {
        for arguments in [&[][..], &["-fno-exceptions", "-fno-rtti"]] {
            let program = Built::cpp(compiler, arguments, &here("examples/hand_over.cpp"));
            let told = program.run(&[]);
            assert!(told.ends_with("pages moved, and every byte is right\n"), "{told}");
        }
    }
}

#[test]
fn what_the_cpp_example_leaves_out_holds_under_every_compiler() {
    for compiler in cpp_compilers() {
        // One of them by the next standard: the last flag counts.
        let arguments: &[&str] = if compiler == "g++" { &["-std=c++20"] } else { &[] };
        let program = Built::cpp(compiler, arguments, &here("tests/cpp/experts_and_endpoints.cpp"));
        let told = program.run(&[]);
        assert!(told.ends_with("all of it holds\n"), "{told}");
    }
}
