//! kvbench and micro-benchmarks
