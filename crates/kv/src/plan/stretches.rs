//! Both page tables walked at once: the longest stretches of tokens that lie in one page on either side.

use std::ops::Range;

use super::PlanInput;
use super::geometry::{Geometry, Grid};
use super::shape::{Shape, Side};
use crate::ContextShare;
use crate::page_table::Walk;

/// A stretch of tokens in one page of the source and one of the destination: page, and token in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair {
    pub source: (u32, u32),
    pub destination: (u32, u32),
    pub tokens: u32,
}

/// The tokens that both workers hold.
pub(super) struct Common<'a> {
    source: Held<'a>,
    destination: Held<'a>,
    tokens: Range<u32>,
}

/// One side's tokens.
#[derive(Clone)]
struct Held<'a> {
    pages: &'a [u32],
    /// Their places among all tokens that are there; `pages` begins with the page of the first one.
    places: Range<u32>,
    page_tokens: u32,
    context: ContextShare,
}

impl<'a> Common<'a> {
    /// Of the pages that hold the input's tokens.
    pub fn new(input: &PlanInput<'a>, source_pages: &'a [u32], destination_pages: &'a [u32]) -> Self {
        let (source, destination) = (&input.source, &input.destination);
        let held = |side: &crate::PageTable<'a>, pages| Held {
            pages,
            places: side.held(&input.tokens),
            page_tokens: side.of().page_tokens(),
            context: side.context(),
        };
        Self {
            source: held(source, source_pages),
            destination: held(destination, destination_pages),
            tokens: input.tokens.clone(),
        }
    }

    /// The pieces of a shape, as few kinds of them as there are.
    pub fn each(&self, shape: &Shape, mut take: impl FnMut(&PiecesOf<'_, 'a>)) {
        let mut pieces = |tokens: Tokens| take(&PiecesOf { common: self, shape, tokens });
        if self.source.context != self.destination.context {
            return pieces(Tokens::Split);
        }
        // The same turns on both sides: what they hold has the same places.
        let all = self.source.places.clone();
        let page_tokens = self.source.page_tokens;
        let by_head = shape.source.is_by_head && shape.destination.is_by_head;
        if !by_head || page_tokens != self.destination.page_tokens {
            return pieces(Tokens::Together(all));
        }
        let whole = all.start.div_ceil(page_tokens)..all.end / page_tokens;
        if whole.is_empty() {
            return pieces(Tokens::Together(all));
        }
        pieces(Tokens::Together(all.start..whole.start * page_tokens));
        pieces(Tokens::WholePages(whole.clone()));
        pieces(Tokens::Together(whole.end * page_tokens..all.end));
    }

    fn together(&self, places: &Range<u32>) -> Pairs<'a> {
        let left = places.end - places.start;
        Pairs {
            source: self.source.walk(places.start),
            destination: self.destination.walk(places.start),
            left,
        }
    }

    /// The pages of these places, where they are cut alike on both sides and begin with the first place.
    fn page_by_page(&self, places: &Range<u32>) -> Option<(&'a [u32], &'a [u32])> {
        let page_tokens = self.source.page_tokens;
        if page_tokens != self.destination.page_tokens || !places.start.is_multiple_of(page_tokens) {
            return None;
        }
        let pages = (places.end - places.start).div_ceil(page_tokens) as usize;
        let of = |side: &Held<'a>| {
            let first = (places.start / page_tokens - side.places.start / page_tokens) as usize;
            side.pages.get(first..first + pages)
        };
        of(&self.source).zip(of(&self.destination))
    }

    fn whole_pages(&self, pages: &Range<u32>) -> Pairs<'a> {
        let (source, destination) = (self.source.walk_pages(pages), self.destination.walk_pages(pages));
        Pairs { source, destination, left: pages.end - pages.start }
    }

    fn split(&self) -> Split<'_, 'a> {
        Split { common: self, next: self.tokens.start }
    }
}

impl<'a> Held<'a> {
    /// Where a token is that has this place.
    fn place(&self, place: u32) -> (u32, u32) {
        let page = place / self.page_tokens - self.places.start / self.page_tokens;
        (self.pages[page as usize], place % self.page_tokens)
    }

    fn walk(&self, place: u32) -> Walk<'a> {
        let page = place / self.page_tokens - self.places.start / self.page_tokens;
        // Behind the last token there need not be a page.
        let pages = self.pages.get(page as usize..).unwrap_or_default();
        Walk::new(pages, place % self.page_tokens, self.page_tokens)
    }

    /// Goes through pages as if each were one token.
    fn walk_pages(&self, pages: &Range<u32>) -> Walk<'a> {
        let first = self.places.start / self.page_tokens;
        Walk::new(&self.pages[(pages.start - first) as usize..(pages.end - first) as usize], 0, 1)
    }
}

/// Which tokens some pieces are of.
enum Tokens {
    /// Those of these places, which are the same on both sides.
    Together(Range<u32>),
    /// Those that both sides hold, each at a place of its own.
    Split,
    /// Those of these pages, of which the pieces hold several heads.
    WholePages(Range<u32>),
}

/// Pieces that a [`Geometry`] can be filled with.
pub(super) struct PiecesOf<'c, 'a> {
    common: &'c Common<'a>,
    shape: &'c Shape,
    tokens: Tokens,
}

