//! The comparison with other libraries, with stand-ins for all of them: what fails is told and left out.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn what_fails_is_left_out_of_a_comparison() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("SKIPPED: there is no python3");
        return;
    }
    let folder = std::env::temp_dir().join(format!("compare-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    // Ours fails with one page length, and what the peer answers over tcp is no JSON.
    let kvbench = program(
        &folder.join("kvbench"),
        r#"case "$*" in *"--page-bytes 8192"*) echo "cannot" >&2; exit 1;; esac
echo '{"gb_per_s": 8, "cpu_s_per_gb": 1, "floor_gb_per_s": 9, "floor_cpu_s_per_gb": 1, "verified": true}'"#,
    );
    let python = program(
        &folder.join("python"),
        r#"echo '{"version": "1.2"}'
while read -r line; do
  case "$*" in *tcp*) echo "nonsense";; *) echo '{"gb_per_s": 4, "cpu_s_per_gb": 2, "prepare_ms": 7, "verified": true}';; esac
done"#,
    );
    let output = Command::new("python3")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/compare/compare.py"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .args(["--kvbench", &kvbench, "--peer", &format!("nixl={python}"), "--rounds", "1"])
        .args(["--pages", "4096,8192,16384", "--out", folder.to_str().expect("a plain path")])
        .output()
        .expect("python3 starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    // Ours has failed, which is no success.
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(
        errors.contains("left out nixl over shm, shared memory, 8192 bytes: kvbench: cannot"),
        "{errors}"
    );
    assert!(errors.contains("left out the rest of nixl over tcp, private memory"), "{errors}");

    let text = |name: &str| std::fs::read_to_string(folder.join(name)).expect("it is written");
    let lines: Vec<Value> =
        text("compare.jsonl").lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let rows = lines.iter().map(|line| {
        assert_eq!((&line["ratio"], &line["peer_prepare_ms"]), (&2.0.into(), &7.into()), "{line}");
        (
            line["port"].as_str().unwrap(),
            line["memory"].as_str().unwrap(),
            line["page_bytes"].as_u64().unwrap(),
        )
    });
    let expected = [("shared", 4096), ("shared", 16384), ("private", 4096), ("private", 16384)]
        .map(|(m, b)| ("shm", m, b));
    assert_eq!(rows.collect::<Vec<_>>(), expected);
    let table = text("compare.md");
    assert!(table.contains("shared (ours allocated) |") && table.contains(" private |"), "{table}");
    assert!(table.starts_with("Clock: "), "{table}");
    std::fs::remove_dir_all(&folder).expect("it is there");
}

/// Writes a shell script, and says where it is.
fn program(path: &Path, text: &str) -> String {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("a file can be written");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("it is ours");
    path.to_str().expect("a plain path").to_owned()
}
