//! All links of a network, and what each waits for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::Shutdown;

use super::SocketOptions;
use super::link::{Answer, Flushed, Link, Read, Stage};
use crate::{LinkCause, LinkEvent, LinkId, NetworkError, OsError, SendError, now_ns};

/// The links by their numbers. Each is registered with epoll for as long as it is in the table.
#[derive(Debug)]
pub(super) struct Links {
    table: HashMap<u32, Link>,
    next: u32,
    deadlines: BTreeSet<(u64, u32)>,
    /// Accepted and silent so far, with the time of accepting.
    silent: BTreeMap<u32, u64>,
    /// Accepted and not trusted so far, those that are silent and those that are being closed included, with the time of
    /// accepting.
    strangers: BTreeMap<u32, u64>,
    /// Which have queued frames since the last flush.
    unflushed: Vec<u32>,
    /// Which have ended without epoll saying so.
    ended: Vec<u32>,
    epoll: OwnedFd,
}

type Take<'t> = dyn FnMut(LinkEvent<'_>) + 't;

impl Links {
    pub fn new(options: &SocketOptions) -> Result<Self, OsError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(OsError::of("epoll_create1"))?;
        Ok(Self {
            table: HashMap::with_capacity(options.max_links.min(1024)),
            next: 0,
            deadlines: BTreeSet::new(),
            silent: BTreeMap::new(),
            strangers: BTreeMap::new(),
            unflushed: Vec::new(),
            ended: Vec::new(),
            epoll,
        })
    }

    pub fn epoll(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// How many were accepted and have said nothing yet.
    pub fn silent(&self) -> usize {
        self.silent.len()
    }

    /// How many were accepted and are not trusted yet.
    pub fn strangers(&self) -> usize {
        self.strangers.len()
    }

    /// The peer has proven who it is.
    pub fn trust(&mut self, id: LinkId) {
        if let Some(link) = self.table.get_mut(&id.0) {
            link.trust();
            self.strangers.remove(&id.0);
        }
    }

    pub fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.deadlines.first().map(|&(deadline_ns, _)| deadline_ns)
    }

    pub fn insert(&mut self, link: Link) -> Result<LinkId, NetworkError> {
        while self.table.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = self.next;
        epoll::add(&self.epoll, &link.stream, EventData::new_u64(id.into()), link.interest)
            .map_err(OsError::of("epoll_ctl"))?;
        self.next = self.next.wrapping_add(1);
        if matches!(link.stage, Stage::Ended { .. }) {
            self.ended.push(id);
        }
        self.table.insert(id, link);
        Ok(LinkId(id))
    }

    /// Bounds the time until a dialled peer answers.
    pub fn expect_answer(&mut self, id: LinkId, now: u64, timeout: Duration) {
        self.set_deadline(id.0, Some(after(now, timeout)));
    }

    /// Bounds the time until an accepted peer says something.
    pub fn expect_first_frame(&mut self, id: LinkId, now: u64, timeout: Duration) {
        self.set_deadline(id.0, Some(after(now, timeout)));
        self.silent.insert(id.0, now);
        self.strangers.insert(id.0, now);
    }

    pub fn send(&mut self, id: LinkId, frame: &[u8]) -> Result<(), SendError> {
        let link = self.table.get_mut(&id.0).ok_or(SendError::Closed)?;
        match link.stage {
            Stage::Connecting | Stage::Open => {}
            Stage::Closing | Stage::SendFailed { .. } | Stage::Ended { .. } => return Err(SendError::Closed),
        }
        link.queue(frame).map_err(|_| SendError::Full)?;
        self.mark_unflushed(id.0);
        Ok(())
    }

    pub fn close(&mut self, id: LinkId, timeout: Duration) {
        let Some(link) = self.table.get_mut(&id.0) else { return };
        let ended = Stage::Ended { cause: LinkCause::ClosedHere };
        match link.stage {
            Stage::Closing | Stage::Ended { .. } => {}
            Stage::SendFailed { .. } => link.stage = ended,
            Stage::Connecting => {
                link.stage = ended;
                self.ended.push(id.0);
            }
            Stage::Open => {
                link.stage = Stage::Closing;
                self.silent.remove(&id.0);
                self.set_deadline(id.0, Some(after(now_ns(), timeout)));
                self.mark_unflushed(id.0);
            }
        }
    }

    /// Sends what was queued since the last time.
    pub fn flush(&mut self) {
        while let Some(id) = self.unflushed.pop() {
            if let Some(link) = self.table.get_mut(&id) {
                link.unflushed = false;
                self.flush_one(id);
            }
        }
    }

    /// Acts on what epoll says of a link.
    pub fn turn(
        &mut self,
        id: u32,
        flags: EventFlags,
        scratch: &mut [u8],
        budget_bytes: &mut usize,
        take: &mut Take<'_>,
    ) {
        // A link that has ended earlier in the same batch of events is not there any more.
        let Some(link) = self.table.get_mut(&id) else { return };
        match link.stage {
            Stage::Connecting => {
                if !self.look_for_answer(id, take) {
                    return;
                }
            }
            Stage::Open | Stage::Closing => {}
            // These are on the list of the ended.
            Stage::SendFailed { .. } | Stage::Ended { .. } => return,
        }
        if flags.contains(EventFlags::OUT) {
            self.flush_one(id);
        }
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            self.read_one(id, scratch, budget_bytes, take);
        }
    }

    /// Ends the links whose time is over.
    pub fn expire(&mut self, now: u64, scratch: &mut [u8], take: &mut Take<'_>) {
        while let Some(&(deadline_ns, id)) = self.deadlines.first()
            && deadline_ns <= now
        {
            self.set_deadline(id, None);
            self.end_unless_awake(id, scratch, take);
        }
    }

    /// Makes room among the silent: closes the oldest if it is older than `grace_ns`, and says otherwise when it
    /// will be. So a crowd of peers that all dial at once, and are about to speak, only waits; while peers that
    /// dial and never speak can keep others away only by dialling faster than those speak.
    pub fn drop_silent(
        &mut self,
        now: u64,
        grace_ns: u64,
        scratch: &mut [u8],
        take: &mut Take<'_>,
    ) -> Result<(), u64> {
        let Some((&oldest, &accepted_ns)) = self.silent.first_key_value() else { return Ok(()) };
        let safe_until_ns = accepted_ns + grace_ns;
        if now < safe_until_ns {
            return Err(safe_until_ns);
        }
        self.end_unless_awake(oldest, scratch, take);
        Ok(())
    }

    /// Makes room among those that have not proven who they are: closes the oldest if it is older than `grace_ns` and has
    /// said nothing new, and says otherwise when to try again.
    pub fn drop_stranger(
        &mut self,
        now: u64,
        grace_ns: u64,
        scratch: &mut [u8],
        take: &mut Take<'_>,
    ) -> Result<(), u64> {
        let Some((&oldest, &accepted_ns)) = self.strangers.first_key_value() else { return Ok(()) };
        let safe_until_ns = accepted_ns.saturating_add(grace_ns);
        if now < safe_until_ns {
            return Err(safe_until_ns);
        }
        // If this thread was held up, the proof may have come. A peer that has none has at most two frames to say.
        let mut unlimited_bytes = usize::MAX;
        if self.read_one(oldest, scratch, &mut unlimited_bytes, take) > 0 {
            return Err(now.saturating_add(LAST_CHANCE_NS));
        }
        let cause = match self.table.get(&oldest).map(|link| link.stage) {
            None => return Ok(()),
            Some(Stage::Closing | Stage::Ended { .. }) => LinkCause::ClosedHere,
            Some(_) => LinkCause::Unproven,
        };
        self.finish(oldest, cause, take);
        Ok(())
    }

    /// Says the end of links that have ended here.
    pub fn say_ended(&mut self, scratch: &mut [u8], budget_bytes: &mut usize, take: &mut Take<'_>) {
        for _ in 0..self.ended.len() {
            let Some(id) = self.ended.pop() else { return };
            let Some(link) = self.table.get_mut(&id) else { continue };
            match link.stage {
                Stage::Ended { cause } => self.finish(id, cause, take),
                Stage::SendFailed { cause } => {
                    while *budget_bytes > 0 {
                        let give = |bytes: &[u8]| take(LinkEvent::Frame { link: LinkId(id), bytes });
                        let Read::Bytes { bytes, .. } = link.read(scratch, give) else { break };
                        *budget_bytes = budget_bytes.saturating_sub(bytes);
                    }
                    if *budget_bytes > 0 {
                        self.finish(id, cause, take);
                    } else {
                        self.ended.push(id);
                        return;
                    }
                }
                Stage::Connecting | Stage::Open | Stage::Closing => {
                    unreachable!("only links that have ended are on this list")
                }
            }
        }
    }

    /// Gives a link whose time is over a last chance: if this thread was held up, the peer may have answered or
    /// spoken in time.
    fn end_unless_awake(&mut self, id: u32, scratch: &mut [u8], take: &mut Take<'_>) {
        let Some(stage) = self.table.get(&id).map(|link| link.stage) else { return };
        let cause = match stage {
            Stage::Connecting => {
                if self.look_for_answer(id, take) || !self.table.contains_key(&id) {
                    return;
                }
                LinkCause::ConnectTimedOut
            }
            Stage::Open => {
                let mut unlimited_bytes = usize::MAX;
                self.read_one(id, scratch, &mut unlimited_bytes, take);
                if !self.silent.contains_key(&id) {
                    return;
                }
                LinkCause::Silent
            }
            Stage::Closing => LinkCause::ClosedHere,
            Stage::SendFailed { .. } | Stage::Ended { .. } => return,
        };
        self.finish(id, cause, take);
    }

    /// Whether a dialled link is open now. If dialling has failed, the link has ended.
    fn look_for_answer(&mut self, id: u32, take: &mut Take<'_>) -> bool {
        let Some(link) = self.table.get_mut(&id) else { return false };
        match link.answer() {
            Answer::NotYet => false,
            Answer::Failed { cause } => {
                self.finish(id, cause, take);
                false
            }
            Answer::Connected => {
                link.stage = Stage::Open;
                self.set_deadline(id, None);
                take(LinkEvent::Opened { link: LinkId(id) });
                // Frames may have been queued while it was dialled, and epoll has to report something else now.
                self.flush_one(id);
                true
            }
        }
    }

    fn flush_one(&mut self, id: u32) {
        let Some(link) = self.table.get_mut(&id) else { return };
        if !matches!(link.stage, Stage::Open | Stage::Closing) {
            return;
        }
        let interest = match (link.flush(), link.stage) {
            (Flushed::All, Stage::Closing) => {
                link.end_sending();
                EventFlags::IN
            }
            (Flushed::All, _) => EventFlags::IN,
            (Flushed::Blocked, _) => EventFlags::IN | EventFlags::OUT,
            (Flushed::Failed { cause }, stage) => {
                link.stage = match stage {
                    Stage::Closing => Stage::Ended { cause: LinkCause::ClosedHere },
                    _ => Stage::SendFailed { cause },
                };
                self.ended.push(id);
                EventFlags::empty()
            }
        };
        if interest != link.interest {
            link.interest = interest;
            epoll::modify(&self.epoll, &link.stream, EventData::new_u64(id.into()), interest)
                .expect("a link is registered for as long as it is in the table");
        }
    }

    /// Reads once; how many frames it gave.
    fn read_one(
        &mut self,
        id: u32,
        scratch: &mut [u8],
        budget_bytes: &mut usize,
        take: &mut Take<'_>,
    ) -> usize {
        let Some(link) = self.table.get_mut(&id) else { return 0 };
        if !matches!(link.stage, Stage::Open | Stage::Closing) {
            return 0;
        }
        let read = link.read(scratch, |bytes| take(LinkEvent::Frame { link: LinkId(id), bytes }));
        let closing = link.stage == Stage::Closing;
        match read {
            Read::Nothing => {}
            Read::Bytes { bytes, frames } => {
                *budget_bytes = budget_bytes.saturating_sub(bytes);
                if frames > 0 && self.silent.remove(&id).is_some() {
                    self.set_deadline(id, None);
                }
                return frames;
            }
            Read::End { .. } if closing => self.finish(id, LinkCause::ClosedHere, take),
            Read::End { cause } => self.finish(id, cause, take),
        }
        0
    }

    fn finish(&mut self, id: u32, cause: LinkCause, take: &mut Take<'_>) {
        self.set_deadline(id, None);
        self.silent.remove(&id);
        self.strangers.remove(&id);
        let Some(link) = self.table.remove(&id) else { return };
        // Closing the descriptor would do both, were it not for children that the process has forked: they keep
        // the stream, so that epoll would go on reporting it and the peer would never see its end.
        let _ = epoll::delete(&self.epoll, &link.stream);
        let _ = rustix::net::shutdown(&link.stream, Shutdown::Both);
        drop(link);
        take(LinkEvent::Closed { link: LinkId(id), cause });
    }

    fn mark_unflushed(&mut self, id: u32) {
        if let Some(link) = self.table.get_mut(&id)
            && !link.unflushed
        {
            link.unflushed = true;
            self.unflushed.push(id);
        }
    }

    fn set_deadline(&mut self, id: u32, deadline_ns: Option<u64>) {
        let Some(link) = self.table.get_mut(&id) else { return };
        if let Some(before_ns) = link.deadline_ns.take() {
            self.deadlines.remove(&(before_ns, id));
        }
        if let Some(deadline_ns) = deadline_ns {
            link.deadline_ns = Some(deadline_ns);
            self.deadlines.insert((deadline_ns, id));
        }
    }
}

/// How long a stranger that has just spoken is left, so that what it said can be acted on.
const LAST_CHANCE_NS: u64 = 10_000_000;

fn after(now: u64, timeout: Duration) -> u64 {
    now.saturating_add(u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX))
}
