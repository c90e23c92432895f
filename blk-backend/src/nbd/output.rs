//! The replies of a connection on their way out: heads in one run of memory, data where it was read to, sent together.
//! Data that nobody has read yet comes straight from the page cache when its turn has come.

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

/// What follows a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    Nothing,
    /// The first bytes that were read for a request, by its number.
    Read(u32, usize),
    /// Bytes that a request asks for, from [`Source::fill`].
    Straight(u32, usize),
}

impl Body {
    fn len(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Read(_, len) | Self::Straight(_, len) => len,
        }
    }

    fn request(self) -> Option<u32> {
        match self {
            Self::Nothing => None,
            Self::Read(request, _) | Self::Straight(request, _) => Some(request),
        }
    }
}

/// Something to be sent.
#[derive(Debug)]
struct Part {
    head: Range<usize>,
    body: Body,
}

/// Replies in the order in which they are sent.
#[derive(Debug, Default)]
pub(super) struct Output {
    parts: VecDeque<Part>,
    heads: Vec<u8>,
    /// Bytes of the first part that are sent.
    sent: usize,
    /// The data of the first part waits in [`Source`].
    filled: bool,
}

/// Where the data of requests is.
pub(super) trait Source {
    /// The first `len_bytes` of the data that was read for `request`.
    fn data(&self, request: u32, len_bytes: usize) -> &[u8];

    /// Makes all that `request` asks for ready for [`Self::send_on`]. False when it has to be read first.
    fn fill(&mut self, request: u32) -> bool;

    /// Sends what the socket takes of what [`Self::fill`] made ready; `None` when it takes nothing.
    fn send_on(&mut self, socket: &Socket) -> io::Result<Option<usize>>;
}

/// What became of requests whose replies are sent.
#[derive(Debug, Default)]
pub(super) struct Ended {
    /// Their data is out.
    pub(super) released: Vec<u32>,
    /// They have to be read first; what was pushed for them is forgotten.
    pub(super) unread: Vec<u32>,
}

/// How far a send came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    All,
    /// The client has to read first.
    Blocked,
}

impl Output {
    /// Appends a reply whose head `write` writes; `body` follows it.
    pub(super) fn push(&mut self, write: impl FnOnce(&mut Vec<u8>), body: Body) {
        let start = self.heads.len();
        write(&mut self.heads);
        self.parts.push_back(Part { head: start..self.heads.len(), body });
    }

