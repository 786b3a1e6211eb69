//! One room, as it is planned for both sides, and as one side lives it.

use std::time::{Duration, Instant};

use crossdock::{
    End, Ended, Failure, NotTaken, PageSet, Peer, ReceiveRequest, Received, Receiving, Refusal, RoomRefusal,
    SendRequest, Sending, ServeRequest, Serving, SessionEnd, Ticket, TicketError,
};

use crate::{Bench, Chance};

/// Which side of a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Has the bytes.
    Prefill,
    /// Wants them.
    Decode,
}

/// What both sides do; each knows all of it from the same seed.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The router's number.
    pub room: u64,
    /// Tokens of the request.
    pub tokens: u32,
    /// Whether the decode side reads, or the prefill side writes.
    pub is_pull: bool,
    /// What the prefill side allows, and the decode side.
    pub deadlines: [Duration; 2],
    /// How much later than it could the prefill side begins, and the decode side.
    pub delays: [Duration; 2],
    /// Who gives it up, and when.
    pub cancelled: Option<(Side, Duration)>,
    /// Whether the prefill side of a push forgets to finish.
    pub is_forgotten: bool,
}

/// How a side's room ended.
#[derive(Debug)]
pub struct Heard {
    /// How.
    pub ended: Ended,
    /// How much after its deadline.
    pub late: Duration,
}

impl Plan {
    /// A plan that both sides can draw.
    pub fn draw(chance: &mut Chance, room: u64) -> Self {
        let mut ms = |range| Duration::from_millis(chance.draw(range));
        let deadlines = [ms(150..2_500), ms(150..2_500)];
        let delays = [ms(0..25), ms(0..25)];
        let cancelled_after = ms(0..60);
        let tokens = match chance.hits(1, 4) {
            true => chance.draw(1..17),
            false => chance.draw(1..u64::from(Bench::LONGEST_TOKENS) + 1),
        } as u32;
        let side = if chance.hits(1, 2) { Side::Prefill } else { Side::Decode };
        Self {
            room,
            tokens,
            is_pull: chance.hits(1, 2),
            deadlines,
            delays,
            cancelled: chance.hits(1, 12).then_some((side, cancelled_after)),
            is_forgotten: chance.hits(1, 30),
        }
    }

    /// A plan that has to succeed where nothing fails.
    pub fn fair(room: u64, is_pull: bool) -> Self {
        Self {
            room,
            tokens: Bench::LONGEST_TOKENS,
            is_pull,
            deadlines: [Duration::from_secs(5); 2],
            delays: [Duration::ZERO; 2],
            cancelled: None,
            is_forgotten: false,
        }
    }
}

/// How long after its deadline the end of a room may be told on a machine that has too much to do; what takes longer hangs.
const MARGIN: Duration = Duration::from_secs(20);

impl Bench {
    /// Lives one side of a room. An error is a rule that was broken.
    pub fn live(&self, plan: &Plan, side: Side, peer: Peer) -> Result<Heard, String> {
        std::thread::sleep(plan.delays[side as usize]);
        match side {
            Side::Prefill => self.prefill(plan),
            Side::Decode => self.decode(plan, peer),
        }
        .map_err(|wrong| format!("{side:?} of {plan:?}: {wrong}"))
    }

    fn prefill(&self, plan: &Plan) -> Result<Heard, String> {
        let Plan { room, tokens, .. } = *plan;
        let pages = self.pages(tokens)?;
        self.fill(pages.ids(), room, tokens);
        let (pages, deadline) = (pages.share(), plan.deadlines[Side::Prefill as usize]);
        let aux = room.to_le_bytes().to_vec();
        let begin = Instant::now();
        if plan.is_pull {
            let request = ServeRequest { room, use_count: 0, tokens, pages, aux, deadline };
            let serving = self.handle.serve(request).map_err(|error| error.to_string())?;
            let (ended, late, _) = plan.wait(Side::Prefill, serving, begin)?;
            return Ok(Heard { ended, late });
        }
        let request = SendRequest { room, use_count: 0, tokens, pages, deadline };
        let mut sending = self.handle.open(request).map_err(|error| error.to_string())?;
        for layer in self.layers() {
            sending.send_layers(layer..layer + 1).map_err(|error| error.to_string())?;
        }
        if !plan.is_forgotten {
            sending.finish(aux).map_err(|error| error.to_string())?;
        }
        let (ended, late, _) = plan.wait(Side::Prefill, sending, begin)?;
        Ok(Heard { ended, late })
    }

