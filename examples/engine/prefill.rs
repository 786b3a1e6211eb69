//! The prefill side: computes prompts, layer by layer, and pushes each layer as soon as it is there.

use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use crossdock::{PageRef, ScatterRequest, Sending};
use crossdock_bootstrap::Client;

use crate::cache::{Paged, Prefixes, Side, Worker};
use crate::model::{Hidden, LAYERS, Model};
use crate::{GRACE, Job, Problem, Report};

/// All ranks of the prefill side. A real engine has a process for each; here one thread plays them all.
pub struct Prefill<'a> {
    model: &'a Model,
    here: &'a Side,
    decode: &'a Side,
    ranks: Vec<Worker>,
    prefixes: Prefixes,
}

/// A request's rooms, one on each rank.
struct Rooms {
    job: Job,
    cached: u32,
    sending: Vec<Sending>,
}

impl<'a> Prefill<'a> {
    pub fn open(
        model: &'a Model,
        [here, decode]: [&'a Side; 2],
        key: &[u8],
        registry: &Client,
    ) -> Result<Self, Problem> {
        let open = |rank| Worker::open(here, rank, key, registry);
        let ranks = (0..here.parallelism.ranks()).map(open).collect::<Result<_, _>>()?;
        Ok(Self { model, here, decode, ranks, prefixes: Prefixes::new(here.page_tokens) })
    }

    /// Computes whatever the router sends, until it hangs up. Returns what each rank has sent, in bytes.
    pub fn run(mut self, jobs: &Receiver<Job>, reports: &Sender<Report>) -> Result<Vec<u64>, Problem> {
        let mut rooms = Vec::new();
        for job in jobs {
            match self.begin(&job)? {
                Some((cached, sending)) => rooms.push(Rooms { job, cached, sending }),
                // Nobody waits for it any more. The decode side has ended it by itself.
                None => {
                    reports.send(Report { room: job.room, cached: 0, ended: None, tokens: Vec::new() })?
                }
            }
        }
        for Rooms { job, cached, sending } in rooms {
            for mut room in sending {
                let ended = room.end.wait_until(job.deadline + GRACE)?;
                let ended = Some(ended);
                reports.send(Report { room: job.room, cached, ended, tokens: Vec::new() })?;
            }
        }
        drop(self.prefixes);
        let mut sent = Vec::new();
        for worker in &self.ranks {
            worker.wait_until_all_free(Instant::now() + GRACE)?;
            let stats = worker.node.handle().stats()?.wait_until(Instant::now() + GRACE)?;
            sent.push(stats.rails.iter().map(|rail| rail.written_bytes).sum());
        }
        Ok(sent)
    }

    /// Opens a room on each rank, computes the prompt, and sends its keys and values. `None` if there is no time left.
    fn begin(&mut self, job: &Job) -> Result<Option<(u32, Vec<Sending>)>, Problem> {
        let Some(pages) = self.pages_for(job)? else { return Ok(None) };
        let tokens = job.prompt.len() as u32;
        let cached = pages.cached;
        let mut sending = Vec::new();
        for (rank, (worker, pages)) in (0..).zip(self.ranks.iter().zip(&pages.of_rank)) {
            sending.push(worker.node.handle().open(ScatterRequest {
                ranks: self.here.parallelism.destinations(&self.decode.parallelism, rank, job.room)?,
                room: job.room,
                use_count: 0,
                tokens,
                pages: vec![pages.clone()],
                deadline: job.time_left(),
            })?);
        }
        // A cached prefix is not computed again. It is sent, for as far as the decode side has not got it.
        let mut hidden: Vec<Hidden> =
            (cached..tokens).map(|token| self.model.embed(job.prompt[token as usize], token)).collect();
        for layer in 0..LAYERS {
            let ranks = self.ranks.iter().zip(&pages.of_rank);
            let mut caches: Vec<Paged<'_>> =
                ranks.map(|(worker, pages)| Paged { worker, pages: pages.ids() }).collect();
            self.model.layer(layer, cached, &mut hidden, &mut caches);
            if job.hangs_up_after == Some(layer) {
                // On one rank: the decode side ends the request, and tells the others.
                sending[0].cancel()?;
                return Ok(Some((cached, sending)));
            }
            // Travels while the next layer is computed.
            sending.iter_mut().try_for_each(|room| room.send_layers(layer..layer + 1))?;
        }
        let first = self.model.next(hidden.last().ok_or("an empty prompt")?);
        for (rank, room) in sending.iter_mut().enumerate() {
            // The decode side needs to hear the first token once.
            room.finish(if rank == 0 { first.to_le_bytes().to_vec() } else { Vec::new() })?;
        }
        self.prefixes.remember(&job.prompt, &pages.of_rank);
        Ok(Some((cached, sending)))
    }

    /// Pages on each rank, those of a known prefix first. Waits for them: rooms that end give theirs back.
    fn pages_for(&mut self, job: &Job) -> Result<Option<Pages>, Problem> {
        while !job.time_left().is_zero() {
            if let Some(pages) = self.try_pages_for(job)? {
                return Ok(Some(pages));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(None)
    }

    fn try_pages_for(&mut self, job: &Job) -> Result<Option<Pages>, Problem> {
        let mut known = self.prefixes.longest(&job.prompt).unwrap_or_default().into_iter();
        let known_pages = known.as_slice().first().map_or(0, PageRef::len) as u32;
        let mut of_rank = Vec::new();
        for worker in &self.ranks {
            let more = worker.layout.pages_for(job.prompt.len() as u32) - known_pages;
            let Some(new) = worker.take(more, &mut self.prefixes)? else { return Ok(None) };
            // Shared before they are filled: only this thread fills them, and each layer before it is sent.
            let mut pages = new.share();
            if let Some(mut prefix) = known.next() {
                prefix.join(pages).map_err(|_| "pages of another pool")?;
                pages = prefix;
            }
            of_rank.push(pages);
        }
        Ok(Some(Pages { of_rank, cached: known_pages * self.here.page_tokens }))
    }
}

struct Pages {
    of_rank: Vec<PageRef>,
    /// So many tokens are in them already.
    cached: u32,
}
