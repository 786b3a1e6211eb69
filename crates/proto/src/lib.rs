//! Sessions, rooms, grants and generations: may it move; no I/O, no clock
