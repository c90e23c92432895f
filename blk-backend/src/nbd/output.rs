//! The replies of a connection on their way out: heads in one run of memory, data where it was read to, sent together.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    ops::Range,
};

use super::socket::Socket;

/// Parts of one send: what the kernel takes at most is 1024, and fewer do not fill a socket's buffer more seldom.
const MAX_PARTS: usize = 128;

/// Heads that are sent but still in the way are removed at this size, where replies never end for long.
const MAX_STALE_BYTES: usize = 64 << 10;

/// Heads that wait for the client to read. No more requests are begun then: refusals and status are nothing but heads.
const MAX_WAITING_BYTES: usize = 1 << 20;

/// Something to be sent: a head, then perhaps the data of a request.
#[derive(Debug)]
struct Part {
    head: Range<usize>,
    /// The request's number, and how much of its data.
    data: Option<(u32, usize)>,
}

/// Replies in the order in which they are sent.
#[derive(Debug, Default)]
pub(super) struct Output {
    parts: VecDeque<Part>,
    heads: Vec<u8>,
    /// Bytes of the first part that are sent.
    sent: usize,
}

/// Where the data of requests is.
pub(super) trait Source {
    /// The first `len_bytes` of the data that was read for `request`.
    fn data(&self, request: u32, len_bytes: usize) -> &[u8];
}

/// How far a send came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    All,
    /// The client has to read first.
    Blocked,
}

impl Output {
    /// Appends a reply whose head `write` writes; `data` of a request follows it.
    pub(super) fn push(&mut self, write: impl FnOnce(&mut Vec<u8>), data: Option<(u32, usize)>) {
        let start = self.heads.len();
        write(&mut self.heads);
        self.parts.push_back(Part { head: start..self.heads.len(), data });
    }

    /// Whether so much waits that nothing should be added.
    pub(super) fn is_long(&self) -> bool {
        let stale = self.parts.front().map_or(0, |part| part.head.start);
        self.heads.len() - stale > MAX_WAITING_BYTES
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Sends what the socket takes. Requests whose data is out are appended to `released`.
    pub(super) fn send(
        &mut self,
        socket: &Socket,
        source: &impl Source,
        released: &mut Vec<u32>,
    ) -> io::Result<Sent> {
        while !self.parts.is_empty() {
            let sent = {
                let mut slices = [IoSlice::new(&[]); MAX_PARTS];
                let count = self.gather(source, &mut slices);
                socket.send(&slices[..count])?
            };
            match sent {
                Some(bytes) => self.advance(bytes, released),
                None => {
                    self.remove_stale();
                    return Ok(Sent::Blocked);
                }
            }
        }
        self.heads.clear();
        Ok(Sent::All)
    }

    /// The bytes still to be sent, from the front, as many as there is room for in `slices`.
    fn gather<'a>(&'a self, source: &'a impl Source, slices: &mut [IoSlice<'a>]) -> usize {
        let mut skip = self.sent;
        let mut count = 0;
        let mut add = |bytes: &'a [u8]| {
            let rest = &bytes[skip.min(bytes.len())..];
            skip -= bytes.len() - rest.len();
            if !rest.is_empty() {
                slices[count] = IoSlice::new(rest);
                count += 1;
            }
        };
        for part in self.parts.iter().take(MAX_PARTS / 2) {
            add(&self.heads[part.head.clone()]);
            if let Some((request, len)) = part.data {
                add(source.data(request, len));
            }
        }
        count
    }

    fn advance(&mut self, bytes: usize, released: &mut Vec<u32>) {
        self.sent += bytes;
        while let Some(part) = self.parts.front() {
            let len = part.head.len() + part.data.map_or(0, |(_, len)| len);
            if self.sent < len {
                break;
            }
            self.sent -= len;
            released.extend(part.data.map(|(request, _)| request));
            self.parts.pop_front();
        }
    }

    fn remove_stale(&mut self) {
        let Some(stale) = self.parts.front().map(|part| part.head.start) else { return };
        if stale >= MAX_STALE_BYTES {
            self.heads.drain(..stale);
            for part in &mut self.parts {
                part.head = part.head.start - stale..part.head.end - stale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use super::*;

    struct Fixed(Vec<Vec<u8>>);

    impl Source for Fixed {
        fn data(&self, request: u32, len_bytes: usize) -> &[u8] {
            &self.0[request as usize][..len_bytes]
        }
    }

    /// A client that reads slowly gets every byte once and in order, and what is sent is released.
    #[test]
    fn replies_arrive_whole_through_a_narrow_socket() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let socket = Socket::new(ours.into()).unwrap();
        let source = Fixed((0..200_u8).map(|n| vec![n; 9000]).collect());
        let (mut output, mut expected, mut got, mut released) =
            (Output::default(), Vec::new(), Vec::new(), Vec::new());
        for n in 0..200_u32 {
            let head = vec![u8::try_from(n).unwrap() ^ 0xff; 1000];
            output.push(|out| out.extend_from_slice(&head), Some((n, 9000)));
            expected.extend_from_slice(&head);
            expected.extend_from_slice(source.data(n, 9000));
            output.push(|out| out.push(7), None);
            expected.push(7);
        }
        let mut blocked = 0;
        while output.send(&socket, &source, &mut released).unwrap() == Sent::Blocked {
            blocked += 1;
            assert!(output.heads.len() <= 200 * 1001);
            let mut some = vec![0; 50_000];
            let len = theirs.read(&mut some).unwrap();
            got.extend_from_slice(&some[..len]);
        }
        drop(socket);
        theirs.set_nonblocking(false).unwrap();
        theirs.read_to_end(&mut got).unwrap();
        assert!(got == expected && blocked > 3);
        assert_eq!(released, (0..200).collect::<Vec<u32>>());
    }
}
