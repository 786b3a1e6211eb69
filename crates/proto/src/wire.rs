//! Little-endian fields of control messages: a writer that appends, and a reader that never looks beyond its bytes
//! and never reserves memory for a length before the bytes of that length are there.

/// Why a frame could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The frame ends in the middle of a field.
    #[error("frame ends in the middle of {field}")]
    Truncated {
        /// Which field.
        field: &'static str,
    },
    /// A field has a value that it cannot have.
    #[error("{field} has the impossible value {value}")]
    BadValue {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A text is not UTF-8.
    #[error("{field} is not UTF-8")]
    NotText {
        /// Which field.
        field: &'static str,
    },
    /// There are bytes after the last field.
    #[error("{bytes} bytes too many")]
    Trailing {
        /// How many.
        bytes: u64,
    },
}

/// Appends fields to a frame.
pub(crate) struct Writer<'a>(pub &'a mut Vec<u8>);

impl Writer<'_> {
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.u32(u32::try_from(bytes.len()).expect("the caller bounds what it sends"));
        self.raw(bytes);
    }

    pub fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    pub fn u32s(&mut self, values: &[u32]) {
        self.u32(u32::try_from(values.len()).expect("the caller bounds what it sends"));
        values.iter().for_each(|value| self.u32(*value));
    }

    /// A list of ids, each in as many bits as the largest needs.
    pub fn ids(&mut self, ids: &[u32]) {
        self.u32(u32::try_from(ids.len()).expect("the caller bounds what it sends"));
        let bits = bits_of_ids(ids);
        self.u8(bits as u8);
        let begin = self.0.len();
        self.0.resize(begin + bytes_of_ids(ids.len() as u64, bits) as usize, 0);
        let (mut held, mut held_bits) = (0u64, 0);
        let mut words = self.0[begin..].chunks_mut(4);
        for &id in ids {
            held |= u64::from(id) << held_bits;
            held_bits += bits;
            if held_bits >= 32 {
                words.next().expect("room for all bits").copy_from_slice(&(held as u32).to_le_bytes());
                (held, held_bits) = (held >> 32, held_bits - 32);
            }
        }
        if let Some(last) = words.next() {
            last.copy_from_slice(&held.to_le_bytes()[..last.len()]);
        }
    }
}

/// Bits an id in a list: enough for the largest, and for so many that differ. (The second follows from the first unless
/// an id is listed twice; it bounds what a reader reserves for a few bytes.)
fn bits_of_ids(ids: &[u32]) -> u32 {
    let all = ids.iter().fold(0, |all, id| all | id);
    let most = (ids.len() as u64).saturating_sub(1);
    (32 - all.leading_zeros()).max(64 - most.leading_zeros())
}

fn bytes_of_ids(count: u64, bits: u32) -> u64 {
    (count * u64::from(bits)).div_ceil(8)
}

/// Takes fields from a frame.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn raw(&mut self, bytes: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        if self.0.len() < bytes {
            return Err(DecodeError::Truncated { field });
        }
        let (head, tail) = self.0.split_at(bytes);
        self.0 = tail;
        Ok(head)
    }

    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        Ok(self.raw(N, field)?.try_into().expect("the length was asked for"))
    }

    pub fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        Ok(self.array::<1>(field)?[0])
    }

    pub fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    pub fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    pub fn flag(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(DecodeError::BadValue { field, value: value.into() }),
        }
    }

    pub fn bytes(&mut self, field: &'static str) -> Result<Vec<u8>, DecodeError> {
        let len = self.u32(field)? as usize;
        Ok(self.raw(len, field)?.to_vec())
    }

    pub fn text(&mut self, field: &'static str) -> Result<String, DecodeError> {
        String::from_utf8(self.bytes(field)?).map_err(|_| DecodeError::NotText { field })
    }

    pub fn u32s(&mut self, field: &'static str) -> Result<Vec<u32>, DecodeError> {
        let count = self.u32(field)? as usize;
        let bytes = count.checked_mul(4).ok_or(DecodeError::Truncated { field })?;
        let raw = self.raw(bytes, field)?;
        Ok(raw.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect())
    }

    /// What [`Writer::ids`] wrote.
    pub fn ids(&mut self, field: &'static str) -> Result<Vec<u32>, DecodeError> {
        let count = u64::from(self.u32(field)?);
        let bits = self.u8(field)?;
        let impossible = DecodeError::BadValue { field, value: bits.into() };
        let bits = u32::from(bits);
        if bits > 32 || count > 1 << bits {
            return Err(impossible);
        }
        let raw = self.raw(bytes_of_ids(count, bits) as usize, field)?;
        let mask = (1u64 << bits) - 1;
        let id = |nth: u64| {
            let bit = nth * u64::from(bits);
            let from = &raw[(bit / 8) as usize..];
            let word = from.first_chunk().copied().unwrap_or_else(|| {
                let mut word = [0; 8];
                word[..from.len()].copy_from_slice(from);
                word
            });
            (u64::from_le_bytes(word) >> (bit % 8) & mask) as u32
        };
        let ids: Vec<u32> = (0..count).map(id).collect();
        let beyond = match (count * u64::from(bits)) % 8 {
            0 => 0,
            used => raw.last().map_or(0, |last| last >> used),
        };
        // One form only: no wider than need be, and nothing in the bits that are left.
        match beyond == 0 && bits_of_ids(&ids) == bits {
            true => Ok(ids),
            false => Err(impossible),
        }
    }

    /// A list whose entries take at least `least_bytes` each: a count beyond what the frame can hold is refused
    /// before anything is reserved for it.
    pub fn list<T>(
        &mut self,
        least_bytes: usize,
        field: &'static str,
        mut entry: impl FnMut(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let count = self.u32(field)? as usize;
        if count > self.0.len() / least_bytes {
            return Err(DecodeError::Truncated { field });
        }
        (0..count).map(|_| entry(self)).collect()
    }

    pub fn end(self) -> Result<(), DecodeError> {
        match self.0.len() as u64 {
            0 => Ok(()),
            bytes => Err(DecodeError::Trailing { bytes }),
        }
    }
}
