//! Words in memory that several processes share, and a place where all of them meet.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossdock::{AllocateOptions, Memory};
use rustix::thread::futex;

use crate::bare::map_theirs;

/// Words that several processes share, each used for one thing. All are 0 at first.
#[derive(Debug)]
pub struct Words(Memory);

impl Words {
    /// So many words.
    pub fn new(count: usize) -> io::Result<Self> {
        Memory::allocate(count * WORD_BYTES, &AllocateOptions::default()).map(Self).map_err(io::Error::other)
    }

    /// Those that another process has made.
    pub fn theirs(process: i32, descriptor: i32, count: usize) -> io::Result<Self> {
        map_theirs(process, descriptor, count * WORD_BYTES).map(Self)
    }

    /// What the other processes open.
    pub fn descriptor(&self) -> Option<i32> {
        self.0.fd().map(|fd| fd.as_fd().as_raw_fd())
    }

    /// One word.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn get(&self, index: usize) -> &AtomicU64 {
        let at = self.0.at(index * WORD_BYTES, WORD_BYTES).expect("a word inside its memory");
        // SAFETY: mappings begin at a page, so the word is aligned; it lives as long as the memory, and no process uses
        // it in another way, except those of a meeting, which are halves everywhere.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }

    /// A word of which only the first half is used: the kernel can only wait for those.
    fn half(&self, index: usize) -> &AtomicU32 {
        let at = self.0.at(index * WORD_BYTES, WORD_BYTES).expect("a word inside its memory");
        // SAFETY: as in `get`.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }
}

/// Where so many processes meet: none goes on before all have come.
#[derive(Clone, Copy, Debug)]
pub struct Meeting<'a> {
    words: &'a Words,
    first: usize,
    members: u32,
    /// There are more members than processors.
    crowded: bool,
    /// How long a sleeper lies at most before it looks around.
    nap: futex::Timespec,
}

impl<'a> Meeting<'a> {
    /// How many words a meeting needs.
    pub const WORDS: usize = 2 * LINE_WORDS;

    /// Of so many members, with [`Meeting::WORDS`] words from the first one on. In a crowd whoever waits sleeps; else
    /// it spins.
    pub fn new(words: &'a Words, first: usize, members: u32, crowded: bool) -> Self {
        Self { words, first, members, crowded, nap: NAP }
    }

    /// For waits of seconds: whoever waits sleeps, and hardly looks around.
    pub fn of_sleepers(words: &'a Words, first: usize, members: u32) -> Self {
        Self { nap: LONG_NAP, ..Self::new(words, first, members, true) }
    }

    /// Waits for all. Now and then `check` says whether there is still hope.
    pub fn wait<E>(&self, mut check: impl FnMut() -> Result<(), E>) -> Result<(), E> {
        let (arrived, generation) = (self.words.half(self.first), self.words.half(self.first + LINE_WORDS));
        let seen = generation.load(Ordering::Acquire);
        if arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.members {
            arrived.store(0, Ordering::Relaxed);
            generation.store(seen.wrapping_add(1), Ordering::Release);
            if self.crowded {
                // Waking on a valid word cannot fail.
                let _ = futex::wake(generation, futex::Flags::empty(), u32::MAX >> 1);
            }
            return Ok(());
        }
        let mut turn = 0_u32;
        while generation.load(Ordering::Acquire) == seen {
            turn = turn.wrapping_add(1);
            let patient = if self.crowded { CHECK_SLEEPS } else { CHECK_SPINS };
            match self.crowded {
                true if turn.is_multiple_of(4) => std::thread::yield_now(),
                true => {
                    // A word that has changed, a signal and the end of the time are the same: look again.
                    let _ = futex::wait(generation, futex::Flags::empty(), seen, Some(&self.nap));
                }
                false => std::hint::spin_loop(),
            }
            if turn.is_multiple_of(patient) {
                if !self.crowded {
                    // Others may want the processor, who are not of this meeting.
                    std::thread::yield_now();
                }
                // Who came last may have gone again, which is not the end of hope.
                check().or_else(|error| {
                    if generation.load(Ordering::Acquire) == seen { Err(error) } else { Ok(()) }
                })?;
            }
        }
        Ok(())
    }
}

/// A word there and back between two processes, each time with the next number.
#[derive(Clone, Copy, Debug)]
pub struct RoundTrips<'a> {
    words: &'a Words,
    first: usize,
    asleep: bool,
}

