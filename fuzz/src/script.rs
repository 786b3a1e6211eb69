//! What the bytes of an input mean: one byte for the moment, then words, each of a length in two bytes, a kind, and
//! what follows the header of a message of that kind. So the fuzzer need not guess the header, and kinds that do not
//! exist are words without any.

use crossdock_proto::Identity;

use crate::world::Moment;

/// One word: its kind, and what follows.
pub type Word<'a> = (u8, &'a [u8]);

/// Reads an input; every input has a meaning.
pub fn read(bytes: &[u8]) -> (Moment, impl Iterator<Item = Word<'_>>) {
    let (&moment, mut rest) = bytes.split_first().unwrap_or((&0, &[]));
    let words = std::iter::from_fn(move || {
        let (&[low, high, kind], tail) = rest.split_first_chunk()?;
        let length = usize::from(u16::from_le_bytes([low, high])).min(tail.len());
        let (body, tail) = tail.split_at(length);
        rest = tail;
        Some((kind, body))
    });
    (Moment::ALL[usize::from(moment) % Moment::ALL.len()], words)
}

/// The frame that a word stands for.
pub fn frame((kind, body): Word<'_>, from: Identity) -> Vec<u8> {
    if kind > LAST_KIND {
        return body.to_vec();
    }
    let mut frame = vec![0x0c, 0xcd, kind, 0];
    frame.extend(from.node.to_le_bytes());
    frame.extend(from.incarnation.to_le_bytes());
    frame.extend(body);
    frame
}

/// Kinds end at 21; the next one is known to nobody, but has a header.
const LAST_KIND: u8 = 22;
