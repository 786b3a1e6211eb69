//! The comparison of epbench with the MPI program, with stand-ins for both.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn ratios_are_ours_to_theirs_and_what_fails_is_left_out() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("SKIPPED: there is no python3");
        return;
    }
    let folder = std::env::temp_dir().join(format!("compare-ep-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    let epbench = program(
        &folder.join("epbench"),
        r#"case "$*" in *"--tokens 7 "*) echo "cannot" >&2; exit 1;; esac
echo '{"dispatch_us_p50": 6, "combine_us_p50": 4, "dispatch_us_min": 5, "combine_us_min": 3, "verified": true,
 "floor_dispatch_us_p50": 3, "floor_combine_us_p50": 2, "floor_dispatch_us_min": 2, "floor_combine_us_min": 2}' | tr -d '\n'"#,
    );
    program(
        &folder.join("mpirun.openmpi"),
        r#"tell() { echo '{"peer":"'$1'","mode":"'$2'","dispatch_us_p50":'$3',"dispatch_us_min":1,"combine_us_p50":'$4',"combine_us_min":1,"verified":true}'; }
case "$*" in *latency*) ;; *) exit 1;; esac
tell openmpi latency 12 8; tell window latency 3 2; tell floor latency 1 2; tell floor quantise 2 0"#,
    );
    let compare = |mpi: &[&str], modes: &str, out: &str| {
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default());
        let output = Command::new("python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/compare/ep/compare.py"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PATH", path)
            .args(["--epbench", &epbench, "--rounds", "2", "--ranks", "2", "--tokens", "1,7,16"])
            .args(["--modes", modes, "--out"])
            .arg(folder.join(out))
            .args(mpi)
            .output()
            .expect("python3 starts");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{errors}");
        let text = std::fs::read_to_string(folder.join(out).join("ep.jsonl")).expect("it is written");
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        (lines, errors, String::from_utf8_lossy(&output.stdout).into_owned())
    };

    let (lines, errors, table) = compare(&["--mpi", "program"], "latency,throughput", "all");
    assert!(errors.contains("left out latency, 2 ranks, 7 tokens: cannot"), "{errors}");
    assert!(errors.contains("left out throughput, 2 ranks, 16 tokens: ended with 1"), "{errors}");
    assert_eq!(lines.len(), 2, "{lines:?}");
    for line in lines {
        let ratios =
            ["floor", "openmpi", "window", "floor_in_c"].map(|peer| &line[format!("ratio_{peer}_both")]);
        assert_eq!(ratios, [2.0, 0.5, 2.0, 2.0].map(Value::from).each_ref(), "{line}");
    }
    assert!(table.contains(" 0.50 0.50 0.50 |"), "{table}");

    // Without the MPI program there is the floor all the same.
    let (lines, _, table) = compare(&["--figure", "min"], "latency", "alone");
    assert_eq!((lines.len(), &lines[0]["ratio_floor_dispatch"]), (2, &2.5.into()));
    assert!(table.contains("the least of dispatch") && !table.contains("window"), "{table}");
    std::fs::remove_dir_all(&folder).expect("it is there");
}

/// Writes a shell script, and says where it is.
fn program(path: &Path, text: &str) -> String {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("a file can be written");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("it is ours");
    path.to_str().expect("a plain path").to_owned()
}
