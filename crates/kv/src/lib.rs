//! Cache layouts, the planner, push and pull of KV pages
