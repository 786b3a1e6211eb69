//! Tests that cross crates: simulation, processes, faults, the house rules
