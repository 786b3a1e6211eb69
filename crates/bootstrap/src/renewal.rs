//! When to register, when to renew, and what an answer means for a registration. No clock and no socket.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backoff::{Backoff, shortened};
use crate::error::Error;
use crate::problem::ErrorCode;
use crate::registration::Status;

/// The course of one registration.
#[derive(Debug)]
pub(crate) struct Renewal {
    interval: Duration,
    backoff: Backoff,
    /// For what time does not cure. Its pauses do not go by the time to live, which may be what is refused.
    refused: Backoff,
    /// Since when the server holds the worker, by the sending of the last request that it granted; `None`
    /// before the first and after the server has forgotten.
    renewed: Option<Instant>,
    attempts: u32,
    /// The worker says something else than what the server holds.
    changed: bool,
    /// The last call was a renewal, and it was granted: nobody has replaced the worker.
    confirmed: bool,
}

/// What to ask the server for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Hand in the whole registration.
    Register,
    /// Renew it. A worker that was replaced while it stood still must ask for this first, also when it has something
    /// new to say: registering would take the name back from its successor at a server that has forgotten both.
    Renew,
}

impl Renewal {
    pub(crate) fn new(ttl: Duration) -> Renewal {
        let interval = ttl / 3;
        let backoff = Backoff::new(
            RETRY_PAUSE_MIN.min(interval / 4).max(PAUSE_MIN),
            RETRY_PAUSE_MAX.min(interval).max(PAUSE_MIN),
        );
        let refused = Backoff::new(RETRY_PAUSE_MIN, RETRY_PAUSE_MAX);
        Renewal { interval, backoff, refused, renewed: None, attempts: 0, changed: false, confirmed: false }
    }

    pub(crate) fn call(&self) -> Call {
        let says_more = self.changed && self.confirmed;
        if self.renewed.is_some() && !says_more { Call::Renew } else { Call::Register }
    }

    /// The worker has something else to say of itself.
    pub(crate) fn changes(&mut self) {
        (self.changed, self.confirmed) = (true, false);
    }

    /// How long the next call may take: one that hangs must leave time for others before the time to live is
    /// over.
    pub(crate) fn call_time(&self) -> Duration {
        self.interval.max(CALL_TIME_MIN)
    }

    /// Takes in how a call ended: how the registration stands, and when to call again, if ever.
    pub(crate) fn done(
        &mut self,
        sent: Instant,
        now: Instant,
        result: Result<(), Error>,
        random: u64,
    ) -> (Status, Option<Instant>) {
        let call = self.call();
        self.confirmed = call == Call::Renew && result.is_ok();
        let error = match result {
            Ok(()) => {
                self.changed &= call == Call::Renew;
                self.renewed = Some(sent);
                self.attempts = 0;
                self.backoff.reset();
                self.refused.reset();
                let next = if self.changed { now } else { sent + shortened(self.interval, 0.85, random) };
                return (Status::Registered { renewed: sent }, Some(next));
            }
            Err(error) => error,
        };
        if error.code() == Some(ErrorCode::StaleIncarnation) {
            return (Status::Replaced { last: Arc::new(error) }, None);
        }
        if error.code() == Some(ErrorCode::UnknownWorker) && self.renewed.take().is_some() {
            self.attempts = 0;
            return (Status::Joining { attempts: 0, last: None }, Some(now));
        }
        self.attempts = self.attempts.saturating_add(1);
        let backoff = if error.retry_helps() { &mut self.backoff } else { &mut self.refused };
        let next = now + backoff.pause(random);
        let (attempts, last) = (self.attempts, Arc::new(error));
        let status = match self.renewed {
            Some(renewed) => Status::Retrying { renewed, attempts, last },
            None => Status::Joining { attempts, last: Some(last) },
        };
        (status, Some(next))
    }
}

