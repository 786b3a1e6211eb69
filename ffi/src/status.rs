//! What a call answers: a status, and for a failed one words that a person can use.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytemuck::Zeroable;
use crossdock::experts::{Advice, EpError, GroupError, MeetError};
use crossdock::{
    Abandoned, CacheLayoutError, Error, MemoryError, NotTaken, PoolError, PortError, SendError, TicketError,
    WorkerError,
};

use crate::sized::{self, Sized as _};

/// What a call answers: one of the `CROSSDOCK_OK` to `CROSSDOCK_LOST` below. Later libraries may answer others.
pub type crossdock_status = i32;

/// Done.
pub const CROSSDOCK_OK: crossdock_status = 0;
/// No error: it is not over yet; ask again, or wait.
pub const CROSSDOCK_PENDING: crossdock_status = 1;
/// No object, or none of this kind, has this handle: it was closed, or never made.
pub const CROSSDOCK_BAD_HANDLE: crossdock_status = 2;
/// An argument is NULL, too large, not UTF-8 or makes no sense; the message says which.
pub const CROSSDOCK_BAD_ARGUMENT: crossdock_status = 3;
/// A structure's `size` is none that it ever had, or a field is set that this library does not know.
pub const CROSSDOCK_BAD_SIZE: crossdock_status = 4;
/// The buffer is too small; the length that was given back says what is needed. Nothing was written to it.
pub const CROSSDOCK_BUFFER_TOO_SMALL: crossdock_status = 5;
/// The time was over first. Nothing has changed; ask again, or wait on.
pub const CROSSDOCK_TIMED_OUT: crossdock_status = 6;
/// A limit is reached: the same call may succeed later.
pub const CROSSDOCK_BUSY: crossdock_status = 7;
/// The node has been closed, or its progress has ended.
pub const CROSSDOCK_STOPPED: crossdock_status = 8;
/// This machine, or this library, cannot do it.
pub const CROSSDOCK_UNSUPPORTED: crossdock_status = 9;
/// Memory could not be allocated or used.
pub const CROSSDOCK_MEMORY: crossdock_status = 10;
/// The layout is not sound.
pub const CROSSDOCK_LAYOUT: crossdock_status = 11;
/// A port could not be opened, or does not take the memory.
pub const CROSSDOCK_PORT: crossdock_status = 12;
/// An address cannot be bound, or dialed.
pub const CROSSDOCK_NETWORK: crossdock_status = 13;
/// The operating system refused a call.
pub const CROSSDOCK_OS: crossdock_status = 14;
/// Too few pages are free.
pub const CROSSDOCK_EXHAUSTED: crossdock_status = 15;
/// A page is held by somebody already.
pub const CROSSDOCK_PAGE_IN_USE: crossdock_status = 16;
/// A peer can still write a page, though its room is over.
pub const CROSSDOCK_PAGE_IN_QUARANTINE: crossdock_status = 17;
/// What held the page was dropped while a peer could write it: it never comes back.
pub const CROSSDOCK_PAGE_ABANDONED: crossdock_status = 18;
/// There is no such page.
pub const CROSSDOCK_PAGE_OUT_OF_RANGE: crossdock_status = 19;
/// A page is named twice.
pub const CROSSDOCK_DUPLICATE_PAGE: crossdock_status = 20;
/// The call does not fit to the object: another kind of room, another kind of pool.
pub const CROSSDOCK_WRONG_KIND: crossdock_status = 21;
/// Tokens are sent in order, each once; and so are the halves of a step.
pub const CROSSDOCK_OUT_OF_ORDER: crossdock_status = 22;
/// A room is finished when everything has been sent, and not before.
pub const CROSSDOCK_NOT_COMPLETE: crossdock_status = 23;
/// The room has been finished, or what was asked for has been taken.
pub const CROSSDOCK_FINISHED: crossdock_status = 24;
/// The node is gone before anything has proven that nobody writes the pages: they stay out of their pool.
pub const CROSSDOCK_ABANDONED: crossdock_status = 25;
/// The peer was refused, or will never be reached.
pub const CROSSDOCK_REFUSED: crossdock_status = 26;
/// The registry could not be asked, or refused.
pub const CROSSDOCK_REGISTRY: crossdock_status = 27;
/// A fault of the library: please report it with its message.
pub const CROSSDOCK_INTERNAL: crossdock_status = 28;
/// The ranks of a group made different calls: the step is not what any of them meant.
pub const CROSSDOCK_MISMATCH: crossdock_status = 29;
/// This rank's step is lost; the next one can be made.
pub const CROSSDOCK_STEP_LOST: crossdock_status = 30;
/// This rank is no longer part of its group, or too few ranks are left: meet anew.
pub const CROSSDOCK_GROUP_LOST: crossdock_status = 31;
/// Some ranks of a group were not met in time.
pub const CROSSDOCK_NOT_MET: crossdock_status = 32;
/// Bytes that a transfer names are not in one memory that is registered.
pub const CROSSDOCK_UNKNOWN_ADDRESS: crossdock_status = 33;
/// The deadline of a transfer passed.
pub const CROSSDOCK_LATE: crossdock_status = 34;
/// The session with the peer ended; it may come back.
pub const CROSSDOCK_LOST: crossdock_status = 35;

