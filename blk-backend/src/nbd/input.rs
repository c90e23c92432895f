//! The stream from a client: received in large pieces, cut into headers and payloads.

use std::io;

use super::socket::Socket;

/// What is received at most in one go, besides a payload under way. Many small requests come with one call.
const BUFFER_BYTES: usize = 128 << 10;

/// Received bytes that nobody has looked at.
pub(super) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    /// The socket may have more.
    readable: bool,
    /// The client says no more.
    ended: bool,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; BUFFER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            readable: true,
            ended: false,
        }
    }

    /// The socket has become readable.
    pub(super) fn is_ready(&mut self) {
        self.readable = true;
    }

    /// Nothing more is taken from the socket.
    pub(super) fn end(&mut self) {
        self.ended = true;
        self.start = self.end;
    }

    /// What was received already is the last.
    pub(super) fn receives_no_more(&self) -> bool {
        self.ended
    }

    /// All was looked at, and nothing more comes.
    pub(super) fn has_ended(&self) -> bool {
        self.ended && self.start == self.end
    }

    /// Whether [`Self::receive`] might bring something now.
    pub(super) fn may_receive(&self) -> bool {
        self.readable && !self.ended && self.end - self.start < BUFFER_BYTES / 2
    }

    /// What was received.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, len: usize) {
        self.start += len;
        assert!(self.start <= self.end, "only what was received can be consumed");
    }

    /// Moves received bytes to `to`, as many as there are and as fit.
    pub(super) fn take(&mut self, to: &mut [u8]) -> usize {
        let len = to.len().min(self.end - self.start);
        to[..len].copy_from_slice(&self.bytes[self.start..self.start + len]);
        self.start += len;
        len
    }

    /// Receives what is there: first into `payload`, which nothing received must precede, then into the buffer. Returns
    /// how much of the payload came.
    pub(super) fn receive(&mut self, socket: &Socket, payload: &mut [u8]) -> io::Result<usize> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        debug_assert!(payload.is_empty() || self.end == 0);
        match socket.receive(payload, &mut self.bytes[self.end..])? {
            None => {
                // Not before the socket is empty: readiness is told at its edges only.
                self.readable = false;
                Ok(0)
            }
            Some(0) => {
                self.ended = true;
                Ok(0)
            }
            Some(len) => {
                let of_payload = len.min(payload.len());
                self.end += len - of_payload;
                Ok(of_payload)
            }
        }
    }
}
