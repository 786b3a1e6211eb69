//! A trace as serving meets it: requests come at their times, wait for pages, and share those of their prefixes. Both
//! sides replay the same requests, each over its own pool.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crossdock::{
    Ended, Memory, PagePool, PageSet, Peer, ReceiveRequest, Received, Receiving, SendRequest, Sending,
    ServeRequest, Serving, now_ns,
};
use crossdock_benches::Content;
use crossdock_replay::{Admitted, Arrival, Block, Dock, DockStats, Lease, Next, Waiting, watermarks};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::options::OpName;
use crate::setup::{Side, WAIT};

/// What is replayed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Orders {
    pub arrivals: Vec<Arrival>,
    pub first_room: u64,
    /// Fill the pages, and check them.
    pub verify: bool,
    pub salt: u64,
}

/// What one side of a replay has seen, in its requests' order.
#[derive(Debug, Serialize, Deserialize)]
pub struct Told {
    pub rooms: Vec<RoomTimes>,
    pub wrong_pages: u64,
    pub dock: DockStats,
    /// How the first room ended that was not delivered, as this side saw it.
    pub failure: Option<String>,
}

/// When things happened to a room on one side, from the start of the replay.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct RoomTimes {
    /// It had its pages.
    pub admitted_ns: u64,
    /// It could be sent, or received.
    pub ready_ns: u64,
    pub end_ns: u64,
    pub held_tokens: u32,
    pub how: How,
}

/// How a room ended on one side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    /// The side that has the bytes says whether they were delivered: of the other one this is nothing but its end.
    Delivered,
    /// It has waited too long for pages.
    Expired,
    #[default]
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Prefill,
    Decode,
}

/// One side's part.
pub struct Replay<'a> {
    side: &'a mut Side,
    peer: Peer,
    role: Role,
    orders: Orders,
    dock: Dock<usize>,
    /// Those that move.
    open: Vec<Open>,
    /// Those whose pages are filled, or checked.
    at_hand: BTreeMap<usize, Lease>,
    hands: Option<Hands>,
    told: Told,
    over: usize,
}

/// A room that moves.
struct Open {
    at: usize,
    lease: Lease,
    room: Room,
}

enum Room {
    Sending(Sending),
    Serving(Serving),
    Receiving(Box<Receiving>, Option<Received>),
}

impl<'a> Replay<'a> {
    pub fn new(side: &'a mut Side, peer: Peer, role: Role, orders: Orders) -> Result<Self, Error> {
        let pages = side.setup.pool_pages;
        // Of the same memory as the side's own pool, which has all of its pages at home meanwhile.
        let pool = PagePool::new(pages, watermarks(pages));
        let hands = match orders.verify {
            true => Some(Hands::start(side, role, &orders)?),
            false => None,
        };
        let rooms = vec![RoomTimes::default(); orders.arrivals.len()];
        let told = Told { rooms, wrong_pages: 0, dock: DockStats::default(), failure: None };
        let dock = Dock::new(pool, orders.arrivals.len());
        Ok(Self {
            side,
            peer,
            role,
            orders,
            dock,
            open: Vec::new(),
            at_hand: BTreeMap::new(),
            hands,
            told,
            over: 0,
        })
    }

    /// Until the last request is over.
    pub fn run(mut self, start_ns: u64) -> Result<Told, Error> {
        let mut coming: VecDeque<usize> = (0..self.orders.arrivals.len()).collect();
        while self.over < self.orders.arrivals.len() {
            self.arrive(&mut coming, start_ns)?;
            // However many move, what waits beside them waits only until its deadline.
            while let Some(expired) = self.dock.expired(now_ns()) {
                self.take(expired, start_ns)?;
            }
            while self.open.len() + self.at_hand.len() < MOST_OPEN
                && let Some(next) = self.dock.next(now_ns())
            {
                self.take(next, start_ns)?;
            }
            while let Some(done) = self.hands.as_ref().and_then(Hands::done) {
                self.put_down(done, start_ns)?;
            }
            let nap = self.nap(&coming, start_ns);
            let Self { side, open, .. } = &mut self;
            if let Some((at, delivered)) = side.driver.within(nap, || ended(open))? {
                self.end(at, delivered, start_ns)?;
            }
        }
        self.told.dock = self.dock.stats();
        self.dock.clear();
        Ok(self.told)
    }

    fn arrive(&mut self, coming: &mut VecDeque<usize>, start_ns: u64) -> Result<(), Error> {
        while let Some(&at) = coming.front()
            && let arrival = &self.orders.arrivals[at]
            && start_ns + arrival.at_ns <= now_ns()
        {
            coming.pop_front();
            let at_ns = start_ns + arrival.at_ns;
            let waiting = Waiting {
                tag: at,
                pages: arrival.pages(self.side.setup.page_tokens),
                blocks: arrival.blocks.clone(),
                at_ns,
                until_ns: at_ns + WAIT.as_nanos() as u64,
            };
            self.dock.arrive(waiting)?;
        }
        Ok(())
    }

