//! What a registry is asked, whichever keeps it: crossdock's own server or etcd.

use std::fmt;
use std::time::Duration;

use crate::error::Error;
use crate::exchange::Deadline;
use crate::group::{Counted, Group, GroupId};
use crate::query::{Query, Wait};
use crate::registry::Registered;
use crate::rooms::DpRank;
use crate::wire::{Health, Workers};
use crate::worker::{Incarnation, Listed, NodeId, Worker};

/// A registry, asked once: no call is repeated here, and none goes on past its deadline. A call with a wait keeps its
/// answer back, and gives what there is when the wait is over.
pub(crate) trait Backend: fmt::Debug + Send + Sync {
    /// As it stands in errors.
    fn name(&self) -> &str;
    fn health(&self, by: Deadline) -> Result<Health, Error>;
    fn register(&self, worker: &Worker, by: Deadline) -> Result<Registered, Error>;
    fn renew(&self, node: &NodeId, incarnation: Incarnation, by: Deadline) -> Result<(), Error>;
    fn deregister(&self, node: &NodeId, incarnation: Incarnation, by: Deadline) -> Result<(), Error>;
    fn worker(&self, node: &NodeId, by: Deadline) -> Result<Option<Listed>, Error>;
    fn find(&self, query: &Query, wait: Option<&Wait>, by: Deadline) -> Result<Workers, Error>;
    /// Waits for the group to be complete.
    fn group(&self, group: &GroupId, counted: Counted, wait: Duration, by: Deadline) -> Result<Group, Error>;
    fn groups(&self, counted: Counted, by: Deadline) -> Result<Vec<Group>, Error>;
    fn tell_rooms(
        &self,
        group: &GroupId,
        rooms: &[(u64, u32)],
        keep: Duration,
        by: Deadline,
    ) -> Result<(), Error>;
    /// Waits for all of the rooms to be known. Answers in the order of the rooms.
    fn dp_ranks(
        &self,
        group: &GroupId,
        rooms: &[u64],
        wait: Duration,
        by: Deadline,
    ) -> Result<Vec<DpRank>, Error>;
}
