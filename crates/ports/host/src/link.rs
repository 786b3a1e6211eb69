//! The Unix sockets of a port: packets with descriptors, never waiting.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::address::{Address, Secret};
use crate::medium::{Kind, OfferForm};
use crate::message::{MAX_BYTES, MAX_DESCRIPTORS, Message};

/// Where a port is found.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    forms: &'static [OfferForm],
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Link {
    socket: OwnedFd,
    /// What is told of regions there.
    forms: &'static [OfferForm],
}

/// How sending went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The packet is on its way.
    Yes,
    /// It does not fit now.
    Full,
    /// Nobody will read it.
    Gone(Errno),
}

/// What a look at the socket found.
#[derive(Debug)]
pub(crate) enum Received {
    /// A packet that can be read, with as many descriptors as its kind brings.
    Message(Message, [Option<OwnedFd>; MAX_DESCRIPTORS]),
    /// No packet now.
    Nothing,
    /// No packet any more.
    End,
    /// The socket failed.
    Broken { call: &'static str, errno: Errno },
    /// A packet that no port of this version sends.
    Nonsense,
}

impl Listener {
    pub(crate) fn bind(kind: &'static Kind, socket: &Secret) -> Result<Self, Errno> {
        let listener = open()?;
        rustix::net::bind(&listener, &socket_address(kind, socket)?)?;
        rustix::net::listen(&listener, BACKLOG)?;
        Ok(Self { socket: listener, forms: kind.offers })
    }

    /// The next connection, if one waits.
    pub(crate) fn accept(&self) -> Result<Option<Link>, Errno> {
        match rustix::net::accept_with(&self.socket, FLAGS) {
            Ok(socket) => Ok(Some(Link { socket, forms: self.forms })),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}

impl Link {
    /// Connects to a port. [`Errno::AGAIN`]: too many others do so at the moment.
    pub(crate) fn dial(kind: &'static Kind, socket: &Secret) -> Result<Self, Errno> {
        let link = open()?;
        rustix::net::connect(&link, &socket_address(kind, socket)?)?;
        Ok(Self { socket: link, forms: kind.offers })
    }

    pub(crate) fn send(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> Sent {
        debug_assert_eq!(descriptors.len(), message.descriptors(), "{message:?}");
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            let pushed = control.push(SendAncillaryMessage::ScmRights(descriptors));
            debug_assert!(pushed, "there is space for as many descriptors as a message has");
        }
        let packet = message.encode();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            return match rustix::net::sendmsg(
                &self.socket,
                &[IoSlice::new(packet.written())],
                &mut control,
                flags,
            ) {
                Ok(_) => Sent::Yes,
                Err(Errno::INTR) => continue,
                // The last one: too many descriptors of this user are on their way, in all sockets together.
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM | Errno::TOOMANYREFS) => Sent::Full,
                Err(errno) => Sent::Gone(errno),
            };
        }
    }

    /// Lets a last packet through although the socket may be full.
    pub(crate) fn make_room(&self) {
        // The kernel doubles what is asked for and caps it: as much as possible is what is wanted.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&self.socket, 1 << 20);
    }

