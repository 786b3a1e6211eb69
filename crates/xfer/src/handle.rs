//! How threads of the user's talk to the progress loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_queue::ArrayQueue;
use crossdock_engine::{AddressCheck, Doorbell, OsError, Promise, Ticket, ticket};
use crossdock_memory::Memory;

use crate::{RegisterError, Transfer, TransferError};

/// A user's end: cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
}

/// Why a call was not taken. Nothing of it was done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotTaken {
    /// The queue to the progress loop is full.
    #[error("the queue to the progress loop is full")]
    Busy,
    /// The progress loop has ended.
    #[error("the endpoint has stopped")]
    Stopped,
    /// There can be no peer at this address.
    #[error("bad address {address:?}: {reason}")]
    BadAddress {
        /// The address.
        address: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// A transfer that is under way.
#[derive(Debug)]
#[must_use = "the end of the transfer is told here"]
pub struct Transferring {
    /// How it ended, by its deadline.
    pub end: Ticket<Result<(), TransferError>>,
    /// Told when no op of it can touch this side's memory any more: with the end, if that is good; after a fault later.
    pub quiet: Ticket<()>,
}

/// What the progress loop is asked for.
pub(crate) enum Command {
    Register(Memory, Promise<Result<(), RegisterError>>),
    Unregister(u64, Promise<Result<(), RegisterError>>),
    Transfer(Transfer, Promises),
}

/// What a transfer has promised.
pub(crate) struct Promises {
    pub end: Promise<Result<(), TransferError>>,
    pub quiet: Promise<()>,
}

pub(crate) struct Shared {
    commands: ArrayQueue<Command>,
    pub doorbell: Doorbell,
    is_stopping: AtomicBool,
    /// Nothing is taken any more.
    is_stopped: AtomicBool,
    address_check: AddressCheck,
}

impl Shared {
    pub fn new(most_commands: usize, address_check: AddressCheck) -> Result<Shared, OsError> {
        Ok(Shared {
            commands: ArrayQueue::new(most_commands.max(1)),
            doorbell: Doorbell::new()?,
            is_stopping: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
            address_check,
        })
    }

    pub fn next(&self) -> Option<Command> {
        self.commands.pop()
    }

    pub fn is_idle(&self) -> bool {
        self.commands.is_empty() && !self.is_stopping()
    }

    pub fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    /// The loop ends: whoever has asked finds the promise dropped.
    pub fn close(&self) {
        self.is_stopped.store(true, Ordering::SeqCst);
        while self.commands.pop().is_some() {}
    }

    fn push(&self, command: Command) -> Result<(), NotTaken> {
        if self.is_stopped.load(Ordering::SeqCst) {
            return Err(NotTaken::Stopped);
        }
        self.commands.push(command).map_err(|_| NotTaken::Busy)?;
        self.doorbell.ring();
        // It may have ended since the first look, and emptied the queue before.
        if self.is_stopped.load(Ordering::SeqCst) {
            self.close();
        }
        Ok(())
    }
}

impl Handle {
    /// Registers memory: peers that connect from now on may write and read it, and transfers may name its addresses.
    pub fn register(&self, memory: Memory) -> Result<Ticket<Result<(), RegisterError>>, NotTaken> {
        let (told, ticket) = ticket();
        self.shared.push(Command::Register(memory, told))?;
        Ok(ticket)
    }

    /// Takes memory back, by the address at which it begins: told when nobody can reach it through this endpoint any more.
    /// Sessions of peers that were told of it end and begin anew without it.
    pub fn unregister(&self, address: u64) -> Result<Ticket<Result<(), RegisterError>>, NotTaken> {
        let (told, ticket) = ticket();
        self.shared.push(Command::Unregister(address, told))?;
        Ok(ticket)
    }

    /// Begins to move bytes.
    pub fn transfer(&self, transfer: Transfer) -> Result<Transferring, NotTaken> {
        if let Err(reason) = (self.shared.address_check)(&transfer.peer) {
            return Err(NotTaken::BadAddress { address: transfer.peer, reason });
        }
        let ((end, end_ticket), (quiet, quiet_ticket)) = (ticket(), ticket());
        self.shared.push(Command::Transfer(transfer, Promises { end, quiet }))?;
        Ok(Transferring { end: end_ticket, quiet: quiet_ticket })
    }

    /// Asks the progress loop to end. Transfers that are under way find their tickets abandoned.
    pub fn stop(&self) {
        self.shared.is_stopping.store(true, Ordering::Release);
        self.shared.doorbell.ring();
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handle({} commands queued)", self.shared.commands.len())
    }
}
