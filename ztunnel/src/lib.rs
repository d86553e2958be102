//! The node proxy as a library, for its binary and its tests.
