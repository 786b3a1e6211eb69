//! The demo's registry, whose end is heard of.

use std::net::TcpStream;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use super::process::{Child, Heard};

/// The bootstrap process.
pub struct Registry {
    child: Child,
    address: String,
    heard: Receiver<(usize, Heard)>,
    ended: Option<String>,
}

impl Registry {
    /// Listens to a process that has said all it has to say: where it serves.
    pub fn new(mut child: Child, address: String) -> std::io::Result<Self> {
        let (events, heard) = mpsc::channel();
        child.listen(0, events)?;
        Ok(Self { child, address, heard, ended: None })
    }

    /// In words, which process ended and how, if it has ended or does so in this time, and nobody has started another
    /// one in its place.
    pub fn ended(&mut self, within: Duration) -> Option<String> {
        if self.ended.is_none()
            && let Ok((_, Heard::Gone { how })) = self.heard.recv_timeout(within)
        {
            let (name, id) = (self.child.name(), self.child.id());
            self.ended = Some(format!("the {name} process ({id}) ended early: {how}"));
        }
        self.ended.clone().filter(|_| !self.is_replaced())
    }

    fn is_replaced(&self) -> bool {
        let address = self.address.parse();
        address.is_ok_and(|address| TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok())
    }

    /// Ends it, and waits.
    pub fn finish(self) {
        self.child.finish(Duration::from_secs(5));
    }
}
