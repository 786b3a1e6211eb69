//! What a fabric and its ports are like.

/// How a fabric behaves. The default is unkind in every small way, and breaks nothing by itself.
#[derive(Clone, Debug)]
pub struct FabricOptions {
    /// How long a message travels, in one direction, without its bytes.
    pub delay: Between,
    /// How long a lane that was closed, or broke, still carries what is on its way to this side.
    pub drain: Between,
    /// How long after the death of a process its peers on the same host have the proof.
    pub death_notice: Between,
    /// How long a lane or a stream outlives a partition, or a peer that fell silent.
    pub silence_ns: u64,
    /// How long connecting a lane may take.
    pub connect_ns: u64,
    /// How often an op lands in several pieces, at different times.
    pub partial_landing: OneIn,
    /// How often a post is cut short.
    pub short_post: OneIn,
    /// How often a poll reports only some of what it could.
    pub short_poll: OneIn,
    /// How often `attach` answers that it does not know the region yet.
    pub not_yet: OneIn,
    /// How often a datagram is lost.
    pub datagram_loss: OneIn,
    /// How many frames of a stream may be on their way or unread before sending says that it is full.
    pub stream_frames: usize,
    /// How many datagrams wait to be read; more are lost.
    pub datagrams_unread: usize,
    /// Whether landings are noted. Who does not drain them turns this off.
    pub note_landings: bool,
    /// Faults that come by themselves.
    pub chaos: Chaos,
}

impl Default for FabricOptions {
    fn default() -> Self {
        Self {
            delay: Between { least_ns: 1_000, most_ns: 20_000 },
            drain: Between { least_ns: 0, most_ns: 30_000 },
            death_notice: Between { least_ns: 10_000, most_ns: 1_000_000 },
            silence_ns: 500_000_000,
            connect_ns: 1_000_000_000,
            partial_landing: OneIn(4),
            short_post: OneIn(16),
            short_poll: OneIn(8),
            not_yet: OneIn(4),
            datagram_loss: OneIn(50),
            stream_frames: 256,
            datagrams_unread: 256,
            note_landings: false,
            chaos: Chaos::default(),
        }
    }
}

/// A stretch of time of random length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Between {
    /// At least so long.
    pub least_ns: u64,
    /// At most so long.
    pub most_ns: u64,
}

/// How often something happens: once in so many times; never if zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OneIn(pub u32);

/// Faults that come by themselves, each after a random time around the given mean, or never if that is zero.
/// Killing is left to the owner of the fabric, who has a process to take down with it.
#[derive(Clone, Copy, Debug)]
pub struct Chaos {
    /// A lane breaks.
    pub lane_loss_ns: u64,
    /// The streams between two nodes break.
    pub stream_loss_ns: u64,
    /// Two nodes no longer reach each other, for a [while](Chaos::duration).
    pub partition_ns: u64,
    /// A process stops, for a while.
    pub stop_ns: u64,
    /// All messages from and to a node take sixteen times as long, for a while.
    pub slow_ns: u64,
    /// How long what ends by itself lasts.
    pub duration: Between,
}

impl Default for Chaos {
    fn default() -> Self {
        Self {
            lane_loss_ns: 0,
            stream_loss_ns: 0,
            partition_ns: 0,
            stop_ns: 0,
            slow_ns: 0,
            duration: Between { least_ns: 1_000_000, most_ns: 2_000_000_000 },
        }
    }
}

/// The rules of a port: who looks at an access, when a source is free, what proves that nothing lands any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Semantics {
    /// As tcp: the receiver checks the grant of each piece when it lands. `Done` means that the bytes have left.
    /// A stopped receiver takes nothing.
    Checked,
    /// As verbs: nobody checks anything but the bounds of the region. `Done` is the acknowledgement. What is on its
    /// way lands until this side's `Down`, also in a stopped process, also from a dead one.
    Verbs,
    /// As shm: the writer stores into the mapped memory, when it comes to it. Only the peer's word or its proven
    /// death ends that; a stopped peer stores the rest when it continues.
    Mapped,
    /// As memory mapped across nodes: like [`Mapped`](Self::Mapped), but nobody can prove a death. `Down` comes by
    /// time-out and promises nothing about what was granted: `revoke` answers `Never`.
    Fabric,
}

impl Semantics {
    /// All of them.
    pub const ALL: [Semantics; 4] = [Self::Checked, Self::Verbs, Self::Mapped, Self::Fabric];

    /// A word for names and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Checked => "checked",
            Self::Verbs => "verbs",
            Self::Mapped => "mapped",
            Self::Fabric => "fabric",
        }
    }

    /// Whether ops are stores and loads of the poster's own processor.
    pub fn is_mapped(self) -> bool {
        matches!(self, Self::Mapped | Self::Fabric)
    }
}

/// What one port is like.
#[derive(Clone, Debug)]
pub struct SimPortOptions {
    /// Its name, for logs.
    pub name: String,
    /// Its rules. Ports with other rules, or another `unordered`, cannot connect.
    pub semantics: Semantics,
    /// Whether the ops of a lane may overtake each other.
    pub unordered: bool,
    /// How many pieces of ops may be in flight on a lane.
    pub pieces_in_flight: u32,
    /// How many immediates may be unread on a lane.
    pub immediates_in_flight: u32,
    /// How many lanes can be made in the life of the port.
    pub lanes: u32,
    /// How fast one lane is.
    pub bytes_per_second: u64,
    /// How fast everything together comes in that is written to this port, first posted, first served. Nothing: as fast
    /// as its lanes are.
    pub link_bytes_per_second: Option<u64>,
}

impl SimPortOptions {
    /// A port of these semantics with ordinary limits.
    pub fn new(semantics: Semantics) -> Self {
        Self {
            name: format!("sim-{}", semantics.name()),
            semantics,
            unordered: false,
            pieces_in_flight: 1024,
            immediates_in_flight: 256,
            lanes: 65_536,
            bytes_per_second: 25_000_000_000,
            link_bytes_per_second: None,
        }
    }
}
