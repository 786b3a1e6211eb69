//! Memory, page layouts, page sets and the page pool
