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
        (vec!["--model", "no-such"], vec!["no-such", "llama-3-70b"]),
        (vec!["--model", "Cargo.toml"], vec!["Cargo.toml", "kv_heads"]),
        (vec!["--model", "llama-3-70b", "--prefill-tp", "3", "--decode-tp", "3"], vec!["8 heads", "3 ranks"]),
        (vec!["--model", "llama-3-70b", "--prefill-tp", "2"], vec!["--prefill-tp", "--decode-tp"]),
        (vec!["--page-bytes", "67108865"], vec!["--page-bytes 67108865"]),
        (vec!["--devices", "rxe0"], vec!["--devices", "--port verbs"]),
        (vec!["--port", "verbs", "--devices", "none0"], vec!["--port verbs", "crossdock doctor"]),
        (vec!["--gpu", "software"], vec!["--gpu", "--port cuda"]),
        (vec!["--gpu", "hardware", "--port", "cuda"], vec!["hardware", "software, or a number"]),
        (vec!["--memory", "cuda"], vec!["--memory cuda", "--port cuda"]),
        (vec!["--memory", "cuda", "--port", "verbs"], vec!["--memory cuda", "--port cuda"]),
        (vec!["--memory", "private", "--port", "cuda"], vec!["--memory private", "--port cuda", "shared"]),
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

/// Pushed and pulled, rates and single pages: beside bare lanes between the same devices.
#[test]
fn rdma_is_measured_between_devices() {
    let Ok(devices) = std::env::var("CROSSDOCK_VERBS_DEVICES") else {
        eprintln!("SKIPPED: CROSSDOCK_VERBS_DEVICES names no RDMA device (run this in tests/rdma-vm)");
        return;
    };
    for (op, memory, pages) in [
        ("write", "shared", "16"),
        ("read", "private", "16"),
        ("write", "private", "1"),
        ("read", "shared", "1"),
    ] {
        let arguments = ["--port", "verbs", "--devices", &devices, "--op", op, "--memory", memory];
        let few = ["--pool-mib", "4", "--payload-mib", "1", "--pages", pages, "--page-bytes", "16384"];
        let (success, text, errors) =
            call(&[&arguments[..], &few[..], &["--repeats", "1", "--verify", "--json"]].concat());
        assert!(success, "{op} {memory} {pages}: {errors}");
        let line: serde_json::Value = serde_json::from_str(&text).expect("one object");
        assert_eq!((&line["port"], &line["floor"]), (&"verbs".into(), &"bare lanes".into()), "{text}");
        assert_eq!((&line["op"], &line["memory"]), (&op.into(), &memory.into()), "{text}");
        assert_eq!(line["verified"], true, "{text}");
        assert!(line["efficiency"].as_f64().is_some_and(|value| value > 0.0), "{text}");
        println!("{text}");
    }
}

/// Pushed and pulled, rates and single pages, plain pages and a model's, the GPU's memory and the host's: between two
/// processes, each with a driver without a GPU.
#[test]
fn a_gpu_in_software_moves_every_byte() {
    let plain = |pages: &'static str| vec!["--pages", pages, "--page-bytes", "4096"];
    let model = vec!["--model", "deepseek-r1", "--page-tokens", "1"];
    for (op, memory, pages) in [
        ("write", "cuda", plain("16")),
        ("read", "cuda", plain("16")),
        ("write", "shared", plain("16")),
        ("write", "cuda", plain("1")),
        ("read", "cuda", plain("1")),
        ("write", "cuda", model),
    ] {
        let arguments = ["--port", "cuda", "--memory", memory, "--gpu", "software", "--op", op];
        let few = ["--pool-mib", "4", "--payload-mib", "1", "--repeats", "1", "--verify", "--json"];
        let (success, text, errors) = call(&[&arguments[..], &pages[..], &few[..]].concat());
        assert!(success, "{op} {memory} {pages:?}: {errors}");
        let line: serde_json::Value = serde_json::from_str(&text).expect("one object");
        assert_eq!(
            (&line["port"], &line["memory"], &line["op"]),
            (&"cuda".into(), &memory.into(), &op.into())
        );
        assert_eq!((&line["floor"], &line["gpu"]), (&"bare mover".into(), &"software".into()), "{text}");
        assert_eq!(line["verified"], true, "{text}");
        let has = |key: &str| line[key].as_f64().is_some_and(|value| value > 0.0);
        assert!(has("efficiency") && has("memcpy_gb_per_s"), "{text}");
        println!("{text}");
    }
}

