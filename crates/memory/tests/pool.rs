//! What the pool answers, case by case. `pool_model.rs` checks whole histories.

use std::sync::Arc;

use crossdock_memory::{
    GrantedPages, PagePool, PageRef, PageSet, PoolError, PoolOptions, QuarantineReason, Until,
};

fn pool(pages: u32) -> PagePool {
    PagePool::new(pages, PoolOptions::default())
}

fn waiting_for(peer: &str) -> QuarantineReason {
    QuarantineReason { peer: peer.into(), until: Until::ReleaseOrDeath }
}

#[test]
fn pages_come_in_one_run_when_there_is_one() {
    let pool = pool(100);
    let mut all = pool.take(100).unwrap();
    assert_eq!(all.ids(), (0..100).collect::<Vec<_>>());
    let end = all.split_off(90);
    let used = all.split_off(40);
    drop(all.split_off(20));
    drop(end);
    // Free now: 20..40 and 90..100.
    let ten = pool.take(10).unwrap();
    assert_eq!(ten.ids(), (90..100).collect::<Vec<_>>());
    drop(ten);
    // No run is long enough: the longest first.
    let scattered = pool.take(25).unwrap();
    assert_eq!(scattered.ids(), (20..40).chain(90..95).collect::<Vec<_>>());
    drop((all, used, scattered));
    assert_eq!(pool.stats().largest_run, 100);
}

#[test]
fn an_exhausted_pool_says_so_and_gives_nothing() {
    let pool = pool(4);
    let held = pool.take(3).unwrap();
    assert_eq!(pool.take(2).unwrap_err(), PoolError::Exhausted { wanted: 2, free: 1 });
    assert_eq!(pool.take(u32::MAX).unwrap_err(), PoolError::Exhausted { wanted: u32::MAX, free: 1 });
    assert!(pool.take(0).unwrap().is_empty());
    let stats = pool.stats();
    assert_eq!((stats.free, stats.lowest_free, stats.takes, stats.failed_takes), (1, 1, 2, 2));
    drop(held);
    assert_eq!((pool.stats().free, pool.stats().lowest_free), (4, 1));
    assert_eq!(PagePool::new(0, PoolOptions::default()).stats().largest_run, 0);
}

#[test]
fn pressure_has_two_watermarks() {
    let pool = PagePool::new(10, PoolOptions { low_watermark: 3, high_watermark: 6 });
    let under_pressure = || pool.stats().under_pressure;
    let mut held = pool.take(7).unwrap();
    assert!(!under_pressure(), "three are free, and the low watermark is three");
    let one = pool.take(1).unwrap();
    assert!(under_pressure());
    drop(one);
    drop(held.split_off(5));
    assert_eq!(pool.stats().free, 5);
    assert!(under_pressure(), "above the low watermark is not yet the high one");
    drop(held.split_off(4));
    assert!(!under_pressure());
}

#[test]
fn watermarks_that_cannot_be_reached_are_moved_to_where_they_can() {
    let pool = PagePool::new(4, PoolOptions { low_watermark: 9, high_watermark: 0 });
    assert!(!pool.stats().under_pressure);
    let mut two = pool.take(2).unwrap();
    assert!(pool.stats().under_pressure);
    drop(two.split_off(1));
    assert!(pool.stats().under_pressure, "the high watermark is not below the low one");
    drop(two);
    assert!(!pool.stats().under_pressure);
}

#[test]
fn granted_pages_are_free_only_when_they_come_home() {
    let pool = pool(8);
    let mut granted = pool.take(5).unwrap().grant();
    assert_eq!((pool.stats().granted, pool.stats().free), (5, 3));
    granted.quarantine(waiting_for("decode-7"), 1_000);
    assert!(granted.is_quarantined());
    assert_eq!((pool.stats().granted, pool.stats().quarantined), (0, 5));

    // Another peer turns out to be the last one; the time does not begin anew.
    granted.quarantine(QuarantineReason { peer: "decode-8".into(), until: Until::LanesDown }, 2_000);
    let [entry] = &pool.quarantine(5_000)[..] else { panic!("one entry") };
    assert_eq!((&*entry.peer, entry.until, entry.pages), ("decode-8", Until::LanesDown, 5));
    assert_eq!((entry.since_ns, entry.age_ns, entry.abandoned), (1_000, 4_000, false));
    assert_eq!(pool.quarantine(500)[0].age_ns, 0, "a clock read earlier than the quarantine began");

    let home = granted.come_home().unwrap();
    assert_eq!(home.ids(), [0, 1, 2, 3, 4]);
    assert!(pool.quarantine(5_000).is_empty());
    drop(home);
    assert_eq!(pool.stats().largest_run, 8);
}

#[test]
fn dropping_granted_pages_never_frees_them() {
    let pool = pool(8);
    drop(pool.take(2).unwrap().grant());
    let mut granted = pool.take(3).unwrap().grant();
    granted.quarantine(waiting_for("decode-1"), 10);
    drop(granted);
    let stats = pool.stats();
    assert_eq!((stats.abandoned, stats.granted, stats.quarantined, stats.free), (5, 0, 0, 3));
    assert_eq!(pool.take(4).unwrap_err(), PoolError::Exhausted { wanted: 4, free: 3 });
    let [entry] = &pool.quarantine(30)[..] else { panic!("only the one with a peer has an entry") };
    assert_eq!((entry.pages, entry.age_ns, entry.abandoned), (3, 20, true));
}

