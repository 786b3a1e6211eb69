//! Reads dumps: whole ones, and as much as there is of others.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::event::{Event, Header, Line, Peer, Ring, VERSION};

/// What could be read of one dump.
#[derive(Clone, Debug, PartialEq)]
pub struct File {
    /// Where it came from.
    pub path: PathBuf,
    /// Its first line.
    pub header: Header,
    /// Its events, each with the peer whose ring it was in.
    pub events: Vec<(Option<Arc<Peer>>, Event)>,
    /// Events that had been overwritten before.
    pub overwritten: u64,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
}

/// What is wrong with a dump of which the rest could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// There is no last line: its writer, its disk or a copy of it ended early.
    Truncated {
        /// So many lines there are.
        lines: u64,
    },
    /// A line cannot be read, and was left out.
    BadLine {
        /// Which, from 1.
        line: u64,
        /// Why.
        what: String,
    },
    /// There are more lines that cannot be read than are listed.
    MoreBadLines {
        /// How many more.
        lines: u64,
    },
    /// The file is longer than is read.
    TooLong {
        /// So much is.
        limit: u64,
    },
    /// The system refused to read on.
    BrokenOff {
        /// So many lines were read.
        lines: u64,
        /// Why.
        what: String,
    },
    /// Lines are missing, or are there twice.
    Incomplete {
        /// So many events could be read.
        events: u64,
        /// So many there should be.
        of: u64,
    },
    /// The dump is over, or another one begins in it, and the file goes on: what follows was not read.
    GoesOn {
        /// From this line on.
        line: u64,
    },
    /// As many events are held as may be.
    LeftOut {
        /// So many of this file are not.
        events: u64,
    },
}

/// Why nothing was read of a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The system refused.
    #[error("{}: {error}", path.display())]
    Os {
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The first line is not a dump's.
    #[error("{}: not a dump of the flight recorder: {what}", path.display())]
    NotADump {
        /// Which file.
        path: PathBuf,
        /// What is wrong with the line.
        what: String,
    },
    /// A later form of dumps.
    #[error("{}: version {version} of the form, where {VERSION} can be read: use the crossdock that wrote it", path.display())]
    Version {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { lines } => write!(f, "ends early, after {lines} lines"),
            Self::BadLine { line, what } => write!(f, "line {line} cannot be read: {what}"),
            Self::MoreBadLines { lines } => write!(f, "{lines} more lines cannot be read"),
            Self::TooLong { limit } => write!(f, "only the first {} MiB were read", limit >> 20),
            Self::BrokenOff { lines, what } => write!(f, "cannot be read after {lines} lines: {what}"),
            Self::Incomplete { events, of } => write!(f, "has {events} events where it had {of}"),
            Self::GoesOn { line } => {
                write!(f, "goes on with something else from line {line} on, which was not read")
            }
            Self::LeftOut { events } => {
                write!(
                    f,
                    "{events} of its events were left out, as there are too many: read fewer dumps at once"
                )
            }
        }
    }
}

/// Reads files, and of folders the files that end in `.jsonl`. Those that cannot be read do not keep the others.
pub fn read_paths(paths: &[PathBuf]) -> (Vec<File>, Vec<ReadError>) {
    let (mut files, mut errors) = (Vec::new(), Vec::new());
    for found in listed(paths) {
        match found.and_then(|path| read_file(&path)) {
            Ok(file) => files.push(file),
            Err(error) => errors.push(error),
        }
    }
    (files, errors)
}

/// The files that are meant by paths: themselves, and of folders those that end in `.jsonl`.
pub fn listed(paths: &[PathBuf]) -> Vec<Result<PathBuf, ReadError>> {
    let mut all = Vec::new();
    for path in paths {
        match files_of(path) {
            Ok(found) => all.extend(found.into_iter().map(Ok)),
            Err(error) => all.push(Err(ReadError::Os { path: path.clone(), error })),
        }
    }
    all
}

