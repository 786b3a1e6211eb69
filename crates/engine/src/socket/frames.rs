//! Frames in a byte stream: a length of four bytes, little-endian, then so many bytes. What they mean is not known
//! here.

use std::collections::VecDeque;

/// The bytes before each frame.
pub(super) const HEADER_BYTES: usize = 4;

/// Buffers that have grown beyond this are given back when they are empty: most links are quiet, and a few long
/// frames should not be paid for ever after.
const KEPT_BYTES: usize = 64 << 10;

/// The longest frame of a peer that has not proven yet who it is; no frame of a handshake is longer. Not shorter than one
/// read, so that no read holds more of a frame that is too long than there is of it.
pub(super) const STRANGER_FRAME_BYTES: usize = 64 << 10;

/// The receiving end: cuts frames out of what arrives.
#[derive(Debug)]
pub(super) struct Inbox {
    max_frame_bytes: usize,
    /// The longest frame now: shorter until the peer is trusted.
    limit_bytes: usize,
    /// The beginning of a frame, with its header. It grows as bytes arrive and never because of what a header
    /// claims.
    partial: Vec<u8>,
}

/// The peer has announced a frame that is longer than allowed. The stream cannot be read any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameTooLong;

impl Inbox {
    pub fn new(max_frame_bytes: usize) -> Self {
        Self { max_frame_bytes, limit_bytes: max_frame_bytes.min(STRANGER_FRAME_BYTES), partial: Vec::new() }
    }

    /// Takes frames of full length from now on.
    pub fn trust(&mut self) {
        self.limit_bytes = self.max_frame_bytes;
    }

    /// Takes in what has arrived, and gives each frame that is complete by it.
    ///
    /// The frame that makes a peer trusted may have one of full length right behind it, in the same read, and nobody has
    /// said yet that the peer is trusted. So what has come of a long frame is kept, at most one read of it, and the
    /// stream ends only if the next read still finds a stranger.
    pub fn take(&mut self, mut bytes: &[u8], mut give: impl FnMut(&[u8])) -> Result<(), FrameTooLong> {
        if !self.partial.is_empty() && !self.complete_partial(&mut bytes, &mut give)? {
            return Ok(());
        }
        // Frames that have arrived whole are given from where they lie.
        while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
            let frame_bytes = self.frame_bytes(header)?;
            if frame_bytes > self.limit_bytes {
                break;
            }
            let Some((frame, rest)) = rest.split_at_checked(frame_bytes) else { break };
            give(frame);
            bytes = rest;
        }
        self.partial.extend_from_slice(bytes);
        Ok(())
    }

    /// Whether the stream stands between two frames.
    pub fn is_empty(&self) -> bool {
        self.partial.is_empty()
    }

    /// Adds to the frame that has begun; whether it is complete and given.
    fn complete_partial(
        &mut self,
        bytes: &mut &[u8],
        give: &mut impl FnMut(&[u8]),
    ) -> Result<bool, FrameTooLong> {
        if !self.fill_to(HEADER_BYTES, bytes) {
            return Ok(false);
        }
        let header = std::array::from_fn(|at| self.partial[at]);
        let frame_bytes = self.frame_bytes(&header)?;
        if frame_bytes > self.limit_bytes {
            return Err(FrameTooLong);
        }
        debug_assert!(
            self.partial.len() <= HEADER_BYTES + frame_bytes,
            "no more was kept than the frame has"
        );
        if !self.fill_to(HEADER_BYTES + frame_bytes, bytes) {
            return Ok(false);
        }
        give(&self.partial[HEADER_BYTES..]);
        self.partial.clear();
        self.partial.shrink_to(KEPT_BYTES);
        Ok(true)
    }

    fn fill_to(&mut self, length: usize, bytes: &mut &[u8]) -> bool {
        let (now, later) = bytes.split_at(bytes.len().min(length.saturating_sub(self.partial.len())));
        self.partial.extend_from_slice(now);
        *bytes = later;
        self.partial.len() >= length
    }

    fn frame_bytes(&self, header: &[u8; HEADER_BYTES]) -> Result<usize, FrameTooLong> {
        let announced = u32::from_le_bytes(*header) as usize;
        if announced <= self.max_frame_bytes { Ok(announced) } else { Err(FrameTooLong) }
    }
}

/// The sending end: a bounded buffer of whole frames.
#[derive(Debug)]
pub(super) struct Outbox {
    limit_bytes: usize,
    queued: VecDeque<u8>,
}

/// There is no room for the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

impl Outbox {
    pub fn new(limit_bytes: usize) -> Self {
        Self { limit_bytes, queued: VecDeque::new() }
    }

    /// Queues a frame, whose length has been checked, or nothing.
    pub fn push(&mut self, frame: &[u8]) -> Result<(), Full> {
        if self.queued.len() + HEADER_BYTES + frame.len() > self.limit_bytes {
            return Err(Full);
        }
        let announced = u32::try_from(frame.len()).expect("frames are limited to what the header can say");
        self.queued.extend(announced.to_le_bytes());
        self.queued.extend(frame);
        Ok(())
    }

    /// The bytes to send next, as far as they lie together.
    pub fn front(&self) -> &[u8] {
        self.queued.as_slices().0
    }

