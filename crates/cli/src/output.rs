//! What the program prints, where the disk below may be full or the reader gone: the work goes on, and the program says
//! at its end that what it printed is not all there.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::atomic::{AtomicI32, Ordering};

/// The error number of the first line that could not be printed; 0 for none.
static FIRST_ERROR: AtomicI32 = AtomicI32::new(0);

/// Prints a line.
macro_rules! say {
    ($($what:tt)*) => { $crate::output::print(format_args!($($what)*)) };
}
pub(crate) use say;

pub fn print(line: Arguments<'_>) {
    if let Err(error) = writeln!(io::stdout(), "{line}") {
        let number = error.raw_os_error().unwrap_or(UNKNOWN);
        // The first one is kept.
        let _ = FIRST_ERROR.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Why not everything was printed, if it was not.
pub fn failure() -> Option<io::Error> {
    match FIRST_ERROR.load(Ordering::Relaxed) {
        0 => None,
        number => Some(io::Error::from_raw_os_error(number)),
    }
}

/// Tells a problem. Where not even that is possible there is nobody to tell.
pub fn complain(line: Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// `EIO`, in the place of an error without a number.
const UNKNOWN: i32 = 5;
