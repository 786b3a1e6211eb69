//! The moves of a lane that are on their way, and what is to be told when they are over.

use std::collections::VecDeque;

use crossdock_transport::{LocalId, RemoteId, Token};

use crate::medium::Ticket;

/// Moves of one lane, oldest first, and what goes with them; immediates and tokens of ops that had nothing to wait for
/// stand here too, behind moves that were posted before. Its room is made when the first move gets a ticket: a lane
/// whose moves end at once never has any.
pub(crate) struct Underway {
    moves: VecDeque<Pending>,
    limit: usize,
    immediates: u32,
    tokens: usize,
}

/// Something that waits for a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pending {
    pub(crate) ticket: Ticket,
    regions: (LocalId, RemoteId),
    pub(crate) imm: Option<u32>,
    pub(crate) token: Option<Token>,
}

impl Underway {
    /// So many at a time, and one at least.
    pub(crate) fn new(limit: usize) -> Self {
        Self { moves: VecDeque::new(), limit: limit.max(1), immediates: 0, tokens: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.moves.is_empty()
    }

    /// Whether nothing may be added.
    pub(crate) fn is_full(&self) -> bool {
        self.moves.len() >= self.limit
    }

    /// Immediates that the ring must have room for.
    pub(crate) fn immediates(&self) -> u32 {
        self.immediates
    }

    /// Tokens that will be reported.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    pub(crate) fn uses_local(&self, region: LocalId) -> bool {
        self.moves.iter().any(|pending| pending.regions.0 == region)
    }

    pub(crate) fn uses_remote(&self, number: u32) -> bool {
        self.moves.iter().any(|pending| pending.regions.1 == RemoteId(number))
    }

    /// The local regions that are used, some perhaps more than once.
    pub(crate) fn locals(&self) -> impl Iterator<Item = LocalId> {
        self.moves.iter().map(|pending| pending.regions.0)
    }

    /// Adds a move; it [is not full](Underway::is_full).
    pub(crate) fn push(
        &mut self,
        ticket: Ticket,
        regions: (LocalId, RemoteId),
        imm: Option<u32>,
        token: Option<Token>,
    ) {
        debug_assert!(!self.is_full(), "the poster has asked");
        if self.moves.capacity() == 0 {
            self.moves.reserve_exact(self.limit);
        }
        self.immediates += u32::from(imm.is_some());
        self.tokens += usize::from(token.is_some());
        match self.moves.back_mut() {
            // The parts of one op stand as one move, and what nobody is told of goes with what follows.
            Some(last) if last.imm.is_none() && last.token.is_none() && last.regions == regions => {
                *last = Pending { ticket: last.ticket.max(ticket), regions, imm, token };
            }
            _ => self.moves.push_back(Pending { ticket, regions, imm, token }),
        }
    }

    /// Adds an op that has nothing to wait for but what is here already, which is something, though
    /// [not too much](Underway::is_full).
    pub(crate) fn follow(&mut self, imm: Option<u32>, token: Option<Token>) {
        if let Some(last) = self.moves.back()
            && (imm.is_some() || token.is_some())
        {
            self.push(last.ticket, last.regions, imm, token);
        }
    }

    /// Takes out the oldest move if its ticket is over.
    pub(crate) fn take_over(&mut self, until: Ticket) -> Option<Pending> {
        if self.moves.front()?.ticket > until {
            return None;
        }
        let over = self.moves.pop_front()?;
        self.immediates -= u32::from(over.imm.is_some());
        self.tokens -= usize::from(over.token.is_some());
        Some(over)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGIONS: (LocalId, RemoteId) = (LocalId(1), RemoteId(2));

    #[test]
    fn parts_of_an_op_are_one_move() {
        let mut underway = Underway::new(2);
        for ticket in 1..10 {
            underway.push(Ticket(ticket), REGIONS, None, None);
        }
        assert!(!underway.is_full());
        underway.push(Ticket(10), REGIONS, Some(7), Some(Token(8)));
        assert_eq!((underway.immediates(), underway.tokens(), underway.take_over(Ticket(9))), (1, 1, None));
        let whole = underway.take_over(Ticket(10)).expect("it is over");
        assert_eq!((whole.ticket, whole.imm, whole.token), (Ticket(10), Some(7), Some(Token(8))));
        assert!(underway.is_empty() && underway.immediates() == 0 && underway.tokens() == 0);
    }

    #[test]
    fn what_has_nothing_to_wait_for_waits_for_what_was_before() {
        let mut underway = Underway::new(4);
        underway.push(Ticket(5), REGIONS, Some(1), None);
        underway.follow(Some(2), None);
        underway.follow(None, None);
        underway.follow(None, Some(Token(3)));
        assert_eq!((underway.immediates(), underway.tokens(), underway.is_full()), (2, 1, false));
        assert_eq!(underway.take_over(Ticket(4)), None);
        let told = std::iter::from_fn(|| underway.take_over(Ticket(5)));
        let told: Vec<_> = told.map(|over| (over.imm, over.token)).collect();
        assert_eq!(told, [(Some(1), None), (Some(2), None), (None, Some(Token(3)))]);
    }

    #[test]
    fn regions_are_used_until_their_last_move_is_over() {
        let mut underway = Underway::new(4);
        underway.push(Ticket(1), REGIONS, None, None);
        underway.push(Ticket(2), (LocalId(1), RemoteId(3)), None, None);
        assert!(underway.uses_local(LocalId(1)) && !underway.uses_local(LocalId(2)));
        assert!(underway.uses_remote(2) && underway.uses_remote(3));
        assert!(underway.take_over(Ticket(1)).is_some());
        assert!(underway.uses_local(LocalId(1)) && !underway.uses_remote(2) && underway.uses_remote(3));
        assert!(underway.take_over(Ticket(2)).is_some() && underway.is_empty());
    }
}