#[test]
fn pages_of_several_writers_are_home_when_all_are_done() {
    let pool = pool(8);
    let mut first = pool.take(3).unwrap().grant();
    let (second, mut third) = (first.another_writer(), first.another_writer());
    assert_eq!((pool.stats().granted, second.ids()), (3, &[0, 1, 2][..]));
    assert!(second.come_home().is_none());
    // What one writer holds up is held up.
    third.quarantine(waiting_for("decode-1"), 10);
    first.quarantine(waiting_for("decode-2"), 20);
    let [entry] = &pool.quarantine(30)[..] else { panic!("one entry") };
    assert_eq!((&*entry.peer, entry.since_ns, entry.pages), ("decode-2", 10, 3));
    assert!(first.come_home().is_none());
    assert_eq!((pool.stats().quarantined, pool.stats().free), (3, 5));
    let home = third.come_home().expect("that was the last");
    assert_eq!((home.ids(), pool.stats().quarantined), (&[0, 1, 2][..], 0));
    drop(home);
    assert_eq!(pool.stats().free, 8);

    // One that is dropped may write for ever, whatever the others say and when they say it.
    let first = pool.take(2).unwrap().grant();
    drop(first.another_writer());
    assert!(first.come_home().is_none());
    let first = pool.take(2).unwrap().grant();
    let second = first.another_writer();
    assert!(first.come_home().is_none());
    drop(second);
    let stats = pool.stats();
    assert_eq!((stats.abandoned, stats.granted, stats.free), (4, 0, 4));
}

#[test]
fn the_oldest_quarantine_is_listed_first() {
    let pool = pool(8);
    let mut held: Vec<GrantedPages> = (0..3).map(|_| pool.take(1).unwrap().grant()).collect();
    for (granted, since_ns) in held.iter_mut().zip([30, 10, 20]) {
        granted.quarantine(waiting_for("peer"), since_ns);
    }
    let since: Vec<u64> = pool.quarantine(40).iter().map(|entry| entry.since_ns).collect();
    assert_eq!(since, [10, 20, 30]);
}

#[test]
fn a_shared_prefix_outlives_the_prompt() {
    let pool = pool(10);
    let prompt = pool.take(8).unwrap().share();
    let prefix = prompt.prefix(3);
    let middle = prompt.slice(2..5);
    assert_eq!((prefix.ids(), middle.ids()), (&[0, 1, 2][..], &[2, 3, 4][..]));
    assert_eq!(middle.slice(1..3).ids(), [3, 4]);
    drop(prompt);
    assert_eq!(pool.stats().shared, 5);
    drop(middle);
    assert_eq!(pool.stats().shared, 3);

    let mut longer = prefix.clone();
    longer.join(pool.take(2).unwrap().share()).unwrap();
    assert_eq!(longer.ids(), [0, 1, 2, 3, 4]);
    let longer = longer.try_into_set().expect_err("the prefix is held twice");
    drop(prefix);
    let set = longer.try_into_set().unwrap();
    assert_eq!((pool.stats().shared, pool.stats().owned), (0, 5));
    drop(set);
    assert_eq!(pool.stats().largest_run, 10);
}

#[test]
fn a_page_named_twice_in_one_reference_is_counted_twice() {
    let pool = pool(2);
    let mut pages = pool.take(2).unwrap().share();
    pages.join(pages.prefix(1)).unwrap();
    assert_eq!(pages.ids(), [0, 1, 0]);
    let pages = pages.try_into_set().expect_err("a page cannot be written through two places of one set");
    drop(pages);
    assert_eq!(pool.stats().free, 2);
}

#[test]
#[should_panic(expected = "out of range")]
fn a_prefix_longer_than_the_pages_is_a_bug_of_the_caller() {
    let _ = pool(4).take(2).unwrap().share().prefix(3);
}

#[test]
fn pages_of_different_pools_do_not_mix() {
    let (here, there) = (pool(4), pool(4));
    let mut pages = here.take(2).unwrap();
    let refused = pages.join(there.take(1).unwrap()).unwrap_err();
    assert!(refused.pool().is_same(&there) && !refused.pool().is_same(&here));
    drop(refused);
    let mut pages = pages.share();
    drop(pages.join(there.take(3).unwrap().share()).unwrap_err());
    assert_eq!((there.stats().free, here.stats().shared), (4, 2));
}

