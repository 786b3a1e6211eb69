//! The thread of a heart.

use std::collections::HashMap;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::datagram::Datagram;
use super::{Shared, Watched};
use crate::{Sleeper, now_ns};

/// What the thread owns.
pub(super) struct Beat {
    socket: UdpSocket,
    shared: Arc<Shared>,
    beating: Vec<Beating>,
    /// Which of `beating` expects a token.
    by_token: HashMap<u64, usize>,
    /// The earliest `due_ns` of all.
    due_ns: u64,
}

/// One session's heartbeats.
struct Beating {
    watched: Watched,
    due_ns: u64,
    sent: u64,
    heard: u64,
    echoed: u64,
}

impl Beating {
    fn hear(&mut self, datagram: &Datagram) {
        // A datagram that the network has kept or doubled proves nothing about now.
        if datagram.sequence <= self.heard {
            return;
        }
        let now = now_ns();
        self.heard = datagram.sequence;
        self.watched.vital.hear(now);
        if datagram.echo > self.echoed && datagram.echo <= self.sent {
            self.echoed = datagram.echo;
            self.watched.vital.echo(now);
        }
    }
}

/// The longest sleep of a heart that has nothing to send; it bounds how old
/// [`listened_ns`](super::Heart::listened_ns) can be.
const LONGEST_SLEEP_NS: u64 = 1_000_000_000;

/// The most heartbeats taken in before due ones are sent: a flood must not silence this node.
const RECEIVED_AT_ONCE: usize = 512;

impl Beat {
    pub fn new(socket: UdpSocket, shared: Arc<Shared>) -> Self {
        Self { socket, shared, beating: Vec::new(), by_token: HashMap::new(), due_ns: u64::MAX }
    }

    pub fn run(mut self) {
        while !self.shared.watched.is_stopped() {
            if let Some(watched) = self.shared.watched.take() {
                self.watch(watched);
            }
            self.receive();
            self.send_due();
            self.sleep();
        }
    }

    /// Brings the list in line with what is to be watched, keeping the state of sessions that stay.
    fn watch(&mut self, watched: Vec<Watched>) {
        let mut before: HashMap<u64, Beating> =
            self.beating.drain(..).map(|beating| (beating.watched.serial, beating)).collect();
        self.beating.extend(watched.into_iter().map(|watched| {
            before.remove(&watched.serial).unwrap_or(Beating {
                watched,
                due_ns: 0,
                sent: 0,
                heard: 0,
                echoed: 0,
            })
        }));
        self.by_token.clear();
        self.by_token.extend(self.beating.iter().zip(0..).map(|(b, at)| (b.watched.expect_token, at)));
        // New sessions are due at once.
        self.due_ns = 0;
    }

    fn receive(&mut self) {
        // One byte more than a heartbeat, so that a longer datagram is not taken for one.
        let mut bytes = [0; Datagram::BYTES + 1];
        for _ in 0..RECEIVED_AT_ONCE {
            let Ok((length, _)) = self.socket.recv_from(&mut bytes) else {
                // The kernel has nothing to give: this publishes what was heard until now. In a flood it is not
                // reached, and rightly so, for the heartbeats of the peers may still wait behind it.
                self.shared.listened.publish(now_ns());
                return;
            };
            let Some(datagram) = Datagram::from_bytes(&bytes[..length]) else { continue };
            let Some(&at) = self.by_token.get(&datagram.token) else { continue };
            self.beating[at].hear(&datagram);
        }
    }

    fn send_due(&mut self) {
        let now = now_ns();
        if now < self.due_ns {
            return;
        }
        self.due_ns = u64::MAX;
        for beating in &mut self.beating {
            if beating.due_ns <= now {
                beating.sent += 1;
                // Counted from now: after a pause one heartbeat is sent, not all that were missed.
                beating.due_ns = now.saturating_add(beating.watched.interval_ns);
                let datagram = Datagram {
                    token: beating.watched.send_token,
                    sequence: beating.sent,
                    echo: beating.heard,
                };
                // A heartbeat that cannot be sent is a heartbeat lost; the next one is due soon.
                let _ = self.socket.send_to(&datagram.to_bytes(), beating.watched.peer);
            }
            self.due_ns = self.due_ns.min(beating.due_ns);
        }
    }

    fn sleep(&self) {
        let bell = &self.shared.bell;
        bell.prepare_sleep();
        if !self.shared.watched.is_news() {
            let mut sleeper = Sleeper::new();
            let watches = sleeper.watch(self.socket.as_fd()).and(sleeper.watch(bell.as_fd()));
            assert!(watches.is_ok(), "two descriptors fit");
            let left_ns = self.due_ns.saturating_sub(now_ns()).min(LONGEST_SLEEP_NS);
            if sleeper.sleep(left_ns).is_err() {
                // The kernel is out of memory, or the process's limit of open files was lowered below two: not
                // the end of this node. The pause keeps the thread from spinning until it is over.
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        bell.awake();
    }
}
