//! Raw windows below a format, and `detect-zeroes`, in `json:` names and `--image-opts`.

use img_tests::twin::Twins;

/// An image inside a larger file, and one with data.
const SETUP: &[&str] = &[
    "qemu-img create -q -f qcow2 a 1M && qemu-io -c 'write -P 1 64k 64k' a >/dev/null",
    "(head -c 512 /dev/zero; cat a; head -c 4096 /dev/zero) > w",
    "head -c 1M /dev/zero | tr '\\0' q > r && qemu-io -f raw -c 'write -P 0 100k 300k' r >/dev/null",
    "qemu-img create -q -f qcow2 full 1M && qemu-io -c 'write -P 7 0 1M' full >/dev/null",
    "cp full base && qemu-img create -q -f qcow2 -b base -F qcow2 over && qemu-io -c 'write -P 0 64k 192k' over >/dev/null",
];

/// `w` as nested nodes, given as JSON members so that numbers stay numbers.
const WINDOWS: &[&str] = &[
    r#"{"driver":"qcow2","file":{"driver":"raw","offset":512,"file":{"driver":"file","filename":"w"}}}"#,
    r#"{"driver":"qcow2","file":{"driver":"raw","offset":512,"size":393216,"file":{"driver":"file","filename":"w"}}}"#,
    r#"{"file":{"driver":"raw","offset":512,"file":{"driver":"raw","size":396800,"file":{"driver":"file","filename":"w"}}}}"#,
    r#"{"driver":"qcow2","file":{"driver":"raw","offset":512,"file":{"driver":"raw","file":{"filename":"w"}}}}"#,
    r#"{"driver":"qcow2","file":{"driver":"raw","file":{"filename":"a"}}}"#,
    r#"{"driver":"raw","offset":512,"size":1024,"file":{"driver":"raw","offset":512,"file":{"driver":"file","filename":"w"}}}"#,
    r#"{"driver":"raw","file":{"driver":"raw","offset":512,"file":{"driver":"file","filename":"w"}}}"#,
    r#"{"driver":"raw","file":{"driver":"raw","file":{"driver":"file","filename":"w"}}}"#,
];

#[test]
fn windows_below_a_format() {
    let mut twins = Twins::new(SETUP);
    for window in WINDOWS {
        for command in ["info", "info --output=json", "map --output=json", "check", "compare r"] {
            twins.line(&format!("qemu-img {command} 'json:{window}'"));
        }
        twins.line(&format!("qemu-img convert -O raw 'json:{window}' out"));
        twins
            .line(&format!("qemu-img create -q -f qcow2 -b 'json:{window}' -F qcow2 on && qemu-img info on"));
    }
    let backing = "backing.driver=raw,backing.file.filename=w";
    twins.line(&format!("qemu-img map --image-opts driver=raw,{backing},file.filename=w"));
    for options in [
        "file.size=1000",
        "file.offset=512k",
        "file.offset=512,file.size=512M",
        "file.offset=512,file.foo=2",
        "file.offset=some",
        "file.backing.driver=raw,file.backing.file.filename=w",
    ] {
        twins.line(&format!(
            "qemu-img map --image-opts driver=qcow2,file.driver=raw,{options},file.file.filename=w"
        ));
    }
    twins.agree();
}

/// Only what is inside the window is written, and no more than it holds.
#[test]
fn windows_are_written() {
    let mut twins = Twins::new(SETUP).without_files();
    let open = "driver=qcow2,file.driver=raw,file.offset=512,file.file.filename=w";
    twins.lines(&[
        &format!("qemu-img bench -w -d 1 -c 5 -s 64k -o 128k --pattern 5 --image-opts {open} | tail -n 0"),
        &format!("qemu-img snapshot -c s --image-opts {open}"),
        &format!("qemu-img check --image-opts {open}"),
        &format!("qemu-img convert -O raw --image-opts {open} out && cksum out"),
        &format!("qemu-img resize --image-opts {open} 2M"),
        "qemu-img info 'json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"raw\",\"offset\":512,\"file\":{\"filename\":\"w\"}}}' | grep -v 'size:'",
    ]);
    let fixed = "driver=qcow2,file.driver=raw,file.offset=512,file.size=384k,file.file.filename=w";
    let mut full = Twins::new(SETUP);
    full.lines(&[
        &format!("qemu-img bench -w -c 1 -s 64k -o 512k --image-opts {fixed} | tail -n 0"),
        &format!("qemu-img check --image-opts {fixed}"),
        &format!("qemu-img convert -O raw --image-opts {fixed} out && cksum out"),
        "qemu-img resize --image-opts driver=raw,file.driver=raw,file.size=384k,file.file.filename=w 1M",
        "qemu-img resize --shrink --image-opts driver=raw,file.driver=raw,file.offset=512,file.file.filename=w 64k",
    ]);
    twins.agree();
    full.agree();
}

