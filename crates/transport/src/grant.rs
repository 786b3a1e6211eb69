//! Who may touch which pages: the grant as ports see it, and the check for ports that can check.

use crossdock_memory::PageLayout;

use crate::{Error, LocalId, PeerId, Result};

/// The name of a grant on the wire: 18 bits of index and 12 bits of generation.
///
/// An index is used again only after quiescence, with the next generation. The generation keeps late
/// immediates from being counted; on ports that [check](GrantTable::check) it also keeps late bytes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GrantId(u32);

impl GrantId {
    /// The name that no grant has; for ops that need none.
    pub const NONE: GrantId = GrantId(u32::MAX);
    /// Indices are below this.
    pub const INDICES: u32 = 1 << 18;
    /// Generations are below this.
    pub const GENERATIONS: u32 = 1 << 12;
    /// So many of the highest indices are for [standing](GrantId::standing) grants.
    pub const STANDING: u32 = 1 << 13;

    /// A grant's name.
    ///
    /// # Panics
    /// If `index` or `generation` is out of range.
    pub const fn new(index: u32, generation: u32) -> Self {
        assert!(index < Self::INDICES && generation < Self::GENERATIONS, "grant id out of range");
        Self(index << 12 | generation)
    }

    /// The name of a grant that both sides know by its number, and of which no message tells: it lasts as long as a
    /// session. Numbers go down from the highest index, and the generation is 0.
    ///
    /// # Panics
    /// If `number` is not below [`STANDING`](GrantId::STANDING).
    pub const fn standing(number: u32) -> Self {
        assert!(number < Self::STANDING, "number of a standing grant out of range");
        Self::new(Self::INDICES - 1 - number, 0)
    }

    /// Reads a name from the lower 30 bits of a word.
    pub fn from_bits(bits: u32) -> Self {
        Self(bits & 0x3fff_ffff)
    }

    /// The name as the lower 30 bits of a word.
    pub fn bits(self) -> u32 {
        self.0 & 0x3fff_ffff
    }

    /// Which entry of the table.
    pub fn index(self) -> u32 {
        self.bits() >> 12
    }

    /// The number of a [standing](GrantId::standing) grant, by the index alone.
    pub fn standing_number(self) -> Option<u32> {
        let number = Self::INDICES - 1 - self.index();
        (number < Self::STANDING).then_some(number)
    }

    /// Which use of that entry.
    pub fn generation(self) -> u32 {
        self.bits() & (Self::GENERATIONS - 1)
    }
}

/// What a grant allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The peer may read the pages.
    Read,
    /// The peer may write the pages.
    Write,
}

/// Pages of some buffers, for one peer.
#[derive(Clone, Copy, Debug)]
pub struct Grant<'a> {
    /// Its name, unique among the live grants of the port.
    pub id: GrantId,
    /// For whom.
    pub peer: PeerId,
    /// To do what.
    pub access: Access,
    /// The buffers; every listed page is granted in each of them.
    pub buffers: &'a [GrantedBuffer],
    /// The pages.
    pub pages: &'a [u32],
}

/// One buffer of a grant: where its pages lie in a registered region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantedBuffer {
    /// The region.
    pub region: LocalId,
    /// Where the pages are in it.
    pub layout: PageLayout,
}

/// The live grants of one port, for ports whose receiving side looks at each access before it happens.
#[derive(Debug, Default)]
pub struct GrantTable {
    /// By index.
    entries: Vec<Option<Entry>>,
    /// Standing grants, by number: their indices are the highest, and a list of all would be long.
    standing: Vec<Option<Entry>>,
    live: usize,
}

/// Why an access was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The grant was revoked or is of an earlier generation: late, but honest.
    Stale,
    /// The grant is alive, and this access is not covered by it: the peer misbehaves.
    Forbidden {
        /// What is wrong.
        what: &'static str,
    },
}

#[derive(Debug)]
struct Entry {
    id: GrantId,
    peer: PeerId,
    access: Access,
    /// Sorted by region, then offset.
    buffers: Box<[GrantedBuffer]>,
    /// In the order in which they were granted, which is the order in which a peer usually comes.
    pages: Box<[u32]>,
    /// The same with their places in `pages`, sorted by page, for a peer that comes in another order: empty until one does,
    /// but with room for all, so that nothing is allocated then.
    sorted: Vec<(u32, u32)>,
    /// Where in `pages` the last access was.
    cursor: usize,
    /// Where in `buffers` it was.
    buffer: usize,
}

