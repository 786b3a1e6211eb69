//! What is known only when it is tried: the system calls that crossdock cannot do without, made in this process.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use crossdock::{AllocateOptions, Memory};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::PidfdFlags;
use serde::Serialize;

/// What was tried. Each is nothing if it works, or what the system said.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tried {
    /// Sealed memory of one process that others can map.
    pub memfd: Option<String>,
    /// A handle of a process that tells its death.
    pub pidfd: Option<String>,
    /// Sockets between processes of one host, with a name that needs no file.
    pub unix_sockets: Option<String>,
    /// TCP over the loopback interface.
    pub tcp_sockets: Option<String>,
    /// The addresses of this machine, with the name of the interface of each.
    pub addresses: Vec<(String, IpAddr)>,
}

impl Tried {
    pub fn here() -> Self {
        let addresses = if_addrs::get_if_addrs().unwrap_or_default();
        Self {
            memfd: Memory::allocate(PROBE_BYTES, &AllocateOptions::default())
                .err()
                .map(|error| error.to_string()),
            pidfd: refusal(pidfd()),
            unix_sockets: refusal(unix_sockets()),
            tcp_sockets: refusal(tcp_sockets()),
            addresses: addresses.into_iter().map(|address| (address.name.clone(), address.ip())).collect(),
        }
    }
}

fn refusal(tried: io::Result<()>) -> Option<String> {
    tried.err().map(|error| error.to_string())
}

/// Of this process, which lives: its handle must not be readable.
fn pidfd() -> io::Result<()> {
    let handle = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let mut polled = [PollFd::new(&handle, PollFlags::IN)];
    match rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? {
        0 => Ok(()),
        _ => Err(io::Error::other("the handle of a living process says that it is dead")),
    }
}

fn unix_sockets() -> io::Result<()> {
    let name = format!("crossdock-doctor-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name.as_bytes())?;
    let listener = UnixListener::bind_addr(&address)?;
    let mut here = UnixStream::connect_addr(&address)?;
    let (mut there, _) = listener.accept()?;
    here.set_read_timeout(Some(SOON))?;
    there.set_read_timeout(Some(SOON))?;
    echo(&mut here, &mut there)
}

fn tcp_sockets() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut here = TcpStream::connect_timeout(&listener.local_addr()?, SOON)?;
    let (mut there, _) = listener.accept()?;
    here.set_read_timeout(Some(SOON))?;
    there.set_read_timeout(Some(SOON))?;
    echo(&mut here, &mut there)
}

/// A few bytes there and back.
fn echo(here: &mut (impl Read + Write), there: &mut (impl Read + Write)) -> io::Result<()> {
    let (sent, mut heard) = (*b"crossdock", [0; 9]);
    here.write_all(&sent)?;
    there.read_exact(&mut heard)?;
    there.write_all(&heard)?;
    here.read_exact(&mut heard)?;
    match heard == sent {
        true => Ok(()),
        false => Err(io::Error::other("other bytes came back than were sent")),
    }
}

const PROBE_BYTES: usize = 64 << 10;
const SOON: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_is_heard() {
        let (mut here, mut there) = UnixStream::pair().expect("a pair of sockets");
        echo(&mut here, &mut there).expect("the bytes come back");
        drop(there);
        let (mut other, _) = UnixStream::pair().expect("a pair of sockets");
        assert!(echo(&mut here, &mut other).is_err());
    }
}
