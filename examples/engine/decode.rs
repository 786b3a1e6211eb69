//! The decode side: asks for the prompts' keys and values, and continues all prompts that are there, a token a step.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use crossdock::{Ended, GatherRequest, PageRef, PageSet, Peer, Receiving};
use crossdock_bootstrap::{Client, Query};

use crate::cache::{Paged, Prefixes, Side, Worker};
use crate::model::{Hidden, LAYERS, Model};
use crate::{GRACE, Job, NEW_TOKENS, Problem, Report};

/// The one rank of the decode side.
pub struct Decode<'a> {
    model: &'a Model,
    here: &'a Side,
    prefill: &'a Side,
    worker: Worker,
    /// The prefill ranks, in their order.
    peers: Vec<Peer>,
    prefixes: Prefixes,
    waiting: VecDeque<Job>,
    arriving: Vec<Arriving>,
    batch: Vec<Sequence>,
    batches: Vec<usize>,
}

/// A request whose keys and values are on their way.
struct Arriving {
    job: Job,
    room: Receiving,
    prefix: Option<PageRef>,
    cached: u32,
    /// For what comes after the prompt.
    spare: PageSet,
}

/// A request that is being continued.
struct Sequence {
    job: Job,
    cached: u32,
    ended: Ended,
    tokens: Vec<u32>,
    pages: Vec<u32>,
    /// What `pages` names: the prompt's whole pages, which others may share, and those that are still written.
    _holds: (PageRef, PageSet),
}