/// What went wrong in the last call of this thread that failed.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_error {
    /// Its size: `sizeof(crossdock_error)`, set by the caller.
    pub size: usize,
    /// What the call answered.
    pub status: crossdock_status,
    /// 1 if the same call may succeed later, else 0.
    pub is_retryable: u32,
    /// What went wrong, with the values that it is about. Never NULL; valid until the next call of this thread fails.
    pub message: *const c_char,
    /// What can be done about it; empty where there is nothing more to say. Never NULL, valid as long as the message.
    pub advice: *const c_char,
}

// SAFETY: `size` is its first field, and zeros are no error at all.
unsafe impl sized::Sized for crossdock_error {
    const FIRST_BYTES: usize = 32;
}

/// Tells what went wrong in the last call of this thread that failed; `CROSSDOCK_OK` in `status` if none has. What
/// `CROSSDOCK_PENDING`, `CROSSDOCK_TIMED_OUT` and `CROSSDOCK_BUFFER_TOO_SMALL` say needs no words: they leave it as it was.
///
/// # Safety
/// `error` points to a structure that says its size, or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_last_error(error: *mut crossdock_error) -> crossdock_status {
    LAST.with_borrow(|last| {
        let mut told = crossdock_error { message: c"".as_ptr(), advice: c"".as_ptr(), ..Zeroable::zeroed() };
        if let Some(last) = last {
            told.status = last.status;
            told.is_retryable = last.is_retryable.into();
            told.message = last.message.as_ptr();
            told.advice = last.advice.as_ptr();
        }
        // SAFETY: as the caller promises.
        match unsafe { crossdock_error::write(error, told) } {
            Ok(()) => CROSSDOCK_OK,
            // The words of the failed call before are worth more than those about this one.
            Err(fault) => fault.status,
        }
    })
}

