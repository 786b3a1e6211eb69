//! Heartbeats, on a thread of their own in every progress mode: a caller that holds an interpreter lock for two
//! seconds, or whose progress loop waits for a slow device, still lives, and its peers are told so.

mod beat;
mod datagram;
mod shared;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::thread::JoinHandle;

use self::beat::Beat;
use self::shared::{Listened, Vital, WatchList};
use crate::network::{OsError, Pulse};
use crate::{Doorbell, NetworkError, now_ns};

/// One node's heartbeats: one UDP socket, one thread, at most as many sessions as configured.
///
/// A heartbeat counts if it carries the token that its session expects and is newer than what was heard before.
/// Dropping the heart stops the thread and waits for it, which takes no longer than one pass over the sessions.
#[derive(Debug)]
pub struct Heart {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    address: String,
    bound: SocketAddr,
    max_sessions: usize,
    sessions: HashMap<u32, Session>,
    serial: u64,
}

/// How a [`Heart`] is opened.
#[derive(Clone, Debug)]
pub struct HeartOptions {
    /// Where heartbeats are received. Port 0 takes any free one.
    pub bind: SocketAddr,
    /// The address that peers are told to send to, if it is not the one of `bind`.
    pub advertise: Option<IpAddr>,
    /// The most sessions watched at once.
    pub max_sessions: usize,
}

/// A watched session as the owner of the heart sees it.
#[derive(Debug)]
struct Session {
    serial: u64,
    vital: Arc<Vital>,
}

/// What the owner of the heart and its thread share.
#[derive(Debug)]
struct Shared {
    watched: WatchList<Watched>,
    bell: Doorbell,
    listened: Listened,
}

/// One session to be watched.
#[derive(Clone, Debug)]
struct Watched {
    /// Tells one watching of a session from the next one of the same session.
    serial: u64,
    peer: SocketAddr,
    interval_ns: u64,
    send_token: u64,
    expect_token: u64,
    vital: Arc<Vital>,
}

/// Heartbeats are never sent more often than this.
const SHORTEST_INTERVAL_NS: u64 = 1_000_000;
/// Nor less often: the peer names the interval, and what it names must not overflow a clock.
const LONGEST_INTERVAL_NS: u64 = 60_000_000_000;
/// Room for so many from the beginning, whatever the limit is.
const USUAL_SESSIONS: usize = 4096;

