//! Proof of a shared key, both ways, and what is derived from it.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crossdock_transport::LaneTags;

/// Whether peers must prove a shared key.
#[derive(Clone, PartialEq, Eq)]
pub enum Auth {
    /// Both sides prove that they know this key, by HMAC-SHA256 over the handshake. It is not empty, and should be
    /// 32 random bytes.
    PreSharedKey(Vec<u8>),
    /// Anybody who can reach the control address may connect. To be asked for explicitly.
    Off,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Auth::PreSharedKey(_) => "PreSharedKey(..)",
            Auth::Off => "Off",
        })
    }
}

impl Auth {
    pub(crate) fn is_on(&self) -> bool {
        matches!(self, Auth::PreSharedKey(_))
    }

    fn key(&self) -> &[u8] {
        match self {
            Auth::PreSharedKey(key) => key,
            Auth::Off => &[],
        }
    }

    /// What one side shows the other: it covers all that both have said so far.
    pub(crate) fn proof(&self, by: Side, transcript: &[&[u8]]) -> [u8; 32] {
        let label: &[u8] = match by {
            Side::Dialer => b"crossdock dialer",
            Side::Acceptor => b"crossdock acceptor",
        };
        mac(self.key(), std::iter::once(label).chain(transcript.iter().copied()))
    }

    /// The key of one session, which neither side chose alone.
    pub(crate) fn session_key(&self, transcript: &[&[u8]]) -> SessionKey {
        SessionKey(mac(
            self.key(),
            std::iter::once(&b"crossdock session"[..]).chain(transcript.iter().copied()),
        ))
    }
}

/// Which end of a control stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Dialer,
    Acceptor,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Dialer => Side::Acceptor,
            Side::Acceptor => Side::Dialer,
        }
    }

    fn byte(self) -> [u8; 1] {
        [matches!(self, Side::Dialer) as u8]
    }
}

/// Derived from the shared key and both nonces; lane tags and heartbeat tokens come from it.
#[derive(Clone)]
pub(crate) struct SessionKey([u8; 32]);

impl SessionKey {
    /// The tags of the `nth` lane of a number.
    pub fn lane_tags(&self, slot: u8, nth: u32, us: Side) -> LaneTags {
        let tag = |side: Side| mac(&self.0, [&b"lane"[..], &[slot], &nth.to_le_bytes(), &side.byte()]);
        LaneTags { ours: tag(us), theirs: tag(us.other()) }
    }

    /// The tokens of the heartbeats that `us` sends and expects.
    pub fn pulse_tokens(&self, us: Side) -> (u64, u64) {
        let token = |side: Side| {
            let mac = mac(&self.0, [&b"pulse"[..], &side.byte()]);
            u64::from_le_bytes(mac[..8].try_into().expect("8 of 32 bytes"))
        };
        (token(us), token(us.other()))
    }
}

/// Equal, in a time that does not depend on where they differ.
pub(crate) fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// HMAC-SHA256 over parts, each with its length before it, so that no two lists of parts look the same.
pub(crate) fn mac<'a>(key: &[u8], parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}
