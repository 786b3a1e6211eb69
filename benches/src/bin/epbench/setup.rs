//! What all ranks agree on, and the memory that they share.

use std::borrow::Cow;
use std::os::fd::{AsFd, AsRawFd};

use crossdock::{AllocateOptions, Memory};
use crossdock_benches::bare::map_theirs;
use crossdock_benches::{Words, rows::MOST_PLACES};
use crossdock_ep::{Group, GroupConfig, Payload, ScaleOrder};

use crate::control::Control;
use crate::error::Error;
use crate::options::{BackendName, Dtype, Mode, Options, PortName, ScaleName};
use crate::problem::Problem;
use crate::process;

/// What follows from the command line; every rank makes the same.
pub struct Setup {
    pub options: Options,
    pub config: GroupConfig,
    pub problem: Problem,
    /// The form of the dispatched rows.
    pub payload: Payload,
    /// There are more ranks than processors.
    pub crowded: bool,
}

impl Setup {
    pub fn new(options: &Options) -> Result<Self, Error> {
        if options.backend == BackendName::Cuda {
            return Err(Error::NotBuilt { what: "--backend cuda" });
        }
        if options.port != PortName::Verbs && !options.devices.is_empty() {
            return Err(Error::NoDevices);
        }
        if !(options.seconds > 0.0 && options.seconds <= 3600.0) {
            return Err(Error::Seconds);
        }
        let payload = match options.dtype {
            Dtype::Bf16 => Payload::Bf16,
            Dtype::Fp8 => Payload::Fp8,
        };
        let config = GroupConfig {
            max_tokens: vec![options.tokens; options.ranks as usize],
            experts: options.experts,
            top_k: options.topk,
            hidden: options.hidden,
            payload,
            slots: options.slots,
            placement_version: 0,
        };
        config.validate()?;
        // A token of a valid configuration has no more choices than a row of the floor has places.
        if options.topk > options.experts || options.topk as usize > MOST_PLACES {
            return Err(Error::TooManyChoices { experts: options.experts, top_k: options.topk });
        }
        let problem = Problem::new(options, config.spread());
        // Between hosts, a rank has a thread that carries its calls.
        let threads = if options.port == PortName::Shm { 1 } else { 2 };
        let crowded = threads * options.ranks > process::processors()?;
        let is_alike = options.port == PortName::Shm && options.mode == Mode::Latency;
        if options.round_trips && (!is_alike || options.ranks < 2 || crowded) {
            return Err(Error::NoRoundTrips);
        }
        Ok(Self { options: options.clone(), config, problem, payload, crowded })
    }

    pub fn row_bytes(&self) -> usize {
        self.payload.row_bytes(self.config.hidden) as usize
    }

    pub fn scale_bytes(&self) -> usize {
        self.payload.scale_bytes(self.config.hidden) as usize
    }

    /// Rows that each expert or, in throughput mode, each rank has room for.
    pub fn rows(&self) -> usize {
        self.problem.ranks as usize * self.problem.tokens
    }

    pub fn order(&self) -> ScaleOrder {
        match (self.options.mode, self.options.scales) {
            (Mode::Latency, ScaleName::Col) => ScaleOrder::ByColumn,
            _ => ScaleOrder::ByRow,
        }
    }

    /// Where the scales begin in the floor's memory.
    pub fn floor_scales(&self) -> usize {
        (self.problem.groups() * self.rows() * self.row_bytes()).next_multiple_of(4096)
    }

    /// Where the floor keeps the scales of each token before they become columns.
    pub fn floor_token_scales(&self) -> usize {
        (self.floor_scales() + self.problem.groups() * self.rows() * self.scale_bytes())
            .next_multiple_of(4096)
    }

    /// Whether the ranks meet as between hosts, and share no memory.
    pub fn is_apart(&self) -> bool {
        self.options.port != PortName::Shm
    }

    /// Where the floor finds the results of a rank that is apart, of one of its groups.
    pub fn results_at(&self, slot: u32, local: usize, groups: usize) -> usize {
        (slot as usize * groups + local) * self.rows() * 2 * self.problem.hidden
    }

    /// What a rank shares with the others: its region, or only its results where the library has the region.
    fn rank_memory(&self, rank: u32) -> Result<Memory, Error> {
        if !self.is_apart() {
            return Ok(Group::allocate_region(&self.config, rank)?);
        }
        memory(self.rank_bytes(rank)?, "epbench-results").map_err(Error::io("allocating memory"))
    }

