//! A toy transformer: grouped-query attention over a KV cache, with made-up weights. What it says means nothing, and every
//! token that it says depends on every key and value before it.

use std::ops::Range;

pub const LAYERS: u32 = 4;
pub const KV_HEADS: u32 = 4;
/// Query heads that share a KV head.
const GROUP: usize = 2;
/// Numbers of a head.
pub const HEAD: usize = 8;
const KV: usize = KV_HEADS as usize * HEAD;
const HIDDEN: usize = KV * GROUP;
const INNER: usize = 2 * HIDDEN;
pub const VOCABULARY: u32 = 256;

/// One token's key, or its value, for one head.
pub type Head = [f32; HEAD];
/// What the model thinks at one token.
pub type Hidden = [f32; HIDDEN];

/// Where keys and values are kept: some heads of all layers. The model does not know of pages.
pub trait KvCache {
    fn heads(&self) -> Range<u32>;
    fn write(&mut self, layer: u32, token: u32, head: u32, key: &Head, value: &Head);
    fn key(&self, layer: u32, token: u32, head: u32) -> Head;
    fn value(&self, layer: u32, token: u32, head: u32) -> Head;
}

pub struct Model {
    embedding: Matrix,
    layers: Vec<Layer>,
    unembedding: Matrix,
}

struct Layer {
    query: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Model {
    pub fn new() -> Self {
        let mut random = Random(0x5eed);
        let embedding = Matrix::random(&mut random, VOCABULARY as usize, HIDDEN);
        let layer = |_| Layer {
            query: Matrix::random(&mut random, HIDDEN, HIDDEN),
            key: Matrix::random(&mut random, KV, HIDDEN),
            value: Matrix::random(&mut random, KV, HIDDEN),
            output: Matrix::random(&mut random, HIDDEN, HIDDEN),
            up: Matrix::random(&mut random, INNER, HIDDEN),
            down: Matrix::random(&mut random, HIDDEN, INNER),
        };
        let layers = (0..LAYERS).map(layer).collect();
        Self { embedding, layers, unembedding: Matrix::random(&mut random, VOCABULARY as usize, HIDDEN) }
    }

    /// What goes into the first layer.
    pub fn embed(&self, id: u32, token: u32) -> Hidden {
        let row = self.embedding.row(id as usize);
        std::array::from_fn(|at| row[at] + (token as f32 * (at as f32 + 1.0) * 0.37).sin() / 8.0)
    }

    /// One layer over the tokens from `first` on, whose keys and values are written, and those of all tokens before them
    /// read. Each of `ranks` works on its heads: here one after the other, on GPUs at the same time.
    pub fn layer(&self, layer: u32, first: u32, hidden: &mut [Hidden], ranks: &mut [impl KvCache]) {
        let Layer { output, up, down, .. } = &self.layers[layer as usize];
        for (token, hidden) in (first..).zip(hidden) {
            let input = normed(hidden);
            // Of all heads, in their order: what an all-gather would give. So the sums are the same on any number of ranks.
            let mut attended = [0.0; HIDDEN];
            for cache in &mut *ranks {
                for head in cache.heads() {
                    self.attend(layer, token, head, &input, cache, &mut attended);
                }
            }
            output.add_to(hidden, &attended);
            let mut inner = [0.0; INNER];
            up.add_to(&mut inner, &normed(hidden));
            down.add_to(hidden, &inner.map(f32::tanh));
        }
    }

    /// The likeliest next token.
    pub fn next(&self, hidden: &Hidden) -> u32 {
        let mut scores = [0.0; VOCABULARY as usize];
        self.unembedding.add_to(&mut scores, &normed(hidden));
        (0..VOCABULARY).max_by(|&a, &b| scores[a as usize].total_cmp(&scores[b as usize])).unwrap_or(0)
    }

    fn attend(
        &self,
        layer: u32,
        token: u32,
        head: u32,
        input: &Hidden,
        cache: &mut impl KvCache,
        attended: &mut Hidden,
    ) {
        let weights = &self.layers[layer as usize];
        let project = |matrix: &Matrix, head| -> Head {
            std::array::from_fn(|at| dot(matrix.row(head * HEAD + at), input))
        };
        let (key, value) = (project(&weights.key, head as usize), project(&weights.value, head as usize));
        cache.write(layer, token, head, &key, &value);
        let keys: Vec<Head> = (0..=token).map(|token| cache.key(layer, token, head)).collect();
        let values: Vec<Head> = (0..=token).map(|token| cache.value(layer, token, head)).collect();
        for query_head in head as usize * GROUP..(head as usize + 1) * GROUP {
            let query = project(&weights.query, query_head);
            let scores: Vec<f32> = keys.iter().map(|key| (2.0 * dot(&query, key)).exp()).collect();
            let total: f32 = scores.iter().sum();
            for (score, value) in scores.iter().zip(&values) {
                for (at, number) in value.iter().enumerate() {
                    attended[query_head * HEAD + at] += score / total * number;
                }
            }
        }
    }
}

/// Row by row.
struct Matrix {
    numbers: Vec<f32>,
    columns: usize,
}

impl Matrix {
    fn random(random: &mut Random, rows: usize, columns: usize) -> Self {
        let scale = 1.7 / (columns as f32).sqrt();
        Self { numbers: (0..rows * columns).map(|_| random.number() * scale).collect(), columns }
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.numbers[row * self.columns..][..self.columns]
    }

    fn add_to(&self, sum: &mut [f32], vector: &[f32]) {
        sum.iter_mut().enumerate().for_each(|(row, sum)| *sum += dot(self.row(row), vector));
    }
}

/// Numbers from -1 to 1, the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn number(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

fn dot(one: &[f32], two: &[f32]) -> f32 {
    one.iter().zip(two).map(|(a, b)| a * b).sum()
}

fn normed(hidden: &Hidden) -> Hidden {
    let scale = (dot(hidden, hidden) / HIDDEN as f32 + 1e-6).sqrt().recip();
    hidden.map(|number| number * scale)
}