    /// How long nothing happens but what the node tells of.
    fn nap(&self, coming: &VecDeque<usize>, start_ns: u64) -> Duration {
        // Pages come home, and hands finish, without waking this thread.
        let is_watched = self.dock.waiting() == 0 && self.at_hand.is_empty();
        let most = if is_watched { Duration::from_millis(20) } else { Duration::from_micros(500) };
        let next_ns = coming.front().map(|&at| start_ns + self.orders.arrivals[at].at_ns);
        next_ns.map_or(most, |next_ns| most.min(Duration::from_nanos(next_ns.saturating_sub(now_ns()))))
    }

    fn take(&mut self, next: Next<usize>, start_ns: u64) -> Result<(), Error> {
        let Admitted { tag: at, lease, pages, .. } = match next {
            Next::Admitted(admitted) => admitted,
            Next::Expired { tag: at, .. } => {
                let end_ns = now_ns() - start_ns;
                self.told.rooms[at] = RoomTimes { end_ns, how: How::Expired, ..RoomTimes::default() };
                self.over += 1;
                return Ok(());
            }
        };
        let now = now_ns() - start_ns;
        let held_tokens = lease.held_pages() * self.side.setup.page_tokens;
        self.told.rooms[at] =
            RoomTimes { admitted_ns: now, ready_ns: now, held_tokens, ..RoomTimes::default() };
        match (self.role, &self.hands) {
            (Role::Prefill, Some(hands)) => {
                hands.give(Job { at, first: lease.held_pages(), here: Vec::new(), pages })?;
                self.at_hand.insert(at, lease);
                Ok(())
            }
            (Role::Prefill, None) => self.send(at, lease, pages),
            (Role::Decode, _) => self.receive(at, lease, pages),
        }
    }

    fn send(&mut self, at: usize, mut lease: Lease, pages: PageSet) -> Result<(), Error> {
        self.dock.keep(&mut lease, pages, now_ns());
        let pages = lease.pages().expect("a request has a page of its own");
        let (room, tokens) = (self.orders.first_room + at as u64, self.orders.arrivals[at].tokens);
        let (use_count, deadline) = (0, WAIT);
        let room = match self.side.setup.op {
            OpName::Write => {
                let request = SendRequest { room, use_count, tokens, pages, deadline };
                let mut sending = self.side.driver.handle().open(request)?;
                sending.send_layers(0..self.side.setup.layers)?;
                sending.finish(Vec::new())?;
                Room::Sending(sending)
            }
            OpName::Read => {
                let aux = Vec::new();
                let request = ServeRequest { room, use_count, tokens, pages, aux, deadline };
                Room::Serving(self.side.driver.handle().serve(request)?)
            }
        };
        self.open.push(Open { at, lease, room });
        Ok(())
    }

    fn receive(&mut self, at: usize, lease: Lease, pages: PageSet) -> Result<(), Error> {
        let request = ReceiveRequest {
            peer: self.peer,
            room: self.orders.first_room + at as u64,
            use_count: 0,
            tokens: self.orders.arrivals[at].tokens,
            skip_tokens: lease.held_pages() * self.side.setup.page_tokens,
            pages,
            deadline: WAIT,
        };
        let receiving = match self.side.setup.op {
            OpName::Write => self.side.driver.handle().receive(request)?,
            OpName::Read => self.side.driver.handle().fetch(request)?,
        };
        self.open.push(Open { at, lease, room: Room::Receiving(Box::new(receiving), None) });
        Ok(())
    }

    /// A room of this place is over.
    fn end(&mut self, place: usize, delivered: Option<PageSet>, start_ns: u64) -> Result<(), Error> {
        let Open { at, lease, room } = self.open.swap_remove(place);
        let times = &mut self.told.rooms[at];
        times.end_ns = now_ns() - start_ns;
        times.how = match &room {
            Room::Receiving(_, received) => {
                let ended = &received.as_ref().expect("its end was told").ended;
                if ended.is_delivered() {
                    How::Delivered
                } else {
                    let room = self.orders.first_room + at as u64;
                    self.told.failure.get_or_insert_with(|| format!("room {room}: {ended}"));
                    How::Failed
                }
            }
            Room::Sending(_) | Room::Serving(_) => How::Delivered,
        };
        match (delivered, &self.hands) {
            (Some(pages), Some(hands)) => {
                hands.give(Job { at, first: lease.held_pages(), here: lease.ids(), pages })?;
                self.at_hand.insert(at, lease);
            }
            (Some(pages), None) => self.hold(at, lease, pages),
            (None, _) => {
                self.dock.release(lease, now_ns());
                self.over += 1;
            }
        }
        Ok(())
    }

