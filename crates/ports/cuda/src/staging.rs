//! Where a GPU finds what it is told: a ring of pinned memory, given back in the order in which launches end.

use std::collections::VecDeque;

use crossdock_memory::{AllocateOptions, Memory, MemoryError};

use crate::driver::{Context, CudaError, HostRegistration};

/// The ring. What a launch reads stays as it is until its ticket has ended.
#[derive(Debug)]
pub(crate) struct Staging {
    registration: HostRegistration,
    memory: Memory,
    /// Where the next bytes go.
    head: usize,
    /// The oldest byte in use; the ring is empty where it is at the head and nothing is in use.
    tail: usize,
    /// Bytes in use, with the waste at the end of the ring.
    used: usize,
    /// What each launch that has not ended has in use.
    launches: VecDeque<(u64, usize)>,
    /// In use by the launch that is being gathered.
    gathered: usize,
}

/// Why there is no ring.
#[derive(Debug)]
pub(crate) enum NoStaging {
    Memory(MemoryError),
    Driver(CudaError),
}

impl Staging {
    pub fn new(context: &Context, bytes: usize) -> Result<Staging, NoStaging> {
        let options = AllocateOptions { name: "crossdock-staging".into(), ..AllocateOptions::default() };
        let memory = Memory::allocate(bytes, &options).map_err(NoStaging::Memory)?;
        let registration = context.register_host(&memory).map_err(NoStaging::Driver)?;
        Ok(Staging {
            registration,
            memory,
            head: 0,
            tail: 0,
            used: 0,
            launches: VecDeque::new(),
            gathered: 0,
        })
    }

    /// The most that can be put at once.
    pub fn capacity(&self) -> usize {
        self.memory.bytes()
    }

    /// The longest stretch that can be put now.
    pub fn room(&self) -> usize {
        if self.used == 0 {
            return self.capacity();
        }
        match self.head >= self.tail {
            // A stretch is whole: behind the head, or from the beginning on.
            true => (self.capacity() - self.head).max(self.tail),
            false => self.tail - self.head,
        }
        .min(self.capacity() - self.used)
    }

    /// Puts bytes where the GPU reads them, and says where that is; `None`: there is no room now.
    pub fn put(&mut self, bytes: &[u8]) -> Option<u64> {
        let length = bytes.len().next_multiple_of(ALIGNMENT);
        if self.used == 0 {
            (self.head, self.tail) = (0, 0);
        }
        let is_wrapped = self.used > 0 && self.head < self.tail;
        let (at, waste) = match is_wrapped {
            false if self.capacity() - self.head >= length => (self.head, 0),
            false if self.tail >= length => (0, self.capacity() - self.head),
            true if self.tail - self.head >= length => (self.head, 0),
            _ => return None,
        };
        if self.used + waste + length > self.capacity() {
            return None;
        }
        self.memory.write(at, bytes).expect("the place lies in the ring");
        self.head = at + length;
        self.used += waste + length;
        self.gathered += waste + length;
        Some(self.registration.address() + at as u64)
    }

    /// What was put since the last launch belongs to this one.
    pub fn launched(&mut self, ticket: u64) {
        let gathered = std::mem::take(&mut self.gathered);
        if gathered > 0 {
            self.launches.push_back((ticket, gathered));
        }
    }

    /// Launches up to this one have ended.
    pub fn ended(&mut self, ticket: u64) {
        while let Some(&(launch, bytes)) = self.launches.front()
            && launch <= ticket
        {
            self.launches.pop_front();
            self.used -= bytes;
            self.tail += bytes;
            if self.tail >= self.capacity() {
                self.tail -= self.capacity();
            }
        }
    }
}

/// Of what kernels read from it.
const ALIGNMENT: usize = 16;

#[cfg(all(test, feature = "fake"))]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What is in use is never written again, whatever is put and ends, and everything that fits an empty ring can be put.
        #[test]
        fn what_is_in_use_stays(steps in prop::collection::vec((1usize..3000, any::<bool>(), any::<bool>()), 1..200)) {
            let device = crate::fake::driver().device(0).unwrap();
            let mut staging = Staging::new(&device.context().unwrap(), 4096).unwrap();
            let base = staging.registration.address();
            let (mut in_use, mut gathered) = (VecDeque::<(u64, Vec<(usize, Vec<u8>)>)>::new(), Vec::new());
            let mut ticket = 0;
            for (nth, (length, launches, ends)) in steps.into_iter().enumerate() {
                let bytes = vec![nth as u8; length];
                let room = staging.room();
                match staging.put(&bytes) {
                    Some(address) => gathered.push(((address - base) as usize, bytes)),
                    None => prop_assert!(room < length.next_multiple_of(ALIGNMENT), "{room} {length}"),
                }
                if launches {
                    ticket += 1;
                    staging.launched(ticket);
                    in_use.push_back((ticket, std::mem::take(&mut gathered)));
                }
                if ends && let Some((oldest, _)) = in_use.pop_front() {
                    staging.ended(oldest);
                }
                for (at, expected) in in_use.iter().flat_map(|(_, all)| all).chain(&gathered) {
                    let mut found = vec![0; expected.len()];
                    staging.memory.read(*at, &mut found).unwrap();
                    prop_assert_eq!(&found, expected);
                }
                if in_use.is_empty() && gathered.is_empty() {
                    prop_assert_eq!(staging.room(), staging.capacity());
                }
            }
        }
    }
}