fn files_of(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !std::fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Reads one file.
pub fn read_file(path: &Path) -> Result<File, ReadError> {
    read(path, open(path)?)
}

/// Reads one dump; `path` is named in what is said of it.
pub fn read(path: &Path, from: impl BufRead) -> Result<File, ReadError> {
    let mut reader = Reader::begin(path, from)?;
    let mut events = Vec::new();
    while let Some((peer, event)) = reader.next() {
        events.push((peer, *event));
    }
    let header = reader.header.clone();
    let (overwritten, problems) = reader.end();
    Ok(File { path: path.to_owned(), header, events, overwritten, problems })
}

pub(crate) fn open(path: &Path) -> Result<BufReader<std::fs::File>, ReadError> {
    let opened = std::fs::File::open(path).map(BufReader::new);
    opened.map_err(|error| ReadError::Os { path: path.to_owned(), error })
}

/// A dump, event by event: [`next`](Self::next) until there is none, then [`end`](Self::end).
pub(crate) struct Reader<R> {
    pub header: Header,
    lines: Lines<R>,
    /// Whose events follow.
    peer: Option<Arc<Peer>>,
    overwritten: u64,
    events: u64,
    bad_lines: u64,
    /// How many events there were, as the last line says.
    of: Option<u64>,
    is_broken: bool,
    problems: Vec<Problem>,
}

impl<R: BufRead> Reader<R> {
    pub fn begin(path: &Path, from: R) -> Result<Self, ReadError> {
        let not_a_dump = |what: String| ReadError::NotADump { path: path.to_owned(), what };
        let mut lines = Lines { from: from.take(LONGEST_FILE_BYTES + 1), number: 0, bytes: Vec::new() };
        let first = lines.next().map_err(|error| ReadError::Os { path: path.to_owned(), error })?;
        let header = match first {
            None => return Err(not_a_dump("it is empty".into())),
            Some(line) => match line.and_then(parse) {
                Ok(Line::Header(header)) => header,
                Ok(_) => return Err(not_a_dump("it does not begin with a header".into())),
                Err(what) => return Err(not_a_dump(what)),
            },
        };
        if header.version != VERSION {
            return Err(ReadError::Version { path: path.to_owned(), version: header.version });
        }
        Ok(Self {
            header,
            lines,
            peer: None,
            overwritten: 0,
            events: 0,
            bad_lines: 0,
            of: None,
            is_broken: false,
            problems: Vec::new(),
        })
    }

    /// The next event, and the peer whose ring it was in.
    pub fn next(&mut self) -> Option<(Option<Arc<Peer>>, Box<Event>)> {
        loop {
            let line = match self.lines.next() {
                Ok(line) => line?.and_then(parse),
                Err(error) => {
                    self.is_broken = true;
                    let (lines, what) = (self.lines.number, error.to_string());
                    self.problems.push(Problem::BrokenOff { lines, what });
                    return None;
                }
            };
            match line {
                Ok(Line::Event(event)) => {
                    self.events += 1;
                    return Some((self.peer.clone(), event));
                }
                Ok(Line::Ring(Ring { peer, overwritten, .. })) => {
                    self.peer = peer.map(Arc::new);
                    self.overwritten = self.overwritten.saturating_add(overwritten);
                }
                Ok(Line::End { events }) => {
                    self.of = Some(events);
                    if let Ok(Some(_)) = self.lines.next() {
                        self.problems.push(Problem::GoesOn { line: self.lines.number });
                    }
                    return None;
                }
                Ok(Line::Header(_)) => {
                    self.problems.push(Problem::GoesOn { line: self.lines.number });
                    return None;
                }
                Ok(Line::Unknown) => {}
                Err(what) => {
                    // It may have begun another ring: whose the next events are is not known any more.
                    self.peer = None;
                    self.bad_lines += 1;
                    if self.bad_lines <= BAD_LINES_NAMED {
                        self.problems.push(Problem::BadLine { line: self.lines.number, what });
                    }
                }
            }
        }
    }

    /// How many events had been overwritten, and what is wrong with the dump.
    pub fn end(mut self) -> (u64, Vec<Problem>) {
        if self.bad_lines > BAD_LINES_NAMED {
            self.problems.push(Problem::MoreBadLines { lines: self.bad_lines - BAD_LINES_NAMED });
        }
        match self.of {
            // Lines that cannot be read have been named.
            Some(of) if self.events > of || self.events.saturating_add(self.bad_lines) < of => {
                self.problems.push(Problem::Incomplete { events: self.events, of });
            }
            None if self.lines.from.limit() == 0 => {
                self.problems.push(Problem::TooLong { limit: LONGEST_FILE_BYTES });
            }
            None if !self.is_broken => {
                self.problems.push(Problem::Truncated { lines: self.lines.number });
            }
            _ => {}
        }
        (self.overwritten, self.problems)
    }
}

struct Lines<R> {
    from: io::Take<R>,
    number: u64,
    bytes: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// The next line that is not empty; an error if it is longer than a line is.
    fn next(&mut self) -> io::Result<Option<Result<&[u8], String>>> {
        loop {
            self.bytes.clear();
            let length = (&mut self.from).take(LONGEST_LINE_BYTES).read_until(b'\n', &mut self.bytes)?;
            if length == 0 {
                return Ok(None);
            }
            self.number += 1;
            if length as u64 == LONGEST_LINE_BYTES && !self.bytes.ends_with(b"\n") {
                self.skip_line()?;
                return Ok(Some(Err(format!("longer than {LONGEST_LINE_BYTES} bytes"))));
            }
            if !self.bytes.trim_ascii().is_empty() {
                return Ok(Some(Ok(self.bytes.as_slice())));
            }
        }
    }

    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            let ahead = self.from.fill_buf()?;
            let (used, is_over) = match ahead.iter().position(|&byte| byte == b'\n') {
                Some(at) => (at + 1, true),
                None => (ahead.len(), ahead.is_empty()),
            };
            self.from.consume(used);
            if is_over {
                return Ok(());
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Line, String> {
    serde_json::from_slice(line).map_err(|error| error.to_string())
}

/// Longer than any folder's usual limit.
const LONGEST_FILE_BYTES: u64 = 256 << 20;
/// No line that is written is half as long.
const LONGEST_LINE_BYTES: u64 = 64 << 10;
const BAD_LINES_NAMED: u64 = 3;