/// Whole requests of zeroes become zeroes in the map, with their space or without.
#[test]
fn zeroes_are_detected() {
    let mut twins = Twins::new(SETUP).without_disk_use();
    for (name, format) in [("full", "qcow2"), ("r", "raw")] {
        for options in ["on", "off", "unmap,discard=unmap", "off,file.detect-zeroes=unmap"] {
            let target = format!("driver={format},file.filename=t,detect-zeroes={options}");
            let renew = format!("cp {name} t");
            let map = format!("qemu-img map --output=json -f {format} t");
            let convert = format!("qemu-img convert -f raw -n --target-image-opts r {target}");
            twins.lines(&[
                &renew,
                &format!("qemu-img bench -w -d 1 -c 4 -s 64k -o 64k --image-opts {target} | tail -n 0"),
                &map,
                &format!(
                    "qemu-img bench -w -d 1 -c 4 -s 64k -o 512k --pattern=3 --image-opts {target} | tail -n 0"
                ),
                &map,
            ]);
            // Of a cluster that becomes zero in part the reference writes the zeroes apart from the rest.
            if !options.contains("file.") {
                twins.lines(&[&renew, &format!("{convert} -S 0"), &map, &renew, &convert, &map]);
            }
            if format == "qcow2" {
                twins.lines(&[
                    "qemu-img create -q -f qcow2 t 1M",
                    &format!("{convert} -S 0 -c"),
                    "qemu-img map --output=json t | grep -c '\"compressed\": true'",
                    "qemu-img map --output=json t | sed 's/, \"offset.*//'",
                ]);
            }
        }
    }
    twins.agree();
}

/// Giving space back must be allowed where zeroes should: by the node's own option, or by the command.
#[test]
fn unmapping_has_to_be_allowed() {
    let mut twins = Twins::new(SETUP).without_files();
    let image = "driver=qcow2,file.filename=full";
    for options in [
        "detect-zeroes=unmap",
        "detect-zeroes=unmap,discard=ignore",
        "detect-zeroes=unmap,discard=unmap",
        "detect-zeroes=maybe",
        "discard=perhaps",
        "file.detect-zeroes=unmap",
        "file.detect-zeroes=unmap,file.discard=off",
        "backing.driver=qcow2,backing.detect-zeroes=unmap,backing.file.filename=base",
    ] {
        let image = format!("{image},{options}");
        for command in ["map", "check", "snapshot -l", "measure -O qcow2"] {
            twins.line(&format!("qemu-img {command} --image-opts {image}"));
        }
        twins.line(&format!("qemu-img convert -n -f raw --target-image-opts r {image}"));
        twins.line(&format!("qemu-img convert -n -S 0 -f raw --target-image-opts r {image}"));
        twins.line(&format!("qemu-img commit -q -d --image-opts driver=qcow2,file.filename=over,{options}"));
    }
    twins.agree();
}

/// What a name says of the image below counts when that one is written.
#[test]
fn commits_detect_zeroes_in_the_base() {
    for detect in ["on", "unmap"] {
        let mut twins = Twins::new(SETUP);
        twins.lines(&[
            &format!(
                "qemu-img commit -q -d --image-opts driver=qcow2,file.filename=over,backing.driver=qcow2,\
                 backing.detect-zeroes={detect},backing.file.filename=base"
            ),
            "qemu-img map --output=json base",
        ]);
        twins.agree();
    }
}
