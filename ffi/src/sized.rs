//! Structures that may grow: each says its size first, as the program that was compiled with it knows it.
//!
//! What an older program does not know is zero when it is read, and zero always means what was usual before the field came.
//! What a newer program knows and this library does not has to be zero; and of what this library tells, it gets what fits.

use std::ptr;

use bytemuck::Zeroable;

use crate::status::{CROSSDOCK_BAD_SIZE, Fault};

/// # Safety
/// The type is `repr(C)`, begins with its size as a `usize`, has no padding that is read, and any bytes that C may write
/// are a value of it.
pub(crate) unsafe trait Sized: Copy + Zeroable {
    /// How large it was in the first release of this ABI.
    const FIRST_BYTES: usize;

    /// Reads what the caller gives.
    ///
    /// # Safety
    /// `from` is NULL, or `size_of::<usize>()` bytes can be read there, and as many as they say.
    unsafe fn read(from: *const Self) -> Result<Self, Fault> {
        // SAFETY: as the caller promises.
        let given = unsafe { given_bytes::<Self>(from) }?;
        let known = given.min(size_of::<Self>());
        let mut value = Self::zeroed();
        // SAFETY: `known` bytes can be read, as the caller promises, and lie in `value`; any bytes are a value.
        unsafe { ptr::copy_nonoverlapping(from.cast::<u8>(), ptr::from_mut(&mut value).cast::<u8>(), known) };
        for at in known..given {
            // SAFETY: as above.
            if unsafe { from.cast::<u8>().add(at).read() } != 0 {
                return Err(Fault::new(
                    CROSSDOCK_BAD_SIZE,
                    format!(
                        "byte {at} of {} is set, of which this library knows {} bytes",
                        name::<Self>(),
                        size_of::<Self>()
                    ),
                    "load the library that the header came with, or a later one",
                ));
            }
        }
        Ok(value)
    }

    /// Writes what the caller knows of it; its `size` stays.
    ///
    /// # Safety
    /// `to` is NULL, or `size_of::<usize>()` bytes can be read there, and as many as they say written.
    unsafe fn write(to: *mut Self, value: Self) -> Result<(), Fault> {
        // SAFETY: as the caller promises.
        let given = unsafe { given_bytes::<Self>(to) }?;
        let known = given.min(size_of::<Self>());
        let size = size_of::<usize>();
        // SAFETY: `given` bytes can be written, as the caller promises; the value has `known` ones, of which the first
        // are its size.
        unsafe {
            let (from, to) = (ptr::from_ref(&value).cast::<u8>(), to.cast::<u8>());
            ptr::copy_nonoverlapping(from.add(size), to.add(size), known - size);
            ptr::write_bytes(to.add(known), 0, given - known);
        }
        Ok(())
    }
}

/// # Safety
/// As [`Sized::read`].
unsafe fn given_bytes<T: Sized>(at: *const T) -> Result<usize, Fault> {
    if at.is_null() {
        return Err(Fault::argument(format!("{} is NULL", name::<T>())));
    }
    // SAFETY: its size can be read, as the caller promises; C may have placed it anywhere.
    let given = unsafe { at.cast::<usize>().read_unaligned() };
    if (T::FIRST_BYTES..=MOST_BYTES).contains(&given) {
        return Ok(given);
    }
    Err(Fault::new(
        CROSSDOCK_BAD_SIZE,
        format!("{}.size is {given}, and was never less than {}", name::<T>(), T::FIRST_BYTES),
        "set `size` to the sizeof of the structure before the call",
    ))
}

/// So that what was never set is not taken for a size.
const MOST_BYTES: usize = 4096;

fn name<T>() -> &'static str {
    std::any::type_name::<T>().rsplit(':').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Zeroable, Debug, PartialEq)]
    struct Grown {
        size: usize,
        first: u64,
        later: u64,
    }

    // SAFETY: `repr(C)`, no padding, any bytes are a value.
    unsafe impl Sized for Grown {
        const FIRST_BYTES: usize = 16;
    }

    #[test]
    fn an_older_program_knows_less_and_a_newer_one_more() {
        let mut words = [16usize, 7, 9, 0, 0];
        let at = words.as_mut_ptr().cast::<Grown>();
        // SAFETY: as many words follow as the first one says, here and below.
        assert_eq!(unsafe { Grown::read(at) }.unwrap(), Grown { size: 16, first: 7, later: 0 });
        // SAFETY: as above.
        unsafe { Grown::write(at, Grown { size: 0, first: 1, later: 2 }) }.unwrap();
        assert_eq!(words, [16, 1, 9, 0, 0]);
        let mut words = [40usize, 7, 9, 0, 0];
        let at = words.as_mut_ptr().cast::<Grown>();
        // SAFETY: as above.
        assert_eq!(unsafe { Grown::read(at) }.unwrap(), Grown { size: 40, first: 7, later: 9 });
        words[4] = 1;
        // SAFETY: as above.
        assert_eq!(unsafe { Grown::read(at) }.unwrap_err().status, CROSSDOCK_BAD_SIZE);
        // SAFETY: as above.
        unsafe { Grown::write(at, Grown { size: 0, first: 1, later: 2 }) }.unwrap();
        assert_eq!(words, [40, 1, 2, 0, 0]);
    }

    #[test]
    fn sizes_that_it_never_had_are_refused() {
        for size in [0usize, 8, 15, MOST_BYTES + 1, usize::MAX] {
            let words = [size, 0, 0];
            // SAFETY: no more than the first word is read of one that is refused.
            let refused = unsafe { Grown::read(words.as_ptr().cast()) };
            assert_eq!(refused.unwrap_err().status, CROSSDOCK_BAD_SIZE);
        }
        // SAFETY: NULL is allowed.
        assert_eq!(unsafe { Grown::read(ptr::null()) }.unwrap_err().status, crate::CROSSDOCK_BAD_ARGUMENT);
    }
}
