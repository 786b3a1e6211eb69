//! What two ports tell each other of their regions, beside the bytes of the region: see `docs/wire-cuda.md`.

use crossdock_host::{OfferForm, Payload};
use crossdock_transport::DownCause;

use crate::driver::{FabricHandle, IpcToken};
use crate::sharing::Within;

/// Where a peer's region is, as it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the host's memory, in the memfd that came with it.
    Host,
    /// On a GPU, in the physical piece whose descriptor came with it.
    Piece(Within),
    /// On a GPU, in the physical piece that has this fabric handle.
    Fabric(FabricHandle, Within),
    /// On a GPU, in the allocation that has this token. In the process that allocated it, it begins at `address`.
    Ipc { token: IpcToken, within: Within, address: u64 },
}

/// The forms of the offers.
pub(crate) const FORMS: &[OfferForm] = &[
    OfferForm { number: HOST, payload_bytes: 0, with_descriptor: true },
    OfferForm { number: PIECE, payload_bytes: 16, with_descriptor: true },
    OfferForm { number: FABRIC, payload_bytes: 80, with_descriptor: false },
    OfferForm { number: IPC, payload_bytes: 88, with_descriptor: false },
];

impl Place {
    pub fn form(&self) -> u8 {
        match self {
            Place::Host => HOST,
            Place::Piece(_) => PIECE,
            Place::Fabric(..) => FABRIC,
            Place::Ipc { .. } => IPC,
        }
    }

    pub fn payload(&self) -> Payload {
        let mut bytes = Vec::with_capacity(Payload::MAX_BYTES);
        match self {
            Place::Host => {}
            Place::Piece(within) => put(&mut bytes, within),
            Place::Fabric(handle, within) => {
                bytes.extend_from_slice(handle);
                put(&mut bytes, within);
            }
            Place::Ipc { token, within, address } => {
                bytes.extend_from_slice(&token.0);
                put(&mut bytes, within);
                bytes.extend_from_slice(&address.to_le_bytes());
            }
        }
        Payload::new(&bytes)
    }

    /// Reads an offer of a region of so many bytes, which has the length of its form; or says why the lane ends by it.
    pub fn read(form: u8, payload: &[u8], bytes: u64) -> Result<Place, DownCause> {
        let mut rest = Rest(payload);
        let place = match form {
            HOST => Some(Place::Host),
            PIECE => rest.within().map(Place::Piece),
            FABRIC => {
                rest.take().and_then(|handle| rest.within().map(|within| Place::Fabric(handle, within)))
            }
            IPC => rest.take().map(IpcToken).and_then(|token| {
                let within = rest.within()?;
                Some(Place::Ipc { token, within, address: u64::from_le_bytes(rest.take()?) })
            }),
            _ => None,
        };
        let within = match place {
            Some(Place::Piece(within) | Place::Fabric(_, within) | Place::Ipc { within, .. }) => Some(within),
            Some(Place::Host) => None,
            None => return Err(IMPOSSIBLE),
        };
        let fits = |within: Within| {
            within.offset.checked_add(bytes).is_some_and(|end| end <= within.whole_bytes)
                && isize::try_from(within.whole_bytes).is_ok()
        };
        match within.is_none_or(fits) && rest.0.is_empty() {
            true => place.ok_or(IMPOSSIBLE),
            false => Err(IMPOSSIBLE),
        }
    }
}

fn put(bytes: &mut Vec<u8>, within: &Within) {
    bytes.extend_from_slice(&within.offset.to_le_bytes());
    bytes.extend_from_slice(&within.whole_bytes.to_le_bytes());
}

/// What is left to be read.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn within(&mut self) -> Option<Within> {
        let (offset, whole_bytes) = (self.take()?, self.take()?);
        Some(Within { offset: u64::from_le_bytes(offset), whole_bytes: u64::from_le_bytes(whole_bytes) })
    }
}

const HOST: u8 = 0;
const PIECE: u8 = 1;
const FABRIC: u8 = 2;
const IPC: u8 = 3;

const IMPOSSIBLE: DownCause = DownCause::PeerMisbehaved { what: "announced a region at an impossible place" };

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes_64() -> impl Strategy<Value = [u8; 64]> {
        prop::collection::vec(any::<u8>(), 64).prop_map(|bytes| bytes.try_into().expect("64"))
    }

    /// Where a region of so many bytes may be.
    fn place(bytes: u64) -> impl Strategy<Value = Place> {
        let within = || {
            (0u64..1 << 40, 0u64..1 << 40)
                .prop_map(move |(offset, more)| Within { offset, whole_bytes: offset + bytes + more })
        };
        prop_oneof![
            Just(Place::Host),
            within().prop_map(Place::Piece),
            (bytes_64(), within()).prop_map(|(handle, within)| Place::Fabric(handle, within)),
            (bytes_64(), within(), any::<u64>()).prop_map(|(token, within, address)| Place::Ipc {
                token: IpcToken(token),
                within,
                address
            }),
        ]
    }

    proptest! {
        #[test]
        fn places_survive_the_journey((bytes, place) in (1u64..1 << 40).prop_flat_map(|bytes| (Just(bytes), place(bytes)))) {
            let form = FORMS.iter().find(|form| form.number == place.form()).expect("a form");
            let payload = place.payload();
            prop_assert_eq!(payload.len(), form.payload_bytes);
            prop_assert_eq!(Place::read(place.form(), &payload, bytes), Ok(place));
        }

        #[test]
        fn any_bytes_are_read_without_harm(form in any::<u8>(), payload in prop::collection::vec(any::<u8>(), 0..96), bytes in 1u64..) {
            if let Ok(Place::Piece(within) | Place::Fabric(_, within) | Place::Ipc { within, .. }) =
                Place::read(form, &payload, bytes)
            {
                prop_assert!(within.offset.checked_add(bytes).is_some_and(|end| end <= within.whole_bytes));
            }
        }

        /// Nothing is mapped beyond what is said to be there.
        #[test]
        fn a_region_beyond_its_piece_is_refused(offset in any::<u64>(), whole_bytes in any::<u64>(), bytes in 1u64..) {
            let fits = u128::from(offset) + u128::from(bytes) <= u128::from(whole_bytes.min(isize::MAX as u64));
            let place = Place::Piece(Within { offset, whole_bytes });
            let is_possible = fits && whole_bytes <= isize::MAX as u64;
            prop_assert_eq!(Place::read(place.form(), &place.payload(), bytes).is_ok(), is_possible);
        }
    }
}