/// The name of a status, as `"CROSSDOCK_BUSY"`; `"?"` for none. Never NULL, valid for ever.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_status_name(status: crossdock_status) -> *const c_char {
    let name = match status {
        CROSSDOCK_OK => c"CROSSDOCK_OK",
        CROSSDOCK_PENDING => c"CROSSDOCK_PENDING",
        CROSSDOCK_BAD_HANDLE => c"CROSSDOCK_BAD_HANDLE",
        CROSSDOCK_BAD_ARGUMENT => c"CROSSDOCK_BAD_ARGUMENT",
        CROSSDOCK_BAD_SIZE => c"CROSSDOCK_BAD_SIZE",
        CROSSDOCK_BUFFER_TOO_SMALL => c"CROSSDOCK_BUFFER_TOO_SMALL",
        CROSSDOCK_TIMED_OUT => c"CROSSDOCK_TIMED_OUT",
        CROSSDOCK_BUSY => c"CROSSDOCK_BUSY",
        CROSSDOCK_STOPPED => c"CROSSDOCK_STOPPED",
        CROSSDOCK_UNSUPPORTED => c"CROSSDOCK_UNSUPPORTED",
        CROSSDOCK_MEMORY => c"CROSSDOCK_MEMORY",
        CROSSDOCK_LAYOUT => c"CROSSDOCK_LAYOUT",
        CROSSDOCK_PORT => c"CROSSDOCK_PORT",
        CROSSDOCK_NETWORK => c"CROSSDOCK_NETWORK",
        CROSSDOCK_OS => c"CROSSDOCK_OS",
        CROSSDOCK_EXHAUSTED => c"CROSSDOCK_EXHAUSTED",
        CROSSDOCK_PAGE_IN_USE => c"CROSSDOCK_PAGE_IN_USE",
        CROSSDOCK_PAGE_IN_QUARANTINE => c"CROSSDOCK_PAGE_IN_QUARANTINE",
        CROSSDOCK_PAGE_ABANDONED => c"CROSSDOCK_PAGE_ABANDONED",
        CROSSDOCK_PAGE_OUT_OF_RANGE => c"CROSSDOCK_PAGE_OUT_OF_RANGE",
        CROSSDOCK_DUPLICATE_PAGE => c"CROSSDOCK_DUPLICATE_PAGE",
        CROSSDOCK_WRONG_KIND => c"CROSSDOCK_WRONG_KIND",
        CROSSDOCK_OUT_OF_ORDER => c"CROSSDOCK_OUT_OF_ORDER",
        CROSSDOCK_NOT_COMPLETE => c"CROSSDOCK_NOT_COMPLETE",
        CROSSDOCK_FINISHED => c"CROSSDOCK_FINISHED",
        CROSSDOCK_ABANDONED => c"CROSSDOCK_ABANDONED",
        CROSSDOCK_REFUSED => c"CROSSDOCK_REFUSED",
        CROSSDOCK_REGISTRY => c"CROSSDOCK_REGISTRY",
        CROSSDOCK_INTERNAL => c"CROSSDOCK_INTERNAL",
        CROSSDOCK_MISMATCH => c"CROSSDOCK_MISMATCH",
        CROSSDOCK_STEP_LOST => c"CROSSDOCK_STEP_LOST",
        CROSSDOCK_GROUP_LOST => c"CROSSDOCK_GROUP_LOST",
        CROSSDOCK_NOT_MET => c"CROSSDOCK_NOT_MET",
        CROSSDOCK_UNKNOWN_ADDRESS => c"CROSSDOCK_UNKNOWN_ADDRESS",
        CROSSDOCK_LATE => c"CROSSDOCK_LATE",
        CROSSDOCK_LOST => c"CROSSDOCK_LOST",
        _ => c"?",
    };
    name.as_ptr()
}

/// Why a call fails.
#[derive(Debug)]
pub(crate) struct Fault {
    pub status: crossdock_status,
    message: String,
    advice: &'static str,
    is_retryable: bool,
}

impl Fault {
    pub fn new(status: crossdock_status, message: impl Into<String>, advice: &'static str) -> Fault {
        Fault { status, message: message.into(), advice, is_retryable: false }
    }

    pub fn argument(message: impl Into<String>) -> Fault {
        Fault::new(CROSSDOCK_BAD_ARGUMENT, message, "")
    }

    /// An answer that is no error.
    pub fn quiet(status: crossdock_status) -> Fault {
        debug_assert!(is_quiet(status));
        Fault::new(status, "", "")
    }

    pub fn retryable(mut self, is_retryable: bool) -> Fault {
        self.is_retryable = is_retryable;
        self
    }
}

fn is_quiet(status: crossdock_status) -> bool {
    matches!(status, CROSSDOCK_PENDING | CROSSDOCK_TIMED_OUT | CROSSDOCK_BUFFER_TOO_SMALL)
}

