//! The shared-memory port

pub mod copy;
pub mod process_memory;
