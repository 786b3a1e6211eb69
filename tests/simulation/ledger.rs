//! What the harness knows of a process's pages, beside what the library's own pool says: which room each page was
//! given to, and which grants were given for it since.

use crossdock_kv::CacheLayout;
use crossdock_transport::{GrantId, LocalId, PeerId};

/// The pages of one process.
pub struct Ledger {
    layout: CacheLayout,
    pages: Vec<Page>,
}

#[derive(Clone, Default)]
pub struct Page {
    pub holder: Holder,
    /// For which peers may write the page, or could since it left home.
    pub grants: Vec<(PeerId, GrantId)>,
}

impl Page {
    pub fn is_granted(&self, grant: GrantId) -> bool {
        self.grants.iter().any(|(_, given)| *given == grant)
    }

    /// Whether a grant has been followed by another one of the same peer's, or by any where there is but one.
    pub fn is_outdated(&self, grant: GrantId, has_one_writer: bool) -> bool {
        let at = self.grants.iter().rposition(|(_, given)| *given == grant);
        let Some(at) = at else { return true };
        let (peer, _) = self.grants[at];
        self.grants[at + 1..].iter().any(|(later, _)| has_one_writer || *later == peer)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Holder {
    /// The process's own.
    #[default]
    Home,
    /// A room's source.
    Source(usize),
    /// A room's destination.
    Destination(usize),
}

impl Ledger {
    pub fn new(layout: CacheLayout) -> Self {
        let pages = vec![Page::default(); layout.pages() as usize];
        Self { layout, pages }
    }

    /// The pages that are home, in order.
    pub fn home(&self) -> Vec<u32> {
        let pages = (0..).zip(&self.pages);
        pages.filter(|(_, page)| page.holder == Holder::Home).map(|(at, _)| at).collect()
    }

    pub fn give(&mut self, pages: &[u32], holder: Holder) {
        for &page in pages {
            self.pages[page as usize] = Page { holder, grants: Vec::new() };
        }
    }

    pub fn note_grant(&mut self, pages: &[u32], peer: PeerId, grant: GrantId) {
        for &page in pages {
            self.pages[page as usize].grants.push((peer, grant));
        }
    }

    /// The pages that some bytes of a region lie in; `None` if some lie in none.
    pub fn touched(&self, region: LocalId, offset: u64, bytes: u64) -> Option<impl Iterator<Item = &Page>> {
        let mut parts = self.layout.tokens().parts().iter();
        let (first, last) = parts.find_map(|part| {
            let mut layers = part.layers().iter().zip(part.buffers());
            layers.find_map(|(&layer, buffer)| match buffer.region == region.0 {
                true => part.page_layout(layer)?.locate(offset, bytes),
                false => None,
            })
        })?;
        Some(self.pages[first as usize..=last as usize].iter())
    }
}
