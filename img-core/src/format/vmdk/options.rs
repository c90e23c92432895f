//! The options of a new VMDK, in the order in which `create` reports them.

use crate::format::{
    OptionDescription,
    OptionKind::{Size, Switch, Text},
};

/// See [`Driver::create_options`](crate::format::Driver::create_options).
pub(super) static CREATE_OPTIONS: &[OptionDescription] = &[
    OptionDescription::new("size", Size, "Virtual disk size"),
    OptionDescription::new(
        "adapter_type",
        Text,
        "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    ),
    OptionDescription::new("backing_file", Text, "File name of a base image"),
    OptionDescription::new("backing_fmt", Text, "Must be 'vmdk' if present"),
    OptionDescription::new("compat6", Switch, "VMDK version 6 image").or("off"),
    OptionDescription::new("hwversion", Text, "VMDK hardware version").or("undefined"),
    OptionDescription::new("toolsversion", Text, "VMware guest tools version"),
    OptionDescription::new(
        "subformat",
        Text,
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | \
         twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    ),
    OptionDescription::new(
        "zeroed_grain",
        Switch,
        "Enable efficient zero writes using the zeroed-grain GTE feature",
    ),
];
