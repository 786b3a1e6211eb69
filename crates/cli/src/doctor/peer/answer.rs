//! The machine that is asked.

use std::io;
use std::net::{SocketAddr, TcpListener};

use crossdock_transport::LaneAddress;

use super::rail::{self, Rail, Stuck};
use super::talk::{Answer, Question, Talk, from_hex, to_hex};
use crate::output::say;

/// Answers one doctor of another machine, and ends when that has gone.
pub fn answer(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    say!("waiting at {} for `crossdock doctor --peer` of another machine", listener.local_addr()?);
    let (stream, peer) = listener.accept()?;
    say!("{peer} asks");
    let (mut rails, refused) = rail::all(stream.local_addr()?.ip());
    for (name, error) in refused {
        say!("{name} cannot be opened: {error}");
    }
    let mut talk = Talk::new(stream)?;
    let mut at = 0;
    while let Some(question) = talk.hear(rails.get_mut(at))? {
        match question {
            Question::Rails => talk.say(&Answer::Rails(rails.iter().map(Rail::offer).collect()))?,
            Question::Open { rail, address } => {
                at = rail;
                match rails.get_mut(rail).map(|rail| open(rail, &address)) {
                    Some(Ok((answer, to))) => {
                        talk.say(&answer)?;
                        // The other side connects when it has heard the address.
                        let up = rails[rail].connect(&to, false).map_err(Stuck::from);
                        talk.say(&told(up.and_then(|()| rails[rail].wait_up())))?;
                    }
                    Some(Err(stuck)) => talk.say(&told(Err(stuck)))?,
                    None => return Err(io::ErrorKind::InvalidData.into()),
                }
            }
            Question::Verify { seed } => talk.say(&Answer::Done { good: rails[at].holds(seed) })?,
            Question::Echo { rounds } => {
                let begun = rails[at].arrived;
                talk.say(&Answer::Done { good: true })?;
                let result = (1..=u64::from(rounds)).try_for_each(|round| {
                    rails[at].wait(|rail| rail.arrived >= begun + round)?;
                    rails[at].notify()
                });
                talk.say(&told(result))?;
            }
            Question::Count { arrivals } => {
                let until = u64::from(arrivals);
                talk.say(&told(rails[at].wait(|rail| rail.arrived >= until)))?;
            }
            Question::Close => {
                rails[at].close();
                talk.say(&Answer::Done { good: true })?;
            }
        }
    }
    Ok(())
}

fn open(rail: &mut Rail, address: &str) -> Result<(Answer, LaneAddress), Stuck> {
    let bytes = from_hex(address).unwrap_or_default();
    let to = LaneAddress::new(&bytes)?;
    let address = to_hex(rail.open()?.bytes());
    Ok((Answer::Opened { address, key: to_hex(rail.key.bytes()) }, to))
}

fn told(result: Result<(), Stuck>) -> Answer {
    match result {
        Ok(()) => Answer::Done { good: true },
        Err(stuck) => Answer::Failed { says: stuck.to_string(), advice: stuck.advice().into() },
    }
}