impl GrantTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a grant. `region_bytes` tells the length of a registered region.
    pub fn insert(&mut self, grant: &Grant<'_>, region_bytes: impl Fn(LocalId) -> Option<u64>) -> Result<()> {
        for buffer in grant.buffers {
            let bytes = region_bytes(buffer.region)
                .ok_or(Error::UnknownRegion { side: "local", region: buffer.region.0 })?;
            let end = buffer.layout.end().ok_or(Error::BadGrant { reason: "page layout overflows" })?;
            if end > bytes {
                return Err(Error::OutOfRange { side: "local", end, region_bytes: bytes });
            }
            if grant.pages.iter().any(|&page| page >= buffer.layout.pages) {
                return Err(Error::BadGrant { reason: "a page lies outside a buffer" });
            }
        }
        let (entries, at) = match grant.id.standing_number() {
            Some(number) => (&mut self.standing, number as usize),
            None => (&mut self.entries, grant.id.index() as usize),
        };
        if entries.len() <= at {
            entries.resize_with(at + 1, || None);
        }
        let entry = &mut entries[at];
        if entry.is_some() {
            return Err(Error::BadGrant { reason: "the index is in use" });
        }
        let mut buffers: Box<[GrantedBuffer]> = grant.buffers.into();
        buffers.sort_by_key(|b| (b.region, b.layout.offset));
        *entry = Some(Entry {
            id: grant.id,
            peer: grant.peer,
            access: grant.access,
            buffers,
            pages: grant.pages.into(),
            sorted: Vec::with_capacity(grant.pages.len()),
            cursor: 0,
            buffer: 0,
        });
        self.live += 1;
        Ok(())
    }

    /// Removes a grant; false if it was not there.
    pub fn remove(&mut self, id: GrantId) -> bool {
        match self.place_mut(id) {
            Some(entry) if entry.as_ref().is_some_and(|e| e.id == id) => {
                *entry = None;
                self.live -= 1;
                true
            }
            _ => false,
        }
    }

    /// The peer of a live grant, and the buffers that it covers.
    pub fn covered_by(&self, id: GrantId) -> Option<(PeerId, &[GrantedBuffer])> {
        let place = match id.standing_number() {
            Some(number) => self.standing.get(number as usize),
            None => self.entries.get(id.index() as usize),
        };
        let entry = place?.as_ref().filter(|entry| entry.id == id)?;
        Some((entry.peer, &entry.buffers))
    }

    /// Whether a grant covers this region.
    pub fn uses(&self, region: LocalId) -> bool {
        self.entries
            .iter()
            .chain(&self.standing)
            .flatten()
            .any(|e| e.buffers.iter().any(|b| b.region == region))
    }

    /// How many grants are alive.
    pub fn len(&self) -> usize {
        self.live
    }

    /// Whether no grant is alive.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Whether `peer` may do this to `bytes` bytes at `offset` of `region` under grant `id`.
    ///
    /// Constant time when the peer comes in the order of the grant's pages, buffer by buffer; otherwise logarithmic in
    /// the pages, and linear in the buffers where they interleave. An access of several pages at once is allowed
    /// where the buffer has no padding between them.
    pub fn check(
        &mut self,
        id: GrantId,
        peer: PeerId,
        access: Access,
        region: LocalId,
        offset: u64,
        bytes: u64,
    ) -> std::result::Result<(), Refusal> {
        let entry = match self.place_mut(id) {
            Some(Some(entry)) if entry.id == id => entry,
            _ => return Err(Refusal::Stale),
        };
        if entry.peer != peer {
            return Err(Refusal::Forbidden { what: "the grant was given to another peer" });
        }
        if entry.access != access {
            return Err(Refusal::Forbidden { what: "the grant does not allow this direction" });
        }
        let Some((first, last)) = entry.locate(region, offset, bytes)? else {
            return Err(Refusal::Forbidden { what: "the access leaves the granted buffer's pages" });
        };
        if (first..=last).all(|page| entry.covers(page)) {
            Ok(())
        } else {
            Err(Refusal::Forbidden { what: "the page is not part of the grant" })
        }
    }

    fn place_mut(&mut self, id: GrantId) -> Option<&mut Option<Entry>> {
        match id.standing_number() {
            Some(number) => self.standing.get_mut(number as usize),
            None => self.entries.get_mut(id.index() as usize),
        }
    }
}

