//! What the ranks of a group agree on, whether that is possible, and what memory it takes.

use std::fmt;

use crate::Experts;
use crate::region::RegionLayout;

/// What all ranks of a group agree on. Compared when they meet: [`GroupConfig::fingerprint`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupConfig {
    /// The most tokens that each rank dispatches in one step, by rank; so there are as many ranks as entries.
    pub max_tokens: Vec<u32>,
    /// Experts over all ranks, as [`Experts`] spreads them.
    pub experts: u32,
    /// Experts that a token chooses, at most.
    pub top_k: u32,
    /// Channels of a token.
    pub hidden: u32,
    /// The largest form in which a dispatch may carry rows. Those that are not larger may be used as well.
    pub payload: Payload,
    /// Micro-batches that may be under way at once.
    pub slots: u32,
    /// Which placement of the experts the ranks believe in.
    pub placement_version: u64,
}

/// The form in which rows travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Payload {
    /// bfloat16, no scales.
    Bf16,
    /// FP8 e4m3 with one `f32` scale for 128 channels.
    Fp8,
    /// FP8 e4m3 with scales that are powers of two: one byte for 128 channels, four to a word, the last word filled up
    /// with zeros.
    Fp8Ue8m0,
    /// Bytes that mean nothing to the library, like MXFP4 or NVFP4 with their scales.
    Opaque {
        /// Bytes of a row.
        row_bytes: u32,
        /// Bytes of a row's scales.
        scale_bytes: u32,
    },
}

/// Channels that share a scale.
pub const BLOCK_CHANNELS: u32 = 128;

impl Payload {
    /// Bytes of one row's values.
    pub fn row_bytes(self, hidden: u32) -> u64 {
        match self {
            Payload::Bf16 => 2 * u64::from(hidden),
            Payload::Fp8 | Payload::Fp8Ue8m0 => u64::from(hidden),
            Payload::Opaque { row_bytes, .. } => u64::from(row_bytes),
        }
    }

    /// Bytes of one row's scales.
    pub fn scale_bytes(self, hidden: u32) -> u64 {
        let blocks = u64::from(hidden.div_ceil(BLOCK_CHANNELS));
        match self {
            Payload::Bf16 => 0,
            Payload::Fp8 => 4 * blocks,
            Payload::Fp8Ue8m0 => 4 * blocks.div_ceil(4),
            Payload::Opaque { scale_bytes, .. } => u64::from(scale_bytes),
        }
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Payload::Bf16 => f.write_str("bf16"),
            Payload::Fp8 => f.write_str("fp8_e4m3 with f32 scales"),
            Payload::Fp8Ue8m0 => f.write_str("fp8_e4m3 with ue8m0 scales"),
            Payload::Opaque { row_bytes, scale_bytes } => {
                write!(f, "rows of {row_bytes} bytes with scales of {scale_bytes}")
            }
        }
    }
}

/// A limit that a configuration violates.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A number is below or above what it can be.
    #[error("{what} {value}: it must be {least} to {most}")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// What it is.
        value: u64,
        /// The smallest that is possible.
        least: u64,
        /// The largest that is possible.
        most: u64,
    },
    /// A rank's token limit is above what it can be.
    #[error("max_tokens {value} of rank {rank}: it must be at most {most}")]
    TooManyTokens {
        /// Which rank.
        rank: usize,
        /// Its limit.
        value: u32,
        /// The largest that is possible.
        most: u32,
    },
    /// Something has to be a multiple of another number.
    #[error("{what} {value}: it must be a multiple of {of}{why}")]
    NotAligned {
        /// What.
        what: &'static str,
        /// How much it is.
        value: u64,
        /// What it has to be a multiple of.
        of: u64,
        /// For what, beginning with a comma.
        why: &'static str,
    },
    /// The memory that the configuration asks for cannot be addressed.
    #[error("the buffers would be larger than an address space")]
    TooLarge,
}

/// Every limit that a configuration violates, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violations(pub Vec<Violation>);

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, violation) in self.0.iter().enumerate() {
            write!(f, "{}{violation}", if at > 0 { "; " } else { "" })?;
        }
        Ok(())
    }
}

impl std::error::Error for Violations {}

/// One value that differs between the configurations of two ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which value.
    pub what: String,
    /// What it is on this side.
    pub ours: String,
    /// What it is on the other.
    pub theirs: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} here, {} there", self.what, self.ours, self.theirs)
    }
}

/// What memory one rank needs, in bytes; known before anything is allocated. Exact in the worst case, in which every
/// token goes to this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// What dispatched rows take between ranks that map each other's memory: the lists of all sources, and this rank's own
    /// rows, which the others read where they are.
    pub dispatch_arenas: u64,
    /// What they take besides where every other rank is on another host: the rows of all sources, and what is to be sent
    /// to each.
    pub port_dispatch_arenas: u64,
    /// What results take between ranks that map each other's memory, besides the outputs: nothing, as they are read where
    /// the experts left them.
    pub combine_arenas: u64,
    /// What they take where every other rank is on another host: a row for each choice of this rank's tokens.
    pub port_combine_arenas: u64,
    /// What this rank's experts read and write, in the layout of the latency mode: values, scales, source tokens, and
    /// results in bf16.
    pub outputs: u64,
}

impl GroupConfig {
    /// How many ranks there are.
    pub fn ranks(&self) -> u32 {
        self.max_tokens.len() as u32
    }

    /// How the experts are spread.
    ///
    /// # Panics
    /// If there is no rank, which [`GroupConfig::validate`] finds.
    pub fn spread(&self) -> Experts {
        Experts::new(self.experts, self.ranks())
    }