impl PiecesOf<'_, '_> {
    /// Finds them; false if they are of too many kinds.
    #[must_use]
    pub fn fill(&self, geometry: &mut Geometry) -> bool {
        let Self { common, shape, tokens } = self;
        let &&Shape { source, destination, head_bytes, heads, .. } = shape;
        if let Tokens::WholePages(pages) = tokens {
            // All heads of a page are one piece, and the page takes the part of a token.
            let page_bytes = head_bytes * u64::from(heads) * u64::from(source.page_tokens);
            let grid = |side: &Side| Grid::new(side, side.stride_bytes, true);
            geometry.begin(grid(&source), grid(&destination), page_bytes, shape.strands().take(1));
            return geometry.fill(common.whole_pages(pages), pages.len());
        }
        let by_head = source.is_by_head || destination.is_by_head;
        let bytes = if by_head { head_bytes } else { head_bytes * u64::from(heads) };
        let steps = (source.token_bytes(shape), destination.token_bytes(shape));
        let joins = (bytes, bytes) == steps;
        let begins_pages = |side: &Side, other: &Side| match tokens {
            Tokens::Together(places) if joins => {
                places.start.is_multiple_of(side.page_tokens)
                    && other.page_tokens.is_multiple_of(side.page_tokens)
            }
            _ => side.page_tokens == 1,
        };
        geometry.begin(
            Grid::new(&source, steps.0, begins_pages(&source, &destination)),
            Grid::new(&destination, steps.1, begins_pages(&destination, &source)),
            bytes,
            shape.strands().take(if by_head { heads as usize } else { 1 }),
        );
        match tokens {
            Tokens::Together(places) if joins => {
                if let Some((from, to)) = common.page_by_page(places)
                    && geometry.fill_scattered(from, to, source.page_tokens, places.end - places.start)
                {
                    return true;
                }
                let pairs = common.together(places);
                let at_most = pairs.at_most();
                geometry.fill(pairs, at_most)
            }
            Tokens::Together(places) => geometry.fill(Singles::new(common.together(places)), places.len()),
            Tokens::Split if joins => geometry.fill(common.split(), common.tokens.len()),
            Tokens::Split => geometry.fill(Singles::new(common.split()), common.tokens.len()),
            Tokens::WholePages(_) => true,
        }
    }
}

/// Stretches of tokens whose places are the same on both sides.
#[derive(Clone)]
struct Pairs<'a> {
    source: Walk<'a>,
    destination: Walk<'a>,
    left: u32,
}

impl Pairs<'_> {
    /// A stretch ends where a page of either side ends, and has at least one token.
    fn at_most(&self) -> usize {
        (self.source.pages() + self.destination.pages()).min(self.left as usize)
    }
}

impl Iterator for Pairs<'_> {
    type Item = Pair;

    #[inline]
    fn next(&mut self) -> Option<Pair> {
        if self.left == 0 {
            return None;
        }
        let tokens = self.source.left().min(self.destination.left()).min(self.left);
        let pair = Pair { source: self.source.place(), destination: self.destination.place(), tokens };
        self.source.advance(tokens);
        self.destination.advance(tokens);
        self.left -= tokens;
        Some(pair)
    }
}

/// Stretches of tokens that both sides hold, where they take turns otherwise.
#[derive(Clone)]
struct Split<'c, 'a> {
    common: &'c Common<'a>,
    next: u32,
}

impl Iterator for Split<'_, '_> {
    type Item = Pair;

    fn next(&mut self) -> Option<Pair> {
        let Common { source, destination, tokens } = self.common;
        loop {
            if self.next >= tokens.end {
                return None;
            }
            let (from, from_run) = source.context.next_run(self.next);
            let (to, to_run) = destination.context.next_run(self.next);
            // The later one may lie in a gap of the other, or behind the end.
            let first = from.max(to);
            if first >= u64::from(tokens.end) {
                self.next = tokens.end;
                continue;
            }
            let first = first as u32;
            if from != to {
                self.next = first;
                continue;
            }
            let places = (source.context.held_before(first), destination.context.held_before(first));
            let (source_place, destination_place) = (source.place(places.0), destination.place(places.1));
            let run = from_run.min(to_run).min(tokens.end - first);
            let run = run.min(source.page_tokens - source_place.1);
            let run = run.min(destination.page_tokens - destination_place.1);
            self.next = first + run;
            return Some(Pair { source: source_place, destination: destination_place, tokens: run });
        }
    }
}

/// The tokens of stretches, one by one: where other heads lie between them.
#[derive(Clone)]
struct Singles<I> {
    stretches: I,
    rest: Pair,
}

impl<I> Singles<I> {
    fn new(stretches: I) -> Self {
        Self { stretches, rest: Pair { source: (0, 0), destination: (0, 0), tokens: 0 } }
    }
}

impl<I: Iterator<Item = Pair>> Iterator for Singles<I> {
    type Item = Pair;

    #[inline]
    fn next(&mut self) -> Option<Pair> {
        if self.rest.tokens == 0 {
            self.rest = self.stretches.next()?;
        }
        let token = Pair { tokens: 1, ..self.rest };
        self.rest.source.1 += 1;
        self.rest.destination.1 += 1;
        self.rest.tokens -= 1;
        Some(token)
    }
}