    /// Whether so much waits that nothing should be added.
    pub(super) fn is_long(&self) -> bool {
        let stale = self.parts.front().map_or(0, |part| part.head.start);
        self.heads.len() - stale > MAX_WAITING_BYTES
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Sends what the socket takes.
    pub(super) fn send(
        &mut self,
        socket: &Socket,
        source: &mut impl Source,
        ended: &mut Ended,
    ) -> io::Result<Sent> {
        while let Some(first) = self.parts.front() {
            let (head_bytes, body) = (first.head.len(), first.body);
            if let Body::Straight(request, _) = body
                && !self.filled
            {
                // Before the head, which promises that it was read.
                self.filled = source.fill(request);
                if !self.filled {
                    ended.unread.push(request);
                    self.parts.pop_front();
                    continue;
                }
            }
            let sent = if matches!(body, Body::Straight(..)) && self.sent >= head_bytes {
                source.send_on(socket)?
            } else {
                let mut slices = [IoSlice::new(&[]); MAX_PARTS];
                let (count, more) = self.gather(source, &mut slices);
                socket.send(&slices[..count], more)?
            };
            match sent {
                Some(bytes) => self.advance(bytes, &mut ended.released),
                None => {
                    self.remove_stale();
                    return Ok(Sent::Blocked);
                }
            }
        }
        self.heads.clear();
        Ok(Sent::All)
    }

    /// The bytes still to be sent, from the front, as many as there is room for in `slices` and as are there. Whether
    /// others follow at once.
    fn gather<'a>(&'a self, source: &'a impl Source, slices: &mut [IoSlice<'a>]) -> (usize, bool) {
        let mut skip = self.sent;
        let mut count = 0;
        let mut more = false;
        let mut add = |bytes: &'a [u8]| {
            let rest = &bytes[skip.min(bytes.len())..];
            skip -= bytes.len() - rest.len();
            if !rest.is_empty() {
                slices[count] = IoSlice::new(rest);
                count += 1;
            }
        };
        for (at, part) in self.parts.iter().take(MAX_PARTS / 2).enumerate() {
            match part.body {
                Body::Nothing => add(&self.heads[part.head.clone()]),
                Body::Read(request, len) => {
                    add(&self.heads[part.head.clone()]);
                    add(source.data(request, len));
                }
                Body::Straight(..) => {
                    // Only the first one is known to be ready.
                    if at == 0 {
                        add(&self.heads[part.head.clone()]);
                        more = true;
                    }
                    break;
                }
            }
        }
        (count, more)
    }

    fn advance(&mut self, bytes: usize, released: &mut Vec<u32>) {
        self.sent += bytes;
        while let Some(part) = self.parts.front() {
            let len = part.head.len() + part.body.len();
            if self.sent < len {
                break;
            }
            self.sent -= len;
            self.filled = false;
            released.extend(part.body.request());
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

        fn fill(&mut self, _request: u32) -> bool {
            false
        }

        fn send_on(&mut self, _socket: &Socket) -> io::Result<Option<usize>> {
            unreachable!("nothing was made ready")
        }
    }

    /// Data of requests with odd numbers is made ready when their turn has come, and sent from there.
    struct Pages {
        read: Fixed,
        ready: Vec<u8>,
        refused: u32,
    }

    impl Source for Pages {
        fn data(&self, request: u32, len_bytes: usize) -> &[u8] {
            self.read.data(request, len_bytes)
        }

        fn fill(&mut self, request: u32) -> bool {
            assert!(self.ready.is_empty(), "one at a time");
            if request != self.refused {
                self.ready = self.read.0[request as usize].clone();
            }
            request != self.refused
        }

        fn send_on(&mut self, socket: &Socket) -> io::Result<Option<usize>> {
            let sent = socket.send(&[IoSlice::new(&self.ready)], false)?;
            self.ready.drain(..sent.unwrap_or(0));
            Ok(sent)
        }
    }

    /// What a client gets that reads a little each time when nothing more can be sent, and what has ended then.
    fn through_a_narrow_socket(output: &mut Output, source: &mut impl Source) -> (Vec<u8>, Ended) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let socket = Socket::new(ours.into()).unwrap();
        let (mut got, mut ended, mut blocked) = (Vec::new(), Ended::default(), 0);
        let most_heads = output.heads.len();
        while output.send(&socket, source, &mut ended).unwrap() == Sent::Blocked {
            blocked += 1;
            assert!(output.heads.len() <= most_heads);
            let mut some = vec![0; 50_000];
            let len = theirs.read(&mut some).unwrap();
            got.extend_from_slice(&some[..len]);
        }
        assert!(blocked > 3, "it is narrow");
        drop(socket);
        theirs.set_nonblocking(false).unwrap();
        theirs.read_to_end(&mut got).unwrap();
        (got, ended)
    }

    /// What is made ready late comes behind its own head, and a request that cannot be leaves no trace.
    #[test]
    fn data_that_is_made_ready_late_follows_its_head() {
        let read = Fixed((0..60_u8).map(|n| vec![n; 50_000]).collect());
        let mut source = Pages { read, ready: Vec::new(), refused: 7 };
        let (mut output, mut expected) = (Output::default(), Vec::new());
        for n in 0..60_u32 {
            let head = vec![u8::try_from(n).unwrap() ^ 0xff; 100];
            let body = if n % 2 == 1 { Body::Straight(n, 50_000) } else { Body::Read(n, 50_000) };
            output.push(|out| out.extend_from_slice(&head), body);
            if n != source.refused {
                expected.extend_from_slice(&head);
                expected.extend_from_slice(source.data(n, 50_000));
            }
        }
        let (got, ended) = through_a_narrow_socket(&mut output, &mut source);
        assert!(got == expected);
        assert_eq!(ended.unread, [7]);
        assert_eq!(ended.released, (0..60).filter(|n| *n != 7).collect::<Vec<u32>>());
    }

    /// A client that reads slowly gets every byte once and in order, and what is sent is released.
    #[test]
    fn replies_arrive_whole_through_a_narrow_socket() {
        let mut source = Fixed((0..200_u8).map(|n| vec![n; 9000]).collect());
        let (mut output, mut expected) = (Output::default(), Vec::new());
        for n in 0..200_u32 {
            let head = vec![u8::try_from(n).unwrap() ^ 0xff; 1000];
            output.push(|out| out.extend_from_slice(&head), Body::Read(n, 9000));
            expected.extend_from_slice(&head);
            expected.extend_from_slice(source.data(n, 9000));
            output.push(|out| out.push(7), Body::Nothing);
            expected.push(7);
        }
        let (got, ended) = through_a_narrow_socket(&mut output, &mut source);
        assert!(got == expected);
        assert_eq!(ended.released, (0..200).collect::<Vec<u32>>());
    }
}
