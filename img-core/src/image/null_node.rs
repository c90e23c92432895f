//! A node that keeps nothing, in place of a host file: `null-co://`, `null-aio://`, and their options.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde_json::Value;

use super::{flat, flat::Flat};
use crate::{
    Error, Result,
    format::{Driver as _, OptionSet, null},
    storage::{NullStorage, Storage},
};

/// How large it is where its options do not say.
const DEFAULT_BYTES: u64 = 1 << 30;

/// The options that count when such nodes are named, in the order of the reference's dictionary around `driver`.
const SHOWN_BEFORE: &str = "read-zeroes";
const SHOWN_BEHIND: &str = "size";

/// What one says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NullNode {
    protocol: &'static str,
    read_zeroes: Option<Value>,
    size: Option<Value>,
    len_bytes: u64,
    reads_zeroes: bool,
    latency: Duration,
}

impl NullNode {
    /// The protocol of that name.
    pub(super) fn protocol(name: &str) -> Option<&'static str> {
        [&null::NULL_CO, &null::NULL_AIO].map(|driver| driver.name()).into_iter().find(|known| *known == name)
    }

    /// The node that a file name names, of which there is one for each protocol.
    pub(super) fn named(protocol: &'static str, name: &str) -> Result<Self> {
        if name == format!("{protocol}://") {
            return Self::take(protocol, &mut Flat::default());
        }
        Err(Error::Invalid(format!("The only allowed filename for this driver is '{protocol}://'")))
    }

    /// Takes its own options, and refuses all that are left.
    pub(super) fn take(protocol: &'static str, flat: &mut Flat) -> Result<Self> {
        let (read_zeroes, size, latency) =
            (flat.take(SHOWN_BEFORE), flat.take(SHOWN_BEHIND), flat.take("latency-ns"));
        if let Some((name, _)) = std::mem::take(flat).into_entries().next() {
            return Err(Error::Invalid(format!(
                "Block protocol '{protocol}' doesn't support the option '{name}'"
            )));
        }
        let mut texts = OptionSet::new();
        for (name, value) in [(SHOWN_BEFORE, &read_zeroes), (SHOWN_BEHIND, &size)] {
            if let Some(value) = value {
                texts.set(name, flat::text(value));
            }
        }
        let latency_ns = match latency.as_ref().map(flat::text).as_deref().map(str::parse::<i128>) {
            None => 0,
            Some(Err(_)) => return Err(Error::Invalid("Parameter 'latency-ns' expects a number".to_owned())),
            Some(Ok(ns)) => u64::try_from(ns)
                .ok()
                .filter(|ns| i64::try_from(*ns).is_ok())
                .ok_or_else(|| Error::Invalid("latency-ns is invalid".to_owned()))?,
        };
        let len_bytes = texts.size(SHOWN_BEHIND)?.unwrap_or(DEFAULT_BYTES);
        Ok(Self {
            protocol,
            reads_zeroes: texts.switch(SHOWN_BEFORE)?.unwrap_or(false),
            len_bytes,
            latency: Duration::from_nanos(latency_ns),
            read_zeroes,
            size,
        })
    }

    /// Whether it makes who uses it wait.
    pub(super) fn is_slow(&self) -> bool {
        !self.latency.is_zero()
    }

    /// Whether nothing is said of it but what it is.
    pub(super) fn is_default(&self) -> bool {
        self.read_zeroes.is_none() && self.size.is_none()
    }

    /// Its name, where that says it all, else `json:{…}`.
    pub(super) fn display(&self) -> String {
        if self.is_default() {
            return format!("{}://", self.protocol);
        }
        format!("json:{}", self.described())
    }

    /// As the reference writes it inside other nodes: how long it takes is not part of what it is.
    pub(super) fn described(&self) -> String {
        let protocol = Value::from(self.protocol);
        let members = [
            (SHOWN_BEFORE, self.read_zeroes.as_ref()),
            ("driver", Some(&protocol)),
            (SHOWN_BEHIND, self.size.as_ref()),
        ];
        let members: Vec<String> = members
            .into_iter()
            .filter_map(|(name, value)| value.map(|value| format!("\"{name}\": {value}")))
            .collect();
        format!("{{{}}}", members.join(", "))
    }

    pub(super) fn open(&self, writable: bool) -> Arc<dyn Storage> {
        Arc::new(NullStorage {
            name: PathBuf::from(self.display()),
            protocol: self.protocol,
            len_bytes: self.len_bytes,
            reads_zeroes: self.reads_zeroes,
            latency: self.latency,
            writable,
        })
    }
}
