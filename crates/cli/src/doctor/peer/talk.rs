//! The lines that two doctors say to each other.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::rail::Rail;

/// What the asking side wants.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// The rails of the machine.
    Rails,
    /// A lane on one of them, to this address.
    Open { rail: usize, address: String },
    /// Whether the region holds what the seed makes.
    Verify { seed: u64 },
    /// So many immediates are coming; each is to be sent back.
    Echo { rounds: u32 },
    /// So many immediates are coming.
    Count { arrivals: u32 },
    /// The lane is no longer needed.
    Close,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Rails(Vec<Offer>),
    Opened {
        address: String,
        key: String,
    },
    /// Of a check, or of a round that is over.
    Done {
        good: bool,
    },
    Failed {
        says: String,
        advice: String,
    },
}

/// One rail.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    pub kind: String,
    pub name: String,
    pub reach: String,
}

/// A connection to the other doctor.
pub struct Talk {
    reader: BufReader<TcpStream>,
    /// What has come of the next line.
    line: Vec<u8>,
    /// How many questions were asked, or the number of the one that is answered.
    asked: u64,
    /// How long the other side is waited for.
    patience: Duration,
}

/// A question, or one of its answers, with the number of the question: what answers an earlier one is passed over.
#[derive(Serialize, Deserialize)]
struct Line<T> {
    number: u64,
    says: T,
}

impl Talk {
    /// Over a connection; the side that asks has less patience than the one that waits to be asked.
    pub fn new(stream: TcpStream, patience: Duration) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(ANSWER_PATIENCE))?;
        Ok(Self { reader: BufReader::new(stream), line: Vec::new(), asked: 0, patience })
    }

    /// Answers the question that was heard last.
    pub fn say(&mut self, answer: &Answer) -> io::Result<()> {
        self.send(answer)
    }

    fn send(&mut self, says: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_string(&Line { number: self.asked, says })?;
        text.push('\n');
        self.reader.get_mut().write_all(text.as_bytes())
    }

    /// The next question; `None` when the other side has gone.
    pub fn question(&mut self, rail: Option<&mut Rail>) -> io::Result<Option<Question>> {
        let Some(line) = self.hear(rail)? else { return Ok(None) };
        let line: Line<Question> = line;
        self.asked = line.number;
        Ok(Some(line.says))
    }

    /// The next line. Meanwhile the rail is polled, again and again: some ports send and take only then.
    fn hear<T: DeserializeOwned>(&mut self, rail: Option<&mut Rail>) -> io::Result<Option<T>> {
        self.reader.get_ref().set_nonblocking(true)?;
        let line = self.read(rail);
        self.reader.get_ref().set_nonblocking(false)?;
        line
    }

    fn read<T: DeserializeOwned>(&mut self, rail: Option<&mut Rail>) -> io::Result<Option<T>> {
        let (begun, mut rail) = (Instant::now(), rail);
        loop {
            // A line of rails is the longest, and far shorter than this.
            let room = LONGEST_LINE.saturating_sub(self.line.len() as u64);
            match io::Read::take(&mut self.reader, room).read_until(b'\n', &mut self.line) {
                Ok(_) if self.line.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.line);
                    return Ok(Some(serde_json::from_slice(&line)?));
                }
                Ok(_) if self.line.is_empty() => return Ok(None),
                Ok(_) => return Err(ErrorKind::UnexpectedEof.into()),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if begun.elapsed() > self.patience {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    match &mut rail {
                        Some(rail) => rail.poll(),
                        None => std::thread::sleep(Duration::from_millis(1)),
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub fn ask(&mut self, question: &Question, rail: Option<&mut Rail>) -> io::Result<Answer> {
        self.asked += 1;
        self.send(question)?;
        self.answer(rail)
    }

    /// The next answer to the last question.
    pub fn answer(&mut self, mut rail: Option<&mut Rail>) -> io::Result<Answer> {
        loop {
            let line: Option<Line<Answer>> = self.hear(rail.as_deref_mut())?;
            match line {
                None => return Err(ErrorKind::UnexpectedEof.into()),
                Some(line) if line.number == self.asked => return Ok(line.says),
                Some(_) => {}
            }
        }
    }
}

pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `None` of what is no hexadecimal text.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2))?;
    Some(digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect())
}

/// How long a rail is waited for.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long the side that asks waits for an answer, before which the other may have to wait for a rail several times.
pub const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// How long the side that answers waits for a question.
pub const QUESTION_PATIENCE: Duration = Duration::from_secs(120);
const LONGEST_LINE: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_text_is_read_as_it_was_written() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
        assert_eq!(from_hex("abc"), None);
        assert_eq!(from_hex("zz"), None);
    }
}
