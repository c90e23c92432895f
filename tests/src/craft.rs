//! Images made byte by byte.