impl<'a> RoundTrips<'a> {
    /// How many words they need.
    pub const WORDS: usize = 2 * LINE_WORDS;
    /// What a trip among sleepers takes longer at each side than it need.
    pub const PAUSE: Duration = Duration::from_micros(30);

    /// With [`RoundTrips::WORDS`] words from the first one on. Whoever waits spins, or sleeps at once.
    pub fn new(words: &'a Words, first: usize, asleep: bool) -> Self {
        Self { words, first, asleep }
    }

    /// So many trips, at the side that begins (or, if not `leads`, at the other). Among sleepers each side lets the other
    /// fall asleep for [`RoundTrips::PAUSE`] before it goes on. Now and then `check` says whether there
    /// is still hope.
    pub fn run<E>(&self, trips: u32, leads: bool, mut check: impl FnMut() -> Result<(), E>) -> Result<(), E> {
        let (there, back) = (self.words.half(self.first), self.words.half(self.first + LINE_WORDS));
        let (own, other) = if leads { (there, back) } else { (back, there) };
        for _ in 0..trips {
            let next = own.load(Ordering::Relaxed).wrapping_add(1);
            if !leads {
                self.wait(other, next, &mut check)?;
            }
            let paused = Instant::now();
            while self.asleep && paused.elapsed() < Self::PAUSE {
                std::hint::spin_loop();
            }
            own.store(next, Ordering::Release);
            if self.asleep {
                // Waking on a valid word cannot fail.
                let _ = futex::wake(own, futex::Flags::empty(), 1);
            }
            if leads {
                self.wait(other, next, &mut check)?;
            }
        }
        Ok(())
    }

    fn wait<E>(
        &self,
        word: &AtomicU32,
        number: u32,
        check: &mut impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        for turn in 1_u32.. {
            let seen = word.load(Ordering::Acquire);
            if seen == number {
                break;
            }
            let patient = if self.asleep { CHECK_SLEEPS } else { CHECK_SPINS };
            match self.asleep {
                true => {
                    // A word that has changed, a signal and the end of the time are the same: look again.
                    let _ = futex::wait(word, futex::Flags::empty(), seen, Some(&NAP));
                }
                false => std::hint::spin_loop(),
            }
            if turn.is_multiple_of(patient) {
                check()?;
            }
        }
        Ok(())
    }
}

/// How many words lie between two that different processes write, so that no line and no pair of lines holds both.
pub const LINE_WORDS: usize = 16;

const WORD_BYTES: usize = 8;
const CHECK_SPINS: u32 = 1 << 16;
const CHECK_SLEEPS: u32 = 1 << 4;
const NAP: futex::Timespec = futex::Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
const LONG_NAP: futex::Timespec = futex::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_goes_on_alone() {
        for crowded in [false, true] {
            let words = Words::new(Meeting::WORDS + 1).unwrap();
            let meeting = Meeting::new(&words, 0, 3, crowded);
            let count = words.get(Meeting::WORDS);
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        for round in 1..=200 {
                            count.fetch_add(1, Ordering::Relaxed);
                            meeting.wait(|| Ok::<_, ()>(())).unwrap();
                            assert_eq!(count.load(Ordering::Relaxed), 3 * round);
                            meeting.wait(|| Ok::<_, ()>(())).unwrap();
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn a_word_goes_there_and_back() {
        for asleep in [false, true] {
            let words = Words::new(RoundTrips::WORDS).unwrap();
            let trips = RoundTrips::new(&words, 0, asleep);
            for _ in 0..3 {
                std::thread::scope(|scope| {
                    scope.spawn(|| trips.run(50, false, || Ok::<_, ()>(())).unwrap());
                    trips.run(50, true, || Ok::<_, ()>(())).unwrap();
                });
            }
            let counts = [0, LINE_WORDS].map(|at| words.half(at).load(Ordering::Relaxed));
            assert_eq!(counts, [150, 150]);
            assert_eq!(trips.run(1, true, || Err("gone")), Err("gone"));
        }
    }

    #[test]
    fn who_has_no_hope_waits_no_longer() {
        let words = Words::new(Meeting::WORDS).unwrap();
        assert_eq!(Meeting::new(&words, 0, 2, false).wait(|| Err("gone")), Err("gone"));
    }
}
