//! The shared-memory port
