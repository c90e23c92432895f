//! A stream of JSON values, one behind the other, cut into texts.
//!
//! Newlines mean nothing: a value may span many lines, and one line may hold several. Only brackets and strings are
//! looked at; whether a text is JSON the parser decides.

/// The longest command that is taken: beyond any that exists.
const MAX_BYTES: usize = 1 << 20;

/// A command was longer than [`MAX_BYTES`]: the stream cannot be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooLong;

/// Received bytes that are not a whole value yet.
#[derive(Debug, Default)]
pub(super) struct Framer {
    bytes: Vec<u8>,
    /// Bytes that were looked at.
    seen: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Framer {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next text that is whole.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        if self.seen == 0 {
            let blank = self.bytes.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            self.bytes.drain(..blank);
        }
        while let Some(byte) = self.bytes.get(self.seen).copied() {
            self.seen += 1;
            if self.ends_at(byte) {
                let rest = self.bytes.split_off(self.seen);
                let text = std::mem::replace(&mut self.bytes, rest);
                *self = Self { bytes: std::mem::take(&mut self.bytes), ..Self::default() };
                return Ok(Some(text));
            }
        }
        if self.seen > MAX_BYTES { Err(TooLong) } else { Ok(None) }
    }

    /// Whether the value is whole with this byte.
    fn ends_at(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            // Outside of brackets a word ends with its line: it is no command whatever it is.
            b'\n' => return self.depth == 0,
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn all(framer: &mut Framer) -> Vec<String> {
        std::iter::from_fn(|| framer.next().unwrap()).map(|text| String::from_utf8(text).unwrap()).collect()
    }

    #[test]
    fn values_end_where_their_brackets_do() {
        let mut framer = Framer::default();
        framer.push(b" \n {\"a\": \"}\\\"]\"}{\n}\t[1,\n[2]] foo\n{\"b\"");
        assert_eq!(all(&mut framer), ["{\"a\": \"}\\\"]\"}", "{\n}", "[1,\n[2]]", "foo\n"]);
        framer.push(b":1}");
        assert_eq!(all(&mut framer), ["{\"b\":1}"]);
        framer.push(&vec![b'{'; MAX_BYTES + 1]);
        assert_eq!(framer.next(), Err(TooLong));
    }

    proptest! {
        /// However the stream is cut, the texts are the same.
        #[test]
        fn pieces_do_not_matter(cuts in vec(1_usize..9, 0..40)) {
            let stream = br#"{"execute":"x","arguments":{"s":"a{b]\"c"}} {"n":[{},{}]}"#.repeat(3);
            let mut whole = Framer::default();
            whole.push(&stream);
            let mut pieces = Framer::default();
            let (mut texts, mut rest) = (Vec::new(), &stream[..]);
            for cut in cuts.into_iter().chain([usize::MAX]) {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                pieces.push(now);
                rest = later;
                texts.extend(all(&mut pieces));
            }
            prop_assert_eq!(texts, all(&mut whole));
        }
    }
}
