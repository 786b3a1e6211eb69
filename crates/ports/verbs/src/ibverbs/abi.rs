//! Is [`sys`](super::sys) what C says? The tables come from `crates/ports/verbs/abi`, which says how to print them.

use std::collections::BTreeSet;
use std::mem::{MaybeUninit, align_of, offset_of, size_of};

use super::sys::*;

#[cfg(target_arch = "x86_64")]
const TABLE: &str = include_str!("abi/x86_64.txt");
#[cfg(target_arch = "aarch64")]
const TABLE: &str = include_str!("abi/aarch64.txt");

/// The lines of a table: of a struct its size and alignment, below it of each field its offset and size; of a
/// constant its value.
macro_rules! names {
    (
        structs {$($name:ident {$($field:ident $([$($in_c:tt)*])?)*})*}
        constants {$($constant:ident $([$($constant_in_c:tt)*])?)*}
    ) => {
        fn lines() -> Vec<String> {
            let mut lines = Vec::new();
            $(
                lines.push(format!("{} {} {}", stringify!($name), size_of::<$name>(), align_of::<$name>()));
                let place = MaybeUninit::<$name>::uninit();
                $(
                    // SAFETY: the address of a field within `place`, of which nothing is read.
                    let field = unsafe { &raw const (*place.as_ptr()).$field };
                    let (offset, size) = (offset_of!($name, $field), size_of_pointee(field));
                    lines.push(format!("  {}.{} {offset} {size}", stringify!($name), stringify!($field)));
                )*
            )*
            $(lines.push(format!("{} = {}", stringify!($constant), i64::from($constant)));)*
            lines
        }
    };
}

include!("abi/names.rs");

fn size_of_pointee<T>(_: *const T) -> usize {
    size_of::<T>()
}

#[test]
fn sizes_offsets_and_values_are_those_of_c() {
    let lines = lines();
    let (ours, of_c): (BTreeSet<_>, BTreeSet<_>) =
        (lines.iter().map(String::as_str).collect(), TABLE.lines().collect());
    let wrong: Vec<_> = ours.difference(&of_c).collect();
    let missing: Vec<_> = of_c.difference(&ours).collect();
    assert!(wrong.is_empty() && missing.is_empty(), "sys.rs has {wrong:#?}, C has {missing:#?}");
    assert_eq!(lines.len(), ours.len(), "a name is listed twice");
}

#[test]
fn the_table_knows_everything_in_sys() {
    let listed: BTreeSet<String> =
        TABLE.lines().map(|line| line.split_whitespace().next().unwrap_or_default().to_owned()).collect();
    let declared = declared(include_str!("sys.rs"));
    assert!(declared.len() > 300, "{} names read", declared.len());
    let unlisted: Vec<_> = declared.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&declared).collect();
    assert!(
        unlisted.is_empty() && gone.is_empty(),
        "not in the table: {unlisted:?}; not in sys.rs: {gone:?}"
    );
}

/// The structs, fields and constants that are declared in a formatted source.
fn declared(source: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut inside = None;
    for line in source.lines() {
        let word = |keyword: &str| {
            let rest = line.strip_prefix(keyword)?;
            Some(rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default())
        };
        if let Some(name) = word("pub struct ").or_else(|| word("pub union ")) {
            names.insert(name.to_owned());
            inside = Some(name);
        } else if let Some(name) = word("pub const ").filter(|name| *name != "fn") {
            names.insert(name.to_owned());
        } else if let (Some(name), Some(field)) = (inside, word("    pub ")) {
            names.insert(format!("{name}.{field}"));
        } else if line == "}" {
            inside = None;
        }
    }
    names
}
