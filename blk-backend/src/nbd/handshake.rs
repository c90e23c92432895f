//! The handshake: fixed newstyle negotiation, from the greeting to the first request.
//!
//! One pass over any stream of bytes, so that tests and fuzzers drive it without a socket. Whatever a client says, each
//! option gets the answer that the protocol gives it, or the connection ends; the server notices neither.

use std::{
    io::{self, Read, Write},
    sync::Arc,
};

use zerocopy::{FromBytes, IntoBytes};

use super::{
    command::Framing,
    context::{self, Selected},
    export::{Export, Exports, PREFERRED_BLOCK_BYTES},
    option::{self, BadOption, InfoRequest, MetaRequest},
    wire::{
        self, Greeting, MAX_PAYLOAD_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC, RawOption, RawOptionReply,
        SERVER_MAGIC, handshake_flag, info, option as opt, reply_type as rep,
    },
};

/// The longest data of an option that is looked at: beyond every list of queries that makes sense. Longer data is
/// passed over and answered with `NBD_REP_ERR_TOO_BIG`.
const MAX_OPTION_BYTES: u32 = 256 << 10;

/// What a client negotiated.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) export: Arc<Export>,
    pub(super) framing: Framing,
    pub(super) contexts: Vec<Selected>,
}

/// Why a handshake did not come to an end that the protocol knows.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Violation(String),
}

type Result<T> = std::result::Result<T, HandshakeError>;

/// Negotiates. `None` when the client took its leave.
///
/// # Errors
/// When the stream fails, or the client breaks a rule that has no answer.
pub(super) fn negotiate<S: Read + Write>(stream: S, exports: &Exports) -> Result<Option<Session>> {
    Handshake {
        stream,
        exports,
        out: Vec::new(),
        framing: Framing::Simple,
        selected: None,
        fixed: false,
        no_zeroes: false,
    }
    .run()
}

struct Handshake<'a, S> {
    stream: S,
    exports: &'a Exports,
    /// The answers to one option, sent together.
    out: Vec<u8>,
    framing: Framing,
    /// The contexts of the last `NBD_OPT_SET_META_CONTEXT`, and the export it was for.
    selected: Option<(Arc<Export>, Vec<Selected>)>,
    fixed: bool,
    no_zeroes: bool,
}

/// What an option leads to.
enum Next {
    Haggle,
    Leave,
    Transmit(Arc<Export>),
}

