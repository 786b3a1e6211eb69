//! Dumps as they are written, read and merged.
#![forbid(unsafe_code)]

mod folder;
mod form;
mod merging;
mod node;
mod reading;
