//! What memory a rank takes, beside what DeepEP's low-latency mode does.

use crossdock_ep::{GroupConfig, Payload};
use serde::Serialize;

use crate::error::Error;
use crate::options::{Dtype, Options};

#[derive(Serialize)]
struct Line {
    bench: &'static str,
    ranks: usize,
    tokens: u32,
    hidden: u32,
    experts: u32,
    topk: u32,
    slots: u32,
    /// All that is touched where ranks map each other's memory.
    mapped_arenas_bytes: u64,
    /// Where every other rank is on another host.
    dispatch_arenas_bytes: u64,
    /// There, too.
    combine_arenas_bytes: u64,
    /// What experts read and write, which DeepEP's formula does not count.
    outputs_bytes: u64,
    deepep_bytes: u64,
    /// Of both kinds of arenas, with every other rank on another host, to DeepEP's buffers.
    ratio: f64,
}

/// Prints a table, or a line of JSON for each number of ranks.
pub fn print(options: &Options) -> Result<(), Error> {
    if !options.json {
        println!(
            "MB of a rank  arenas on one host  over ports: dispatch  combine  outputs  DeepEP's buffers  over ports / DeepEP's"
        );
    }
    for ranks in [8, 32, 72] {
        let line = line(options, ranks)?;
        if options.json {
            println!("{}", serde_json::to_string(&line).expect("numbers and names"));
            continue;
        }
        let [mapped, dispatch, combine, outputs, deepep] = [
            line.mapped_arenas_bytes,
            line.dispatch_arenas_bytes,
            line.combine_arenas_bytes,
            line.outputs_bytes,
            line.deepep_bytes,
        ]
        .map(|bytes| bytes as f64 / 1e6);
        let ratio = line.ratio;
        println!(
            "{ranks:>6} ranks {mapped:>18.1}{dispatch:>22.1}{combine:>9.1}{outputs:>9.1}{deepep:>18.1}{ratio:>23.3}"
        );
    }
    Ok(())
}

fn line(options: &Options, ranks: usize) -> Result<Line, Error> {
    let config = GroupConfig {
        max_tokens: vec![options.tokens; ranks],
        experts: options.experts,
        top_k: options.topk,
        hidden: options.hidden,
        payload: match options.dtype {
            Dtype::Bf16 => Payload::Bf16,
            Dtype::Fp8 => Payload::Fp8,
        },
        slots: options.slots,
        placement_version: 0,
    };
    let sizes = config.sizes()?;
    let deepep_bytes = deepep_bytes(options.tokens.into(), options.hidden.into(), options.experts.into());
    let over_ports = sizes.dispatch_arenas + sizes.port_dispatch_arenas;
    Ok(Line {
        bench: "ep-sizes",
        ranks,
        tokens: options.tokens,
        hidden: options.hidden,
        experts: options.experts,
        topk: options.topk,
        slots: options.slots,
        mapped_arenas_bytes: sizes.dispatch_arenas + sizes.combine_arenas,
        dispatch_arenas_bytes: over_ports,
        combine_arenas_bytes: sizes.port_combine_arenas,
        outputs_bytes: sizes.outputs,
        deepep_bytes,
        ratio: (over_ports + sizes.port_combine_arenas) as f64 / deepep_bytes as f64,
    })
}

/// Buffers for sending and receiving and the signals, twice, however many ranks there are.
fn deepep_bytes(tokens: u64, hidden: u64, experts: u64) -> u64 {
    let scales = 4 * (hidden / 128);
    let dispatched = 16 + (2 * hidden).max(hidden + scales);
    let combined = scales + 2 * hidden;
    let sent = (tokens * dispatched).max(experts * tokens * combined);
    let received = experts * tokens * dispatched.max(combined);
    let signals = (4 * experts).next_multiple_of(128);
    let all = 2 * (sent + received + signals);
    (all / 128 + 1) * 128
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deepep_takes_what_it_is_known_to_take() {
        let gib = |tokens, hidden, experts| deepep_bytes(tokens, hidden, experts) as f64 / f64::from(1 << 30);
        assert!((gib(128, 7168, 256) - 1.78).abs() < 0.01);
        assert!((gib(512, 7168, 256) - 7.1).abs() < 0.05);
        assert!((gib(1840, 5120, 448) - 31.94).abs() < 0.01);
    }
}