    /// Forgets bytes that were sent.
    pub fn sent(&mut self, bytes: usize) {
        self.queued.drain(..bytes);
        if self.queued.is_empty() {
            self.queued.shrink_to(KEPT_BYTES);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.queued.is_empty()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn take_all(inbox: &mut Inbox, bytes: &[u8]) -> (Vec<Vec<u8>>, Result<(), FrameTooLong>) {
        let mut frames = Vec::new();
        let result = inbox.take(bytes, |frame| frames.push(frame.to_vec()));
        (frames, result)
    }

    #[test]
    fn a_long_announcement_is_refused_before_anything_is_kept_for_it() {
        for cut in 0..=HEADER_BYTES {
            let mut inbox = Inbox::new(100);
            let header = 101u32.to_le_bytes();
            let first = take_all(&mut inbox, &header[..cut]).1;
            assert_eq!(first.and_then(|()| take_all(&mut inbox, &header[cut..]).1), Err(FrameTooLong));
            assert!(inbox.partial.capacity() <= 16);
        }
        let mut inbox = Inbox::new(usize::MAX);
        inbox.trust();
        assert_eq!(take_all(&mut inbox, &[0xff, 0xff, 0xff, 0xff, 1, 2]).1, Ok(()));
        assert!(inbox.partial.capacity() < 100, "four thousand million bytes were announced, six have come");
    }

    #[test]
    fn strangers_send_short_frames_only() {
        let long = vec![7; STRANGER_FRAME_BYTES + 1];
        let mut outbox = Outbox::new(usize::MAX);
        outbox.push(&[1]).unwrap();
        outbox.push(&long).unwrap();
        outbox.push(&[2]).unwrap();
        let wire = outbox.queued.make_contiguous().to_vec();
        for cut in [5, 6, 9, 10, 1000, STRANGER_FRAME_BYTES] {
            // Trusted between two reads, as the first frame asks for.
            let mut inbox = Inbox::new(1 << 20);
            assert_eq!(take_all(&mut inbox, &wire[..cut]), (vec![vec![1]], Ok(())));
            inbox.trust();
            assert_eq!(take_all(&mut inbox, &wire[cut..]), (vec![long.clone(), vec![2]], Ok(())));
            // Not trusted: no more than one read is held.
            let mut inbox = Inbox::new(1 << 20);
            assert_eq!(take_all(&mut inbox, &wire[..cut]), (vec![vec![1]], Ok(())));
            assert!(inbox.partial.len() <= STRANGER_FRAME_BYTES);
            let mut rest = wire[cut..].chunks(1000);
            let mut ended = false;
            while let (false, Some(part)) = (ended, rest.next()) {
                let (frames, result) = take_all(&mut inbox, part);
                assert_eq!(frames.len(), 0);
                assert!(inbox.partial.len() <= STRANGER_FRAME_BYTES);
                ended = result == Err(FrameTooLong);
            }
            assert!(ended, "at the first sight or the second");
        }
    }

    #[test]
    fn frames_before_a_bad_one_are_given() {
        let mut inbox = Inbox::new(3);
        let (frames, result) = take_all(&mut inbox, &[1, 0, 0, 0, 7, 0, 0, 0, 0, 4, 0, 0, 0]);
        assert_eq!((frames, result), (vec![vec![7], vec![]], Err(FrameTooLong)));
    }

    #[test]
    fn a_full_outbox_takes_nothing_of_a_frame() {
        let mut outbox = Outbox::new(10);
        assert_eq!(outbox.push(&[1, 2]), Ok(()));
        assert_eq!(outbox.push(&[3]), Err(Full));
        assert_eq!(outbox.push(&[]), Ok(()));
        assert_eq!(outbox.queued, [2, 0, 0, 0, 1, 2, 0, 0, 0, 0]);
        outbox.sent(5);
        assert_eq!(outbox.push(&[3]), Ok(()));
    }

    #[test]
    fn long_buffers_are_given_back() {
        let long = vec![9; 4 * KEPT_BYTES];
        let mut outbox = Outbox::new(8 * KEPT_BYTES);
        outbox.push(&long).unwrap();
        let wire = outbox.queued.make_contiguous().to_vec();
        outbox.sent(wire.len());
        assert!(outbox.queued.capacity() <= 2 * KEPT_BYTES);
        let mut inbox = Inbox::new(long.len());
        inbox.trust();
        assert_eq!(take_all(&mut inbox, &wire[..wire.len() - 1]).0.len(), 0);
        assert_eq!(take_all(&mut inbox, &wire[wire.len() - 1..]).0, [long]);
        assert!(inbox.partial.capacity() <= 2 * KEPT_BYTES);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]

        /// However the stream is cut, the frames are the same.
        #[test]
        fn any_cutting_gives_the_same_frames(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..12),
            cuts in prop::collection::vec(1usize..30, 1..60),
        ) {
            let mut outbox = Outbox::new(usize::MAX);
            for frame in &frames {
                outbox.push(frame).unwrap();
            }
            let mut inbox = Inbox::new(40);
            let mut given = Vec::new();
            let mut cuts = cuts.iter().cycle();
            while !outbox.is_empty() {
                let now = outbox.front().len().min(*cuts.next().unwrap());
                let piece = outbox.front()[..now].to_vec();
                outbox.sent(now);
                inbox.take(&piece, |frame| given.push(frame.to_vec())).unwrap();
            }
            prop_assert!(inbox.is_empty());
            prop_assert_eq!(given, frames);
        }

        /// Whatever arrives, no more is kept than has come, and no frame is longer than allowed.
        #[test]
        fn noise_is_bounded(pieces in prop::collection::vec(prop::collection::vec(0u8..6, 0..50), 0..20)) {
            let mut inbox = Inbox::new(1_000);
            let mut arrived = 0;
            for piece in &pieces {
                arrived += piece.len();
                let mut longest = 0;
                let result = inbox.take(piece, |frame| longest = longest.max(frame.len()));
                prop_assert!(longest <= 1_000 && inbox.partial.len() <= arrived);
                if result.is_err() {
                    break;
                }
            }
        }
    }
}
