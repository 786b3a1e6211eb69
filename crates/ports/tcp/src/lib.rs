//! The TCP port
