//! Data of handshake options: bytes → checked names, queries and information requests.

use super::wire::MAX_STRING_BYTES;

/// The most queries that one option may carry; "`NBD_REP_ERR_TOO_BIG`" is for those with more. Every context
/// that exists can be named with far fewer.
pub(super) const MAX_QUERIES: u32 = 1024;

/// What is wrong with an option's data.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadOption {
    /// Answered with `NBD_REP_ERR_INVALID`.
    #[error("{0}")]
    Invalid(&'static str),
    /// Answered with `NBD_REP_ERR_TOO_BIG`.
    #[error("{0}")]
    TooBig(&'static str),
}

type Result<T> = std::result::Result<T, BadOption>;

/// "`NBD_OPT_INFO` and `NBD_OPT_GO`".
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InfoRequest {
    pub(super) name: String,
    /// Information types, also unknown ones.
    pub(super) wanted: Vec<u16>,
}

/// "`NBD_OPT_LIST_META_CONTEXT`" and "`NBD_OPT_SET_META_CONTEXT`".
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetaRequest {
    pub(super) name: String,
    pub(super) queries: Vec<String>,
}

/// The rest of an option's data.
struct Data<'a>(&'a [u8]);

impl<'a> Data<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(BadOption::Invalid(what))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self, what: &'static str) -> Result<u16> {
        let bytes = self.take(2, what)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// A string behind its 32-bit length.
    fn string(&mut self, what: &'static str) -> Result<String> {
        let len = usize::try_from(self.u32(what)?).map_err(|_| BadOption::Invalid(what))?;
        string(self.take(len, what)?)
    }

    fn end(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(BadOption::Invalid("bytes behind the option's data")) }
    }
}

/// "Conventions": UTF-8 without NUL, at most 4096 bytes.
pub(super) fn string(bytes: &[u8]) -> Result<String> {
    if bytes.len() > MAX_STRING_BYTES {
        return Err(BadOption::Invalid("a string of more than 4096 bytes"));
    }
    match str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(BadOption::Invalid("a string that is not UTF-8, or has a NUL")),
    }
}

impl InfoRequest {
    pub(super) fn parse(data: &[u8]) -> Result<Self> {
        let mut data = Data(data);
        let name = data.string("the export's name is longer than the option")?;
        let count = data.u16("no number of information requests")?;
        let mut wanted = Vec::new();
        for _ in 0..count {
            wanted.push(data.u16("fewer information requests than announced")?);
        }
        data.end()?;
        Ok(Self { name, wanted })
    }
}

impl MetaRequest {
    pub(super) fn parse(data: &[u8]) -> Result<Self> {
        let mut data = Data(data);
        let name = data.string("the export's name is longer than the option")?;
        let count = data.u32("no number of queries")?;
        if count > MAX_QUERIES {
            return Err(BadOption::TooBig("too many queries"));
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(data.string("a query is longer than the option")?);
        }
        data.end()?;
        Ok(Self { name, queries })
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn counted(text: &str) -> Vec<u8> {
        [&u32::try_from(text.len()).unwrap().to_be_bytes(), text.as_bytes()].concat()
    }

    #[test]
    fn information_requests_are_read_to_the_last_byte() {
        let good = [counted("disk"), vec![0, 2, 0, 3, 0x12, 0x34]].concat();
        let parsed = InfoRequest::parse(&good).unwrap();
        assert_eq!(parsed, InfoRequest { name: "disk".into(), wanted: vec![3, 0x1234] });
        for len in 0..good.len() {
            assert!(InfoRequest::parse(&good[..len]).is_err(), "{len}");
        }
        assert!(InfoRequest::parse(&[&good[..], &[0]].concat()).is_err());
    }

    #[test]
    fn context_queries_are_read_to_the_last_byte() {
        let good = [counted("d"), vec![0, 0, 0, 2], counted("base:"), counted("qemu:")].concat();
        let parsed = MetaRequest::parse(&good).unwrap();
        assert_eq!(parsed, MetaRequest { name: "d".into(), queries: vec!["base:".into(), "qemu:".into()] });
        for len in 0..good.len() {
            assert!(MetaRequest::parse(&good[..len]).is_err(), "{len}");
        }
        let many = [counted("d"), u32::MAX.to_be_bytes().to_vec()].concat();
        assert!(matches!(MetaRequest::parse(&many), Err(BadOption::TooBig(_))));
    }

    #[test]
    fn strings_are_utf_8_of_bounded_length() {
        assert!(string(&[0xff]).is_err() && string(b"a\0b").is_err());
        assert!(string(&[b'a'; 4096]).is_ok() && string(&[b'a'; 4097]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_have_an_answer(data in vec(any::<u8>(), 0..200)) {
            if let Ok(request) = InfoRequest::parse(&data) {
                prop_assert_eq!(4 + request.name.len() + 2 + 2 * request.wanted.len(), data.len());
            }
            if let Ok(request) = MetaRequest::parse(&data) {
                let queries: usize = request.queries.iter().map(|query| 4 + query.len()).sum();
                prop_assert_eq!(4 + request.name.len() + 4 + queries, data.len());
            }
        }
    }
}