const RETRY_PAUSE_MIN: Duration = Duration::from_millis(100);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Whatever the time to live.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const CALL_TIME_MIN: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Stage;
    use crate::problem::Problem;

    const TTL: Duration = Duration::from_secs(9);

    fn refused(error: ErrorCode) -> Result<(), Error> {
        let problem = Problem::new(error, "for this test");
        Err(Error::Refused { server: "s".to_owned(), status: error.status(), problem })
    }

    fn away() -> Result<(), Error> {
        let source = std::io::ErrorKind::ConnectionRefused.into();
        Err(Error::Unreachable { server: "s".to_owned(), stage: Stage::Connect, source })
    }

    #[test]
    fn it_renews_within_each_third_of_the_time_to_live() {
        let start = Instant::now();
        let mut renewal = Renewal::new(TTL);
        assert_eq!(renewal.call(), Call::Register);
        for random in [0, u64::MAX / 2, u64::MAX] {
            let later = start + Duration::from_millis(800);
            let (status, next) = renewal.done(start, later, Ok(()), random);
            assert!(matches!(status, Status::Registered { renewed } if renewed == start));
            let pause = next.unwrap() - start;
            assert!(pause > TTL / 4 && pause <= TTL / 3, "{pause:?}");
            assert_eq!(renewal.call(), Call::Renew);
        }
    }

    #[test]
    fn a_server_that_is_away_is_asked_with_growing_pauses_and_found_again() {
        let start = Instant::now();
        let mut renewal = Renewal::new(TTL);
        renewal.done(start, start, Ok(()), 0);
        let mut pauses = Vec::new();
        for attempt in 1..=8 {
            let (status, next) = renewal.done(start, start, away(), u64::MAX);
            assert!(matches!(status, Status::Retrying { renewed, attempts, .. }
                if renewed == start && attempts == attempt));
            pauses.push(next.unwrap() - start);
        }
        assert!(pauses.is_sorted() && pauses[0] == RETRY_PAUSE_MIN && pauses[7] == TTL / 3, "{pauses:?}");
        assert_eq!(renewal.call(), Call::Renew, "a worker that was replaced meanwhile must not take over");

        let (status, next) = renewal.done(start, start, refused(ErrorCode::UnknownWorker), 0);
        assert!(matches!(status, Status::Joining { attempts: 0, last: None }));
        assert_eq!((renewal.call(), next), (Call::Register, Some(start)));
        assert!(matches!(renewal.done(start, start, Ok(()), 0).0, Status::Registered { .. }));
        let (_, next) = renewal.done(start, start, away(), u64::MAX);
        assert_eq!(next.unwrap() - start, RETRY_PAUSE_MIN, "a success makes the pauses short again");
    }

    #[test]
    fn a_worker_that_says_something_new_makes_sure_first_that_it_was_not_replaced() {
        let start = Instant::now();
        let mut renewal = Renewal::new(TTL);
        renewal.done(start, start, Ok(()), 0);
        renewal.changes();
        assert_eq!(renewal.call(), Call::Renew);
        let (_, next) = renewal.done(start, start, Ok(()), 0);
        assert_eq!((renewal.call(), next), (Call::Register, Some(start)), "at once");
        // A failure leaves in doubt who holds the name.
        renewal.done(start, start, away(), 0);
        assert_eq!(renewal.call(), Call::Renew);
        renewal.done(start, start, Ok(()), 0);
        assert_eq!(renewal.call(), Call::Register);
        let (_, next) = renewal.done(start, start, Ok(()), u64::MAX);
        assert_eq!((renewal.call(), next), (Call::Renew, Some(start + TTL / 3)), "it is said");
        // At a server that has forgotten, there is nothing to make sure of.
        renewal.changes();
        renewal.done(start, start, refused(ErrorCode::UnknownWorker), 0);
        assert_eq!(renewal.call(), Call::Register);
        renewal.done(start, start, Ok(()), u64::MAX);
        assert_eq!(renewal.call(), Call::Renew);
    }

    #[test]
    fn a_short_time_to_live_is_no_reason_to_hammer() {
        let start = Instant::now();
        type Failure = fn() -> Result<(), Error>;
        let failures: [(Failure, Duration); 3] = [
            (away, PAUSE_MIN),
            (|| refused(ErrorCode::TtlOutOfRange), RETRY_PAUSE_MIN),
            (|| refused(ErrorCode::WrongToken), RETRY_PAUSE_MIN),
        ];
        for ttl_ms in [0, 1, 30] {
            for (failure, least) in failures {
                let mut renewal = Renewal::new(Duration::from_millis(ttl_ms));
                for _ in 0..20 {
                    let next = renewal.done(start, start, failure(), u64::MAX).1.unwrap();
                    assert!(next - start >= least, "{ttl_ms}: {:?}", next - start);
                }
                if least == RETRY_PAUSE_MIN {
                    let next = renewal.done(start, start, failure(), u64::MAX).1.unwrap();
                    assert_eq!(next - start, RETRY_PAUSE_MAX);
                }
            }
        }
    }

    #[test]
    fn only_being_replaced_is_the_end() {
        let start = Instant::now();
        for code in [
            ErrorCode::WrongToken,
            ErrorCode::RegistryFull,
            ErrorCode::TtlOutOfRange,
            // To a registration this makes no sense; it must not make a loop without a pause.
            ErrorCode::UnknownWorker,
            ErrorCode::Unknown,
        ] {
            let (status, next) = Renewal::new(TTL).done(start, start, refused(code), 0);
            assert!(matches!(status, Status::Joining { attempts: 1, last: Some(_) }), "{code:?}");
            assert!(next.unwrap() > start);
        }
        let (status, next) = Renewal::new(TTL).done(start, start, refused(ErrorCode::StaleIncarnation), 0);
        assert!(matches!(status, Status::Replaced { .. }) && next.is_none());
    }
}