impl<S: Read + Write> Handshake<'_, S> {
    fn run(mut self) -> Result<Option<Session>> {
        let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        let greeting = Greeting {
            server_magic: SERVER_MAGIC.into(),
            option_magic: OPTION_MAGIC.into(),
            flags: flags.into(),
        };
        self.stream.write_all(greeting.as_bytes())?;
        let mut client_flags = [0; 4];
        self.stream.read_exact(&mut client_flags)?;
        let client_flags = u32::from_be_bytes(client_flags);
        if client_flags & !u32::from(flags) != 0 {
            return Err(HandshakeError::Violation(format!("unknown client flags {client_flags:#x}")));
        }
        self.fixed = client_flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = client_flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        loop {
            let next = self.option()?;
            self.stream.write_all(&self.out)?;
            self.out.clear();
            match next {
                Next::Haggle => {}
                Next::Leave => return Ok(None),
                Next::Transmit(export) => return Ok(Some(self.session(export))),
            }
        }
    }

    /// Contexts count only for the export that they were selected for ("`NBD_CMD_BLOCK_STATUS`").
    fn session(self, export: Arc<Export>) -> Session {
        let contexts = match self.selected {
            Some((of, contexts)) if Arc::ptr_eq(&of, &export) => contexts,
            _ => Vec::new(),
        };
        Session { export, framing: self.framing, contexts }
    }

    /// Reads one option and answers it into `out`.
    fn option(&mut self) -> Result<Next> {
        let mut head = [0; size_of::<RawOption>()];
        self.stream.read_exact(&mut head)?;
        let (head, _) = RawOption::ref_from_prefix(&head).expect("sizes agree");
        let (magic, option, len) = (head.magic.get(), head.option.get(), head.data_bytes.get());
        if magic != OPTION_MAGIC {
            return Err(HandshakeError::Violation(format!("option magic {magic:#018x}")));
        }
        if !self.fixed && option != opt::EXPORT_NAME {
            return Err(HandshakeError::Violation(format!("option {option} without fixed newstyle")));
        }
        if len > MAX_OPTION_BYTES {
            self.pass_over(len)?;
            self.error(option, rep::ERR_TOO_BIG, "the option's data is too long");
            return if option == opt::EXPORT_NAME {
                Err(HandshakeError::Violation(format!("an export name of {len} bytes")))
            } else {
                Ok(Next::Haggle)
            };
        }
        let mut data = vec![0; usize::try_from(len).expect("at most 256 KiB")];
        self.stream.read_exact(&mut data)?;
        if self.exports.is_closing() && !matches!(option, opt::ABORT | opt::EXPORT_NAME) {
            self.error(option, rep::ERR_SHUTDOWN, "the server is being shut down");
            return Ok(Next::Haggle);
        }
        self.answer(option, &data)
    }

    fn answer(&mut self, option: u32, data: &[u8]) -> Result<Next> {
        let without_data =
            matches!(option, opt::LIST | opt::STARTTLS | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS);
        if without_data && !data.is_empty() {
            self.error(option, rep::ERR_INVALID, "this option has no data");
            return Ok(Next::Haggle);
        }
        match option {
            opt::EXPORT_NAME => return self.export_name(data),
            opt::ABORT => {
                self.reply(option, rep::ACK, &[]);
                return Ok(Next::Leave);
            }
            opt::INFO | opt::GO => {
                if let Some(export) = self.info(option, data)
                    && option == opt::GO
                {
                    return Ok(Next::Transmit(export));
                }
            }
            opt::LIST => self.list(),
            opt::STARTTLS => self.error(option, rep::ERR_POLICY, "this server does not do TLS"),
            opt::STRUCTURED_REPLY => self.structured_reply(),
            opt::EXTENDED_HEADERS => self.extended_headers(),
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_context(option, data),
            _ => self.error(option, rep::ERR_UNSUP, "unknown option"),
        }
        Ok(Next::Haggle)
    }

    /// "`NBD_OPT_EXPORT_NAME`": has no error but the end of the connection.
    fn export_name(&mut self, data: &[u8]) -> Result<Next> {
        let violation = |text: String| Err(HandshakeError::Violation(text));
        if self.framing == Framing::Extended {
            return violation("NBD_OPT_EXPORT_NAME after extended headers were negotiated".to_owned());
        }
        let name = match option::string(data) {
            Ok(name) => name,
            Err(bad) => return violation(format!("the export's name: {bad}")),
        };
        let Some(export) = self.exports.find(&name) else {
            return violation(format!("there is no export called '{name}'"));
        };
        self.out.extend_from_slice(&export.size_bytes().to_be_bytes());
        self.out.extend_from_slice(&export.transmission_flags(self.framing).to_be_bytes());
        if !self.no_zeroes {
            self.out.extend_from_slice(&[0; 124]);
        }
        Ok(Next::Transmit(export))
    }

    fn list(&mut self) {
        for export in self.exports.all() {
            let name = export.name().as_bytes();
            let len = u32::try_from(name.len()).expect("names have at most 4096 bytes");
            let description = export.description().as_bytes();
            let data = [&len.to_be_bytes()[..], name, description].concat();
            self.reply(opt::LIST, rep::SERVER, &data);
        }
        self.reply(opt::LIST, rep::ACK, &[]);
    }

    /// "`NBD_OPT_INFO` and `NBD_OPT_GO`": the export, when the request is in order.
    fn info(&mut self, option: u32, data: &[u8]) -> Option<Arc<Export>> {
        let request = match InfoRequest::parse(data) {
            Ok(request) => request,
            Err(bad) => {
                self.bad(option, &bad);
                return None;
            }
        };
        let export = self.known_export(option, &request.name)?;
        let wants = |kind| request.wanted.contains(&kind);
        let head = |kind: u16| kind.to_be_bytes().to_vec();
        if wants(info::NAME) {
            let data = [head(info::NAME), export.name().into()].concat();
            self.reply(option, rep::INFO, &data);
        }
        if wants(info::DESCRIPTION) && !export.description().is_empty() {
            let data = [head(info::DESCRIPTION), export.description().into()].concat();
            self.reply(option, rep::INFO, &data);
        }
        // Told even when it was not asked for, as in the reference: any alignment is accepted either way.
        let sizes = [1, PREFERRED_BLOCK_BYTES, MAX_PAYLOAD_BYTES];
        let mut block_size = head(info::BLOCK_SIZE);
        block_size.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
        self.reply(option, rep::INFO, &block_size);
        let mut about = head(info::EXPORT);
        about.extend(export.size_bytes().to_be_bytes());
        about.extend(export.transmission_flags(self.framing).to_be_bytes());
        self.reply(option, rep::INFO, &about);
        self.reply(option, rep::ACK, &[]);
        Some(export)
    }

    fn structured_reply(&mut self) {
        match self.framing {
            Framing::Simple => {
                self.framing = Framing::Structured;
                self.reply(opt::STRUCTURED_REPLY, rep::ACK, &[]);
            }
            Framing::Structured => {
                self.error(
                    opt::STRUCTURED_REPLY,
                    rep::ERR_INVALID,
                    "structured replies are already negotiated",
                );
            }
            Framing::Extended => self.error(
                opt::STRUCTURED_REPLY,
                rep::ERR_EXT_HEADER_REQD,
                "extended headers are already negotiated",
            ),
        }
    }

    fn extended_headers(&mut self) {
        if self.framing == Framing::Extended {
            self.error(opt::EXTENDED_HEADERS, rep::ERR_INVALID, "extended headers are already negotiated");
            return;
        }
        self.framing = Framing::Extended;
        self.reply(opt::EXTENDED_HEADERS, rep::ACK, &[]);
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) {
        if option == opt::SET_META_CONTEXT {
            // "Including when this command fails."
            self.selected = None;
        }
        if self.framing < Framing::Structured {
            return self.error(option, rep::ERR_INVALID, "structured replies are not negotiated");
        }
        let request = match MetaRequest::parse(data) {
            Ok(request) => request,
            Err(bad) => return self.bad(option, &bad),
        };
        let Some(export) = self.known_export(option, &request.name) else { return };
        let all = export.contexts();
        if option == opt::LIST_META_CONTEXT {
            for context in context::listed(all, &request.queries) {
                self.reply(option, rep::META_CONTEXT, &[&[0; 4], context.name().as_bytes()].concat());
            }
        } else {
            let fixed = |selected: Selected| -> img_core::Result<Selected> {
                Ok(Selected { context: export.fixed(selected.context)?, ..selected })
            };
            let selected = context::selected(all, &request.queries);
            let selected: Vec<Selected> = match selected.into_iter().map(fixed).collect() {
                Ok(selected) => selected,
                Err(error) => return self.error(option, rep::ERR_INVALID, &error.to_string()),
            };
            for Selected { id, context } in &selected {
                self.reply(
                    option,
                    rep::META_CONTEXT,
                    &[&id.to_be_bytes(), context.name().as_bytes()].concat(),
                );
            }
            self.selected = Some((export, selected));
        }
        self.reply(option, rep::ACK, &[]);
    }

    fn known_export(&mut self, option: u32, name: &str) -> Option<Arc<Export>> {
        let export = self.exports.find(name);
        if export.is_none() {
            self.error(option, rep::ERR_UNKNOWN, &format!("there is no export called '{name}'"));
        }
        export
    }

    fn bad(&mut self, option: u32, bad: &BadOption) {
        let kind = match bad {
            BadOption::Invalid(_) => rep::ERR_INVALID,
            BadOption::TooBig(_) => rep::ERR_TOO_BIG,
        };
        self.error(option, kind, &bad.to_string());
    }

    fn error(&mut self, option: u32, kind: u32, why: &str) {
        // A name of the client's that is repeated may be as long as a string may be.
        self.reply(option, kind, wire::cut(why));
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let head = RawOptionReply {
            magic: OPTION_REPLY_MAGIC.into(),
            option: option.into(),
            reply_type: kind.into(),
            data_bytes: u32::try_from(data.len()).expect("a few strings").into(),
        };
        self.out.extend_from_slice(head.as_bytes());
        self.out.extend_from_slice(data);
    }

    fn pass_over(&mut self, len: u32) -> Result<()> {
        let passed = io::copy(&mut (&mut self.stream).take(u64::from(len)), &mut io::sink())?;
        if passed < u64::from(len) {
            Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
        } else {
            Ok(())
        }
    }
}
