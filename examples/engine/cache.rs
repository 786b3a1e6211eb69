//! What both kinds of workers have: a node over a paged cache, and the prefixes of prompts that are in it.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheKind, CacheLayout, Config, Dtype, HeadOrder, HeadShare, LayoutOptions, Memory, Node,
    PagePool, PageRef, PageSet, Parallelism, Placement, PoolError,
};
use crossdock_bootstrap::{
    Address, Client, GroupId, Incarnation, Labels, Member, NodeId, Ranks, Registration, Role, Tag, Topology,
};

use crate::Problem;
use crate::model::{HEAD, Head, KV_HEADS, KvCache, LAYERS};

/// One side of the engine. Both sides know both, to see which ranks have to do with each other.
pub struct Side {
    pub role: Role,
    pub parallelism: Parallelism,
    pub page_tokens: u32,
    pub pages: u32,
}

/// A rank: its node, its share of the cache, and its pages.
pub struct Worker {
    pub node: Node,
    pub layout: CacheLayout,
    pub memory: Memory,
    pub pool: PagePool,
    /// Kept for as long as the node is to be found.
    _registration: Registration,
}

impl Worker {
    /// Allocates the rank's share of the cache, opens a node over it, and tells the registry where it is.
    pub fn open(side: &Side, rank: u32, key: &[u8], registry: &Client) -> Result<Self, Problem> {
        // The cache of the whole model; `Parallelism` cuts the rank's heads out of it.
        let whole = LayoutOptions {
            model: "toy".into(),
            model_layers: LAYERS,
            layers: 0..LAYERS,
            kind: CacheKind::Heads {
                heads: HeadShare::all(KV_HEADS),
                head_bytes: size_of::<Head>() as u32,
                order: HeadOrder::TokensFirst,
            },
            dtype: Dtype::F32,
            page_tokens: side.page_tokens,
            pages: side.pages,
            placement: Placement::LayerMajor { region: 0 },
        };
        let layout = side.parallelism.layout(rank, whole)?;
        let (memory, pool) = crossdock::allocate(&layout)?;
        let name = format!("{}-{rank}", side.role.as_str());
        let authentication = Authentication::PreSharedKey(key.to_vec());
        let node = Node::open(Config::new(&name, layout.clone(), memory.clone(), authentication))?;
        let topology = Topology {
            tp_size: side.parallelism.tp,
            ..Topology::single(Tag::new(layout.model())?, Tag::new(layout.dtype().name())?, side.page_tokens)
        };
        let registration = Registration::start(
            registry.clone(),
            crossdock_bootstrap::Worker {
                node: NodeId::new(&name)?,
                incarnation: Incarnation::new(node.identity().incarnation),
                role: side.role.clone(),
                address: Address::new(node.address().parse()?)?,
                ttl_ms: 10_000,
                warm_up_ms: 0,
                member: Some(Member::new(GroupId::new(side.role.as_str())?, topology, Ranks::tp(rank))?),
                labels: Labels::none(),
            },
        )?;
        registration.wait(Duration::from_secs(10))?;
        Ok(Self { node, layout, memory: memory[0].clone(), pool, _registration: registration })
    }

    /// Takes pages, at the cost of the prefixes that nobody has asked for lately. `None`: none are left to give up.
    pub fn take(&self, pages: u32, prefixes: &mut Prefixes) -> Result<Option<PageSet>, Problem> {
        loop {
            match self.pool.take(pages) {
                Ok(set) => return Ok(Some(set)),
                Err(PoolError::Exhausted { .. }) if prefixes.forget_oldest() => {}
                Err(PoolError::Exhausted { .. }) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until all pages are home: nobody holds any, and no peer can write any.
    pub fn wait_until_all_free(&self, deadline: Instant) -> Result<(), Problem> {
        while self.pool.stats().free < self.pool.pages() {
            if Instant::now() > deadline {
                return Err(format!("pages have not come home: {:?}", self.pool.stats()).into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// A request's keys and values on one rank: token `t` is in page `pages[t / page_tokens]`.
pub struct Paged<'a> {
    pub worker: &'a Worker,
    pub pages: &'a [u32],
}

const KEYS: &str = "k";
const VALUES: &str = "v";

impl Paged<'_> {
    fn place(&self, part: &str, layer: u32, token: u32, head: u32) -> usize {
        let tokens = self.worker.layout.tokens();
        let page = self.pages[(token / tokens.page_tokens()) as usize];
        let part = tokens.part(part).expect("a cache of heads has keys and values");
        let place = part.offset(layer, page, token % tokens.page_tokens(), head);
        place.expect("the pool has no pages, and the model no layers, that the layout has not") as usize
    }

    fn read(&self, place: usize) -> Head {
        let mut found = [0.0; HEAD];
        let bytes = bytemuck::cast_slice_mut(&mut found);
        self.worker.memory.read(place, bytes).expect("pages lie within the memory");
        found
    }

    fn write(&self, place: usize, head: &Head) {
        self.worker.memory.write(place, bytemuck::cast_slice(head)).expect("pages lie within the memory");
    }
}

impl KvCache for Paged<'_> {
    fn heads(&self) -> Range<u32> {
        let heads = self.worker.layout.tokens().part(KEYS).expect("a cache of heads has keys").heads();
        heads.first..heads.first + heads.count
    }

    fn write(&mut self, layer: u32, token: u32, head: u32, key: &Head, value: &Head) {
        Paged::write(self, self.place(KEYS, layer, token, head), key);
        Paged::write(self, self.place(VALUES, layer, token, head), value);
    }

    fn key(&self, layer: u32, token: u32, head: u32) -> Head {
        self.read(self.place(KEYS, layer, token, head))
    }

    fn value(&self, layer: u32, token: u32, head: u32) -> Head {
        self.read(self.place(VALUES, layer, token, head))
    }
}

/// Prompts whose whole pages are still here: whoever asks for a prompt that begins alike shares these pages. A page goes
/// back to the pool when the last who shares it lets go.
pub struct Prefixes {
    page_tokens: u32,
    /// With the pages on each rank; those used last are at the end.
    known: VecDeque<(Vec<u32>, Vec<PageRef>)>,
}

impl Prefixes {
    pub fn new(page_tokens: u32) -> Self {
        Self { page_tokens, known: VecDeque::new() }
    }

    /// The pages on each rank of the longest known beginning of a prompt, if there is one. At least the prompt's last token
    /// is left out: somebody has to think about it, to find the next.
    pub fn longest(&mut self, prompt: &[u32]) -> Option<Vec<PageRef>> {
        let whole_pages = |known: &[u32]| {
            let alike = known.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(a, b)| a == b).count();
            alike / self.page_tokens as usize
        };
        let longest = (0..self.known.len()).max_by_key(|&at| whole_pages(&self.known[at].0))?;
        let pages = whole_pages(&self.known[longest].0);
        let used = self.known.remove(longest)?;
        let found = used.1.iter().map(|ranks_pages| ranks_pages.prefix(pages)).collect();
        self.known.push_back(used);
        (pages > 0).then_some(found)
    }

    /// Remembers a prompt whose keys and values are in these pages of each rank.
    pub fn remember(&mut self, prompt: &[u32], pages: &[PageRef]) {
        let whole_pages = prompt.len() / self.page_tokens as usize;
        let tokens = prompt[..whole_pages * self.page_tokens as usize].to_vec();
        self.known.push_back((tokens, pages.iter().map(|pages| pages.prefix(whole_pages)).collect()));
    }

    fn forget_oldest(&mut self) -> bool {
        self.known.pop_front().is_some()
    }
}
