//! The suite that every port passes: one set of cases, the same for each transport.
//!
//! A port's tests implement [`Rig`] and call [`run`], once for each kind of memory or configuration that behaves
//! differently. Each [case](CASES) makes fresh ports, moves real bytes between them, and compares the whole of every
//! memory with a model, so that a byte too many is found like a byte too few. While a case runs, the order of
//! events of every lane is checked: one `Up` before anything else, each `Done` once and in the order of posting,
//! one `Down`, nothing after it.
//!
//! Every wait ends within [`Rig::patience`], and says what it waited for.
//!
//! A peer that is stopped or killed needs a process of its own. [`ProcessChild::spawn`] runs the test binary again for
//! that, with only the named test, which answers to [`requested_child`] with [`serve`] and does nothing when nobody
//! requested it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crossdock_memory::Memory;

use crate::{Fence, Port};

mod bytes;
mod child;
mod death;
mod grants;
mod immediates;
mod lanes;
mod posting;
mod random;
mod refusals;
mod sleep;
mod stage;
mod threads;

pub use child::{Child, ProcessChild, Streamer, requested_child, serve, this_binary};
pub use random::Rng;

/// How a port is tested: where its ports and memories come from, and what it promises.
pub trait Rig {
    /// What is tested, for reports.
    fn name(&self) -> String;

    /// Fresh ports of which any two can connect. They are to give up connecting after two seconds at most, as the
    /// suite waits for that to happen.
    fn ports(&mut self, count: usize) -> Vec<Box<dyn Port>>;

    /// Memory of the kind that is tested.
    fn memory(&mut self, bytes: usize) -> Memory;

    /// Lets time pass between two polls: yields, or moves a simulated clock.
    fn pass(&mut self);

    /// What `revoke` of a grant answers while the peer lives and its lanes are up.
    fn fence(&self) -> Fence;

    /// Whether the receiving side looks at each access before it happens, and ends the lane of a peer that
    /// reaches for what it was not granted.
    fn checks(&self) -> bool;

    /// A peer that can be stopped and killed, usually in [a process of its own](ProcessChild). Without one the
    /// cases that need it are left out.
    fn child(&mut self) -> Option<Box<dyn Child>> {
        None
    }

    /// How long any wait of the suite lasts before it fails: more than usual where the medium is emulated.
    fn patience(&self) -> Duration {
        PATIENCE
    }

    /// Where the suite's random choices begin.
    fn seed(&self) -> u64 {
        1
    }
}

/// One case of the suite.
#[derive(Clone, Copy)]
pub struct Case {
    /// What is stated.
    pub name: &'static str,
    /// Runs the case; panics when the port does not behave as stated.
    pub run: fn(&mut dyn Rig),
}

/// Runs every case, also after one has failed.
///
/// # Panics
/// If a case failed; the message names all that did. What each of them found has been printed before.
pub fn run(rig: &mut dyn Rig) {
    let name = rig.name();
    let mut failed = Vec::new();
    for case in CASES {
        if catch_unwind(AssertUnwindSafe(|| (case.run)(rig))).is_err() {
            eprintln!("{name}: case {} failed (seed {})", case.name, rig.seed());
            failed.push(case.name);
        }
    }
    assert!(
        failed.is_empty(),
        "{name}: {} of {} cases failed: {}",
        failed.len(),
        CASES.len(),
        failed.join(", ")
    );
}

/// How long any wait of the suite usually lasts before it fails.
pub const PATIENCE: Duration = Duration::from_secs(10);

macro_rules! cases {
    ($($module:ident: $($case:ident),* $(,)?;)*) => {
        /// All cases, in the order in which [`run`] runs them.
        pub const CASES: &[Case] =
            &[$($(Case { name: stringify!($case), run: $module::$case }),*),*];
        $(pub use $module::{$($case),*};)*
    };
}

cases! {
    bytes:
        spans_of_every_size,
        pages_at_any_stride,
        a_mix_of_ops_in_both_directions,
        several_regions_on_one_lane,
        registered_memory_outlives_its_handle;
    immediates:
        immediates_come_once_after_their_bytes,
        bare_notifications_touch_nothing,
        unread_immediates_hold_back_their_sender;
    posting:
        a_paged_op_is_resumed_where_it_stopped,
        done_covers_earlier_ops,
        done_of_a_read_means_that_it_has_arrived,
        thousands_of_ops_in_flight,
        an_event_buffer_of_one,
        posting_needs_a_lane_that_is_up,
        one_stuck_peer_holds_back_no_other;
    refusals:
        bad_ops_are_refused_before_anything_moves,
        a_bad_op_stops_only_what_follows_it,
        garbage_keys_are_refused,
        garbage_addresses_are_refused,
        bad_grants_are_refused,
        regions_in_use_stay;
    grants:
        revoke_keeps_its_promise,
        a_new_generation_replaces_the_old,
        what_was_not_granted_is_out_of_reach,
        a_late_read_is_misbehaviour;
    lanes:
        every_lane_ends_once,
        close_from_both_sides_at_once,
        closing_early_is_an_end_too,
        nothing_is_written_after_down,
        nothing_is_read_after_down,
        wrong_tags_never_come_up,
        connecting_to_nobody_ends,
        a_dropped_port_ends_its_lanes,
        many_lanes_between_two_ports,
        several_peers_on_one_port,
        a_new_lane_follows_a_closed_one;
    sleep:
        a_sleeper_is_woken,
        an_idle_port_lets_its_owner_sleep;
    threads:
        bytes_are_there_across_threads;
    death:
        a_killed_peer_ends_its_lane,
        a_stopped_peer_writes_nothing_after_down,
        a_peer_killed_while_closing;
}
