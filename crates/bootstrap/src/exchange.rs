//! One HTTP/1.1 exchange over a blocking socket, by a deadline: connect, send, receive, close.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::error::{Error, ForeignAnswer, Stage};
use crate::lookup::Lookup;

/// The beginning of a request, to which further header lines may be added.
pub(crate) fn request_head(method: &str, path: &str, server: &Lookup) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n{HEADERS}", server.name())
}

/// When a call must be over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    end: Instant,
    time: Duration,
}

impl Deadline {
    /// This deadline, or `time` from now if that is earlier.
    pub(crate) fn within(self, time: Duration) -> Deadline {
        let sooner = Deadline::after(time);
        if sooner.end < self.end { sooner } else { self }
    }

    pub(crate) fn after(time: Duration) -> Deadline {
        let now = Instant::now();
        // An absurdly long time would overflow the clock; a year is as good as for ever.
        Deadline { end: now + time.min(A_YEAR), time }
    }

    /// The time that is left, never zero.
    pub(crate) fn remaining(&self) -> Option<Duration> {
        self.end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    pub(crate) fn end(&self) -> Instant {
        self.end
    }

    /// How long there was when it was set.
    pub(crate) fn time(&self) -> Duration {
        self.time
    }

    pub(crate) fn time_ms(&self) -> u64 {
        u64::try_from(self.time.as_millis()).unwrap_or(u64::MAX)
    }
}

/// A server's answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

/// Sends one request on a connection of its own and takes the answer. A connection kept open would save a
/// round trip per renewal, and would cost telling a server that closed it from one that is gone.
pub(crate) fn exchange(
    server: &Lookup,
    request: &[u8],
    body_limit: usize,
    deadline: Deadline,
) -> Result<Answer, Error> {
    exchange_until(server, request, body_limit, deadline, |_| false)
}

/// The same, and an answer that comes in chunks is left when the part that has come is enough.
pub(crate) fn exchange_until(
    server: &Lookup,
    request: &[u8],
    body_limit: usize,
    deadline: Deadline,
    enough: impl Fn(&[u8]) -> bool,
) -> Result<Answer, Error> {
    let failed = |stage| {
        move |source: io::Error| {
            let server = server.name().to_owned();
            if source.kind() == io::ErrorKind::TimedOut && deadline.remaining().is_none() {
                Error::Deadline { server, stage, time_ms: deadline.time_ms() }
            } else {
                Error::Unreachable { server, stage, source }
            }
        }
    };
    let addresses = server.addresses(deadline).map_err(failed(Stage::Lookup))?;
    let stream = connect(&addresses, deadline).map_err(failed(Stage::Connect))?;
    let mut stream = Timed { stream, deadline };
    stream.write_all(request).map_err(failed(Stage::Send))?;
    receive(&mut stream, body_limit, &enough).map_err(|fault| match fault {
        Fault::Stream(source) => failed(Stage::Receive)(source),
        Fault::Foreign(source) => Error::Foreign { server: server.name().to_owned(), source },
    })
}

/// Tries one address after the other, each with its share of the time that is left.
fn connect(addresses: &[SocketAddr], deadline: Deadline) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for (index, address) in addresses.iter().enumerate() {
        let left = (addresses.len() - index) as u32;
        let time = deadline.remaining().ok_or(io::ErrorKind::TimedOut)? / left;
        match TcpStream::connect_timeout(address, time.max(Duration::from_micros(1))) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A socket whose every wait ends by the deadline.
struct Timed {
    stream: TcpStream,
    deadline: Deadline,
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.remaining().ok_or(io::ErrorKind::TimedOut)?;
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer).map_err(timed_out)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.deadline.remaining().ok_or(io::ErrorKind::TimedOut)?;
        self.stream.set_write_timeout(Some(left))?;
        self.stream.write(bytes).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket with a time-out reports `EAGAIN` when it is over.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

enum Fault {
    Stream(io::Error),
    Foreign(ForeignAnswer),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        Fault::Stream(error)
    }
}

impl From<ForeignAnswer> for Fault {
    fn from(answer: ForeignAnswer) -> Fault {
        Fault::Foreign(answer)
    }
}

/// How an answer tells where its body ends. The server tells the length; a proxy may change that.
enum Framing {
    Length(usize),
    Chunks,
    End,
}

fn receive(
    source: &mut impl Read,
    body_limit: usize,
    enough: &impl Fn(&[u8]) -> bool,
) -> Result<Answer, Fault> {
    let mut bytes = Vec::new();
    let (status, framing) = loop {
        match head(&bytes)? {
            Some((length, 100..=199, _)) => drop(bytes.drain(..length)),
            Some((length, status, framing)) => {
                bytes.drain(..length);
                break (status, framing);
            }
            None if bytes.len() > HEAD_BYTES_MAX => {
                return Err(ForeignAnswer::Head { limit: HEAD_BYTES_MAX }.into());
            }
            None => more(source, &mut bytes)?.or_cut_off()?,
        }
    };
    let too_large = || Fault::Foreign(ForeignAnswer::Body { limit: body_limit });
    match framing {
        Framing::Length(length) if length > body_limit => return Err(too_large()),
        Framing::Length(length) => {
            while bytes.len() < length {
                more(source, &mut bytes)?.or_cut_off()?;
            }
            bytes.truncate(length);
        }
        Framing::End => {
            while bytes.len() <= body_limit && more(source, &mut bytes)? == More::Bytes {}
            if bytes.len() > body_limit {
                return Err(too_large());
            }
        }
        Framing::Chunks => bytes = chunks(source, bytes, body_limit, enough)?,
    }
    Ok(Answer { status, body: bytes })
}

/// Reads a head if all of it is there: its length, the status, and how the body ends.
fn head(bytes: &[u8]) -> Result<Option<(usize, u16, Framing)>, ForeignAnswer> {
    let mut headers = [httparse::EMPTY_HEADER; HEAD_LINES_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(ForeignAnswer::NotHttp),
    };
    let status = response.code.ok_or(ForeignAnswer::NotHttp)?;
    let mut framing = if matches!(status, 204 | 304) { Framing::Length(0) } else { Framing::End };
    for header in &*response.headers {
        let value = std::str::from_utf8(header.value).unwrap_or("").trim();
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") {
                return Err(ForeignAnswer::Length);
            }
            framing = Framing::Chunks;
            break;
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            let length = value.parse().map_err(|_| ForeignAnswer::Length)?;
            match framing {
                Framing::Length(before) if before != length => return Err(ForeignAnswer::Length),
                _ => framing = Framing::Length(length),
            }
        }
    }
    Ok(Some((length, status, framing)))
}

