//! What C gives, made into what Rust takes.

use std::ffi::{CStr, c_char};
use std::slice;
use std::time::{Duration, Instant};

use crate::status::{CROSSDOCK_BUFFER_TOO_SMALL, Fault};

/// A text, or `None` for NULL.
///
/// # Safety
/// `text` is NULL, or ends with a NUL and is not changed meanwhile.
pub(crate) unsafe fn optional_text<'a>(
    name: &'static str,
    text: *const c_char,
) -> Result<Option<&'a str>, Fault> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: as the caller promises.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| Fault::argument(format!("{name} is not UTF-8")))
}

/// A text.
///
/// # Safety
/// As [`optional_text`].
pub(crate) unsafe fn text<'a>(name: &'static str, text: *const c_char) -> Result<&'a str, Fault> {
    // SAFETY: as the caller promises.
    unsafe { optional_text(name, text) }?.ok_or_else(|| Fault::argument(format!("{name} is NULL")))
}

/// `count` values; NULL where there is none.
///
/// # Safety
/// `values` is NULL, or so many values can be read there, and nobody changes them meanwhile.
pub(crate) unsafe fn list<'a, T>(
    name: &'static str,
    values: *const T,
    count: usize,
) -> Result<&'a [T], Fault> {
    if count == 0 {
        return Ok(&[]);
    }
    if values.is_null() {
        return Err(Fault::argument(format!("{name} is NULL, and {count} are to be read there")));
    }
    if !values.is_aligned() {
        return Err(Fault::argument(format!("{name} is not aligned to {} bytes", align_of::<T>())));
    }
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(Fault::argument(format!("{name}: {count} is more than memory holds")));
    }
    // SAFETY: not NULL, aligned and not too long; the rest as the caller promises.
    Ok(unsafe { slice::from_raw_parts(values, count) })
}

/// Puts a value where the caller wants it.
///
/// # Safety
/// `to` is NULL, or a value can be written there.
pub(crate) unsafe fn put<T>(name: &'static str, to: *mut T, value: T) -> Result<(), Fault> {
    not_null(name, to)?;
    // SAFETY: as the caller promises; C may have placed it anywhere.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

/// Asked before anything is done whose answer would be lost.
pub(crate) fn not_null<T>(name: &'static str, to: *const T) -> Result<(), Fault> {
    match to.is_null() {
        true => Err(Fault::argument(format!("{name} is NULL"))),
        false => Ok(()),
    }
}

/// Copies bytes into the caller's buffer, if they fit, and tells how many they are.
///
/// # Safety
/// `buffer` is NULL or so many bytes can be written there; `length` is NULL or can be written.
pub(crate) unsafe fn copy_out(
    bytes: &[u8],
    buffer: *mut u8,
    capacity: usize,
    length: *mut usize,
) -> Result<(), Fault> {
    if !length.is_null() {
        // SAFETY: as the caller promises.
        unsafe { length.write_unaligned(bytes.len()) };
    }
    if capacity < bytes.len() {
        return Err(Fault::quiet(CROSSDOCK_BUFFER_TOO_SMALL));
    }
    if bytes.is_empty() {
        return Ok(());
    }
    not_null("buffer", buffer)?;
    // SAFETY: the buffer is long enough, and no part of what Rust owns.
    unsafe { buffer.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    Ok(())
}

/// As [`copy_out`], with a NUL behind it that the length does not count.
///
/// # Safety
/// As [`copy_out`].
pub(crate) unsafe fn text_out(
    text: &str,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> Result<(), Fault> {
    let text = text.replace('\0', "␀");
    if !length.is_null() {
        // SAFETY: as the caller promises.
        unsafe { length.write_unaligned(text.len()) };
    }
    let mut bytes = text.into_bytes();
    bytes.push(0);
    // SAFETY: as the caller promises.
    unsafe { copy_out(&bytes, buffer.cast(), capacity, std::ptr::null_mut()) }
}

/// Milliseconds, of which 0 means what is usual.
pub(crate) fn milliseconds(value: u64, usual: Duration) -> Duration {
    if value == 0 { usual } else { Duration::from_millis(value).min(LONGEST) }
}

/// When a call has to be over that may take this long.
pub(crate) fn deadline(timeout_ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(timeout_ms).min(LONGEST)
}

/// A time that no clock overflows with, and nobody waits for.
pub(crate) const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);