impl Heart {
    /// Opens the socket and starts the thread.
    pub fn open(options: &HeartOptions) -> Result<Self, NetworkError> {
        let os =
            |call| move |error: std::io::Error| OsError { call, errno: error.raw_os_error().unwrap_or(0) };
        let socket = UdpSocket::bind(options.bind).map_err(os("bind"))?;
        socket.set_nonblocking(true).map_err(os("fcntl"))?;
        // Room for a burst of heartbeats while the thread is starved. The kernel may give less, which costs
        // nothing but heartbeats in that case.
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 1 << 20);
        let bound = socket.local_addr().map_err(os("getsockname"))?;
        let address = advertised("heart bind", bound, options.advertise)?;
        let shared = Arc::new(Shared {
            watched: WatchList::new(Vec::with_capacity(options.max_sessions.min(USUAL_SESSIONS))),
            bell: Doorbell::new()?,
            listened: Listened::new(now_ns()),
        });
        let thread = std::thread::Builder::new()
            .name("crossdock-heart".into())
            .spawn({
                let shared = shared.clone();
                move || Beat::new(socket, shared).run()
            })
            .map_err(os("pthread_create"))?;
        Ok(Self {
            shared,
            thread: Some(thread),
            address,
            bound,
            max_sessions: options.max_sessions,
            sessions: HashMap::with_capacity(options.max_sessions.min(USUAL_SESSIONS)),
            serial: 0,
        })
    }

    /// Where peers send their heartbeats.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// See [`Network::watch`](crate::Network::watch).
    pub fn watch(&mut self, session: u32, pulse: &Pulse) -> Result<(), NetworkError> {
        let bad = |reason| NetworkError::BadAddress { address: pulse.peer_address.clone(), reason };
        let peer: SocketAddr = pulse
            .peer_address
            .parse()
            .map_err(|_| bad("not an IP address and a port, as in 10.0.0.1:7000"))?;
        let peer = match (self.bound, peer) {
            (SocketAddr::V4(_), SocketAddr::V6(_)) => {
                return Err(bad("an IPv6 address, where heartbeats are bound to an IPv4 one"));
            }
            (SocketAddr::V6(_), SocketAddr::V4(peer)) => {
                SocketAddr::new(IpAddr::V6(peer.ip().to_ipv6_mapped()), peer.port())
            }
            _ => peer,
        };
        if !self.sessions.contains_key(&session) && self.sessions.len() == self.max_sessions {
            return Err(NetworkError::Limit { what: "watched sessions", limit: self.max_sessions as u64 });
        }
        self.serial += 1;
        let vital = Arc::new(Vital::new(now_ns()));
        let watched = Watched {
            serial: self.serial,
            peer,
            interval_ns: pulse.interval_ns.clamp(SHORTEST_INTERVAL_NS, LONGEST_INTERVAL_NS),
            send_token: pulse.send_token,
            expect_token: pulse.expect_token,
            vital: vital.clone(),
        };
        let replaced = self.sessions.insert(session, Session { serial: self.serial, vital });
        self.change(|list| {
            list.retain(|w| replaced.as_ref().is_none_or(|r| w.serial != r.serial));
            list.push(watched);
        });
        Ok(())
    }

    /// See [`Network::unwatch`](crate::Network::unwatch).
    pub fn unwatch(&mut self, session: u32) {
        if let Some(ended) = self.sessions.remove(&session) {
            self.change(|list| list.retain(|w| w.serial != ended.serial));
        }
    }

    /// See [`Network::heard_ns`](crate::Network::heard_ns).
    pub fn heard_ns(&self, session: u32) -> Option<u64> {
        self.sessions.get(&session).map(|s| s.vital.heard_ns())
    }

    /// When a heartbeat of the peer last showed that the peer hears this node; the time of
    /// [`watch`](Heart::watch) before the first. A peer that is heard and does not hear is behind something that
    /// lets datagrams pass in one direction only.
    pub fn echoed_ns(&self, session: u32) -> Option<u64> {
        self.sessions.get(&session).map(|s| s.vital.echoed_ns())
    }

    /// See [`Network::listened_ns`](crate::Network::listened_ns).
    pub fn listened_ns(&self) -> u64 {
        self.shared.listened.get()
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Watched>)) {
        self.shared.watched.change(change);
        self.shared.bell.ring();
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.shared.watched.stop();
        self.shared.bell.ring();
        if let Some(thread) = self.thread.take() {
            // The thread has no way to panic that a test would not show; its end is all that matters here.
            let _ = thread.join();
        }
    }
}

