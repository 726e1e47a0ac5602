//! A read-only tree of immutable files, a read engine with a bounded cache, and the adapter that serves both over FUSE.
