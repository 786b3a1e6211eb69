//! Writes the inputs that the fuzzer begins with: every message of the tests' corpus, at every moment.

use std::path::Path;

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
    for target in ["message", "peer"] {
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
    println!("{} messages at {} moments", messages.len(), world::Moment::ALL.len());
    Ok(())
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
