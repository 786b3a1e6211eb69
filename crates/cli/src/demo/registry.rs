//! The demo's registry, whose end is heard of.

use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use super::process::{Child, Heard};

/// The bootstrap process.
pub struct Registry {
    child: Child,
    heard: Receiver<(usize, Heard)>,
    ended: Option<String>,
}

impl Registry {
    /// Listens to a process that has said all it has to say.
    pub fn new(mut child: Child) -> std::io::Result<Self> {
        let (events, heard) = mpsc::channel();
        child.listen(0, events)?;
        Ok(Self { child, heard, ended: None })
    }

    /// In words, which process ended and how, if it has ended or does so in this time.
    pub fn ended(&mut self, within: Duration) -> Option<String> {
        if self.ended.is_none()
            && let Ok((_, Heard::Gone { how })) = self.heard.recv_timeout(within)
        {
            let (name, id) = (self.child.name(), self.child.id());
            self.ended = Some(format!("the {name} process ({id}) ended early: {how}"));
        }
        self.ended.clone()
    }

    /// Ends it, and waits.
    pub fn finish(self) {
        self.child.finish(Duration::from_secs(5));
    }
}
