//! The simulated port and its virtual fabric
