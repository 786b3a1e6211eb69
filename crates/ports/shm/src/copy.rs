//! Copies by several threads: a [`Copier`] with helpers.

mod claims;
mod futex;
#[cfg(test)]
mod tests;
mod threads;

pub use crossdock_memory::copy::{Copier, Pieces, Strategy, Vectors};
pub use threads::CopyThreads;
