//! Exactly the addressed bytes change, and they change to what the source held.

use super::Rig;
use super::stage::{Link, Stage, apply, assert_content, content};
use crate::{Access, Direction, GrantId, Op, Shape, Token};

/// Spans of many lengths, at odd places, written and read; nothing around them changes.
pub fn spans_of_every_size(rig: &mut dyn Rig) {
    const BYTES: usize = (4 << 20) + 77;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(BYTES);
    let mut models = Models::of(&link);
    for bytes in
        [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 511, 4095, 4096, 4097, 65_537, (1 << 20) + 13, (3 << 20) + 1]
    {
        for direction in [Direction::Write, Direction::Read] {
            let by = stage.rng.below(2) as usize;
            let room = BYTES as u64 - bytes + 1;
            let (local, remote) = (stage.rng.below(room), stage.rng.below(room));
            let op = link.span(by, direction, local, remote, bytes);
            models.move_and_wait(&mut stage, &link, by, &[op]);
        }
        models.check(&link, &format!("after spans of {bytes} bytes"));
    }
    // The very first and the very last byte.
    let end = BYTES as u64 - 1;
    let edges = [link.write(0, 0, end, 1), link.write(0, end, 0, 1)];
    models.move_and_wait(&mut stage, &link, 0, &edges);
    models.check(&link, "after writes at the edges");
    stage.end();
}

/// Paged ops with all kinds of strides, piece lengths and lists.
pub fn pages_at_any_stride(rig: &mut dyn Rig) {
    const BYTES: usize = 1 << 20;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(BYTES);
    let mut models = Models::of(&link);
    for round in 0..60 {
        let direction = if stage.rng.one_in(2) { Direction::Write } else { Direction::Read };
        let by = stage.rng.below(2) as usize;
        let lists = Lists::random(&mut stage, direction, BYTES as u64);
        let op = lists.op(&link, by, direction);
        models.move_and_wait(&mut stage, &link, by, &[op]);
        models.check(&link, &format!("after paged op {round}: {direction:?} {lists:?}"));
    }
    stage.end();
}

/// Batches of many ops of all kinds, from both sides at once.
pub fn a_mix_of_ops_in_both_directions(rig: &mut dyn Rig) {
    // Each region has four parts: the peer writes into the first, its owner's reads land in the second, writes come
    // from the third and reads from the fourth, which nobody changes. Every op has a place of its own to land in,
    // since nothing is said about the order of bytes of ops that are in flight together.
    const PART: u64 = 1 << 20;
    const OPS: u64 = 20;
    const SLOT: u64 = PART / OPS;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(4 * PART as usize);
    let mut models = Models::of(&link);
    for round in 0..8 {
        let mut lists = Vec::new();
        for _ in 0..2 * OPS {
            let direction = if stage.rng.one_in(3) { Direction::Read } else { Direction::Write };
            lists.push((direction, Lists::random(&mut stage, direction, SLOT)));
        }
        let mut ops: [Vec<Op<'_>>; 2] = [Vec::new(), Vec::new()];
        for (at, (direction, lists)) in lists.iter().enumerate() {
            let by = at % 2;
            let slot = at as u64 / 2 * SLOT;
            let mut op = lists.op(&link, by, *direction);
            if let Shape::Pages { local_offset, remote_offset, .. } = &mut op.shape {
                let (local_part, remote_part) = if *direction == Direction::Write { (2, 0) } else { (1, 3) };
                *local_offset += local_part * PART + slot;
                *remote_offset += remote_part * PART + slot;
            }
            op.imm = (*direction == Direction::Write).then_some(at as u32);
            op.token = Some(Token(at as u64));
            models.apply(by, &op);
            ops[by].push(op);
        }
        let arrived = [0, 1].map(|side| stage.log(side, link.lanes[side]).arrived.len());
        let done = [0, 1].map(|side| stage.log(side, link.lanes[side]).done.len());
        for (by, ops) in ops.iter().enumerate() {
            stage.post_all(by, link.lanes[by], ops);
        }
        stage.wait("every op of both sides", |s| {
            (0..2).all(|side| {
                let [sent, heard] = [s.log(side, link.lanes[side]), s.log(1 - side, link.lanes[1 - side])];
                let writes = ops[side].iter().filter(|op| op.imm.is_some()).count();
                sent.done.len() == done[side] + ops[side].len()
                    && heard.arrived.len() == arrived[1 - side] + writes
            })
        });
        models.check(&link, &format!("after mix {round}"));
    }
    stage.end();
}

/// Ops of one lane name the region they mean.
pub fn several_regions_on_one_lane(rig: &mut dyn Rig) {
    const REGIONS: usize = 5;
    const BYTES: usize = 8192;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(BYTES);
    let mut sources = Vec::new();
    let mut targets = Vec::new();
    for at in 0..REGIONS {
        sources.push(stage.region(0, BYTES));
        let target = stage.region(1, BYTES);
        let id = GrantId::new(10 + at as u32, 0);
        stage.grant_all(1, &target, id, 0, Access::Write);
        let remote = stage.attach(0, link.lanes[0], &target.key);
        targets.push((target, remote, id));
    }
    let mut expected: Vec<Vec<u8>> = targets.iter().map(|(target, ..)| content(&target.memory)).collect();
    let mut ops = Vec::new();
    for at in 0..REGIONS {
        let from = (at * 3 + 1) % REGIONS;
        let (_, remote, grant) = &targets[at];
        ops.push(Op {
            grant: *grant,
            shape: Shape::Span {
                local: sources[from].local,
                local_offset: 100,
                remote: *remote,
                remote_offset: at as u64,
                bytes: 4000 + at as u64,
            },
            ..link.write(0, 0, 0, 0)
        });
        apply(&ops[at], &mut content(&sources[from].memory), &mut expected[at]);
    }
    stage.write(&link, 0, &ops);
    for (at, (target, ..)) in targets.iter().enumerate() {
        assert_content(&target.memory, &expected[at], &format!("region {at}"));
    }
    stage.end();
}

/// The port's own handle keeps memory alive and in place.
pub fn registered_memory_outlives_its_handle(rig: &mut dyn Rig) {
    const BYTES: usize = 64 << 10;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(BYTES);
    // What was written into the region of which nobody but the port has a handle comes back by a read.
    let hidden = stage.region(1, BYTES);
    stage.grant_all(1, &hidden, GrantId::new(10, 0), 0, Access::Write);
    stage.grant_all(1, &hidden, GrantId::new(11, 0), 0, Access::Read);
    let remote = stage.attach(0, link.lanes[0], &hidden.key);
    drop(hidden);
    let sent = content(&link.regions[0].memory);
    let there = |op: Op<'static>, grant| match op.shape {
        Shape::Span { local, local_offset, remote_offset, bytes, .. } => Op {
            grant: GrantId::new(grant, 0),
            shape: Shape::Span { local, local_offset, remote, remote_offset, bytes },
            ..op
        },
        Shape::Pages { .. } => op,
    };
    stage.write(&link, 0, &[there(link.write(0, 0, 0, BYTES as u64), 10)]);
    link.regions[0].memory.fill(0, BYTES, 0).expect("a whole memory can be filled");
    stage.read(&link, 0, &[there(link.read(0, 0, 0, BYTES as u64), 11)]);
    assert_content(&link.regions[0].memory, &sent, "what came back");
    stage.end();
}