    fn decode(&self, plan: &Plan, peer: Peer) -> Result<Heard, String> {
        let Plan { room, tokens, .. } = *plan;
        let pages = self.pages(tokens)?;
        let deadline = plan.deadlines[Side::Decode as usize];
        let begin = Instant::now();
        let request = ReceiveRequest { peer, room, use_count: 0, tokens, skip_tokens: 0, pages, deadline };
        let handle = &self.handle;
        let receiving = if plan.is_pull { handle.fetch(request) } else { handle.receive(request) };
        let receiving = receiving.map_err(|error| error.to_string())?;
        let (received, late, mut receiving) = plan.wait(Side::Decode, receiving, begin)?;
        let home = receiving.pages.wait_until(Instant::now() + MARGIN);
        let home = home.map_err(|error| format!("ended {}, and the pages: {error}", received.ended))?;
        match received.ended.is_delivered() {
            true if received.aux != room.to_le_bytes() => {
                return Err(format!("wrong aux {:?}", received.aux));
            }
            true if !self.is_right(home.ids(), room, tokens) => return Err("wrong bytes".into()),
            true => {}
            false => self.guard(home.ids(), tokens)?,
        }
        Ok(Heard { ended: received.ended, late })
    }

    /// Pages that have come home are nobody else's: what is written into them stays.
    fn guard(&self, pages: &[u32], tokens: u32) -> Result<(), String> {
        self.fill(pages, GUARD, tokens);
        std::thread::sleep(Duration::from_millis(5));
        match self.is_right(pages, GUARD, tokens) {
            true => Ok(()),
            false => Err("somebody wrote into pages that had come home".into()),
        }
    }

    fn pages(&self, tokens: u32) -> Result<PageSet, String> {
        let pages = self.take(self.pages_for(tokens), MARGIN);
        pages.ok_or_else(|| format!("pages do not come home: {:?}", self.pool))
    }
}

/// No room has this number.
const GUARD: u64 = u64::MAX;

/// A side's room, whichever it is.
trait Room {
    type End;
    fn end(&mut self) -> &mut Ticket<Self::End>;
    fn cancel(&self) -> Result<(), NotTaken>;
}

macro_rules! rooms {
    ($($room:ty => $end:ty),*) => {$(
        impl Room for $room {
            type End = $end;
            fn end(&mut self) -> &mut Ticket<$end> {
                &mut self.end
            }
            fn cancel(&self) -> Result<(), NotTaken> {
                self.cancel()
            }
        }
    )*};
}

rooms!(Sending => Ended, Serving => Ended, Receiving => Received);

impl Plan {
    /// Waits for the end of a room, and cancels it if that is the plan. Also says how late it was.
    fn wait<R: Room>(
        &self,
        side: Side,
        mut room: R,
        begin: Instant,
    ) -> Result<(R::End, Duration, R), String> {
        let until = begin + self.deadlines[side as usize];
        if let Some((_, after)) = self.cancelled.filter(|(by, _)| *by == side) {
            match room.end().wait_until(begin + after) {
                Ok(end) => return Ok((end, Instant::now().saturating_duration_since(until), room)),
                Err(TicketError::TimedOut) => room.cancel().map_err(|error| error.to_string())?,
                Err(error) => return Err(error.to_string()),
            }
        }
        match room.end().wait_until(until + MARGIN) {
            Ok(end) => Ok((end, Instant::now().saturating_duration_since(until), room)),
            Err(TicketError::TimedOut) => Err("it hangs: no end after deadline and margin".into()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Heard {
    /// The end in one word, for tables.
    pub fn word(&self) -> &'static str {
        match &self.ended.end {
            End::Delivered => "delivered",
            End::Cancelled { .. } => "cancelled",
            End::Expired { .. } => "expired",
            End::PeerLost { .. } => "peer lost",
            End::Refused { .. } => "refused",
            _ => "failed",
        }
    }
}

/// Whether a room may end so where connections break, peers die and nodes are closed, but nobody breaks the protocol and
/// no byte is changed: nobody is blamed for what the network did.
pub fn is_typed(ended: &Ended) -> bool {
    match &ended.end {
        End::Delivered | End::Cancelled { .. } | End::Expired { .. } => true,
        End::PeerLost { cause: SessionEnd::Misbehaved { .. } | SessionEnd::Port(_) } => false,
        End::PeerLost { cause: SessionEnd::Refused { refusal, .. } } => is_passing(refusal),
        End::PeerLost { .. } => true,
        End::Refused { why: RoomRefusal::Handshake(refusal), .. } => is_passing(refusal),
        End::Refused { why, .. } => *why == RoomRefusal::Busy,
        End::Failed { cause, .. } => matches!(cause, Failure::Lane(_) | Failure::AtPeer),
        _ => false,
    }
}

/// What is refused when a session begins before the last one's end has been heard of.
fn is_passing(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Busy | Refusal::Duplicate)
}
