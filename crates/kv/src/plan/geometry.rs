//! The pieces of all layers that have the same shape.

use super::shape::Side;
use super::stretches::Pair;

/// Pieces that move in each layer of one shape, grouped into paged ops.
#[derive(Debug, Default)]
pub(super) struct Geometry {
    source: Grid,
    destination: Grid,
    /// Of one token.
    token_bytes: u64,
    /// The same pieces move once for each of these: how far from the start of the buffers.
    strands: Vec<(u64, u64)>,
    groups: Vec<Group>,
    /// The index lists of all groups, one group after the other.
    source_indices: Vec<u32>,
    destination_indices: Vec<u32>,
}

/// Most caches need fewer.
const GROUPS_USUAL: usize = 4;

/// One op of each layer and strand: pieces of one length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    /// Where its lists begin.
    pub first: u32,
    /// How long they are.
    pub pieces: u32,
    pub piece_bytes: u64,
    /// From the start of the strand to piece 0.
    pub source_offset: u64,
    pub destination_offset: u64,
}

/// A piece in either buffer, as an op can say it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    tokens: u32,
    source: Place,
    destination: Place,
}

/// So many units from the start of a strand, and so many tokens.
#[derive(Clone, Copy, Debug)]
struct Place {
    index: u32,
    rest_tokens: u32,
}

impl Geometry {
    /// Starts over, in the memory that is there: tokens of so many bytes, `strands` times.
    pub fn begin(
        &mut self,
        source: Grid,
        destination: Grid,
        token_bytes: u64,
        strands: impl Iterator<Item = (u64, u64)>,
    ) {
        (self.source, self.destination, self.token_bytes) = (source, destination, token_bytes);
        self.strands.clear();
        self.strands.extend(strands);
        self.groups.clear();
        self.source_indices.clear();
        self.destination_indices.clear();
    }

    /// Finds the pieces of these stretches of tokens, of which there are at most so many.
    /// False if they are of too many kinds; then some are missing.
    #[must_use]
    pub fn fill(&mut self, stretches: impl Iterator<Item = Pair> + Clone, at_most: usize) -> bool {
        self.reserve(at_most);
        self.find_pieces(stretches)
    }

    /// Takes what the request needs at most, and whatever chunk of it: that has no other kinds, but it may cut a piece at
    /// either end.
    fn reserve(&mut self, pieces: usize) {
        self.groups.reserve(GROUPS_USUAL + 2);
        self.source_indices.reserve(pieces);
        self.destination_indices.reserve(pieces);
    }

    /// Takes pages that begin with the first token on both sides, one by one; their last one may be cut. False where
    /// neighbours would make longer pieces, and nothing was done.
    ///
    /// Most requests' pages are such: so it goes through the lists, and not through their tokens.
    #[must_use]
    pub fn fill_scattered(&mut self, from: &[u32], to: &[u32], page_tokens: u32, tokens: u32) -> bool {
        let page_bytes = u64::from(page_tokens) * self.token_bytes;
        let dense = [self.source, self.destination].map(|grid| grid.stride_bytes == page_bytes);
        let next = |pages: &[u32], at: usize| pages[at + 1] == pages[at].wrapping_add(1);
        if dense == [true; 2] && (0..from.len().saturating_sub(1)).any(|at| next(from, at) && next(to, at)) {
            return false;
        }
        // In the order of the pages, in which a grant lists them, too.
        let (whole, rest) = (tokens / page_tokens, tokens % page_tokens);
        self.reserve((2 * from.len()).min(tokens as usize));
        for (tokens, first, pieces) in [(page_tokens, 0, whole), (rest, whole, 1)] {
            if tokens * pieces > 0 {
                let kind = Kind { tokens, ..Kind::default() };
                let group = self.group(kind, first, pieces);
                self.groups.push(group);
            }
        }
        let units = (self.source.page_units, self.destination.page_units);
        self.source_indices.extend(from.iter().map(|page| page * units.0));
        self.destination_indices.extend(to.iter().map(|page| page * units.1));
        true
    }

    /// Finds how many pieces of each kind there are, and with that the place of each. Going through the pages twice
    /// costs less than to note and to sort the pieces, and needs no memory. Where there are too many kinds to count at
    /// once, the least of them are done first, and the others in further rounds.
    fn find_pieces(&mut self, stretches: impl Iterator<Item = Pair> + Clone) -> bool {
        let (source, destination, token_bytes) = (self.source, self.destination, self.token_bytes);
        let pieces = || Pieces::new(stretches.clone(), source, destination, token_bytes);
        if self.find_in_order(pieces()) {
            return true;
        }
        let mut kinds = Kinds::default();
        for _ in 0..ROUNDS_MAX {
            pieces().for_each(|piece| kinds.count(piece.kind()));
            kinds.sort();
            let mut places = [0; KINDS_MAX];
            for (place, &(kind, count)) in places.iter_mut().zip(kinds.known()) {
                *place = self.push_group(kind, count) as usize;
            }
            let all = self.groups.last().map_or(0, |last| (last.first + last.pieces) as usize);
            self.source_indices.resize(all, 0);
            self.destination_indices.resize(all, 0);
            // Where everything has been counted, every piece has its place.
            for piece in pieces() {
                let Some(at) = kinds.find(piece.kind()) else { continue };
                let place = &mut places[at];
                self.source_indices[*place] = piece.source.index;
                self.destination_indices[*place] = piece.destination.index;
                *place += 1;
            }
            if !kinds.next_round() {
                return true;
            }
        }
        false
    }

