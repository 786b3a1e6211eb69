//! What a model keeps: the caches whose bytes are moved.

use std::path::Path;

use serde::Deserialize;

use crate::error::Error;

/// What one tensor-parallel rank keeps of a model, as pages that are moved alike: a head's keys and values lie in buffers
/// of their own, so each counts as a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankCache {
    pub token_bytes: u64,
    pub buffers: u32,
}

/// A model as a file describes it, in JSON: `{"layers": 61, "token_bytes": 1152}` where each rank keeps everything (MLA),
/// or `{"layers": 80, "kv_heads": 8, "head_bytes": 256}` where the ranks share the heads of keys and values.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Model {
    Whole { layers: u32, token_bytes: u64 },
    Heads { layers: u32, kv_heads: u32, head_bytes: u64 },
}

/// What a rank keeps of the model with this name, or in this file, under so many ranks.
pub fn rank_cache(name: &str, ranks: u32) -> Result<RankCache, Error> {
    let model = match name {
        "deepseek-r1" => Model::Whole { layers: 61, token_bytes: 1152 },
        "llama-3-70b" => Model::Heads { layers: 80, kv_heads: 8, head_bytes: 256 },
        file if Path::new(file).exists() => read(file)?,
        name => return Err(Error::UnknownModel { name: name.into() }),
    };
    match model {
        Model::Whole { layers, token_bytes } => Ok(RankCache { token_bytes, buffers: layers }),
        Model::Heads { layers, kv_heads, head_bytes } => {
            let share = crossdock::HeadShare::of_rank(kv_heads, 0, ranks);
            let share = share.ok_or(Error::Heads { kv_heads, ranks })?;
            let buffers = layers.saturating_mul(2);
            Ok(RankCache { token_bytes: head_bytes.saturating_mul(share.count.into()), buffers })
        }
    }
}

fn read(file: &str) -> Result<Model, Error> {
    let wrong = |why: String| Error::ModelFile { file: file.into(), why };
    let text = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))
}
