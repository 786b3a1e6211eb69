//! Which memory is registered where, and how a peer is told.

use std::collections::BTreeMap;

use crate::RegisterError;

/// Registered memory by where it begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    stretches: BTreeMap<u64, Stretch>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub bytes: u64,
    /// The region that it is.
    pub region: u32,
}

/// A side has at most so many; what it tells of them fits into a message of the handshake.
pub(crate) const MOST_STRETCHES: usize = 2048;

const VERSION: u32 = 0x7866_0001;

impl Table {
    pub fn len(&self) -> usize {
        self.stretches.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, Stretch)> {
        self.stretches.iter().map(|(&address, &stretch)| (address, stretch))
    }

    /// Whether it could be put in.
    pub fn check(&self, address: u64, bytes: u64) -> Result<(), RegisterError> {
        if self.len() >= MOST_STRETCHES {
            return Err(RegisterError::TooMany(self.len()));
        }
        let end = address.saturating_add(bytes);
        match self.stretches.range(..end).next_back() {
            Some((&other, stretch)) if other.saturating_add(stretch.bytes) > address => {
                Err(RegisterError::Overlaps { address, bytes, other })
            }
            _ => Ok(()),
        }
    }

    pub fn put(&mut self, address: u64, stretch: Stretch) {
        self.stretches.insert(address, stretch);
    }

    pub fn remove(&mut self, address: u64) -> Option<Stretch> {
        self.stretches.remove(&address)
    }

    /// The region that holds all of these bytes, and where in it they begin.
    pub fn find(&self, address: u64, bytes: u64) -> Option<(u32, u64)> {
        let (&begin, stretch) = self.stretches.range(..=address).next_back()?;
        let offset = address - begin;
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= stretch.bytes);
        fits.then_some((stretch.region, offset))
    }

    /// As a peer is told: version, count, and of each stretch region, address and length, little-endian. What follows is the
    /// session's number.
    pub fn encode(&self) -> Vec<u8> {
        let mut told = Vec::with_capacity(8 + 20 * self.len());
        told.extend(VERSION.to_le_bytes());
        told.extend((self.len() as u32).to_le_bytes());
        for (address, stretch) in self.iter() {
            told.extend(stretch.region.to_le_bytes());
            told.extend(address.to_le_bytes());
            told.extend(stretch.bytes.to_le_bytes());
        }
        told
    }

    /// What a peer tells, with its number of the session; `None` if it speaks another language.
    pub fn decode(told: &[u8]) -> Option<(Table, u32)> {
        fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
            let (first, behind) = rest.split_first_chunk::<N>()?;
            *rest = behind;
            Some(*first)
        }
        let rest = &mut &*told;
        if u32::from_le_bytes(take(rest)?) != VERSION {
            return None;
        }
        let count = u32::from_le_bytes(take(rest)?);
        if count as usize > MOST_STRETCHES {
            return None;
        }
        let mut table = Table::default();
        for _ in 0..count {
            let region = u32::from_le_bytes(take(rest)?);
            let (address, bytes) = (u64::from_le_bytes(take(rest)?), u64::from_le_bytes(take(rest)?));
            if bytes == 0 || address.checked_add(bytes).is_none() || table.check(address, bytes).is_err() {
                return None;
            }
            table.put(address, Stretch { bytes, region });
        }
        let session = u32::from_le_bytes(take(rest)?);
        rest.is_empty().then_some((table, session))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_overlaps_or_crosses_is_refused() {
        let mut table = Table::default();
        for (address, region) in [(100, 0), (300, 1), (200, 2)] {
            table.check(address, 100).unwrap();
            table.put(address, Stretch { bytes: 100, region });
        }
        for (address, bytes) in [(50, 51), (399, 1), (0, 1000), (250, 10), (299, 2)] {
            assert!(table.check(address, bytes).is_err(), "{address} {bytes}");
        }
        table.check(400, 10).unwrap();
        table.check(0, 100).unwrap();
        assert_eq!(table.find(250, 50), Some((2, 50)));
        assert_eq!(table.find(100, 100), Some((0, 0)));
        for (address, bytes) in [(99, 1), (199, 2), (250, 51), (400, 0), (400, 1), (100, u64::MAX)] {
            assert_eq!(
                table.find(address, bytes),
                (address == 400 && bytes == 0).then_some((1, 100)),
                "{address} {bytes}"
            );
        }
        assert_eq!(table.remove(300), Some(Stretch { bytes: 100, region: 1 }));
        assert_eq!(table.find(300, 1), None);
    }

    proptest! {
        #[test]
        fn tables_come_back_out_of_what_is_told(stretches in prop::collection::vec((1u64..1000, 0u64..1000, any::<u32>()), 0..40), session in any::<u32>()) {
            let (mut table, mut address) = (Table::default(), 1000u64);
            for (bytes, gap, region) in stretches {
                address += gap;
                table.put(address, Stretch { bytes, region });
                address += bytes;
            }
            let mut told = table.encode();
            told.extend(session.to_le_bytes());
            prop_assert_eq!(Table::decode(&told), Some((table, session)));
            for cut in 0..told.len() {
                prop_assert_eq!(Table::decode(&told[..cut]), None);
            }
        }

        #[test]
        fn nonsense_is_refused(told in prop::collection::vec(any::<u8>(), 0..200), count in 0u32..4) {
            let _ = Table::decode(&told);
            let mut told_well = [VERSION.to_le_bytes(), count.to_le_bytes()].concat();
            told_well.extend(told);
            if let Some((table, _)) = Table::decode(&told_well) {
                prop_assert_eq!(table.len(), count as usize);
            }
        }
    }
}
