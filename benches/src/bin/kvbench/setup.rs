//! What both processes agree on, and one process's pool and node.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheKind, CacheLayout, CacheLayoutError, Config, Dtype, LayoutOptions, Memory, Node,
    PagePool, PageSet, Placement, PoolError, PortConfig, Progress, ShmOptions, TcpOptions,
};
use crossdock_benches::bare::Pages;
use crossdock_benches::{Content, GpuChoice, OpenGpu, anonymous, rail_ports, rails, scattered};
use crossdock_verbs::VerbsPort;
use serde::{Deserialize, Serialize};

use crate::driver::Driver;
use crate::error::Error;
use crate::model::{RankCache, rank_cache};
use crate::options::{MemoryName, OpName, Options, PortName, ProgressName};
use crate::talk::Pass;

/// What both processes agree on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    pub port: PortName,
    pub memory: MemoryName,
    pub op: OpName,
    pub progress: ProgressName,
    pub copy_threads: u32,
    pub lanes: u8,
    pub congestion: Option<String>,
    /// Of the side that measures, and of its peer.
    pub devices: Vec<String>,
    /// Of both sides, with the cuda port alone.
    pub gpu: Option<GpuChoice>,
    pub token_bytes: u64,
    pub page_tokens: u32,
    pub layers: u32,
    pub pool_pages: u32,
}

impl Setup {
    /// The tcp port's options, as far as they do not depend on where it is.
    pub fn tcp(&self) -> TcpOptions {
        TcpOptions { congestion: self.congestion.clone(), ..TcpOptions::default() }
    }

    pub fn new(options: &Options) -> Result<Self, Error> {
        let gpu = match (options.port, options.memory) {
            (PortName::Cuda, MemoryName::Private) => return Err(Error::NotMapped),
            (PortName::Cuda, _) => Some(options.gpu.unwrap_or(GpuChoice::Device(0))),
            (_, MemoryName::Cuda) => return Err(Error::MemoryOfGpu),
            _ if options.gpu.is_some() => return Err(Error::NoGpu),
            _ => None,
        };
        if options.port != PortName::Verbs && !options.devices.is_empty() {
            return Err(Error::NoDevices);
        }
        if options.prefill_tp != options.decode_tp {
            return Err(Error::TensorParallel);
        }
        // The lengths of a trace are in tokens, which only a model gives a size.
        let model = options.model.as_deref().or(options.trace.as_ref().map(|_| "deepseek-r1"));
        let (token_bytes, page_tokens, layers) = match model {
            None => {
                // A page is one token where it can be; a layout limits how long a token is.
                let unit = options.page_bytes.div_ceil(CacheLayout::MAX_TOKEN_BYTES);
                if !options.page_bytes.is_multiple_of(unit) || unit > CacheLayout::MAX_PAGE_TOKENS.into() {
                    let page_bytes = options.page_bytes;
                    return Err(Error::PageBytes { page_bytes, unit: CacheLayout::MAX_TOKEN_BYTES });
                }
                (options.page_bytes / unit, unit as u32, 1)
            }
            Some(name) => {
                let RankCache { token_bytes, buffers } = rank_cache(name, options.prefill_tp)?;
                (token_bytes, options.page_tokens, buffers)
            }
        };
        let page_bytes = token_bytes * u64::from(page_tokens) * u64::from(layers);
        let page_flag = if model.is_some() { "--page-tokens" } else { "--page-bytes" };
        let pool_bytes = options.pool_mib.saturating_mul(1 << 20);
        if page_bytes > pool_bytes {
            return Err(Error::NoPage { page_bytes, pool_bytes, page_flag });
        }
        let setup = Self {
            port: options.port,
            memory: options.memory,
            op: options.op,
            progress: options.progress,
            copy_threads: options.copy_threads,
            lanes: options.lanes,
            congestion: options.congestion.clone(),
            devices: options.devices.clone(),
            gpu,
            token_bytes,
            page_tokens,
            layers,
            pool_pages: u32::try_from(pool_bytes / page_bytes).unwrap_or(u32::MAX),
        };
        match setup.layout() {
            Err(Error::Layout(error @ CacheLayoutError::BadPages { .. })) => {
                Err(Error::PoolPages { error, page_flag })
            }
            other => other.map(|_| setup),
        }
    }

