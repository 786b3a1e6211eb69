//! A deployment of 32 prefill and 72 decode ranks on one machine: the real protocol, engine and KV code over simulated
//! ports and streams, in virtual time and without faults. What is asserted is counted, so that it holds on any machine:
//! nothing may grow faster than the mesh does.
//!
//! By default the sizes are small; in full, with the figures of `docs/benchmarks.md`:
//! `CROSSDOCK_SCALE=full cargo test --release -p crossdock-tests --test scale -- --nocapture --test-threads=1`.

#[allow(dead_code, reason = "the simulation uses more of it")]
#[path = "../simulation/chance.rs"]
mod chance;
#[allow(dead_code, reason = "the simulation uses more of it")]
#[path = "../simulation/network.rs"]
mod network;
#[allow(dead_code, reason = "the simulation uses more of it")]
#[path = "../simulation/rules.rs"]
mod rules;

mod bring_up;
mod cluster;
mod counting;
mod incast;
mod rooms;

/// Whether everything is to be as large as it would be in production.
fn is_full() -> bool {
    std::env::var("CROSSDOCK_SCALE").is_ok_and(|size| size == "full")
}