impl<'a> Decode<'a> {
    /// Waits for the prefill ranks to be found, and dials them.
    pub fn open(
        model: &'a Model,
        [here, prefill]: [&'a Side; 2],
        key: &[u8],
        registry: &Client,
    ) -> Result<Self, Problem> {
        let worker = Worker::open(here, 0, key, registry)?;
        let query = Query::all().role(prefill.role.clone());
        let ranks = prefill.parallelism.ranks() as usize;
        let mut found = registry.wait_for(&query, ranks, Duration::from_secs(20))?;
        found.sort_by_key(|listed| listed.worker.member.as_ref().map(|member| member.ranks().tp_rank));
        let mut peers = Vec::new();
        for listed in found {
            let (peer, mut up) = worker.node.handle().connect(listed.worker.address.socket().to_string())?;
            up.wait_until(Instant::now() + GRACE)??;
            peers.push(peer);
        }
        let prefixes = Prefixes::new(here.page_tokens);
        let (waiting, arriving, batch, batches) = Default::default();
        Ok(Self { model, here, prefill, worker, peers, prefixes, waiting, arriving, batch, batches })
    }

    /// Serves whatever the router sends, until it hangs up and everything is served. Returns how many requests each step
    /// continued.
    pub fn run(mut self, jobs: &Receiver<Job>, reports: &Sender<Report>) -> Result<Vec<usize>, Problem> {
        loop {
            // With nothing to compute, look at the rooms again soon. An engine that has an event loop adds the node's
            // `event_fd` to it instead.
            let patience = Duration::from_micros(if self.batch.is_empty() { 200 } else { 0 });
            let is_over = match jobs.recv_timeout(patience) {
                Ok(job) => {
                    self.waiting.push_back(job);
                    false
                }
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => true,
            };
            self.admit()?;
            self.welcome(reports)?;
            self.step();
            self.retire(reports)?;
            if is_over && self.waiting.is_empty() && self.arriving.is_empty() && self.batch.is_empty() {
                break;
            }
        }
        drop(self.prefixes);
        self.worker.wait_until_all_free(Instant::now() + GRACE)?;
        Ok(self.batches)
    }

    /// Asks for the requests that there are pages for; the others wait until some have been retired.
    fn admit(&mut self) -> Result<(), Problem> {
        while let Some(job) = self.waiting.pop_front() {
            match self.ask(&job)? {
                Some(arriving) => self.arriving.push(arriving),
                None => {
                    self.waiting.push_front(job);
                    break;
                }
            }
        }
        Ok(())
    }

    fn ask(&mut self, job: &Job) -> Result<Option<Arriving>, Problem> {
        let tokens = job.prompt.len() as u32;
        let prefix = self.prefixes.longest(&job.prompt).and_then(|mut pages| pages.pop());
        let prefix_pages = prefix.as_ref().map_or(0, PageRef::len) as u32;
        let cached = prefix_pages * self.here.page_tokens;
        let (prompt_pages, all_pages) =
            (self.worker.layout.pages_for(tokens), self.worker.layout.pages_for(tokens + NEW_TOKENS));
        // All that it will ever need, so that it never has to stop half-way.
        let taken = self.worker.take(all_pages - prefix_pages, &mut self.prefixes)?;
        let Some(mut pages) = taken else { return Ok(None) };
        let spare = pages.split_off((prompt_pages - prefix_pages) as usize);
        let ranks = self.prefill.parallelism.sources(&self.here.parallelism, 0, job.room)?;
        let room = self.worker.node.handle().receive(GatherRequest {
            sources: ranks.into_iter().map(|rank| rank.at(self.peers[rank.rank as usize])).collect(),
            room: job.room,
            use_count: 0,
            tokens,
            skip_tokens: cached,
            layers: None,
            pages: vec![pages],
            deadline: job.time_left(),
        })?;
        Ok(Some(Arriving { job: job.clone(), room, prefix, cached, spare }))
    }

    /// Takes the requests that have arrived into the batch.
    fn welcome(&mut self, reports: &Sender<Report>) -> Result<(), Problem> {
        for mut arriving in std::mem::take(&mut self.arriving) {
            let Some(received) = arriving.room.end.poll()? else {
                self.arriving.push(arriving);
                continue;
            };
            let Arriving { job, mut room, prefix, cached, spare } = arriving;
            if !received.ended.is_delivered() {
                // Cancelled, too late, or a fault; the pages go back to the pool by themselves, when nobody can write
                // them any more.
                let ended = Some(received.ended);
                reports.send(Report { room: job.room, cached, ended, tokens: Vec::new() })?;
                continue;
            }
            let mut pages = room.pages.wait_until(Instant::now() + GRACE)?;
            let whole_pages = job.prompt.len() / self.here.page_tokens as usize;
            let mut open = pages.split_off(whole_pages - prefix.as_ref().map_or(0, PageRef::len));
            open.join(spare).map_err(|_| "pages of another pool")?;
            let shared = match prefix {
                Some(mut prefix) => {
                    prefix.join(pages.share()).map_err(|_| "pages of another pool")?;
                    prefix
                }
                None => pages.share(),
            };
            self.prefixes.remember(&job.prompt, std::slice::from_ref(&shared));
            let first = u32::from_le_bytes(received.aux.as_slice().try_into()?);
            self.batch.push(Sequence {
                job,
                cached,
                ended: received.ended,
                tokens: vec![first],
                pages: [shared.ids(), open.ids()].concat(),
                _holds: (shared, open),
            });
        }
        Ok(())
    }

    /// One more token for each request of the batch.
    fn step(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        self.batches.push(self.batch.len());
        let embed = |sequence: &Sequence| self.model.embed(sequence.last(), sequence.place());
        let mut hidden: Vec<Hidden> = self.batch.iter().map(embed).collect();
        for layer in 0..LAYERS {
            for (sequence, hidden) in self.batch.iter().zip(&mut hidden) {
                let cache = Paged { worker: &self.worker, pages: &sequence.pages };
                self.model.layer(layer, sequence.place(), std::slice::from_mut(hidden), &mut [cache]);
            }
        }
        for (sequence, hidden) in self.batch.iter_mut().zip(&hidden) {
            sequence.tokens.push(self.model.next(hidden));
        }
    }

    /// Lets the requests go that have all their tokens; their pages go with them.
    fn retire(&mut self, reports: &Sender<Report>) -> Result<(), Problem> {
        let is_done = |sequence: &mut Sequence| sequence.tokens.len() as u32 == NEW_TOKENS;
        for Sequence { job, cached, ended, tokens, .. } in self.batch.extract_if(.., is_done) {
            reports.send(Report { room: job.room, cached, ended: Some(ended), tokens })?;
        }
        Ok(())
    }
}

impl Sequence {
    /// The token whose successor is not known.
    fn last(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }

    /// Where that one stands.
    fn place(&self) -> u32 {
        (self.job.prompt.len() + self.tokens.len() - 1) as u32
    }
}
