//! What `info` says about a qcow2 image beyond what every image has.

use serde_json::{Map, Value, json};

use super::{
    bitmap, details_luks,
    feature::{autoclear, compatible, incompatible},
    header::{CryptMethod, Header},
};
use crate::{Result, format::Codec, storage::Storage};

/// The reference's `format-specific` object, type and data.
///
/// # Errors
/// When the bitmap directory or the encryption header cannot be read or is malformed.
pub(super) fn details(storage: &dyn Storage, header: &Header) -> Result<Value> {
    let mut data = Map::new();
    let mut put = |key: &str, value: Value| data.insert(key.to_owned(), value);
    let version_3 = header.geometry.version >= 3;
    put("compat", json!(if version_3 { "1.1" } else { "0.10" }));
    put(
        "compression-type",
        json!(match header.compression {
            Codec::Deflate | Codec::Zlib => "zlib",
            Codec::Zstd => "zstd",
        }),
    );
    if version_3 {
        put("lazy-refcounts", json!(header.compatible & compatible::LAZY_REFCOUNTS != 0));
    }
    if let Some(extension) = header.bitmaps {
        let bitmaps = bitmap::read_directory(storage, header.geometry, extension)?;
        put("bitmaps", bitmaps.iter().map(bitmap_details).collect());
    }
    put("refcount-bits", json!(1_u32 << header.geometry.refcount_order));
    if let Some(name) = header.data_file.as_ref().filter(|_| header.geometry.external_data) {
        put("data-file", json!(name));
    }
    match header.crypt_method {
        CryptMethod::None => {}
        CryptMethod::Aes => {
            put("encrypt", json!({ "format": "aes" }));
        }
        CryptMethod::Luks => {
            put("encrypt", details_luks::details(storage, header)?);
        }
    }
    if header.geometry.external_data {
        put("data-file-raw", json!(header.autoclear & autoclear::RAW_DATA != 0));
    }
    if version_3 {
        put("corrupt", json!(header.is(incompatible::CORRUPT)));
        put("extended-l2", json!(header.geometry.extended_l2));
    }
    Ok(json!({ "type": "qcow2", "data": data }))
}

fn bitmap_details(bitmap: &bitmap::Bitmap) -> Value {
    let mut flags = Vec::new();
    if bitmap.is_in_use() {
        flags.push("in-use");
    }
    if bitmap.is_auto() {
        flags.push("auto");
    }
    json!({ "flags": flags, "name": bitmap.name, "granularity": bitmap.granularity_bytes() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{
        OpenMode,
        qcow2::oracle::{self, file, qemu_img},
    };

    /// The same keys and values as the reference prints, whatever the image.
    #[test]
    fn as_the_reference_says() {
        let directory = oracle::directory();
        let path = directory.path();
        let secret = "secret,id=s,data=abc";
        let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
        let old_luks =
            format!("{luks},encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256");
        for options in [
            "compat=0.10",
            "compat=1.1,lazy_refcounts=on",
            "extended_l2=on,compression_type=zstd,refcount_bits=1",
            "data_file=d",
            "data_file=e,data_file_raw=on",
            "encrypt.format=aes,encrypt.key-secret=s",
            luks,
            &format!("{luks},encrypt.cipher-alg=serpent-128"),
            &format!("{luks},encrypt.cipher-alg=twofish-192,encrypt.hash-alg=sha512,cluster_size=512"),
            &old_luks,
        ] {
            qemu_img(path, &["create", "-q", "--object", secret, "-f", "qcow2", "-o", options, "x", "1M"]);
            if options.contains("lazy") {
                qemu_img(path, &["bitmap", "--add", "x", "one"]);
                qemu_img(path, &["bitmap", "--add", "--disable", "-g", "512", "x", "two"]);
            }
            let info: Value =
                serde_json::from_str(&qemu_img(path, &["info", "--output=json", "x"])).expect("JSON");
            let storage = file(&path.join("x"));
            let header = Header::read(&*storage, OpenMode::Inspect).unwrap();
            assert_eq!(details(&*storage, &header).unwrap(), info["format-specific"], "{options}");
            std::fs::remove_file(path.join("x")).unwrap();
        }
    }
}