    /// Finds the pieces in one pass, where those of each kind follow each other: most requests have whole pages of one
    /// kind, and the ends of the first and the last one. False where they do not, and nothing was found.
    fn find_in_order(&mut self, pieces: impl Iterator<Item = Piece>) -> bool {
        // Kinds, and where the first piece of each is.
        let mut runs = [(Kind::default(), 0); RUNS_MAX];
        let mut known = 0;
        let mut last = None;
        for piece in pieces {
            let kind = piece.kind();
            if last != Some(kind) {
                if known == RUNS_MAX || runs[..known].iter().any(|(earlier, _)| *earlier == kind) {
                    self.source_indices.clear();
                    self.destination_indices.clear();
                    return false;
                }
                runs[known] = (kind, self.source_indices.len() as u32);
                known += 1;
                last = Some(kind);
            }
            self.source_indices.push(piece.source.index);
            self.destination_indices.push(piece.destination.index);
        }
        let runs = &runs[..known];
        let ends = runs.iter().skip(1).map(|(_, first)| *first).chain([self.source_indices.len() as u32]);
        for (&(kind, first), end) in runs.iter().zip(ends) {
            let group = self.group(kind, first, end - first);
            self.groups.push(group);
        }
        true
    }

    /// Adds a group behind the others, and says where its lists begin.
    fn push_group(&mut self, kind: Kind, pieces: u32) -> u32 {
        let first = self.groups.last().map_or(0, |last| last.first + last.pieces);
        let group = self.group(kind, first, pieces);
        self.groups.push(group);
        first
    }

    fn group(&self, kind: Kind, first: u32, pieces: u32) -> Group {
        Group {
            first,
            pieces,
            piece_bytes: u64::from(kind.tokens) * self.token_bytes,
            source_offset: u64::from(kind.source_rest_tokens) * self.source.step_bytes,
            destination_offset: u64::from(kind.destination_rest_tokens) * self.destination.step_bytes,
        }
    }

    /// What the indices of either side count.
    pub fn units(&self) -> (u64, u64) {
        (self.source.unit_bytes, self.destination.unit_bytes)
    }

    pub fn strands(&self) -> &[(u64, u64)] {
        &self.strands
    }

    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// How many ops each layer takes.
    pub fn ops(&self) -> usize {
        self.groups.len() * self.strands.len()
    }

    /// How many pieces each layer takes.
    pub fn pieces(&self) -> usize {
        self.source_indices.len() * self.strands.len()
    }

    /// How many bytes move in each layer.
    pub fn bytes(&self) -> u64 {
        let strand: u64 = self.groups.iter().map(|group| u64::from(group.pieces) * group.piece_bytes).sum();
        strand * self.strands.len() as u64
    }

    /// The index lists of a group, without its first `done` pieces.
    #[inline]
    pub fn indices(&self, group: &Group, done: u64) -> (&[u32], &[u32]) {
        let range = group.first as usize + done as usize..group.first as usize + group.pieces as usize;
        (&self.source_indices[range.clone()], &self.destination_indices[range])
    }
}

/// What pieces must have in common to share an op.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    tokens: u32,
    source_rest_tokens: u32,
    destination_rest_tokens: u32,
}

impl Piece {
    #[inline]
    fn kind(&self) -> Kind {
        Kind {
            tokens: self.tokens,
            source_rest_tokens: self.source.rest_tokens,
            destination_rest_tokens: self.destination.rest_tokens,
        }
    }
}

/// The few kinds that the pieces of a request are of, and how often each occurs.
#[derive(Default)]
struct Kinds {
    kinds: [(Kind, u32); KINDS_MAX],
    len: usize,
    /// Where the last one was found: the next is mostly the same.
    last: usize,
    /// The greatest of the earlier rounds.
    done: Option<Kind>,
    /// Kinds were left for the next round.
    more: bool,
}

/// So many runs of pieces of one kind are found in one pass.
const RUNS_MAX: usize = 4;

/// Caches that are cut at page boundaries have two or three. Pieces merged from neighbours are of as many kinds as they
/// are of lengths.
const KINDS_MAX: usize = 32;

/// Each round goes through all pieces. Runs of pages have hundreds of lengths at the most, since their sum is the request;
/// a peer whose page stride no index can express could ask for as many kinds as a page has tokens.
const ROUNDS_MAX: usize = 16;

