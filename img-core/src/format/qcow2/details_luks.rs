//! The embedded LUKS header of an encrypted image, as far as `info` describes it.
//!
//! Layout: "LUKS On-Disk Format Specification Version 1.2.3", "phdr" and "key slot". Nothing is decrypted.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{
    extension::{be32, text},
    header::Header,
};
use crate::{Error, Result, storage::Storage};

const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
const HEADER_BYTES: usize = 592;
const SLOTS_AT: usize = 208;
const SLOT_BYTES: usize = 48;
const SLOTS: usize = 8;
const SLOT_ACTIVE: u32 = 0x00ac_71f3;
const SLOT_INACTIVE: u32 = 0x0000_dead;
/// Offsets in the header count these.
const SECTOR_BYTES: u64 = 512;

/// The `encrypt` object of the details.
///
/// # Errors
/// [`Error::Corrupt`] where there is no LUKS header of version 1 behind the pointer.
pub(super) fn details(storage: &dyn Storage, header: &Header) -> Result<Value> {
    let file = storage.path();
    let Some(pointer) = header.encryption else {
        return Err(Error::corrupt(file, "header extensions", 0, "an encryption header pointer", "none"));
    };
    let at = pointer.offset;
    let mut bytes = [0; HEADER_BYTES];
    storage.read_at(&mut bytes, at)?;
    if !bytes.starts_with(&MAGIC) {
        return Err(Error::corrupt(file, "LUKS header, magic", at, "LUKS\\xba\\xbe", "something else"));
    }
    let version = u16::from_be_bytes([bytes[6], bytes[7]]);
    if version != 1 {
        return Err(Error::corrupt(file, "LUKS header, version", at + 6, 1, version));
    }
    let field = |start: usize, length: usize, name| {
        text(&bytes[start..start + length], file, name, at + start as u64)
    };
    let cipher = field(8, 32, "LUKS header, cipher name")?;
    let mode = field(40, 32, "LUKS header, cipher mode")?;
    let key_bytes = be32(&bytes, 108);
    let (cipher_mode, iv) = mode.split_once('-').unwrap_or((&mode, ""));
    let (iv, iv_hash) = match iv.split_once(':') {
        Some((iv, hash)) => (iv, Some(hash)),
        None => (iv, None),
    };
    // XTS takes two keys of the cipher's length.
    let cipher_key_bytes = if cipher_mode == "xts" { key_bytes / 2 } else { key_bytes };
    let mut found = Map::new();
    let mut put = |key: &str, value: Value| found.insert(key.to_owned(), value);
    put("ivgen-alg", json!(iv));
    if let Some(hash) = iv_hash {
        put("ivgen-hash-alg", json!(hash));
    }
    put("detached-header", json!(false));
    put("hash-alg", json!(field(72, 32, "LUKS header, hash")?));
    put("cipher-alg", json!(cipher_name(file, at, &cipher, cipher_key_bytes)?));
    put("uuid", json!(field(168, 40, "LUKS header, UUID")?));
    put("format", json!("luks"));
    put("cipher-mode", json!(cipher_mode));
    let slots: Result<Vec<_>> = (0..SLOTS)
        .map(|index| {
            let start = SLOTS_AT + index * SLOT_BYTES;
            slot(file, at + start as u64, &bytes[start..start + SLOT_BYTES])
        })
        .collect();
    put("slots", slots?.into());
    put("payload-offset", json!(u64::from(be32(&bytes, 104)) * SECTOR_BYTES));
    put("master-key-iters", json!(be32(&bytes, 164)));
    Ok(found.into())
}

/// The reference's name of a cipher, which tells its key length.
fn cipher_name(file: &Path, at: u64, cipher: &str, key_bytes: u32) -> Result<String> {
    let lengths: &[u32] = match cipher {
        "aes" | "serpent" | "twofish" => &[16, 24, 32],
        "cast5" => &[16],
        _ => &[],
    };
    if !lengths.contains(&key_bytes) {
        return Err(Error::corrupt(
            file,
            "LUKS header, cipher",
            at + 8,
            "aes, serpent, twofish or cast5 with a key length it has",
            format_args!("{cipher:?} with a key of {key_bytes} bytes"),
        ));
    }
    Ok(format!("{cipher}-{}", key_bytes * 8))
}

fn slot(file: &Path, at: u64, slot: &[u8]) -> Result<Value> {
    let key_offset = u64::from(be32(slot, 40)) * SECTOR_BYTES;
    match be32(slot, 0) {
        SLOT_ACTIVE => Ok(json!({
            "active": true,
            "iters": be32(slot, 4),
            "key-offset": key_offset,
            "stripes": be32(slot, 44),
        })),
        SLOT_INACTIVE => Ok(json!({ "active": false, "key-offset": key_offset })),
        other => Err(Error::corrupt(
            file,
            "LUKS key slot, state",
            at,
            format_args!("{SLOT_ACTIVE:#x} or {SLOT_INACTIVE:#x}"),
            format_args!("{other:#x}"),
        )),
    }
}