fn chunks(
    source: &mut impl Read,
    mut bytes: Vec<u8>,
    body_limit: usize,
    enough: &impl Fn(&[u8]) -> bool,
) -> Result<Vec<u8>, Fault> {
    let mut body = Vec::new();
    loop {
        let (line, size) = match httparse::parse_chunk_size(&bytes) {
            Ok(httparse::Status::Complete(parsed)) => parsed,
            Ok(httparse::Status::Partial) if bytes.len() <= CHUNK_LINE_BYTES_MAX => {
                more(source, &mut bytes)?.or_cut_off()?;
                continue;
            }
            _ => return Err(ForeignAnswer::Length.into()),
        };
        // Trailers say nothing that is needed, and the connection is closed after this.
        if size == 0 {
            return Ok(body);
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > body_limit - body.len() {
            return Err(ForeignAnswer::Body { limit: body_limit }.into());
        }
        let end = line + size;
        while bytes.len() < end + CRLF.len() {
            more(source, &mut bytes)?.or_cut_off()?;
        }
        if &bytes[end..end + CRLF.len()] != CRLF {
            return Err(ForeignAnswer::Length.into());
        }
        body.extend_from_slice(&bytes[line..end]);
        bytes.drain(..end + CRLF.len());
        if enough(&body) {
            return Ok(body);
        }
    }
}

/// What one read brought.
#[derive(PartialEq, Eq)]
enum More {
    Bytes,
    End,
}

impl More {
    /// For a place where the answer is not complete.
    fn or_cut_off(self) -> io::Result<()> {
        match self {
            More::Bytes => Ok(()),
            More::End => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn more(source: &mut impl Read, bytes: &mut Vec<u8>) -> io::Result<More> {
    let mut buffer = [0; 16 * 1024];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return Ok(More::End),
            Ok(count) => {
                bytes.extend_from_slice(&buffer[..count]);
                return Ok(More::Bytes);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

const HEADERS: &str = concat!(
    "Connection: close\r\nAccept: application/json\r\nUser-Agent: crossdock/",
    env!("CARGO_PKG_VERSION"),
    "\r\n"
);
const A_YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
const HEAD_BYTES_MAX: usize = 16 * 1024;
const HEAD_LINES_MAX: usize = 64;
const CHUNK_LINE_BYTES_MAX: usize = 1024;
const CRLF: &[u8] = b"\r\n";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Gives its bytes out a few at a time.
    struct Dribble<'a> {
        bytes: &'a [u8],
        step: usize,
    }

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let (now, later) = self.bytes.split_at(self.step.min(buffer.len()).min(self.bytes.len()));
            buffer[..now.len()].copy_from_slice(now);
            self.bytes = later;
            Ok(now.len())
        }
    }

    fn received(bytes: &[u8], step: usize, body_limit: usize) -> Result<(u16, String), String> {
        match receive(&mut Dribble { bytes, step }, body_limit, &|_| false) {
            Ok(answer) => Ok((answer.status, String::from_utf8_lossy(&answer.body).into_owned())),
            Err(Fault::Stream(error)) => Err(error.kind().to_string()),
            Err(Fault::Foreign(error)) => Err(error.to_string()),
        }
    }

    const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n";

    #[test]
    fn each_framing_of_a_body_is_understood_whatever_the_reads() {
        for step in [1, 2, 3, 7, 1000] {
            for (answer, body) in [
                ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello, rest".to_owned(), "hello"),
                ("HTTP/1.0 200 OK\r\n\r\nhello".to_owned(), "hello"),
                (
                    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello".to_owned(),
                    "hello",
                ),
                (format!("{CHUNKED}2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"), "hello"),
                ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned(), ""),
            ] {
                assert_eq!(received(answer.as_bytes(), step, 5), Ok((200, body.to_owned())), "{answer}");
            }
            assert_eq!(received(b"HTTP/1.1 204 No\r\n\r\nx", step, 5), Ok((204, String::new())));
        }
    }

    #[test]
    fn an_answer_without_an_end_is_left_when_enough_has_come() {
        let endless = format!("{CHUNKED}2\r\na\n\r\n4\r\nb\nc\n\r\n1\r\n");
        for step in [1, 4, 1000] {
            let mut source = Dribble { bytes: endless.as_bytes(), step };
            let answer = receive(&mut source, 100, &|body| body.ends_with(b"c\n"));
            assert!(matches!(answer, Ok(Answer { status: 200, body }) if body == b"a\nb\nc\n"));
        }
    }

    #[test]
    fn an_answer_that_breaks_off_is_no_answer() {
        for whole in [
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello".to_owned(),
            format!("{CHUNKED}5\r\nhello\r\n0\r\n"),
        ] {
            for length in 0..whole.len() {
                let cut = received(&whole.as_bytes()[..length], 3, 5);
                assert_eq!(cut, Err("unexpected end of file".to_owned()), "{:?}", &whole[..length]);
            }
        }
    }

    #[test]
    fn limits_and_framing_are_held() {
        let endless_head = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(40_000));
        let lines = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(65));
        for (answer, part) in [
            ("SSH-2.0-OpenSSH_9.2\r\n", "not HTTP"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhello!", "more than 5 bytes"),
            ("HTTP/1.1 200 OK\r\n\r\nhello!", "more than 5 bytes"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 4\r\n\r\nhello", "length"),
            ("HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\nhello", "length"),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nhello", "length"),
            (&format!("{CHUNKED}3\r\nhel\r\n3\r\nlo!\r\n0\r\n\r\n"), "more than 5 bytes"),
            (&format!("{CHUNKED}ffffffffffffffff\r\n"), "more than 5 bytes"),
            (&format!("{CHUNKED}10000000000000000\r\n"), "length"),
            (&format!("{CHUNKED}2\r\nhello\r\n"), "length"),
            (&format!("{CHUNKED}zwei\r\n"), "length"),
            (&endless_head, "head has more than"),
            (&lines, "not HTTP"),
        ] {
            let refused = received(answer.as_bytes(), 100, 5).unwrap_err();
            assert!(refused.contains(part), "{answer:.60}: {refused}");
        }
    }

    #[test]
    fn each_address_of_a_name_is_tried() {
        let [dead, live] = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let addresses = [&dead, &live].map(|listener| listener.local_addr().unwrap());
        drop(dead);
        let deadline = Deadline::after(Duration::from_secs(5));
        assert_eq!(connect(&addresses, deadline).unwrap().peer_addr().unwrap(), addresses[1]);
        let refused = connect(&addresses[..1], deadline).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect(&[], deadline).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn an_address_that_does_not_answer_leaves_time_for_the_next() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let _entered = runtime.enter();
        let full = tokio::net::TcpSocket::new_v4().unwrap();
        full.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let full = full.listen(1).unwrap();
        let live = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses = [full.local_addr().unwrap(), live.local_addr().unwrap()];
        // Nobody accepts here, and when the queue is full the kernel does not answer any more.
        let short = Duration::from_millis(50);
        let mut queue = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&addresses[0], short) {
            queue.push(stream);
            assert!(queue.len() < 100, "a queue of one does not fill");
        }
        let stream = connect(&addresses, Deadline::after(short * 8)).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), addresses[1]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_a_fault(
            start in prop_oneof![Just(""), Just("HTTP/1.1 200 OK\r\n"), Just(CHUNKED)],
            rest in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                "([0-9a-f]{0,3}\r\n[a-z]{0,3}\r\n){0,5}".prop_map(String::into_bytes),
            ],
            step in 1usize..50,
        ) {
            let bytes = [start.as_bytes(), &rest].concat();
            if let Ok(answer) = receive(&mut Dribble { bytes: &bytes, step }, 64, &|body| body.ends_with(b"zz")) {
                prop_assert!(answer.body.len() <= 64);
            }
        }
    }
}