    /// Whether this process's devices can be used, before another process is started.
    pub fn check_devices(&self) -> Result<(), Error> {
        if self.port == PortName::Verbs {
            for rail in rails(&self.devices, Who::Initiator as usize) {
                VerbsPort::open(rail).map_err(Error::Device)?;
            }
        }
        self.open_gpu().map(drop)
    }

    /// The GPU, in this process.
    pub fn open_gpu(&self) -> Result<Option<OpenGpu>, Error> {
        self.gpu.map(|gpu| gpu.open().map_err(Error::gpu(gpu))).transpose()
    }

    pub fn page_bytes(&self) -> u64 {
        self.token_bytes * u64::from(self.page_tokens)
    }

    /// Of a page, in all layers.
    pub fn slot_bytes(&self) -> u64 {
        self.page_bytes() * u64::from(self.layers)
    }

    pub fn layout(&self) -> Result<CacheLayout, Error> {
        Ok(CacheLayout::new(LayoutOptions {
            model: "kvbench".into(),
            model_layers: self.layers,
            layers: 0..self.layers,
            kind: CacheKind::Mla { latent_bytes: self.token_bytes as u32, rope_bytes: 0 },
            dtype: Dtype::Int8,
            page_tokens: self.page_tokens,
            pages: self.pool_pages,
            placement: Placement::LayerMajor { region: 0 },
        })?)
    }

    pub fn content(&self, salt: u64) -> Content {
        Content {
            salt: salt.wrapping_mul(0xD134_2543_DE82_EF95) | 1,
            page_bytes: self.page_bytes() as usize,
            layer_pages: self.pool_pages,
            layers: self.layers,
        }
    }

    /// The source's and the destination's pages of a pass.
    pub fn lists(&self, pass: &Pass) -> Lists {
        let list = |seed| scattered(self.pool_pages, pass.pages(), seed);
        Lists { from: list(2 * pass.seed), to: list(2 * pass.seed + 1) }
    }

    pub fn pages<'a>(&self, lists: &'a Lists) -> Pages<'a> {
        Pages {
            from: &lists.from,
            to: &lists.to,
            page_bytes: self.page_bytes() as usize,
            layer_pages: self.pool_pages,
            layers: self.layers,
        }
    }

    pub fn tokens(&self, pages: u32) -> u32 {
        pages * self.page_tokens
    }
}

/// Scattered pages of one pass.
pub struct Lists {
    pub from: Vec<u32>,
    pub to: Vec<u32>,
}

/// Which of the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Initiator,
    Target,
}

/// What a side has before its node: the memory of its pool, and the GPU that moves it, if one does.
pub struct Allocated {
    pub memory: Memory,
    pub gpu: Option<OpenGpu>,
}

/// One process's pool and node.
pub struct Side {
    pub setup: Setup,
    pub memory: Memory,
    pub gpu: Option<OpenGpu>,
    pub pool: PagePool,
    pub driver: Driver,
}

/// What a side needs before its node.
pub fn allocate(setup: &Setup) -> Result<Allocated, Error> {
    let gpu = setup.open_gpu()?;
    Ok(Allocated { memory: pool_memory(setup, gpu.as_ref())?, gpu })
}

