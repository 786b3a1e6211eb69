//! What an immediate says: 2 bits of kind, and 30 bits that are a grant's name for KV pages.

use crossdock_transport::GrantId;

/// An immediate of the engine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imm(u32);

/// What an immediate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Counted for the room that gave the grant.
    Kv,
    /// Rows for experts.
    Experts,
    /// Means nothing to the receiver; it only made the sender's port say that earlier ops are done.
    Notice,
}

impl Imm {
    /// An immediate of a kind with 30 bits of its own.
    pub fn new(kind: Kind, value: u32) -> Self {
        Self((kind as u32) << 30 | (value & 0x3fff_ffff))
    }

    /// One arrival under a grant.
    pub fn kv(grant: GrantId) -> Self {
        Self::new(Kind::Kv, grant.bits())
    }

    /// As a port carries it.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// As it came from a port. The fourth kind means nothing to this version.
    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// What it is for.
    pub fn kind(self) -> Kind {
        match self.0 >> 30 {
            0 => Kind::Kv,
            1 => Kind::Experts,
            _ => Kind::Notice,
        }
    }

    /// The lower 30 bits.
    pub fn value(self) -> u32 {
        self.0 & 0x3fff_ffff
    }

    /// The grant of an arrival.
    pub fn grant(self) -> GrantId {
        GrantId::from_bits(self.0)
    }
}
