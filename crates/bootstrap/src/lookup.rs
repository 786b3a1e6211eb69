//! Where the server is: its name, and the addresses behind it.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};

use parking_lot::Mutex;

use crate::error::InvalidServer;
use crate::exchange::Deadline;
use crate::server::DEFAULT_PORT;

/// A server's name. Names are looked up at each call, since a server that was restarted elsewhere keeps its
/// name and not its address.
#[derive(Debug)]
pub(crate) struct Lookup {
    /// As it stands in errors and in the `Host` header.
    name: String,
    host: Host,
    /// The system's resolver takes no deadline, so it runs on a thread of its own. One that overstays a call
    /// is left for the next call to wait for: there is never a second one.
    running: Mutex<Option<Receiver<io::Result<Vec<SocketAddr>>>>>,
}

#[derive(Debug)]
enum Host {
    Address(SocketAddr),
    Name(String, u16),
}

impl Lookup {
    pub(crate) fn new(given: &str) -> Result<Lookup, InvalidServer> {
        let text = given.strip_prefix("http://").unwrap_or(given);
        let text = text.strip_suffix('/').unwrap_or(text);
        Lookup::with_port(text, DEFAULT_PORT).ok_or_else(|| InvalidServer { given: given.to_owned() })
    }

    /// `HOST` or `HOST:PORT`.
    pub(crate) fn with_port(text: &str, port: u16) -> Option<Lookup> {
        let host = host(text, port)?;
        let name = match &host {
            Host::Address(address) => address.to_string(),
            Host::Name(name, port) => format!("{name}:{port}"),
        };
        Some(Lookup { name, host, running: Mutex::new(None) })
    }

    /// Without the scheme, and with the port.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn addresses(&self, deadline: Deadline) -> io::Result<Vec<SocketAddr>> {
        let (name, port) = match &self.host {
            Host::Address(address) => return Ok(vec![*address]),
            Host::Name(name, port) => (name, *port),
        };
        let mut running = self.running.try_lock_until(deadline.end()).ok_or(io::ErrorKind::TimedOut)?;
        let receiver = match running.take() {
            Some(receiver) => receiver,
            None => {
                let (sender, receiver) = sync_channel(1);
                let name = name.clone();
                std::thread::Builder::new().name("crossdock-lookup".to_owned()).spawn(move || {
                    let found = (name.as_str(), port).to_socket_addrs();
                    // Nobody listens when the client is gone.
                    let _ = sender.send(found.map(Iterator::collect));
                })?;
                receiver
            }
        };
        match receiver.recv_timeout(deadline.remaining().ok_or(io::ErrorKind::TimedOut)?) {
            Ok(found) => found,
            Err(RecvTimeoutError::Timeout) => {
                *running = Some(receiver);
                Err(io::ErrorKind::TimedOut.into())
            }
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

fn host(text: &str, default_port: u16) -> Option<Host> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return (address.port() != 0).then_some(Host::Address(address));
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(Host::Address(SocketAddr::new(address, default_port)));
    }
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, port.parse().ok().filter(|port| *port != 0)?),
        None => (text, default_port),
    };
    // The name goes into a header, where a line break would begin another one.
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
    fits.then(|| Host::Name(name.to_owned(), port))
}

const NAME_BYTES_MAX: usize = 253;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn addresses_and_names_are_told_apart() {
        for (given, name) in [
            ("10.0.0.1:7000", "10.0.0.1:7000"),
            ("10.0.0.1", "10.0.0.1:8997"),
            ("[::1]:7000", "[::1]:7000"),
            ("::1", "[::1]:8997"),
            ("bootstrap.default.svc:7000", "bootstrap.default.svc:7000"),
            ("bootstrap", "bootstrap:8997"),
            ("http://bootstrap:7000/", "bootstrap:7000"),
        ] {
            assert_eq!(Lookup::new(given).unwrap().name(), name);
        }
        for wrong in
            ["", ":7000", "a:b", "a:0", "1.2.3.4:0", "a:70000", "https://a", "a b", "a\r\nb: c", "a/b"]
        {
            assert_eq!(Lookup::new(wrong).unwrap_err(), InvalidServer { given: wrong.to_owned() });
        }
    }

    #[test]
    fn a_lookup_that_overstays_its_call_serves_the_next_one() {
        let lookup = Lookup::new("bootstrap:7000").unwrap();
        let (sender, receiver) = sync_channel(1);
        *lookup.running.lock() = Some(receiver);
        let late = lookup.addresses(Deadline::after(Duration::from_millis(10))).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let address = "10.0.0.1:7000".parse().unwrap();
        sender.send(Ok(vec![address])).unwrap();
        assert_eq!(lookup.addresses(Deadline::after(Duration::from_secs(5))).unwrap(), [address]);
        assert!(lookup.running.lock().is_none());
    }
}