#[test]
fn adoption_says_what_is_wrong_and_takes_all_or_nothing() {
    let pool = PagePool::external(10);
    let owned = pool.adopt(&[4, 2]).unwrap();
    assert_eq!(owned.ids(), [4, 2]);
    let granted = pool.adopt(&[1]).unwrap().grant();
    let mut quarantined = PageSet::from_ids(&pool, &[3]).unwrap().grant();
    quarantined.quarantine(waiting_for("decode-1"), 77);
    drop(pool.adopt(&[5]).unwrap().grant());
    let shared = pool.adopt(&[6]).unwrap().share();

    let peer: Arc<str> = "decode-1".into();
    for (ids, error) in [
        (&[0, 4][..], PoolError::PageInUse { page: 4 }),
        (&[0, 1], PoolError::PageInUse { page: 1 }),
        (&[0, 6], PoolError::PageInUse { page: 6 }),
        (&[0, 9, 0], PoolError::DuplicatePage { page: 0 }),
        (&[0, 10], PoolError::PageOutOfRange { page: 10, pages: 10 }),
        (&[0, u32::MAX], PoolError::PageOutOfRange { page: u32::MAX, pages: 10 }),
        (&[0, 5], PoolError::PageAbandoned { page: 5 }),
        (&[0, 3], PoolError::PageInQuarantine { page: 3, peer, since_ns: 77 }),
    ] {
        assert_eq!(pool.adopt(ids).unwrap_err(), error);
        assert_eq!(pool.stats().free, 4, "{ids:?} left something behind");
    }
    drop((granted.come_home(), quarantined.come_home(), shared, owned));
    assert_eq!((pool.stats().free, pool.stats().abandoned), (9, 1));
    assert_eq!(pool.adopt(&[0, 1, 2, 3, 4, 6, 7, 8, 9]).unwrap().len(), 9);
    assert_eq!((pool.stats().failed_takes, pool.stats().largest_run), (8, 0));
}

#[test]
fn what_the_engine_lends_is_counted_and_never_what_a_peer_may_write() {
    let pool = PagePool::external(6);
    let (first, second) = (pool.lend(&[0, 1, 1]).unwrap(), pool.lend(&[1, 2]).unwrap());
    assert_eq!((pool.stats().shared, pool.stats().free), (3, 3));
    let granted = pool.adopt(&[4]).unwrap().grant();
    assert_eq!(pool.lend(&[1, 3, 4]).unwrap_err(), PoolError::PageInUse { page: 4 });
    assert_eq!(pool.lend(&[3, 6]).unwrap_err(), PoolError::PageOutOfRange { page: 6, pages: 6 });
    assert_eq!((pool.stats().shared, pool.stats().free), (3, 2), "a refused call leaves nothing behind");
    drop(first);
    assert_eq!(pool.adopt(&[1]).unwrap_err(), PoolError::PageInUse { page: 1 });
    drop((second, granted.come_home()));
    assert_eq!(pool.stats().free, 6);
}

#[test]
fn a_pool_either_allocates_or_adopts() {
    assert_eq!(pool(4).lend(&[0]).unwrap_err(), PoolError::PoolAllocates);
    assert_eq!(PagePool::external(4).take(1).unwrap_err(), PoolError::PoolIsExternal);
    assert_eq!(pool(4).adopt(&[0]).unwrap_err(), PoolError::PoolAllocates);
}

#[test]
fn empty_sets_go_through_every_state() {
    let pool = pool(1);
    let mut granted = pool.take(0).unwrap().grant();
    granted.quarantine(waiting_for("peer"), 0);
    assert!(granted.is_empty() && !granted.is_quarantined());
    let shared = granted.come_home().unwrap().share();
    assert!(shared.clone().prefix(0).is_empty());
    assert!(shared.try_into_set().unwrap().is_empty());
    drop(pool.take(0).unwrap().grant());
    assert_eq!((pool.stats().free, pool.stats().abandoned), (1, 0));
}

#[test]
fn threads_can_share_a_pool() {
    fn threads<T: Send + Sync + 'static>() {}
    threads::<(PagePool, PageSet, GrantedPages, PageRef)>();

    let pool = pool(64);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for pages in (1..16).cycle().take(500) {
                    let set = pool.take(pages).expect("four threads hold fifteen pages each at most");
                    let shared = set.share();
                    let prefix = shared.prefix(pages as usize / 2);
                    drop(shared);
                    drop(prefix.try_into_set().unwrap().grant().come_home().unwrap());
                }
            });
        }
    });
    assert_eq!((pool.stats().free, pool.stats().largest_run, pool.stats().takes), (64, 64, 2000));
}

#[test]
fn a_million_pages_come_and_go_one_by_one() {
    let pool = pool(1 << 20);
    let mut singles: Vec<PageSet> = (0..1 << 20).map(|_| pool.take(1).unwrap()).collect();
    assert_eq!(pool.stats().free, 0);
    // Every second page first, so that no run can form, then the rest, each of which joins two runs.
    let mut index = 0;
    singles.retain(|_| {
        index += 1;
        index % 2 == 0
    });
    assert_eq!((pool.stats().free, pool.stats().largest_run), (1 << 19, 1));
    let scattered = pool.take(1000).unwrap();
    assert_eq!(scattered.len(), 1000);
    drop((scattered, singles));
    assert_eq!((pool.stats().free, pool.stats().largest_run), (1 << 20, 1 << 20));
}