impl Kinds {
    /// Counts one, unless its kind belongs to another round.
    #[inline]
    fn count(&mut self, kind: Kind) {
        match self.find(kind) {
            Some(at) => self.kinds[at].1 += 1,
            None => self.count_first(kind),
        }
    }

    #[cold]
    fn count_first(&mut self, kind: Kind) {
        if self.done.is_some_and(|done| kind <= done) {
            return;
        }
        if self.len < KINDS_MAX {
            self.last = self.len;
            self.len += 1;
        } else {
            // The greatest is left for later. It is not counted again in this round: what is kept only gets less.
            self.more = true;
            let greatest = (0..KINDS_MAX).max_by_key(|&at| self.kinds[at].0).unwrap_or(0);
            if self.kinds[greatest].0 < kind {
                return;
            }
            self.last = greatest;
        }
        self.kinds[self.last] = (kind, 1);
    }

    #[inline]
    fn find(&mut self, kind: Kind) -> Option<usize> {
        if self.len > 0 && self.kinds[self.last].0 == kind {
            return Some(self.last);
        }
        let at = self.known().iter().position(|(known, _)| *known == kind)?;
        self.last = at;
        Some(at)
    }

    fn known(&self) -> &[(Kind, u32)] {
        &self.kinds[..self.len]
    }

    fn sort(&mut self) {
        self.kinds[..self.len].sort_unstable();
        self.last = 0;
    }

    /// After [`sort`](Kinds::sort): forgets the kinds of this round; false if it was the last one.
    fn next_round(&mut self) -> bool {
        let done = self.known().last().map(|(kind, _)| *kind);
        let more = self.more;
        *self = Self { done, ..Self::default() };
        more
    }
}

/// The stretches, those that follow each other in memory on both sides joined.
struct Pieces<I> {
    stretches: I,
    source: Grid,
    destination: Grid,
    token_bytes: u64,
    /// The piece that may still grow, and where the next stretch would have to begin.
    open: Option<Piece>,
    expected: (u64, u64),
}

impl<I> Pieces<I> {
    fn new(stretches: I, source: Grid, destination: Grid, token_bytes: u64) -> Self {
        Self { stretches, source, destination, token_bytes, open: None, expected: (0, 0) }
    }
}

impl<I: Iterator<Item = Pair>> Iterator for Pieces<I> {
    type Item = Piece;

    #[inline]
    fn next(&mut self) -> Option<Piece> {
        for Pair { source: from, destination: to, tokens } in self.stretches.by_ref() {
            let at = (self.source.byte(from), self.destination.byte(to));
            let bytes = u64::from(tokens) * self.token_bytes;
            let joins = at == self.expected;
            self.expected = (at.0 + bytes, at.1 + bytes);
            match &mut self.open {
                Some(piece) if joins => piece.tokens += tokens,
                open => {
                    let (source, destination) = (self.source.place(from), self.destination.place(to));
                    let before = open.replace(Piece { tokens, source, destination });
                    if before.is_some() {
                        return before;
                    }
                }
            }
        }
        self.open.take()
    }
}

/// How one side says where a piece begins.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Grid {
    stride_bytes: u64,
    /// From one token to the next.
    step_bytes: u64,
    unit_bytes: u64,
    /// Units from one page to the next, and from one token to the next.
    page_units: u32,
    token_units: u32,
    /// 1 where tokens go into the offset of the op instead, because units cannot express them; otherwise 0.
    rest: u32,
}

impl Grid {
    /// Indices count pages while every piece begins a page. Otherwise they count the largest unit that divides
    /// both the stride and the step from token to token, so that pieces that begin at different tokens of their pages
    /// still share an op; unless the pool is so large that such indices do not fit.
    pub fn new(side: &Side, step_bytes: u64, begins_pages: bool) -> Self {
        let stride_bytes = side.stride_bytes;
        let whole_pages = Self {
            stride_bytes,
            step_bytes,
            unit_bytes: stride_bytes,
            page_units: 1,
            token_units: 0,
            rest: 1,
        };
        if begins_pages {
            return whole_pages;
        }
        let unit_bytes = greatest_common_divisor(stride_bytes, step_bytes);
        let last_page_end = u64::from(side.pages).checked_mul(stride_bytes / unit_bytes);
        if last_page_end.is_none_or(|units| units > u64::from(u32::MAX)) {
            return whole_pages;
        }
        Self {
            stride_bytes,
            step_bytes,
            unit_bytes,
            page_units: (stride_bytes / unit_bytes) as u32,
            token_units: (step_bytes / unit_bytes) as u32,
            rest: 0,
        }
    }

    #[inline]
    fn byte(&self, (page, token): (u32, u32)) -> u64 {
        u64::from(page) * self.stride_bytes + u64::from(token) * self.step_bytes
    }

    #[inline]
    fn place(&self, (page, token): (u32, u32)) -> Place {
        Place { index: page * self.page_units + token * self.token_units, rest_tokens: token * self.rest }
    }
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
