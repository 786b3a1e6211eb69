//! What a benchmark says about how it was called.

use std::process::Command;

#[test]
fn wrong_calls_name_their_flags() {
    for (arguments, words) in [
        (vec!["--page-bytes", "1"], vec!["--page-bytes", "--pool-mib", "268435456"]),
        (
            vec!["--page-bytes", "33554432", "--pool-mib", "16"],
            vec!["--page-bytes", "--pool-mib", "holds no page"],
        ),
        (vec!["--model", "deepseek-r1", "--pool-mib", "1"], vec!["--page-tokens", "--pool-mib"]),
        (vec!["--page-bytes", "1048577"], vec!["--page-bytes 1048577"]),
    ] {
        let (success, _, errors) = call(&arguments);
        assert!(!success, "{arguments:?} is accepted");
        for word in words {
            assert!(errors.contains(word), "{arguments:?} does not say '{word}': {errors}");
        }
    }
}

#[test]
fn the_header_says_what_the_flags_say() {
    let (success, text, errors) = call(&["--pool-mib", "16", "--page-bytes", "4096", "--repeats", "1"]);
    assert!(success, "{errors}");
    assert!(text.starts_with("shm, shared memory, write, pages of 4096 bytes, "), "{text}");
}

fn call(arguments: &[&str]) -> (bool, String, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_kvbench")).args(arguments).output().expect("the program starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}