    pub(crate) fn receive(&self) -> Received {
        let mut bytes = [0; MAX_BYTES + 1];
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut resets = 0;
        let packet = loop {
            match rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)
            {
                Ok(packet) => break packet,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Received::Nothing,
                // Said once, when the peer left packets of ours unread; what it sent before is still to be read.
                Err(Errno::CONNRESET) if resets == 0 => resets = 1,
                Err(errno) => return Received::Broken { call: "recvmsg", errno },
            }
        };
        let mut descriptors = [const { None }; MAX_DESCRIPTORS];
        let mut count = 0;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                for fd in rights {
                    // More than any message brings are closed here, and the message is refused below.
                    if let Some(place) = descriptors.get_mut(count) {
                        *place = Some(fd);
                    }
                    count += 1;
                }
            }
        }
        if packet.flags.contains(ReturnFlags::CTRUNC) {
            // The kernel drops descriptors that this process has no number for.
            return Received::Broken { call: "recvmsg(SCM_RIGHTS)", errno: Errno::MFILE };
        }
        if packet.bytes == 0 {
            return Received::End;
        }
        match bytes.get(..packet.bytes).and_then(|packet| Message::decode(packet, self.forms)) {
            Some(message) if message.descriptors() == count => Received::Message(message, descriptors),
            _ => Received::Nonsense,
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn socket_address(kind: &Kind, socket: &Secret) -> Result<SocketAddrUnix, Errno> {
    SocketAddrUnix::new_abstract_name(Address::socket_name(kind, socket).as_bytes())
}

fn open() -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);
/// As many as the system allows; it caps this number.
const BACKLOG: i32 = 4096;
const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doorbell::Doorbell;
    use crate::message::{Described, Payload};

    static KIND: Kind = Kind {
        name: "test",
        address_magic: *b"ta\x00\x01",
        key_magic: *b"tk\x00\x01",
        offers: &[OfferForm { number: 0, payload_bytes: 8, with_descriptor: true }],
    };

    fn region() -> Message {
        let offer = Described { form: 0, payload: Payload::new(&[0; 8]), with_descriptor: true };
        Message::Region { number: 3, bytes: 4096, offer }
    }

    fn pair() -> (Link, Link) {
        let secret = crate::address::secret().expect("the kernel has entropy");
        let listener = Listener::bind(&KIND, &secret).expect("an abstract name can be bound");
        let dialed = Link::dial(&KIND, &secret).expect("the listener is there");
        let accepted = listener.accept().expect("accept works").expect("a connection waits");
        (dialed, accepted)
    }

    #[test]
    fn messages_arrive_with_their_descriptors() {
        let (one, other) = pair();
        assert!(matches!(other.receive(), Received::Nothing));
        let bell = Doorbell::new().expect("an eventfd");
        let region = region();
        assert_eq!(one.send(&region, &[bell.as_fd()]), Sent::Yes);
        assert_eq!(one.send(&Message::Announced, &[]), Sent::Yes);
        assert!(matches!(other.receive(), Received::Message(found, [Some(_), None]) if found == region));
        assert!(matches!(other.receive(), Received::Message(Message::Announced, [None, None])));
        drop(one);
        assert!(matches!(other.receive(), Received::End));
    }

    #[test]
    fn what_was_sent_before_a_reset_is_still_read() {
        let (one, other) = pair();
        assert_eq!(other.send(&Message::Announced, &[]), Sent::Yes);
        assert_eq!(one.send(&Message::Closed, &[]), Sent::Yes);
        drop(one);
        assert!(matches!(other.receive(), Received::Message(Message::Closed, _)));
        assert!(matches!(other.receive(), Received::End));
    }

    #[test]
    fn wrong_packets_are_nonsense() {
        let (one, other) = pair();
        let raw = |bytes: &[u8]| rustix::net::send(&one, bytes, SendFlags::empty()).expect("sent");
        for packet in [&[0xff][..], &[4, 0], &[1; 200], &[3, 0, 1]] {
            raw(packet);
            assert!(matches!(other.receive(), Received::Nonsense), "{packet:?}");
        }
        // A region without its descriptor.
        raw(region().encode().written());
        assert!(matches!(other.receive(), Received::Nonsense));
    }

    #[test]
    fn a_full_socket_has_room_for_one_last_packet() {
        let (one, other) = pair();
        while one.send(&Message::Announced, &[]) == Sent::Yes {}
        assert_eq!(one.send(&Message::Closed, &[]), Sent::Full);
        one.make_room();
        assert_eq!(one.send(&Message::Closed, &[]), Sent::Yes);
        drop(one);
        let mut last = None;
        while let Received::Message(message, _) = other.receive() {
            last = Some(message);
        }
        assert_eq!(last, Some(Message::Closed));
    }
}
