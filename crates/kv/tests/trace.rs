//! A recorded trace, from the file to what it comes to.

use std::fs::File;
use std::io::BufReader;

use crossdock_kv::trace::{Request, Scale, Totals, TraceLimits, TraceReader};

fn recorded() -> Vec<Request> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/requests.jsonl");
    let file = BufReader::new(File::open(path).unwrap());
    TraceReader::new(file, TraceLimits::default()).collect::<Result<_, _>>().unwrap()
}

#[test]
fn a_file_is_read_whole() {
    let requests = recorded();
    let expected = Totals {
        requests: 20,
        input_tokens: 53_460,
        output_tokens: 4094,
        pages: 842,
        longest_input_tokens: 12_800,
        last_at_ms: 27_000,
    };
    assert_eq!(Totals::of(&requests, 64), expected);
    assert_eq!(requests[2].prefix_ids, [0, 1, 2, 6]);
}

#[test]
fn a_scaled_trace_keeps_its_proportions() {
    let whole = recorded();
    let mut scaled = whole.clone();
    let scale = Scale::new(0.1).unwrap();
    for request in &mut scaled {
        request.scale_lengths(scale);
        request.scale_time(scale);
    }
    let (before, after) = (Totals::of(&whole, 64), Totals::of(&scaled, 64));
    let tenth = before.input_tokens / 10;
    assert!(after.input_tokens.abs_diff(tenth) <= whole.len() as u64, "{}", after.input_tokens);
    assert_eq!((after.longest_input_tokens, after.last_at_ms), (1280, 2700));
    assert!(scaled.is_sorted_by_key(|request| request.at_ms));
    for (request, original) in scaled.iter().zip(&whole) {
        let ids = original.prefix_ids.len();
        assert_eq!(request.prefix_ids, original.prefix_ids);
        assert_eq!(scale.prefix_tokens(request, ids), request.input_tokens);
        let shared = scale.prefix_tokens(request, ids / 2);
        assert_eq!(shared, (ids as u32 / 2 * 512 + 5) / 10);
    }
}
