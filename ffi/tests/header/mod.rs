//! What a header of crossdock declares, read as far as its own style goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

#[derive(Default)]
pub struct Header {
    pub functions: BTreeMap<String, String>,
    pub constants: BTreeMap<String, String>,
    pub typedefs: BTreeMap<String, String>,
    /// By structure, its fields in order.
    structures: BTreeMap<String, Vec<String>>,
    /// Those that never grow.
    pub fixed: BTreeSet<String>,
}

/// As cbindgen writes it, without what means nothing to a user of C.
pub fn tidied(made: &str) -> String {
    let mut lines = Vec::new();
    let mut skips = false;
    for line in made.lines() {
        // Each comment ends with what Rust's callers are told under "# Safety", which C's are told as well.
        let line = if line.trim() == "// # Safety" { "// Obligations:" } else { line };
        skips = line.is_empty() && lines.last().is_some_and(|last: &String| last.is_empty());
        if !skips {
            lines.push(line.replace("[`crossdock", "`crossdock").replace("`]", "`"));
        }
    }
    let _ = skips;
    lines.join("\n") + "\n"
}

impl Header {
    pub fn of(text: &str) -> Header {
        let mut header = Header::default();
        let mut comment = String::new();
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if line.trim_start().starts_with("//") {
                comment.push_str(line);
                continue;
            }
            match words[..] {
                ["#define", name, value] if name.starts_with("CROSSDOCK_") => {
                    header.constants.insert(name.into(), value.into());
                }
                ["typedef", "struct", name, "{"] => {
                    let fields = lines.by_ref().take_while(|line| !line.starts_with('}'));
                    let fields = fields.filter(|line| line.trim_end().ends_with(';')).map(|line| {
                        let name = line.trim_end().trim_end_matches(';').rsplit([' ', '*']).next();
                        name.expect("a name").to_owned()
                    });
                    header.structures.insert(name.into(), fields.collect());
                    if comment.contains("It never grows") {
                        header.fixed.insert(name.into());
                    }
                }
                ["typedef", ref target @ .., name] if name.ends_with(';') => {
                    header.typedefs.insert(name.trim_end_matches(';').into(), target.join(" "));
                }
                _ if line.contains("crossdock_") && line.contains('(') => {
                    let mut declaration = line.trim().to_owned();
                    while !declaration.ends_with(';') {
                        declaration = format!("{declaration} {}", lines.next().expect("it ends").trim());
                    }
                    let (before, _) = declaration.split_once('(').expect("arguments");
                    let name = before.rsplit([' ', '*']).next().expect("a name").to_owned();
                    header.functions.insert(name, declaration);
                }
                _ => {}
            }
            comment.clear();
        }
        header
    }

    /// A program that prints where each field is and how long, and how long each structure.
    pub fn places_program(&self) -> String {
        let mut program = String::from("#include <stdio.h>\n#include \"crossdock.h\"\nint main(void) {\n");
        for (name, fields) in &self.structures {
            let _ = writeln!(program, "printf(\"{name} 0 %zu\\n\", sizeof({name}));");
            for field in fields {
                let _ = writeln!(
                    program,
                    "printf(\"{name}.{field} %zu %zu\\n\", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));"
                );
            }
        }
        program + "return 0;\n}\n"
    }
}
