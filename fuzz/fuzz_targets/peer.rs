//! A live node, and a peer that says what the fuzzer wishes, at the moment that it wishes.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../src/script.rs"]
mod script;
#[allow(dead_code, unused_imports)] // The tests' world has more to it than a hostile peer needs.
#[path = "../../crates/proto/tests/proto/world/mod.rs"]
mod world;

fuzz_target!(|bytes: &[u8]| {
    let (moment, words) = script::read(bytes);
    let mut hostile = world::Hostile::at(moment);
    for word in words.take(64) {
        let frame = script::frame(word, hostile.peer);
        hostile.say(&frame);
    }
    hostile.finish();
});