    fn rank_bytes(&self, rank: u32) -> Result<usize, Error> {
        if !self.is_apart() {
            return Ok(Group::region_bytes(&self.config, rank)?);
        }
        let groups = self.problem.groups_of(rank).len();
        Ok(self.results_at(self.config.slots, 0, groups).max(1))
    }

    fn floor_bytes(&self) -> usize {
        self.floor_token_scales() + self.rows() * self.scale_bytes()
    }

    fn made_bytes(&self) -> usize {
        self.rows() * (self.row_bytes() + self.scale_bytes())
    }

    /// What will be touched, of ours, of the floor, and by whoever computes and checks.
    pub fn needed_bytes(&self) -> u64 {
        let problem = &self.problem;
        let (row, result) = (self.row_bytes() + self.scale_bytes(), 2 * problem.hidden);
        let tokens = problem.ranks as usize * problem.tokens;
        let rows: usize = (0..problem.ranks)
            .flat_map(|rank| (0..problem.tokens).map(move |token| problem.goes_to(rank, token).count()))
            .sum();
        let arenas = tokens * (problem.ranks as usize).min(problem.top_k) * row;
        let slots = self.config.slots as usize;
        (rows * (2 * row + slots * result) + slots * arenas + tokens * (4 * result + 2 * row)) as u64
    }
}

/// The memory that all ranks map.
pub struct Shared {
    pub words: Words,
    /// Where the floor's rows and scales go, of all ranks.
    pub floor: Memory,
    /// Each token's row and scales as the reference makes them, where they are compared.
    pub made: Option<Memory>,
    /// The ranks' regions, or where they are apart, their results.
    pub regions: Vec<Memory>,
    /// Those of the group whose ranks sleep at once.
    pub parked: Vec<Memory>,
}

impl Shared {
    pub fn allocate(setup: &Setup) -> Result<Self, Error> {
        if let Some(available) = available_bytes()
            && setup.needed_bytes() > available / 10 * 9
        {
            let (needed_mb, available_mb) = (setup.needed_bytes() / 1_000_000, available / 1_000_000);
            return Err(Error::TooLarge { needed_mb, available_mb });
        }
        let failed = "allocating memory";
        let regions = || (0..setup.config.ranks()).map(|rank| setup.rank_memory(rank));
        Ok(Self {
            words: Words::new(Control::words(setup)).map_err(Error::io(failed))?,
            floor: memory(setup.floor_bytes(), "epbench-floor").map_err(Error::io(failed))?,
            made: match setup.options.verify {
                true => Some(memory(setup.made_bytes(), "epbench-made").map_err(Error::io(failed))?),
                false => None,
            },
            regions: regions().collect::<Result<_, _>>()?,
            parked: match setup.options.round_trips {
                true => regions().collect::<Result<_, _>>()?,
                false => Vec::new(),
            },
        })
    }

    /// What the first rank has allocated.
    pub fn open(setup: &Setup, parent: i32, descriptors: &[i32]) -> Result<Self, Error> {
        let mut descriptors = descriptors.iter().copied();
        let mut next = || descriptors.next().unwrap_or(-1);
        let failed = "opening the first rank's memory";
        let words = Words::theirs(parent, next(), Control::words(setup)).map_err(Error::io(failed))?;
        let mut memory = |bytes: usize| map_theirs(parent, next(), bytes.max(1)).map_err(Error::io(failed));
        let parked = if setup.options.round_trips { setup.config.ranks() } else { 0 };
        Ok(Self {
            words,
            floor: memory(setup.floor_bytes())?,
            made: if setup.options.verify { Some(memory(setup.made_bytes())?) } else { None },
            regions: (0..setup.config.ranks())
                .map(|rank| memory(setup.rank_bytes(rank)?))
                .collect::<Result<_, _>>()?,
            parked: (0..parked)
                .map(|rank| memory(Group::region_bytes(&setup.config, rank)?))
                .collect::<Result<_, _>>()?,
        })
    }

    /// In the order in which [`Shared::open`] takes them.
    pub fn descriptors(&self) -> Vec<i32> {
        let memories = [&self.floor].into_iter().chain(&self.made).chain(&self.regions).chain(&self.parked);
        let of_memories = memories.filter_map(|memory| memory.fd().map(|fd| fd.as_fd().as_raw_fd()));
        self.words.descriptor().into_iter().chain(of_memories).collect()
    }
}

fn memory(bytes: usize, name: &'static str) -> std::io::Result<Memory> {
    let options = AllocateOptions { name: Cow::Borrowed(name), ..AllocateOptions::default() };
    Memory::allocate(bytes.max(1), &options).map_err(std::io::Error::other)
}

/// What the system says that it can give; `None` where it does not say.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
