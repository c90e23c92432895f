//! Raw windows below a format, `detect-zeroes`, `discard`, `cache.*` and `aio` in `json:` names and `--image-opts`.

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

/// The space of what becomes zeroes is kept where any node says so.
#[test]
fn space_is_kept_where_the_name_says_so() {
    let mut twins = Twins::new(SETUP).without_files();
    twins.line("qemu-img create -q -f raw zeroes 1M");
    for format in ["raw", "qcow2"] {
        for options in [
            "",
            ",discard=unmap",
            ",discard=ignore",
            ",file.discard=ignore",
            ",discard=unmap,file.discard=off",
            ",discard=on,file.discard=on",
        ] {
            // 64 KiB of slack: how the host counts its own blocks is not the point.
            twins.lines(&[
                &format!("qemu-img convert -f qcow2 -O {format} full t"),
                &format!(
                    "qemu-img convert -n -f raw --target-image-opts zeroes \
                     driver={format},file.filename=t{options}"
                ),
                "test $(stat -c %b t) -ge 1920 && echo kept || echo given back",
                &format!("qemu-img map -f {format} --output=json t"),
            ]);
        }
    }
    twins.agree();
}

/// Whether `file` was opened past the page cache, as a line of shell that prints it.
fn opened(command: &str, file: &str) -> String {
    format!(
        "strace -f -qq -e trace=openat,open -o log {command} >out.txt 2>&1; echo $?; grep -v '^[0-9 ]*\\(' out.txt; \
         grep '\"{file}\"' log | grep -q O_DIRECT && echo {file} directly || echo {file} cached; rm -f log out.txt"
    )
}

/// A whole chain is read past the page cache, unless a node says otherwise; that of a file comes before that of the
/// format above it.
#[test]
fn the_page_cache_is_left_out_for_the_whole_chain() {
    let mut twins = Twins::new(SETUP).without_files();
    let over = "driver=qcow2,file.filename=over";
    for command in [
        "qemu-img convert -T none -O raw over flat".to_owned(),
        "qemu-img compare -T directsync over over".to_owned(),
        "qemu-img compare over over".to_owned(),
        "qemu-img check -T none over".to_owned(),
        "qemu-img rebase -t none -b base -F qcow2 over".to_owned(),
        "qemu-img bench -q -t none -c 1 -d 1 over >bench.txt".to_owned(),
        format!("qemu-img map --image-opts {over},cache.direct=on"),
        format!("qemu-img map --image-opts {over},file.cache.direct=on"),
        format!("qemu-img map --image-opts {over},cache.direct=on,file.cache.direct=off"),
        format!("qemu-img map --image-opts {over},cache.direct=off,file.cache.direct=on"),
        format!(
            "qemu-img map --image-opts {over},cache.direct=on,backing.driver=qcow2,backing.file.filename=base"
        ),
        format!(
            "qemu-img map --image-opts \
             {over},cache.direct=on,backing.driver=qcow2,backing.cache.direct=off,backing.file.filename=base"
        ),
        format!("qemu-img map --image-opts {over},cache.direct=on,file.aio=native"),
        format!("qemu-img map --image-opts {over},file.cache.direct=on,file.aio=native"),
        format!("qemu-img map --image-opts {over},file.aio=native"),
        format!("qemu-img compare -T none --image-opts {over},file.aio=native {over}"),
    ] {
        twins.lines(&[&opened(&command, "over"), &opened(&command, "base")]);
    }
    twins.agree();
}