impl Entry {
    /// The first and the last page of an access. Where buffers lie one behind the other, it is in the last one that
    /// begins before it; where they interleave, because a page holds all layers, it may be in any, and a peer that
    /// comes layer by layer is found in the one where it was.
    fn locate(
        &mut self,
        region: LocalId,
        offset: u64,
        bytes: u64,
    ) -> std::result::Result<Option<(u32, u32)>, Refusal> {
        let after = self.buffers.partition_point(|b| (b.region, b.layout.offset) <= (region, offset));
        let of_region = |buffer: &&GrantedBuffer| buffer.region == region;
        let nearest = after.checked_sub(1).filter(|&at| of_region(&&self.buffers[at]));
        let Some(nearest) = nearest else {
            return Err(Refusal::Forbidden { what: "the grant does not cover this region" });
        };
        for at in [nearest, self.buffer.min(nearest)].into_iter().chain((0..nearest).rev()) {
            let buffer = &self.buffers[at];
            if of_region(&buffer)
                && let Some(pages) = buffer.layout.locate(offset, bytes)
            {
                self.buffer = at;
                return Ok(Some(pages));
            }
        }
        Ok(None)
    }

    /// Whether the page is granted. A peer goes through the pages in the order of the grant, once a buffer: the
    /// page is then the last one again, the next one or the first one, and nothing is searched.
    fn covers(&mut self, page: u32) -> bool {
        for expected in [self.cursor, self.cursor + 1, 0] {
            if self.pages.get(expected) == Some(&page) {
                self.cursor = expected;
                return true;
            }
        }
        if self.sorted.is_empty() {
            self.sorted.extend(self.pages.iter().copied().zip(0..));
            self.sorted.sort_unstable();
        }
        match self.sorted.binary_search_by_key(&page, |&(page, _)| page) {
            Ok(found) => {
                self.cursor = self.sorted[found].1 as usize;
                true
            }
            Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Their names are apart from all others, and their indices cost no long list.
    #[test]
    fn standing_grants_are_found_by_their_numbers() {
        let mut table = GrantTable::new();
        let layout = PageLayout::dense(0, 8, 2);
        let buffers = [GrantedBuffer { region: LocalId(0), layout }];
        let peer = PeerId(1);
        for number in [0, 3, GrantId::STANDING - 1] {
            let id = GrantId::standing(number);
            assert_eq!((id.standing_number(), id.generation()), (Some(number), 0));
            let grant = Grant { id, peer, access: Access::Write, buffers: &buffers, pages: &[0, 1] };
            table.insert(&grant, |_| Some(16)).unwrap();
            assert_eq!(table.check(id, peer, Access::Write, LocalId(0), 0, 16), Ok(()));
            assert_eq!(table.covered_by(id).map(|(peer, _)| peer), Some(peer));
        }
        assert!(table.entries.is_empty() && table.uses(LocalId(0)));
        assert_eq!(GrantId::new(GrantId::INDICES - GrantId::STANDING - 1, 0).standing_number(), None);
        // The name that no grant has shares its index with the first of them.
        assert!(table.covered_by(GrantId::NONE).is_none());
        assert!(table.remove(GrantId::standing(0)) && !table.remove(GrantId::standing(0)));
        let late = table.check(GrantId::standing(0), peer, Access::Write, LocalId(0), 0, 8);
        assert_eq!((late, table.len()), (Err(Refusal::Stale), 2));
    }

    /// Where a page holds all layers, their buffers interleave.
    #[test]
    fn finds_the_buffer_among_interleaved_ones() {
        let (layers, page_bytes, pages) = (3, 8, 4);
        let buffers: Vec<GrantedBuffer> = (0..layers)
            .map(|layer| GrantedBuffer {
                region: LocalId(0),
                layout: PageLayout { offset: layer * 10, stride_bytes: 30, page_bytes, pages },
            })
            .collect();
        let (id, peer) = (GrantId::new(0, 0), PeerId(1));
        let grant = Grant { id, peer, access: Access::Write, buffers: &buffers, pages: &[1, 3] };
        let mut table = GrantTable::new();
        table.insert(&grant, |_| Some(200)).unwrap();
        for offset in 0..200 {
            for bytes in 1..12 {
                let (page, in_page) = (offset / 30, offset % 10);
                let granted = [1, 3].contains(&page) && in_page + bytes <= page_bytes;
                let found = table.check(id, peer, Access::Write, LocalId(0), offset, bytes);
                assert_eq!(found.is_ok(), granted, "{offset} + {bytes}: {found:?}");
            }
        }
    }
}