#[test]
fn a_report_of_software_says_first_what_it_is() {
    let arguments = ["--port", "cuda", "--memory", "cuda", "--gpu", "software", "--repeats", "1"];
    let (success, text, errors) = call(&[&arguments[..], &["--pool-mib", "4"]].concat());
    assert!(success, "{errors}");
    let mut lines = text.lines();
    assert!(lines.next().is_some_and(|line| line.starts_with("GPU software: ")), "{text}");
    assert!(lines.next().is_some_and(|line| line.contains("no figure here says anything")), "{text}");
    assert!(lines.any(|line| line.starts_with("cuda, cuda memory, write, pages of 65536 bytes, ")), "{text}");
}

/// Without a driver or a device the program ends at once, and says what to do.
#[test]
fn a_gpu_that_is_not_there_is_missed() {
    let output = Command::new(env!("CARGO_BIN_EXE_kvbench"))
        .args(["--port", "cuda", "--memory", "cuda", "--gpu", "4000", "--pool-mib", "4"])
        .output()
        .expect("the program starts");
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.starts_with("kvbench: --gpu 4000: "), "{errors}");
    assert!(
        ["driver", "nvidia-smi", "crossdock doctor"].iter().any(|word| errors.contains(word)),
        "{errors}"
    );
}

#[test]
fn models_are_measured_as_one_rank_keeps_them() {
    let file = std::env::temp_dir().join(format!("kvbench-{}-model.json", std::process::id()));
    std::fs::write(&file, r#"{"layers": 80, "kv_heads": 8, "head_bytes": 256}"#)
        .expect("a file can be written");
    for model in ["llama-3-70b", file.to_str().unwrap()] {
        for (tp, page_bytes) in [("1", 16 * 2048), ("4", 16 * 512)] {
            let arguments = ["--model", model, "--prefill-tp", tp, "--decode-tp", tp, "--page-tokens", "16"];
            let more = ["--pool-mib", "32", "--repeats", "1", "--seconds", "0.1", "--verify", "--json"];
            let (success, text, errors) = call(&[&arguments[..], &more[..]].concat());
            assert!(success, "{errors}");
            let report: serde_json::Value = serde_json::from_str(&text).expect("one object");
            assert_eq!(
                (&report["page_bytes"], &report["verified"]),
                (&page_bytes.into(), &true.into()),
                "{text}"
            );
        }
    }
    std::fs::remove_file(&file).expect("it was there");
}

#[test]
fn a_trace_is_replayed_and_drawn() {
    let folder = std::env::temp_dir();
    let file = |name: &str| folder.join(format!("kvbench-{}-{name}", std::process::id()));
    let (trace, picture) = (file("trace.jsonl"), file("picture.svg"));
    // Every third request goes on where the first one has ended.
    let lines = (0..30u64).map(|at| {
        let ids = if at % 3 == 0 { vec![0, 1] } else { vec![100 + at] };
        let tokens = ids.len() * 512 + 40;
        let at_ms = at * 50;
        format!("{{\"timestamp\": {at_ms}, \"input_length\": {tokens}, \"output_length\": 2, \"hash_ids\": {ids:?}}}\n")
    });
    std::fs::write(&trace, lines.collect::<String>()).expect("a file can be written");
    for op in ["write", "read"] {
        let arguments = [
            "--trace",
            trace.to_str().unwrap(),
            "--scale",
            "0.25",
            "--page-tokens",
            "16",
            "--pool-mib",
            "128",
            "--repeats",
            "1",
            "--op",
            op,
            "--verify",
            "--json",
            "--svg",
            picture.to_str().unwrap(),
        ];
        let (success, text, errors) = call(&arguments);
        assert!(success, "{errors}");
        let line: serde_json::Value = serde_json::from_str(&text).expect("one line of JSON");
        let replay = &line["replay"];
        assert_eq!((&replay["delivered"], &line["verified"]), (&30.into(), &true.into()), "{text}");
        let share = |key: &str| replay[key].as_f64().expect("a number");
        assert!(share("decode_hit_share") > 0.1 && share("prefill_hit_share") > 0.1, "{text}");
        assert!(share("decode_hit_share") <= share("possible_hit_share") + 1e-9, "{text}");
        assert!(line["roofline"].as_array().is_some_and(|points| points.len() >= 3), "{text}");
        let svg = std::fs::read_to_string(&picture).expect("a picture is written");
        assert!(
            svg.contains("crossdock") && svg.contains("memcpy") && svg.contains("shm: hand-over"),
            "{svg}"
        );
    }
    std::fs::remove_file(&trace).expect("it is there");
    std::fs::remove_file(&picture).expect("it is there");
}

fn call(arguments: &[&str]) -> (bool, String, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_kvbench")).args(arguments).output().expect("the program starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}
