//! Little-endian fields of what this crate puts on the wire, read without looking beyond the bytes that are there.

/// The bytes end in the middle of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Truncated {
    pub field: &'static str,
}

/// What is left to be read.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn u8(&mut self, field: &'static str) -> Result<u8, Truncated> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub fn u32(&mut self, field: &'static str) -> Result<u32, Truncated> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, field: &'static str) -> Result<u64, Truncated> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub fn take(&mut self, field: &'static str, bytes: usize) -> Result<&'a [u8], Truncated> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(Truncated { field })?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], Truncated> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Truncated { field })?;
        self.0 = rest;
        Ok(*taken)
    }
}
