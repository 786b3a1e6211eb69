//! The demo's registry, whose end is heard of.

use std::error::Error;
use std::net::TcpStream;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use super::process::{Child, Heard};

/// Where the workers meet: a bootstrap process of the demo's own, or a registry that was there before.
pub struct Registry {
    address: String,
    own: Option<Own>,
}

struct Own {
    child: Child,
    heard: Receiver<(usize, Heard)>,
    ended: Option<String>,
}

impl Registry {
    /// Starts one.
    pub fn start() -> Result<Self, Box<dyn Error>> {
        let mut child =
            Child::start("bootstrap", &["bootstrap", "--listen", "127.0.0.1:0", "--until-stdin-ends"])?;
        let address = child.first_line(Duration::from_secs(10))?;
        let (events, heard) = mpsc::channel();
        child.listen(0, events)?;
        Ok(Self { address, own: Some(Own { child, heard, ended: None }) })
    }

    /// One that somebody else keeps. What becomes of it the workers tell.
    pub fn at(address: &str) -> Self {
        Self { address: address.to_owned(), own: None }
    }

    /// Where it is, for people.
    pub fn described(&self) -> String {
        match &self.own {
            Some(own) => format!("registry at http://{}, process {}", self.address, own.child.id()),
            None => format!("registry at {}", self.address),
        }
    }

    /// What a client takes to find it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// In words, which process ended and how, if it has ended or does so in this time, and nobody has started another
    /// one in its place.
    pub fn ended(&mut self, within: Duration) -> Option<String> {
        let own = self.own.as_mut()?;
        if own.ended.is_none()
            && let Ok((_, Heard::Gone { how })) = own.heard.recv_timeout(within)
        {
            let (name, id) = (own.child.name(), own.child.id());
            own.ended = Some(format!("the {name} process ({id}) ended early: {how}"));
        }
        own.ended.clone().filter(|_| !self.is_replaced())
    }

    fn is_replaced(&self) -> bool {
        let address = self.address.parse();
        address.is_ok_and(|address| TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok())
    }

    /// Ends the demo's own, and waits.
    pub fn finish(self) {
        if let Some(own) = self.own {
            own.child.finish(Duration::from_secs(5));
        }
    }
}
