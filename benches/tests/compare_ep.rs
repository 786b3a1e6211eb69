//! The comparison of epbench with the MPI program, with stand-ins for both.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Both programs: they answer a turn with times, and cannot do 7 tokens.
const EPBENCH: &str = r#"case "$*" in
*"--tokens 7 "*) echo "cannot" >&2; exit 1;;
*--sizes*) echo '{"bench": "ep-sizes", "ranks": 8, "mapped_arenas_bytes": 5e5, "dispatch_arenas_bytes": 1e6, "combine_arenas_bytes": 2e6, "outputs_bytes": 9e6, "deepep_bytes": 6e6, "ratio": 0.5}'; exit;;
*--round-trips*) echo '{"step_us_p50": 9, "step_us_p99": 10, "alone_us_p50": 6, "alone_us_p99": 7, "trip_us_p50": 1, "trip_us_p99": 1,
  "step_ratio": 1.2, "parked_step_us_p50": 50, "parked_step_us_p99": 60, "parked_trip_us_p50": 9, "parked_trip_us_p99": 9,
  "parked_sleeps_mean": 1.6, "bench": "ep", "verified": true}' | tr -d '\n'; exit;;
esac
echo '{"ready": true}'
while read -r part ms; do
  case $part in
    ours) echo '{"dispatch_us": [6, 6, 9], "combine_us": [4, 4, 21]}';;
    floor) echo '{"dispatch_us": [3], "combine_us": [2]}';;
  esac
done
echo '{"verified": true}'"#;
const MPIRUN: &str = r#"echo '{"ready": true}'
while read -r part ms; do
  case $part in
    openmpi) echo '{"dispatch_us": [20], "combine_us": [10]}';;
    openmpi-p2p) echo '{"dispatch_us": [15], "combine_us": [10]}';;
    window) echo '{"dispatch_us": [5], "combine_us": [3]}';;
    floor) echo '{"dispatch_us": [4, 4, 6], "combine_us": [3, 3, 8], "quantise_us": [1, 1, 1]}';;
  esac
done
case "$*" in *"--tokens 16 "*) echo '{"verified": false}';; *) echo '{"verified": true}';; esac"#;
const KERNELS: &str = r#"echo 'hot quantise                 floor            80.00   1.00
hot quantise                 Avx512           20.00   0.25
streamed quantise            floor             6.00   1.00
streamed quantise            Avx512            5.40   0.90'"#;

#[test]
fn bars_are_ratios_of_turns_and_what_fails_is_left_out() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("SKIPPED: there is no python3");
        return;
    }
    let folder = std::env::temp_dir().join(format!("compare-ep-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    let (epbench, kernels) =
        (program(&folder.join("epbench"), EPBENCH), program(&folder.join("kernels"), KERNELS));
    program(&folder.join("mpirun.openmpi"), MPIRUN);
    let compare = |more: &[&str], out: &str| {
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default());
        let output = Command::new("python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/compare/ep/compare.py"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PATH", path)
            .args(["--epbench", &epbench, "--kernels", &kernels, "--seconds", "0.1", "--out"])
            .arg(folder.join(out))
            .args(more)
            .output()
            .expect("python3 starts");
        let text = std::fs::read_to_string(folder.join(out).join("ep.jsonl")).expect("it is written");
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let of = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), lines, of(&output.stderr), of(&output.stdout))
    };

    let (code, lines, errors, table) =
        compare(&["--mpi", "program", "--only", "latency,crowded", "--tokens", "7,16,128"], "turns");
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.contains("left out latency, 2 ranks, 7 tokens: cannot"), "{errors}");
    let expected = [
        ("latency, 2 ranks, 16 tokens: floor / ours", 0.8, "WRONG OUTPUTS"),
        ("latency, 2 ranks, 128 tokens: floor / ours", 0.8, "yes"),
        ("latency, 2 ranks, 128 tokens: openmpi-p2p / ours", 2.5, "yes"),
        ("latency, 2 ranks, 128 tokens: ours / window", 1.25, "NO"),
        // A p99 of 30 to a p50 of 10, and 15 to 8.
        ("latency, 8 ranks, 128 tokens: p99/p50, ours / floor", 1.6, "NO"),
        ("latency, 8 ranks, 128 tokens: openmpi-p2p / ours", 2.5, "yes"),
    ];
    check(&lines, &expected.map(|(what, ratio, met)| (what.to_owned(), ratio, met)));
    assert!(table.contains("| latency, 2 ranks, 128 tokens: ours / window"), "{table}");

    let (code, lines, errors, _) = compare(&["--only", "token,quantiser,buffers"], "alone");
    assert_eq!(code, Some(0), "{errors}");
    check(
        &lines,
        &[
            ("a token there and back".to_owned(), 1.2, "yes"),
            ("the same, who waits sleeps".to_owned(), 1.6, "NO"),
            ("quantiser (Avx512), rows in the second-level cache".to_owned(), 0.25, "NO"),
            ("quantiser (Avx512), rows streamed".to_owned(), 0.9, "yes"),
            ("buffers of a rank of 8".to_owned(), 0.5, "NO"),
        ],
    );

    // What cannot end in time is not begun.
    let (code, lines, errors, _) = compare(&["--only", "latency", "--tokens", "1", "--within", "0"], "late");
    assert!(code == Some(1) && lines.is_empty() && errors.contains("the 0 s are over"), "{errors}");

    // Without the MPI program there is epbench's own floor all the same.
    let (code, lines, errors, _) = compare(&["--only", "latency", "--tokens", "128"], "without");
    assert_eq!(code, Some(0), "{errors}");
    check(&lines, &[("latency, 2 ranks, 128 tokens: floor of epbench / ours".to_owned(), 0.5, "-")]);
    std::fs::remove_dir_all(&folder).expect("it is there");
}

fn check(lines: &[Value], expected: &[(String, f64, &str)]) {
    for (what, ratio, met) in expected {
        let bars = lines.iter().filter(|line| line["bench"] == "compare-ep-bar");
        let mut bars = bars.filter(|bar| bar["what"].as_str().is_some_and(|name| name.starts_with(what)));
        let bar = bars.next().unwrap_or_else(|| panic!("no {what}: {lines:?}"));
        assert_eq!((bar["ratio"].as_f64(), bar["met"].as_str()), (Some(*ratio), Some(*met)), "{bar}");
    }
}

/// Writes a shell script, and says where it is.
fn program(path: &Path, text: &str) -> String {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("a file can be written");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("it is ours");
    path.to_str().expect("a plain path").to_owned()
}
