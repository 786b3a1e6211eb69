//! The experts' scenes: four processes send their tokens to the experts of a DeepSeek-R1 layer and back, in each mode, check
//! every row, and go on when one of them is killed.

mod content;
mod rank;
mod report;
mod scene;
mod talk;

use std::error::Error;
use std::time::Duration;

use clap::ValueEnum;
use crossdock::experts::{GroupConfig, Payload};
use serde::{Deserialize, Serialize};

pub use rank::{RankOptions, work};
pub use report::{Scene, table};

use super::Options;
use super::registry::Registry;
use scene::Stage;

/// DeepEP's two modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// As in decode: few tokens, rows by expert.
    Latency,
    /// As in prefill: many tokens, a row for each rank.
    Throughput,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Latency => "latency",
            Mode::Throughput => "throughput",
        }
    }

    /// Tokens of each rank and step.
    pub fn tokens(self) -> u32 {
        match self {
            Mode::Latency => 32,
            Mode::Throughput => 256,
        }
    }

    /// A layer of DeepSeek-R1, over the demo's ranks.
    fn group(self) -> GroupConfig {
        GroupConfig {
            max_tokens: vec![self.tokens(); RANKS as usize],
            experts: 256,
            top_k: 8,
            hidden: 7168,
            payload: Payload::Fp8,
            // One of them moves the tokens; in the other the ranks wait for each other, so that what is timed begins for
            // all at once.
            slots: 2,
            placement_version: 1,
        }
    }
}

/// Ranks of a scene.
const RANKS: u32 = 4;
/// How long the ranks of a scene step before one of them is killed.
const MEASURED: Duration = Duration::from_secs(1);

/// Plays a scene for each mode.
pub fn play(options: &Options, registry: &mut Registry) -> Result<Vec<Scene>, Box<dyn Error>> {
    let mut scenes = Vec::new();
    for mode in [Mode::Latency, Mode::Throughput] {
        scenes.push(match registry.ended(Duration::ZERO) {
            // Nobody can meet any more.
            Some(how) => Scene::without(mode, how),
            None => Stage::start(options, mode, registry.address())?.play(registry),
        });
    }
    Ok(scenes)
}