/// The address that peers are told: a bound one of `0.0.0.0` cannot be reached by that name.
pub(crate) fn advertised(
    option: &'static str,
    bound: SocketAddr,
    advertise: Option<IpAddr>,
) -> Result<String, NetworkError> {
    let ip = advertise.unwrap_or(bound.ip());
    if ip.is_unspecified() {
        return Err(NetworkError::BadOption {
            option,
            reason: "peers cannot reach an unspecified address: bind to one, or name the one to advertise",
        });
    }
    Ok(SocketAddr::new(ip, bound.port()).to_string())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::{Duration, Instant};

    use super::datagram::Datagram;
    use super::*;

    const INTERVAL_NS: u64 = 10_000_000;

    fn heart() -> Heart {
        Heart::open(&HeartOptions { bind: "127.0.0.1:0".parse().unwrap(), advertise: None, max_sessions: 2 })
            .unwrap()
    }

    fn pulse(peer_address: &str, send_token: u64, expect_token: u64) -> Pulse {
        Pulse { peer_address: peer_address.into(), interval_ns: INTERVAL_NS, send_token, expect_token }
    }

    /// Waits until what is heard of a session is newer than now.
    fn hears(heart: &Heart, session: u32) -> bool {
        let (began_ns, deadline) = (now_ns(), Instant::now() + Duration::from_secs(10));
        while Instant::now() < deadline {
            if heart.heard_ns(session).unwrap() > began_ns {
                return true;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }

    fn stays_silent(heart: &Heart, session: u32) -> bool {
        // Whatever is on its way arrives first.
        std::thread::sleep(Duration::from_millis(30));
        let before = heart.heard_ns(session).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        heart.heard_ns(session).unwrap() == before
    }

    #[test]
    fn two_hearts_hear_each_other_until_one_stops() {
        let (mut a, mut b) = (heart(), heart());
        a.watch(1, &pulse(b.address(), 11, 22)).unwrap();
        b.watch(9, &pulse(a.address(), 22, 11)).unwrap();
        assert!(hears(&a, 1) && hears(&b, 9));
        let began_ns = now_ns();
        let deadline = Instant::now() + Duration::from_secs(10);
        while a.echoed_ns(1).unwrap() < began_ns && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(a.echoed_ns(1).unwrap() >= began_ns, "and each learns that the other hears it");
        let stopping = Instant::now();
        drop(b);
        assert!(stopping.elapsed() < Duration::from_secs(5));
        assert!(stays_silent(&a, 1));
        let (listened, heard) = (a.listened_ns(), a.heard_ns(1).unwrap());
        assert!(listened > heard + 50_000_000, "it goes on listening: {listened} {heard}");
    }

    #[test]
    fn beats_on_while_its_owner_is_blocked() {
        let (mut a, mut b) = (heart(), heart());
        a.watch(1, &pulse(b.address(), 11, 22)).unwrap();
        b.watch(1, &pulse(a.address(), 22, 11)).unwrap();
        assert!(hears(&a, 1) && hears(&b, 1));
        // The owner of b does nothing at all; a still hears b, again and again.
        let blocked = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(1_500));
            b
        });
        for _ in 0..10 {
            assert!(hears(&a, 1));
        }
        assert!(!blocked.is_finished(), "ten heartbeats came well within the time");
        let b = blocked.join().unwrap();
        assert!(now_ns() - b.heard_ns(1).unwrap() < 1_000_000_000, "and b has heard a meanwhile");
    }

    #[test]
    fn only_the_expected_token_counts() {
        let (mut a, mut b) = (heart(), heart());
        a.watch(1, &pulse(b.address(), 11, 22)).unwrap();
        b.watch(1, &pulse(a.address(), 23, 11)).unwrap();
        assert!(hears(&b, 1));
        assert!(stays_silent(&a, 1));
        // Watching again with the right token replaces the wrong one.
        b.watch(1, &pulse(a.address(), 22, 11)).unwrap();
        assert!(hears(&a, 1));
        b.unwatch(1);
        assert_eq!(b.heard_ns(1), None);
        assert!(stays_silent(&a, 1));
    }

    #[test]
    fn two_sessions_of_one_node_with_itself() {
        let mut heart = heart();
        let address = heart.address().to_owned();
        heart.watch(1, &pulse(&address, 11, 22)).unwrap();
        heart.watch(2, &pulse(&address, 22, 11)).unwrap();
        assert!(hears(&heart, 1) && hears(&heart, 2));
        assert_eq!(
            heart.watch(3, &pulse(&address, 5, 6)),
            Err(NetworkError::Limit { what: "watched sessions", limit: 2 })
        );
        heart.unwatch(2);
        heart.watch(3, &pulse(&address, 22, 11)).unwrap();
        assert!(hears(&heart, 1) && hears(&heart, 3));
    }

    #[test]
    fn late_doubled_and_broken_datagrams_do_not_count() {
        let mut heart = heart();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        heart.watch(1, &pulse(&peer.local_addr().unwrap().to_string(), 11, 22)).unwrap();
        let say = |bytes: &[u8]| peer.send_to(bytes, heart.address()).map(|_| ()).unwrap();
        let beat = |token, sequence| Datagram { token, sequence, echo: 0 }.to_bytes();

        let before = now_ns();
        say(&beat(22, 7));
        assert!(hears_after(&heart, 1, before));
        let heard = heart.heard_ns(1).unwrap();
        say(&beat(22, 7));
        say(&beat(22, 6));
        say(&beat(21, 8));
        say(&beat(22, 8)[..20]);
        say(&[&beat(22, 8)[..], &[0]].concat());
        say(&[]);
        for place in 0..8 {
            let mut broken = beat(22, 8);
            broken[place] ^= 0x40;
            say(&broken);
        }
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(heart.heard_ns(1), Some(heard));
        let watched = heart.echoed_ns(1).unwrap();
        say(&beat(22, 8));
        assert!(hears_after(&heart, 1, heard));
        assert_eq!(heart.echoed_ns(1), Some(watched), "a peer that hears nothing echoes nothing");
    }

    #[test]
    fn an_absurd_interval_neither_stops_the_thread_nor_floods() {
        for interval_ns in [u64::MAX, u64::MAX - 1, 1 << 63, 0] {
            let mut heart = heart();
            let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
            peer.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let pulse = Pulse { interval_ns, ..pulse(&peer.local_addr().unwrap().to_string(), 11, 22) };
            heart.watch(1, &pulse).unwrap();
            let (mut bytes, mut received) = ([0; 128], 0);
            let deadline = Instant::now() + Duration::from_millis(300);
            while Instant::now() < deadline && peer.recv_from(&mut bytes).is_ok() {
                received += 1;
            }
            if interval_ns == 0 {
                assert!((2..=301).contains(&received), "a heartbeat a millisecond at most: {received}");
            } else {
                assert_eq!(received, 1, "one heartbeat in the first minute");
            }
            let before = now_ns();
            peer.send_to(&Datagram { token: 22, sequence: 1, echo: 0 }.to_bytes(), heart.address()).unwrap();
            assert!(hears_after(&heart, 1, before), "the thread lives");
        }
    }

    fn hears_after(heart: &Heart, session: u32, time_ns: u64) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        while heart.heard_ns(session).unwrap() <= time_ns {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    #[test]
    fn what_is_sent_grows_and_echoes() {
        let mut heart = heart();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        heart.watch(1, &pulse(&peer.local_addr().unwrap().to_string(), 11, 22)).unwrap();
        let mut last = 0;
        let mut echoed = 0;
        for told in [0, 5, 9] {
            if told > 0 {
                let beat = Datagram { token: 22, sequence: told, echo: last };
                peer.send_to(&beat.to_bytes(), heart.address()).unwrap();
            }
            while last == 0 || echoed < told {
                let mut bytes = [0; 128];
                let (length, _) = peer.recv_from(&mut bytes).unwrap();
                let beat = Datagram::from_bytes(&bytes[..length]).unwrap();
                assert_eq!(beat.token, 11);
                assert!(beat.sequence > last && beat.echo >= echoed);
                (last, echoed) = (beat.sequence, beat.echo);
            }
            assert_eq!(echoed, told);
        }
    }

    #[test]
    fn bad_addresses_and_options_are_refused() {
        let mut heart = heart();
        for address in ["", "localhost:1", "127.0.0.1", "[::1]:9"] {
            assert!(matches!(heart.watch(1, &pulse(address, 1, 2)), Err(NetworkError::BadAddress { .. })));
        }
        assert_eq!(heart.heard_ns(1), None);
        let unspecified =
            HeartOptions { bind: "0.0.0.0:0".parse().unwrap(), advertise: None, max_sessions: 1 };
        assert!(matches!(Heart::open(&unspecified), Err(NetworkError::BadOption { .. })));
        let named = HeartOptions { advertise: Some("10.1.2.3".parse().unwrap()), ..unspecified };
        assert!(Heart::open(&named).unwrap().address().starts_with("10.1.2.3:"));
    }
}