/// What the two memories of a link should hold.
struct Models([Vec<u8>; 2]);

impl Models {
    fn of(link: &Link) -> Self {
        Self([0, 1].map(|side| content(&link.regions[side].memory)))
    }

    fn apply(&mut self, by: usize, op: &Op<'_>) {
        let [first, second] = &mut self.0;
        let (local, remote) = if by == 0 { (first, second) } else { (second, first) };
        apply(op, local, remote);
    }

    #[track_caller]
    fn move_and_wait(&mut self, stage: &mut Stage<'_>, link: &Link, by: usize, ops: &[Op<'_>]) {
        match ops[0].direction {
            Direction::Write => stage.write(link, by, ops),
            Direction::Read => stage.read(link, by, ops),
        }
        ops.iter().for_each(|op| self.apply(by, op));
    }

    #[track_caller]
    fn check(&self, link: &Link, when: &str) {
        for side in 0..2 {
            assert_content(&link.regions[side].memory, &self.0[side], &format!("{when}, side {side}"));
        }
    }
}

/// A paged op's numbers.
#[derive(Debug)]
struct Lists {
    piece_bytes: u64,
    offsets: [u64; 2],
    strides: [u64; 2],
    /// Source pages may repeat, destination pages not.
    local: Vec<u32>,
    remote: Vec<u32>,
}

impl Lists {
    /// Fits into `limit` bytes on both sides.
    fn random(stage: &mut Stage<'_>, direction: Direction, limit: u64) -> Self {
        let rng = &mut stage.rng;
        let piece_bytes = match rng.below(4) {
            0 => 1 + rng.below(8),
            1 => 1 + rng.below(600),
            2 => 4096,
            _ => 1 + rng.below(20_000),
        };
        let mut strides = [piece_bytes; 2];
        let mut offsets = [0; 2];
        for side in 0..2 {
            if rng.one_in(2) {
                strides[side] += rng.below(200);
            }
            offsets[side] = rng.below(limit / 8);
        }
        let pages = strides.iter().zip(&offsets).map(|(stride, offset)| (limit - offset) / stride);
        let pages = pages.min().expect("two sides").min(2000) as u32;
        let count = rng.below(u64::from(pages.min(300)) + 1) as usize;
        let runs = rng.one_in(3);
        let mut unique = rng.distinct(count, pages);
        if runs {
            unique.sort_unstable();
        }
        let repeating = match rng.one_in(2) {
            true => (0..count).map(|_| rng.below(u64::from(pages)) as u32).collect(),
            false => unique.iter().rev().copied().collect(),
        };
        let (local, remote) = match direction {
            Direction::Write => (repeating, unique),
            Direction::Read => (unique, repeating),
        };
        Self { piece_bytes, offsets, strides, local, remote }
    }

    fn op(&self, link: &Link, by: usize, direction: Direction) -> Op<'_> {
        Op {
            direction,
            grant: link.grant(direction),
            shape: Shape::Pages {
                local: link.regions[by].local,
                local_offset: self.offsets[0],
                local_stride_bytes: self.strides[0],
                local_pages: &self.local,
                remote: link.remotes[by],
                remote_offset: self.offsets[1],
                remote_stride_bytes: self.strides[1],
                remote_pages: &self.remote,
                piece_bytes: self.piece_bytes,
            },
            imm: None,
            token: None,
        }
    }
}
