//! The decoder of cache layouts: any bytes are refused, or are the one form of a layout; and what two workers with such
//! layouts plan stays within both.
#![no_main]

use crossdock_kv::{CacheLayout, PageTable, Plan, PlanInput, Route};
use crossdock_transport::{Direction, GrantId, LocalId, Op, Posted, RemoteId};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Two layouts, one after the other, behind the length of the first one.
    let Some((first, rest)) = bytes.split_first_chunk() else { return };
    let (one, two) = rest.split_at(rest.len().min(u16::from_le_bytes(*first).into()));
    let (Ok(one), Ok(two)) = (decoded(one), decoded(two)) else { return };
    let pages: Vec<u32> = (0..one.pages().min(two.pages()).min(64)).collect();
    for pool in 0..one.pools().len().min(two.pools().len()) {
        for tokens in [0..1, 0..33, 7..40] {
            let table = |layout| PageTable::of_pool(layout, pool, tokens.start, &pages);
            let input = PlanInput { source: table(&one), destination: table(&two), tokens: tokens.clone() };
            if let Ok(plan) = Plan::build(&input) {
                walk(&plan, &one, &two);
            }
        }
    }
});

fn decoded(bytes: &[u8]) -> Result<CacheLayout, ()> {
    let layout = CacheLayout::decode(bytes).map_err(|_| ())?;
    let mut again = Vec::new();
    layout.encode(&mut again);
    assert_eq!(again, bytes, "{layout:?} has two forms");
    Ok(layout)
}

fn walk(plan: &Plan, source: &CacheLayout, destination: &CacheLayout) {
    let regions = |layout: &CacheLayout| layout.buffers().map(|buffer| buffer.region).max().unwrap_or(0);
    // A region's number may be any, and is that of a list.
    let most = regions(source).max(regions(destination));
    if most >= 64 {
        return;
    }
    let (local, remote): (Vec<_>, Vec<_>) = (0..=most).map(|id| (LocalId(id), RemoteId(id))).unzip();
    let (direction, grant) = (Direction::Write, GrantId::new(0, 0));
    let route = Route { direction, grant, local: &local, remote: &remote };
    let ops = plan.ops(route, plan.layers()).expect("every region is there");
    let mut batch = [Op::notify(0); 16];
    let (mut cursor, mut bytes) = (ops.start(), 0);
    let needed =
        |layout: &CacheLayout| (0..=most).map(|region| layout.bytes_needed(region)).max().unwrap_or(0);
    while !ops.is_done(cursor) {
        let filled = ops.fill(cursor, &mut batch);
        for op in &batch[..filled] {
            let (from, to) = op.extents().expect("a planned op is sound");
            assert!(from <= needed(source) && to <= needed(destination));
            bytes += op.bytes().expect("as many as there are");
        }
        cursor = ops.advance(cursor, Posted::all(&batch[..filled]));
    }
    assert_eq!(bytes, plan.total_bytes());
}