/// Memory for a pool.
pub fn pool_memory(setup: &Setup, gpu: Option<&OpenGpu>) -> Result<Memory, Error> {
    let bytes = setup.layout()?.bytes_needed(0) as usize;
    match (setup.memory, gpu) {
        (MemoryName::Private, _) => anonymous(bytes).map_err(Error::io("allocating private memory")),
        (MemoryName::Cuda, Some(on)) => {
            on.gpu.allocate(bytes).map_err(|error| Error::gpu(on.choice)(error.into()))
        }
        (MemoryName::Cuda, None) => Err(Error::MemoryOfGpu),
        (MemoryName::Shared, _) => {
            let options = crossdock::AllocateOptions { prefault: true, ..Default::default() };
            Ok(Memory::allocate(bytes, &options)?)
        }
    }
}

impl Side {
    pub fn open(who: Who, setup: Setup, allocated: Allocated, ip: IpAddr) -> Result<Self, Error> {
        let Allocated { memory, gpu } = allocated;
        let name = match who {
            Who::Initiator => "kvbench",
            Who::Target => "kvbench-target",
        };
        let layout = setup.layout()?;
        let pool = PagePool::external(layout.pages());
        // A key would have to be told over the connection on which the processes talk, which proves nothing itself.
        let mut config = Config::new(name, layout, vec![memory.clone()], Authentication::Off);
        config.bind = SocketAddr::new(ip, 0);
        config.lanes_per_rail = setup.lanes;
        config.progress = match setup.progress {
            ProgressName::Caller => Progress::Caller,
            ProgressName::Thread => config.progress,
        };
        config.ports = match (setup.port, &gpu) {
            (PortName::Shm, _) => vec![PortConfig::Shm(ShmOptions {
                copy_threads: setup.copy_threads as usize,
                allow_ptrace: setup.memory == MemoryName::Private,
                ..ShmOptions::default()
            })],
            (PortName::Tcp, _) => {
                vec![PortConfig::Tcp(Some(TcpOptions { bind: config.bind, ..setup.tcp() }))]
            }
            (PortName::Verbs, _) => rail_ports(&setup.devices, who as usize),
            (PortName::Cuda, Some(on)) => {
                vec![PortConfig::Cuda { gpu: on.gpu.clone(), options: on.options.clone() }]
            }
            (PortName::Cuda, None) => return Err(Error::Unexpected { said: "a cuda port of no GPU".into() }),
        };
        let node = Node::open(config).map_err(|error| match (error, setup.gpu) {
            (crossdock::Error::Cuda(error), Some(gpu)) => Error::Gpu { gpu, error },
            (other, _) => other.into(),
        })?;
        Ok(Self { setup, memory, gpu, pool, driver: Driver::new(node) })
    }

    /// Takes pages for a room. Those of the pass before may still be on their way home.
    pub fn adopt(&mut self, pages: &[u32]) -> Result<PageSet, Error> {
        let pool = self.pool.clone();
        self.driver.keep_trying("waiting for the pages of the last pass", WAIT, || match pool.adopt(pages) {
            Ok(pages) => Ok(Some(pages)),
            Err(PoolError::PageInUse { .. } | PoolError::PageInQuarantine { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        })
    }
}

/// For anything that the peer or the node does.
pub const WAIT: Duration = Duration::from_secs(60);

/// Splits a pass's pages into those of its rooms.
pub fn rooms<'a>(pass: &Pass, list: &'a [u32]) -> impl Iterator<Item = (u64, &'a [u32])> + use<'a> {
    let mut at = 0;
    let first = pass.first_room;
    let lengths = pass.rooms.clone();
    lengths.into_iter().zip(first..).map(move |(pages, room)| {
        let range = at..at + pages as usize;
        at = range.end;
        (room, &list[range])
    })
}

/// Now, and what has been used until now.
pub struct Clock {
    pub begin: Instant,
    cpu_s: f64,
}

impl Clock {
    pub fn start() -> Self {
        Self { cpu_s: crossdock_benches::cpu_seconds(), begin: Instant::now() }
    }

    pub fn seconds(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    pub fn cpu_s(&self) -> f64 {
        crossdock_benches::cpu_seconds() - self.cpu_s
    }
}
