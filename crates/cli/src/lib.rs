//! The crossdock program
