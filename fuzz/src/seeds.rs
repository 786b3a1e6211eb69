//! Writes the inputs that the fuzzer begins with: every message of the tests' corpus, at every moment.

use std::path::Path;

use crossdock_kv::{CacheLayout, ContextShare};
use crossdock_proto::Message;

#[allow(dead_code)]
#[path = "../../crates/proto/tests/proto/corpus.rs"]
mod corpus;
#[allow(dead_code)]
mod script;
#[allow(dead_code, unused_imports)] // The tests' world has more to it than a corpus needs.
#[path = "../../crates/proto/tests/proto/world/mod.rs"]
mod world;

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in ["layout", "message", "peer"] {
        std::fs::create_dir_all(root.join(target))?;
    }
    let messages = corpus::corpus();
    for (at, message) in messages.iter().enumerate() {
        std::fs::write(root.join("message").join(format!("{at:02}")), corpus::encoded(message))?;
        for moment in 0..world::Moment::ALL.len() {
            let mut input = vec![moment as u8];
            (1..=7).for_each(|room| input.extend(word(message, room)));
            std::fs::write(root.join("peer").join(format!("{moment}-{at:02}")), input)?;
        }
    }
    for (at, pair) in layouts().iter().enumerate() {
        std::fs::write(root.join("layout").join(format!("{at:02}")), pair)?;
    }
    println!("{} messages at {} moments", messages.len(), world::Moment::ALL.len());
    Ok(())
}

/// Pairs of layouts, one behind the other, behind the length of the first one.
fn layouts() -> Vec<Vec<u8>> {
    let heads = |page_tokens, rank, ranks| CacheLayout::llama_3_70b(page_tokens, 64, rank, ranks);
    let latent = |page_tokens| CacheLayout::deepseek_r1(page_tokens, 64);
    let turns = |rank| {
        latent(4).and_then(|layout| layout.with_context(ContextShare { rank, ranks: 4, interleave: 1 }))
    };
    let pairs = [
        (latent(64), latent(64)),
        (latent(1), latent(64)),
        (latent(64), turns(3)),
        (turns(1), turns(1)),
        (heads(16, 0, 1), heads(4, 1, 2)),
        (heads(16, 3, 4), heads(16, 0, 1)),
    ];
    pairs.into_iter().map(|(one, two)| joined(one.expect("a layout"), two.expect("a layout"))).collect()
}

fn joined(one: CacheLayout, two: CacheLayout) -> Vec<u8> {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    one.encode(&mut first);
    two.encode(&mut second);
    [&(first.len() as u16).to_le_bytes()[..], &first, &second].concat()
}

/// A message as the peer says it about a room.
fn word(message: &Message, room: u64) -> Vec<u8> {
    let frame = corpus::said(message, corpus::FROM, room);
    let (kind, body) = (frame[2], &frame[20..]);
    let mut word = (body.len() as u16).to_le_bytes().to_vec();
    word.push(kind);
    word.extend(body);
    word
}
