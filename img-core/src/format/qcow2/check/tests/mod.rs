//! The audit against the reference, against bytes that nobody meant, and against power cuts.

mod differential;
mod hostile;
mod oracle;