    /// A request is decoded, and keeps its pages so long.
    fn hold(&mut self, at: usize, mut lease: Lease, pages: PageSet) {
        self.dock.keep(&mut lease, pages, now_ns());
        self.dock.release_at(lease, now_ns() + self.orders.arrivals[at].decode_ns);
        self.over += 1;
    }

    /// Pages have been filled, or checked.
    fn put_down(&mut self, done: Done, start_ns: u64) -> Result<(), Error> {
        let Done { at, pages, wrong_pages } = done;
        self.told.wrong_pages += wrong_pages;
        let lease = self.at_hand.remove(&at).expect("it was given with these pages");
        match self.role {
            Role::Prefill => {
                self.told.rooms[at].ready_ns = now_ns() - start_ns;
                self.send(at, lease, pages)
            }
            Role::Decode => {
                self.hold(at, lease, pages);
                Ok(())
            }
        }
    }
}

/// One of the rooms that is over, and its pages if they were delivered here.
fn ended(open: &mut [Open]) -> Result<Option<(usize, Option<PageSet>)>, Error> {
    for (place, Open { room, .. }) in open.iter_mut().enumerate() {
        let over: Option<Ended> = match room {
            Room::Sending(sending) => sending.end.poll()?,
            Room::Serving(serving) => serving.end.poll()?,
            Room::Receiving(receiving, received) => {
                if received.is_none() {
                    *received = receiving.end.poll()?;
                }
                match received {
                    Some(received) if received.ended.is_delivered() => {
                        if let Some(pages) = receiving.pages.poll()? {
                            return Ok(Some((place, Some(pages))));
                        }
                        None
                    }
                    Some(received) => Some(received.ended.clone()),
                    None => None,
                }
            }
        };
        if over.is_some() {
            return Ok(Some((place, None)));
        }
    }
    Ok(None)
}

/// A thread that fills and checks pages, so that this does not hold up what is measured.
struct Hands {
    jobs: Sender<Job>,
    done: Receiver<Done>,
}

struct Job {
    at: usize,
    /// The number of the first of the pages in its request.
    first: u32,
    /// The pages before them, which were held.
    here: Vec<u32>,
    pages: PageSet,
}

struct Done {
    at: usize,
    pages: PageSet,
    wrong_pages: u64,
}

impl Hands {
    fn start(side: &Side, role: Role, orders: &Orders) -> Result<Self, Error> {
        let (jobs, taken) = channel::<Job>();
        let (tell, done) = channel();
        let bytes = Bytes {
            content: side.setup.content(orders.salt),
            memory: side.memory.clone(),
            token_bytes: side.setup.token_bytes,
            page_tokens: side.setup.page_tokens,
            first_room: orders.first_room,
            arrivals: orders.arrivals.clone(),
        };
        // Not more jobs than open rooms wait here.
        let work = move || {
            for Job { at, first, here, pages } in taken {
                let wrong_pages = match role {
                    Role::Prefill => bytes.each(at, first, pages.ids(), Content::write_named),
                    Role::Decode => {
                        bytes.each(at, 0, &here, Content::check_named)
                            + bytes.each(at, first, pages.ids(), Content::check_named)
                    }
                };
                if tell.send(Done { at, pages, wrong_pages }).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("hands".into())
            .spawn(work)
            .map_err(Error::io("starting a thread"))?;
        Ok(Self { jobs, done })
    }

    fn give(&self, job: Job) -> Result<(), Error> {
        self.jobs.send(job).map_err(|_| Error::HandsGone)
    }

    fn done(&self) -> Option<Done> {
        self.done.try_recv().ok()
    }
}

/// What the pages of the requests hold.
struct Bytes {
    content: Content,
    memory: Memory,
    token_bytes: u64,
    page_tokens: u32,
    first_room: u64,
    arrivals: Vec<Arrival>,
}

impl Bytes {
    /// Does something with each of the pages and the name of what they hold; sums up.
    fn each(
        &self,
        at: usize,
        first: u32,
        pages: &[u32],
        mut what: impl FnMut(&Content, &Memory, u32, u64, usize) -> u64,
    ) -> u64 {
        let arrival = &self.arrivals[at];
        let mut sum = 0;
        for (number, &page) in (first..).zip(pages) {
            let tokens = (arrival.tokens - number * self.page_tokens).min(self.page_tokens);
            let bytes = (u64::from(tokens) * self.token_bytes) as usize;
            let name = name(&arrival.blocks, number)
                .unwrap_or((self.first_room + at as u64) << 20 ^ u64::from(number));
            sum += what(&self.content, &self.memory, page, name, bytes);
        }
        sum
    }
}

/// What a page holds that others may share: named by its block, and its place in it.
fn name(blocks: &[Block], number: u32) -> Option<u64> {
    let mut before = 0;
    let block = blocks.iter().find(|block| {
        before += block.pages;
        number < before
    })?;
    Some(1 << 63 | block.id << 16 ^ u64::from(before - number))
}

/// Rooms that move at once.
const MOST_OPEN: usize = 64;
