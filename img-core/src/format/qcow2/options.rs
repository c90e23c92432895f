//! The options of a new qcow2 image, in the order in which `create` reports them, and of one that exists.

use crate::format::{
    OptionDescription,
    OptionKind::{Number, Size, Switch, Text},
};

/// See [`Driver::create_options`](crate::format::Driver::create_options).
pub(super) static CREATE_OPTIONS: &[OptionDescription] = &[
    OptionDescription::new(
        "encryption",
        Switch,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    OptionDescription::new("encrypt.format", Text, "Encrypt the image, format choices: 'aes', 'luks'"),
    OptionDescription::new(
        "encrypt.key-secret",
        Text,
        "ID of secret providing qcow AES key or LUKS passphrase",
    ),
    OptionDescription::new("encrypt.cipher-alg", Text, "Name of encryption cipher algorithm"),
    OptionDescription::new("encrypt.cipher-mode", Text, "Name of encryption cipher mode"),
    OptionDescription::new("encrypt.ivgen-alg", Text, "Name of IV generator algorithm"),
    OptionDescription::new("encrypt.ivgen-hash-alg", Text, "Name of IV generator hash algorithm"),
    OptionDescription::new("encrypt.hash-alg", Text, "Name of encryption hash algorithm"),
    OptionDescription::new("encrypt.iter-time", Number, "Time to spend in PBKDF in milliseconds"),
    OptionDescription::new("cluster_size", Size, "qcow2 cluster size").or("65536"),
    OptionDescription::new("extended_l2", Switch, "Extended L2 tables").or("off"),
    OptionDescription::new(
        "preallocation",
        Text,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    ),
    OptionDescription::new("compression_type", Text, "Compression method used for image cluster compression")
        .or("zlib"),
    OptionDescription::new("size", Size, "Virtual disk size"),
    OptionDescription::new("compat", Text, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    OptionDescription::new("backing_file", Text, "File name of a base image"),
    OptionDescription::new("backing_fmt", Text, "Image format of the base image"),
    OptionDescription::new("data_file", Text, "File name of an external data file"),
    OptionDescription::new("data_file_raw", Switch, "The external data file must stay valid as a raw image"),
    OptionDescription::new("lazy_refcounts", Switch, "Postpone refcount updates").or("off"),
    OptionDescription::new("refcount_bits", Number, "Width of a reference count entry in bits").or("16"),
];

/// See [`Driver::amend_options`](crate::format::Driver::amend_options).
pub(super) static AMEND_OPTIONS: &[OptionDescription] = &[
    OptionDescription::new("backing_file", Text, "File name of a base image"),
    OptionDescription::new("backing_fmt", Text, "Image format of the base image"),
    OptionDescription::new("compat", Text, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    OptionDescription::new("data_file", Text, "File name of an external data file"),
    OptionDescription::new("data_file_raw", Switch, "The external data file must stay valid as a raw image"),
    OptionDescription::new("encrypt.iter-time", Number, "Time to spend in PBKDF in milliseconds"),
    OptionDescription::new("encrypt.keyslot", Number, "Select a single keyslot to modify explicitly"),
    OptionDescription::new(
        "encrypt.new-secret",
        Text,
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    OptionDescription::new("encrypt.old-secret", Text, "Select all keyslots that match this password"),
    OptionDescription::new("encrypt.state", Text, "Select new state of affected keyslots (active/inactive)"),
    OptionDescription::new("lazy_refcounts", Switch, "Postpone refcount updates"),
    OptionDescription::new("refcount_bits", Number, "Width of a reference count entry in bits"),
    OptionDescription::new("size", Size, "Virtual disk size"),
];
