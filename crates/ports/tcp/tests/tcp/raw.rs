//! A peer that is not a port: it speaks the wire format by hand, as `docs/wire-tcp.md` describes it.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use crossdock_tcp::TcpOptions;
use crossdock_transport::{Event, GrantId, LaneAddress, LaneTags, Port};

use crate::common::{End, TAG_A, TAG_B, until};

pub const HELLO_BYTES: usize = 96;
pub const HEAD_BYTES: usize = 40;

/// One end that is a port, and a bare connection in the place of the other end.
pub struct Raw {
    pub end: End,
    pub socket: TcpStream,
}

/// The head of a frame; every field can be set to anything.
#[derive(Clone, Copy, Default)]
pub struct Head {
    pub kind: u8,
    pub flags: u8,
    pub pages: u16,
    pub word: u32,
    pub grant: u32,
    pub region: u32,
    pub offset: u64,
    pub stride: u64,
    pub piece: u64,
}

impl Head {
    pub const WRITE: u8 = 1;
    pub const READ: u8 = 2;
    pub const REPLY: u8 = 3;
    pub const NOTIFY: u8 = 4;
    pub const CLOSE: u8 = 5;

    /// A write of a span, with an immediate.
    pub fn write(grant: GrantId, region: u32, offset: u64, bytes: u64, imm: u32) -> Self {
        let (kind, flags, grant) = (Self::WRITE, 1, grant.bits());
        Self { kind, flags, word: imm, grant, region, offset, piece: bytes, ..Self::default() }
    }

    pub fn notify(imm: u32) -> Self {
        Self { kind: Self::NOTIFY, word: imm, ..Self::default() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.kind, self.flags];
        bytes.extend(self.pages.to_le_bytes());
        for word in [self.word, self.grant, self.region] {
            bytes.extend(word.to_le_bytes());
        }
        for long in [self.offset, self.stride, self.piece] {
            bytes.extend(long.to_le_bytes());
        }
        assert_eq!(bytes.len(), HEAD_BYTES);
        bytes
    }
}

pub fn hello(from: &[u8; 16], to: &[u8; 16], tag: &[u8; 32]) -> Vec<u8> {
    let mut bytes = b"xdlane\0\x01".to_vec();
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(4u32.to_le_bytes());
    bytes.extend(from);
    bytes.extend(to);
    bytes.extend(tag);
    bytes.extend(99u64.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    assert_eq!(bytes.len(), HELLO_BYTES);
    bytes
}

/// An address as a port writes it.
pub fn address(to: SocketAddr, cookie: [u8; 16]) -> LaneAddress {
    let IpAddr::V4(ip) = to.ip() else { panic!("the tests use IPv4") };
    let mut bytes = b"xdTA\x04\0".to_vec();
    bytes.extend(to.port().to_le_bytes());
    bytes.extend(ip.octets());
    bytes.extend([0; 12]);
    bytes.extend(cookie);
    LaneAddress::new(&bytes).unwrap()
}

/// Where a lane is dialled, and its cookie.
pub fn parse(address: &LaneAddress) -> (SocketAddr, [u8; 16]) {
    let bytes = address.bytes();
    let port = u16::from_le_bytes([bytes[6], bytes[7]]);
    let ip = Ipv4Addr::new(bytes[8], bytes[9], bytes[10], bytes[11]);
    (SocketAddr::from((ip, port)), bytes[24..40].try_into().unwrap())
}

/// The cookie of a dialler is smaller than any random one, that of a listener larger.
pub const DIALS: [u8; 16] = [0; 16];
pub const LISTENS: [u8; 16] = [255; 16];

impl Raw {
    /// A lane that is up: the raw side has dialled.
    pub fn new(bytes: usize) -> Self {
        Self::with(TcpOptions::default(), bytes)
    }

    pub fn with(options: TcpOptions, bytes: usize) -> Self {
        let mut end = End::open(options, bytes);
        let (to, cookie) = parse(&end.address);
        let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
        end.port.connect(end.lane, &address(nobody, DIALS), &tags()).unwrap();
        let mut socket = TcpStream::connect(to).unwrap();
        socket.write_all(&hello(&DIALS, &cookie, &TAG_A)).unwrap();
        until("the lane is up", || {
            end.poll();
            !end.events.is_empty()
        });
        assert_eq!(end.events, [Event::Up { lane: end.lane }]);
        end.events.clear();
        let mut answer = [0; HELLO_BYTES];
        socket.read_exact(&mut answer).unwrap();
        assert_eq!(answer[16..80], hello(&cookie, &DIALS, &TAG_B)[16..80]);
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self { end, socket }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub fn until(&mut self, what: &str, mut done: impl FnMut(&End) -> bool) {
        until(what, || {
            self.end.poll();
            done(&self.end)
        });
    }
}

pub fn tags() -> LaneTags {
    LaneTags { ours: TAG_B, theirs: TAG_A }
}

/// A listener in the place of a port, and its address with the cookie that makes the port dial.
pub fn listener() -> (TcpListener, LaneAddress) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = address(listener.local_addr().unwrap(), LISTENS);
    (listener, address)
}
