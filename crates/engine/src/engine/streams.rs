//! Control messages on their way to peers, and those that a full stream did not take.

use std::collections::VecDeque;

use crossdock_proto::{LinkCause, LinkId as ProtoLink};

use super::Engine;
use crate::network::{LinkId, SendError};

#[derive(Default)]
pub(super) struct Backlog {
    pub frames: VecDeque<Vec<u8>>,
    pub bytes: usize,
    /// Close the link when the frames have left.
    pub then_close: bool,
}

impl Engine {
    pub(super) fn send(&mut self, now_ns: u64, link: ProtoLink, frame: Vec<u8>) {
        if !self.backlog.contains_key(&link) {
            match self.network.send(LinkId(link.0), &frame) {
                Ok(()) | Err(SendError::Closed) => return,
                Err(SendError::Full) => {}
                Err(SendError::TooLong { limit, .. }) => return self.refuse_frame(now_ns, link, limit),
            }
        }
        let backlog = self.backlog.entry(link).or_default();
        backlog.bytes += frame.len();
        backlog.frames.push_back(frame);
        if backlog.bytes > self.options.max_backlog_bytes {
            self.give_up(now_ns, link);
        }
    }

    /// Ends a link whose peer does not read what it must.
    fn give_up(&mut self, now_ns: u64, link: ProtoLink) {
        let bytes = self.backlog.remove(&link).map_or(0, |backlog| backlog.bytes);
        self.network.close(LinkId(link.0));
        self.proto.link_closed(now_ns, link, LinkCause::NotRead { bytes });
    }

    pub(super) fn send_backlog(&mut self, now_ns: u64) {
        let network = &mut self.network;
        let mut too_long = None;
        self.backlog.retain(|link, backlog| {
            while let Some(frame) = backlog.frames.front() {
                match network.send(LinkId(link.0), frame) {
                    Err(SendError::Full) => return true,
                    Err(SendError::TooLong { limit, .. }) => {
                        too_long = Some((*link, limit));
                        return false;
                    }
                    Ok(()) | Err(SendError::Closed) => {
                        backlog.bytes -= frame.len();
                        backlog.frames.pop_front();
                    }
                }
            }
            if backlog.then_close {
                network.close(LinkId(link.0));
            }
            false
        });
        if let Some((link, limit)) = too_long {
            self.refuse_frame(now_ns, link, limit);
        }
    }

    /// Ends a link for which there is a frame that it cannot carry: what the frame says must not be lost silently.
    fn refuse_frame(&mut self, now_ns: u64, link: ProtoLink, limit: usize) {
        self.network.close(LinkId(link.0));
        self.proto.link_closed(now_ns, link, LinkCause::Limit { what: "bytes a frame", limit: limit as u64 });
    }
}
