//! The port against another port, and against peers that are none.

mod common;
mod ending;
mod fences;
mod hostile;
mod moving;
mod raw;
