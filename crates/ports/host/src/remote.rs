//! The peer's regions on one lane: announced, attached, retired.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossdock_transport::{Attached, DownCause, Error, RemoteId, Result};

use crate::address::{Key, Secret};
use crate::descriptors::Descriptors;
use crate::doorbell::{Doorbell, RingOnDrop};
use crate::link::Link;
use crate::medium::{Attaching, HeardOffer, Landmark, Medium};
use crate::message::{Described, Message};
use crate::numbered::Numbered;
use crate::peer::Peer;
use crate::underway::Underway;

/// All that the peer has announced on a lane and not retired.
pub(crate) struct RemoteRegions<M: Medium> {
    /// Which port the peer is; its keys say so too. The name lies in the peer's memory.
    port: Landmark,
    descriptors: Descriptors,
    announced: Numbered<Remote<M>>,
    /// Retired while moves that use them were on their way.
    leaving: Vec<(u32, M::Remote)>,
    /// The last number that was ever announced.
    last: Option<u32>,
}

/// One region of the peer.
struct Remote<M: Medium> {
    bytes: u64,
    state: RemoteState<M>,
}

/// How far a region is usable here.
enum RemoteState<M: Medium> {
    Offered(M::Offered),
    /// Ops can use it.
    Attached(M::Remote),
}

/// Ties a lane's connection to the mappings that were made on it: whoever lets go last tells the peer.
///
/// The lane itself lets go when it has stopped, and as a rule it is the last, and has sent `Closed` before. If the port
/// is dropped while a caller still stores through a [`Mapping`](crossdock_transport::Mapping), the end of that mapping
/// sends it.
#[derive(Debug)]
pub(crate) struct Leash {
    pub(crate) link: Link,
    /// `Closed` has been sent, or nobody is left to read it.
    pub(crate) told: bool,
    /// A forked child holds copies of all this, but no mapping, and must not speak for its parent.
    owner: u32,
}

/// Keeps a lane from its end. Its fields are dropped in this order: the leash knows it, then the port is woken to see it.
#[derive(Debug)]
pub struct Tether {
    _leash: Arc<Leash>,
    _bell: RingOnDrop,
}

impl Leash {
    pub(crate) fn new(link: Link) -> Self {
        Self { link, told: false, owner: std::process::id() }
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        if !self.told && self.owner == std::process::id() {
            self.link.make_room();
            // If even this fails, the peer waits for the end of this process instead.
            let _ = self.link.send(&Message::Closed, &[]);
        }
    }
}

impl Tether {
    pub(crate) fn new(leash: &Arc<Leash>, bell: &Arc<Doorbell>) -> Self {
        Self { _leash: leash.clone(), _bell: RingOnDrop(bell.clone()) }
    }
}

impl<M: Medium> RemoteRegions<M> {
    pub(crate) fn new(port: Secret, port_address: u64, descriptors: Descriptors) -> Self {
        Self {
            port: Landmark { address: port_address, bytes: port },
            descriptors,
            announced: Numbered::default(),
            leaving: Vec::new(),
            last: None,
        }
    }

    /// A region for an op, and its length.
    pub(crate) fn get(&self, id: RemoteId) -> Result<(u64, &M::Remote)> {
        match self.announced.get(id.0) {
            Some(Remote { bytes, state: RemoteState::Attached(remote) }) => Ok((*bytes, remote)),
            _ => Err(Error::UnknownRegion { side: "remote", region: id.0 }),
        }
    }

    /// Takes an announcement in, or says why the lane ends by it.
    pub(crate) fn announce(
        &mut self,
        number: u32,
        bytes: u64,
        offer: Described,
        fd: Option<OwnedFd>,
        medium: &mut M,
    ) -> std::result::Result<(), DownCause> {
        let misbehaved = |what| Err(DownCause::PeerMisbehaved { what });
        if self.last.is_some_and(|last| number <= last) {
            return misbehaved("announced a region twice");
        }
        if self.announced.len() >= MAX_REGIONS {
            return misbehaved("announced more regions than a port can have");
        }
        if bytes == 0 || isize::try_from(bytes).is_err() {
            return misbehaved("announced a region of an impossible length");
        }
        let descriptor = match fd {
            Some(fd) => Some(self.descriptors.keep(fd).ok_or(DownCause::LimitReached {
                what: "descriptors of peers' regions",
                limit: self.descriptors.limit() as u64,
            })?),
            None => None,
        };
        let heard = HeardOffer { form: offer.form, payload: offer.payload, descriptor };
        let state = RemoteState::Offered(medium.hear(heard, bytes)?);
        self.last = Some(number);
        self.announced.push(number, Remote { bytes, state });
        Ok(())
    }

    /// Forgets a region, once no move uses it. Mappings that the caller holds stay until it drops them.
    pub(crate) fn retire(&mut self, number: u32, underway: &Underway) {
        if let Some(Remote { state: RemoteState::Attached(remote), .. }) = self.announced.remove(number)
            && underway.uses_remote(number)
        {
            self.leaving.push((number, remote));
        }
    }

    /// Lets go of retired regions that no move uses any more.
    pub(crate) fn release_retired(&mut self, underway: &Underway) {
        self.leaving.retain(|(number, _)| underway.uses_remote(*number));
    }

    /// Forgets all regions. No move uses any.
    pub(crate) fn clear(&mut self) {
        self.announced.clear();
        self.leaving.clear();
    }

    /// Whether the announcement of a key's region has come, or is not to be waited for.
    pub(crate) fn has_heard_of(&self, key: &Key) -> bool {
        key.port != self.port.bytes || self.last.is_some_and(|last| key.region <= last)
    }

    /// Makes a region usable in ops.
    pub(crate) fn attach(
        &mut self,
        key: &Key,
        peer: &Peer,
        leash: &Arc<Leash>,
        bell: &Arc<Doorbell>,
        medium: &mut M,
    ) -> Result<Attached> {
        if key.port != self.port.bytes {
            return Err(Error::BadKey {
                reason: "of another port than the one at the other end of this lane",
            });
        }
        if !self.has_heard_of(key) {
            return Err(Error::NotYet);
        }
        let Remote { bytes, state } = self
            .announced
            .get_mut(key.region)
            .ok_or(Error::BadKey { reason: "its region has been deregistered" })?;
        if *bytes != key.bytes {
            return Err(Error::BadKey { reason: "its length is not that of the announced region" });
        }
        if let RemoteState::Offered(offered) = state {
            let attaching = Attaching { bytes: *bytes, peer, landmark: self.port, leash, bell };
            *state = RemoteState::Attached(medium.attach(offered, &attaching)?);
        }
        let mapping = match state {
            RemoteState::Attached(remote) => M::mapping(remote),
            RemoteState::Offered(_) => None,
        };
        Ok(Attached { id: RemoteId(key.region), bytes: *bytes, mapping })
    }
}

/// The most regions that a port can have at a time.
pub(crate) const MAX_REGIONS: usize = 4096;