    /// Lists every violated limit.
    pub fn validate(&self) -> Result<(), Violations> {
        let mut found = Vec::new();
        let mut range = |what, value: u64, least, most| {
            if !(least..=most).contains(&value) {
                found.push(Violation::OutOfRange { what, value, least, most });
            }
        };
        range("ranks", self.max_tokens.len() as u64, 1, u64::from(MAX_RANKS));
        range("experts", self.experts.into(), 1, u64::from(MAX_EXPERTS));
        range("top_k", self.top_k.into(), 1, u64::from(MAX_TOP_K));
        range("hidden", self.hidden.into(), 1, u64::from(MAX_HIDDEN));
        range("slots", self.slots.into(), 1, u64::from(MAX_SLOTS));
        for (rank, &value) in self.max_tokens.iter().enumerate() {
            if value > MAX_TOKENS {
                found.push(Violation::TooManyTokens { rank, value, most: MAX_TOKENS });
            }
        }
        let mut aligned = |what, value: u64, of, why| {
            if !value.is_multiple_of(of) {
                found.push(Violation::NotAligned { what, value, of, why });
            }
        };
        aligned("hidden", self.hidden.into(), 8, ", as results are bf16 rows of 16-byte pieces");
        if let Err(Violations(of_payload)) = self.check_payload(self.payload) {
            found.extend(of_payload);
        }
        if found.is_empty() && self.checked_sizes().is_none() {
            found.push(Violation::TooLarge);
        }
        if found.is_empty() { Ok(()) } else { Err(Violations(found)) }
    }

    /// Lists what is wrong with a form of rows, in this group. That it may be larger than the group's own is not looked at.
    pub fn check_payload(&self, payload: Payload) -> Result<(), Violations> {
        let mut found = Vec::new();
        let mut check = |what, value: u32, least: u32, of: u32, why| {
            if !(least..=MAX_ROW_BYTES).contains(&value) {
                let (value, least, most) = (value.into(), least.into(), MAX_ROW_BYTES.into());
                found.push(Violation::OutOfRange { what, value, least, most });
            }
            if !value.is_multiple_of(of) {
                found.push(Violation::NotAligned { what, value: value.into(), of: of.into(), why });
            }
        };
        match payload {
            Payload::Bf16 => {}
            Payload::Fp8 | Payload::Fp8Ue8m0 => {
                check("hidden", self.hidden, 1, BLOCK_CHANNELS, ", the channels of a scale");
            }
            Payload::Opaque { row_bytes, scale_bytes } => {
                check("row_bytes", row_bytes, 1, 16, "");
                check("scale_bytes", scale_bytes, 0, 4, "");
            }
        }
        if found.is_empty() { Ok(()) } else { Err(Violations(found)) }
    }

    /// # Panics
    /// If a dispatch of this group cannot carry rows of this form.
    pub(crate) fn assert_takes(&self, payload: Payload) {
        let bytes = |payload: Payload| payload.row_bytes(self.hidden) + payload.scale_bytes(self.hidden);
        let fits = self.check_payload(payload).is_ok() && bytes(payload) <= bytes(self.payload);
        assert!(fits, "{payload} in a group of {}", self.payload);
    }

    /// What memory each rank needs.
    pub fn sizes(&self) -> Result<Sizes, Violations> {
        self.validate()?;
        Ok(self.checked_sizes().expect("a valid configuration has sizes"))
    }

    fn checked_sizes(&self) -> Option<Sizes> {
        // The largest of all ranks: of those with the most experts, and tokens.
        let most = (0..self.ranks()).max_by_key(|&rank| self.max_tokens[rank as usize])?;
        let regions = [RegionLayout::of_group(self, 0..1)?, RegionLayout::of_group(self, most..most + 1)?];
        let largest =
            |bytes: fn(&RegionLayout) -> u64| regions.iter().flatten().map(bytes).max().unwrap_or(0);
        let tokens = self.max_tokens.iter().map(|&tokens| u64::from(tokens)).sum::<u64>();
        let packed_row = self.payload.row_bytes(self.hidden) + self.payload.scale_bytes(self.hidden) + 4;
        let places = tokens.checked_mul(self.spread().most().into())?;
        let packed = places.checked_mul(packed_row)?.checked_mul(self.slots.into())?;
        let sizes = Sizes {
            dispatch_arenas: largest(RegionLayout::dispatch_bytes),
            port_dispatch_arenas: largest(RegionLayout::port_dispatch_bytes),
            combine_arenas: 0,
            port_combine_arenas: largest(RegionLayout::port_combine_bytes),
            outputs: packed.checked_add(largest(RegionLayout::result_bytes))?,
        };
        let region = regions.iter().flatten().map(|region| region.bytes as u64).max()?;
        // Places of packed rows have 32 bits.
        let fits = region.checked_add(packed)? <= MAX_BYTES && places <= u64::from(u32::MAX);
        fits.then_some(sizes)
    }
}

/// All buffers of a rank: what a process can address.
const MAX_BYTES: u64 = 1 << 47;
/// Ranks of a group.
pub const MAX_RANKS: u32 = 4096;
/// Experts of a group: a local index and "none" fit in 16 bits.
pub const MAX_EXPERTS: u32 = 1 << 15;
/// Choices of a token.
pub const MAX_TOP_K: u32 = 64;
/// Channels of a token.
pub const MAX_HIDDEN: u32 = 1 << 17;
/// Tokens of a rank in one step.
pub const MAX_TOKENS: u32 = 1 << 20;
/// Micro-batches under way.
pub const MAX_SLOTS: u32 = 64;
/// Bytes of a row that means nothing to the library.
pub const MAX_ROW_BYTES: u32 = 1 << 19;
