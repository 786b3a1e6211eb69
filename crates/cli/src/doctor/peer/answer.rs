//! The machine that is asked.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use crossdock_transport::LaneAddress;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::rail::{self, Rail, Stuck};
use super::talk::{Answer, QUESTION_PATIENCE, Question, Talk, from_hex, to_hex};
use crate::output::say;

/// Answers one doctor of another machine, and ends when that has gone.
pub fn answer(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    say!("waiting at {} for `crossdock doctor --peer` of another machine", listener.local_addr()?);
    let (stream, peer) = accept(&listener)?;
    say!("{peer} asks");
    let (mut rails, refused) = rail::all(stream.local_addr()?.ip());
    for (name, error) in refused {
        say!("{name} cannot be opened: {error}");
    }
    let mut talk = Talk::new(stream, QUESTION_PATIENCE)?;
    let mut at = 0;
    while let Some(question) = talk.question(rails.get_mut(at))? {
        if let Question::Open { rail, .. } = question {
            at = rail;
        }
        match (question, rails.get_mut(at)) {
            (Question::Rails, _) => talk.say(&Answer::Rails(rails.iter().map(Rail::offer).collect()))?,
            (_, None) => {
                let says = format!("there is no rail {at} here");
                talk.say(&Answer::Failed { says, advice: "run the same version on both sides".into() })?;
            }
            (Question::Open { address, .. }, Some(rail)) => match open(rail, &address) {
                Ok((answer, to)) => {
                    talk.say(&answer)?;
                    // The other side connects when it has heard the address.
                    let connected = rail.connect(&to, false).map_err(Stuck::from);
                    talk.say(&told(connected.and_then(|()| rail.wait_up())))?;
                }
                Err(stuck) => talk.say(&told(Err(stuck)))?,
            },
            (Question::Verify { seed }, Some(rail)) => talk.say(&Answer::Done { good: rail.holds(seed) })?,
            (Question::Echo { rounds }, Some(rail)) => {
                let begun = rail.arrived;
                talk.say(&Answer::Done { good: true })?;
                let result = (1..=u64::from(rounds)).try_for_each(|round| {
                    rail.wait(|rail| rail.arrived >= begun + round)?;
                    rail.notify()
                });
                talk.say(&told(result))?;
            }
            (Question::Count { arrivals }, Some(rail)) => {
                let until = u64::from(arrivals);
                talk.say(&told(rail.wait(|rail| rail.arrived >= until)))?;
            }
            (Question::Close, Some(rail)) => {
                rail.close();
                talk.say(&Answer::Done { good: true })?;
            }
        }
    }
    Ok(())
}

/// Whoever comes first, if that is soon enough.
fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let timeout = Timespec::try_from(LISTEN_TIMEOUT).expect("a time that fits");
    match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&timeout))? {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, "nobody has asked for half an hour")),
        _ => listener.accept(),
    }
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

/// How long the doctor waits for the other: somebody has to type there.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(30 * 60);