struct Last {
    status: crossdock_status,
    is_retryable: bool,
    message: CString,
    advice: CString,
}

thread_local! {
    static LAST: RefCell<Option<Last>> = const { RefCell::new(None) };
}

/// Runs one call of the ABI: its fault becomes a status, with the words kept for [`crossdock_last_error`], and a panic
/// becomes [`CROSSDOCK_INTERNAL`].
pub(crate) fn call(body: impl FnOnce() -> Result<(), Fault>) -> crossdock_status {
    let fault = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return CROSSDOCK_OK,
        Ok(Err(fault)) => fault,
        Err(panic) => {
            let words = panic.downcast_ref::<&str>().map(|words| words.to_string());
            let words = words.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            // What a panic carries may panic when it is dropped.
            std::mem::forget(panic);
            Fault::new(CROSSDOCK_INTERNAL, words, "report it, with this message")
        }
    };
    if !is_quiet(fault.status) {
        let words = |text: &str| CString::new(text.replace('\0', "␀")).unwrap_or_default();
        // Not where the thread is ending and its own values are gone already.
        let _ = LAST.try_with(|last| {
            *last.borrow_mut() = Some(Last {
                status: fault.status,
                is_retryable: fault.is_retryable,
                message: words(&fault.message),
                advice: words(fault.advice),
            });
        });
    }
    fault.status
}

impl From<NotTaken> for Fault {
    fn from(error: NotTaken) -> Fault {
        let status = match error {
            NotTaken::Busy => CROSSDOCK_BUSY,
            NotTaken::Stopped => CROSSDOCK_STOPPED,
            NotTaken::BadAddress { .. } | NotTaken::NotDialed => CROSSDOCK_BAD_ARGUMENT,
            _ => CROSSDOCK_INTERNAL,
        };
        Fault::new(status, error.to_string(), error.advice()).retryable(error.is_retryable())
    }
}

impl From<SendError> for Fault {
    fn from(error: SendError) -> Fault {
        let status = match &error {
            SendError::NotTaken(why) => return why.clone().into(),
            SendError::OutOfOrder { .. } => CROSSDOCK_OUT_OF_ORDER,
            SendError::OutOfRange { .. } | SendError::NoSuchPool { .. } | SendError::TooManyPages { .. } => {
                CROSSDOCK_BAD_ARGUMENT
            }
            SendError::NotComplete { .. } => CROSSDOCK_NOT_COMPLETE,
            SendError::Finished => CROSSDOCK_FINISHED,
            _ => CROSSDOCK_INTERNAL,
        };
        Fault::new(status, error.to_string(), error.advice())
    }
}

impl From<PoolError> for Fault {
    fn from(error: PoolError) -> Fault {
        let (status, advice) = match &error {
            PoolError::Exhausted { .. } => (CROSSDOCK_EXHAUSTED, "wait for pages, or evict"),
            PoolError::PageInQuarantine { .. } => {
                (CROSSDOCK_PAGE_IN_QUARANTINE, "choose another page until this one has come home")
            }
            PoolError::PageAbandoned { .. } => (CROSSDOCK_PAGE_ABANDONED, "never hand out this page again"),
            PoolError::PageInUse { .. } => {
                (CROSSDOCK_PAGE_IN_USE, "hand out a page again only when its room has given it back")
            }
            PoolError::DuplicatePage { .. } => (CROSSDOCK_DUPLICATE_PAGE, "name each page once"),
            PoolError::PageOutOfRange { .. } => {
                (CROSSDOCK_PAGE_OUT_OF_RANGE, "make the pool over as many pages as the layout has")
            }
            PoolError::PoolIsExternal => (CROSSDOCK_WRONG_KIND, "name the pages that a room is to use"),
            PoolError::PoolAllocates => (CROSSDOCK_WRONG_KIND, "take pages from this pool"),
            _ => (CROSSDOCK_INTERNAL, ""),
        };
        let is_retryable = matches!(error, PoolError::Exhausted { .. } | PoolError::PageInQuarantine { .. });
        Fault::new(status, error.to_string(), advice).retryable(is_retryable)
    }
}

impl From<MemoryError> for Fault {
    fn from(error: MemoryError) -> Fault {
        let error = Error::Memory(error);
        Fault::new(CROSSDOCK_MEMORY, error.to_string(), error.advice()).retryable(error.is_retryable())
    }
}

impl From<CacheLayoutError> for Fault {
    fn from(error: CacheLayoutError) -> Fault {
        Fault::new(CROSSDOCK_LAYOUT, error.to_string(), "correct what the message names")
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        let status = match &error {
            Error::Memory(_) | Error::Gpu(_) => CROSSDOCK_MEMORY,
            Error::Cuda(_) => CROSSDOCK_PORT,
            Error::NoPort | Error::ShortKey { .. } | Error::BadLimit { .. } => CROSSDOCK_BAD_ARGUMENT,
            Error::Port { error: PortError::Unsupported { .. }, .. }
            | Error::Worker(WorkerError::Register(PortError::Unsupported { .. })) => CROSSDOCK_UNSUPPORTED,
            Error::Port { .. } | Error::Worker(WorkerError::Register(_)) => CROSSDOCK_PORT,
            Error::Network(_) => CROSSDOCK_NETWORK,
            Error::Worker(WorkerError::NoMemory { .. } | WorkerError::TooSmall { .. }) => {
                CROSSDOCK_BAD_ARGUMENT
            }
            Error::Worker(_) | Error::Os(_) | Error::Random { .. } | Error::Thread(_) => CROSSDOCK_OS,
            _ => CROSSDOCK_INTERNAL,
        };
        Fault::new(status, error.to_string(), error.advice()).retryable(error.is_retryable())
    }
}

impl From<Abandoned> for Fault {
    fn from(_: Abandoned) -> Fault {
        Fault::new(
            CROSSDOCK_ABANDONED,
            "the node is gone, and what was waited for with it",
            "open a new node",
        )
    }
}

impl From<TicketError> for Fault {
    fn from(error: TicketError) -> Fault {
        match error {
            TicketError::TimedOut => Fault::quiet(CROSSDOCK_TIMED_OUT),
            TicketError::Abandoned(abandoned) => abandoned.into(),
        }
    }
}

impl From<EpError> for Fault {
    fn from(error: EpError) -> Fault {
        let (status, advice) = match error.advice() {
            Advice::CorrectArguments => (CROSSDOCK_BAD_ARGUMENT, "correct what the message names"),
            Advice::NextStep => (CROSSDOCK_STEP_LOST, "go on with the next step"),
            Advice::AlignCalls => (CROSSDOCK_MISMATCH, "make the same calls in the same order on all ranks"),
            _ => (CROSSDOCK_GROUP_LOST, "close the group, and meet anew"),
        };
        Fault::new(status, error.to_string(), advice).retryable(error.is_retryable())
    }
}

impl From<GroupError> for Fault {
    fn from(error: GroupError) -> Fault {
        Fault::new(CROSSDOCK_BAD_ARGUMENT, error.to_string(), "correct what the message names")
    }
}

impl From<MeetError> for Fault {
    fn from(error: MeetError) -> Fault {
        let (status, advice) = match &error {
            MeetError::Group(_) | MeetError::Addresses { .. } => {
                (CROSSDOCK_BAD_ARGUMENT, "correct what the message names")
            }
            MeetError::Late { .. } => {
                (CROSSDOCK_NOT_MET, "start the ranks that are missing, or allow more time")
            }
            MeetError::Refused { .. } | MeetError::WrongRank { .. } => {
                (CROSSDOCK_REFUSED, "give all ranks the same configuration, key and addresses")
            }
            MeetError::Register(_) => (CROSSDOCK_PORT, "look at what the port says of the memory"),
            _ => (CROSSDOCK_OS, "look at what the system says of the call"),
        };
        Fault::new(status, error.to_string(), advice).retryable(status == CROSSDOCK_NOT_MET)
    }
}
