//! A disk that fills up, a real one: a tmpfs of 6 MiB in a mount namespace of the test's own.
//!
//! What fails names the file, what was tried, and where; what it made is gone; what was there is sound, reads as it did
//! or as what was on its way, and takes the whole change once there is room.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::symlink,
};

use img_tests::command::{Output, Run, img_binary, oracle};

/// What each script begins with: the small disk at `small`, and a source of 8 MiB that is not zero anywhere.
const HEAD: &str = "mount -t tmpfs -o size=6m none small || exit 77\n\
     head -c 8M /dev/zero | tr '\\0' q > source\n\
     fails() { \"$@\" 2>err; echo \"code $?: $(cat err)\"; }\n\
     sound() { check \"$@\"; case $? in 0|3) echo sound;; *) echo DAMAGED;; esac; }\n\
     check() { img check \"$@\" >check.out 2>&1; }\n\
     kept() { cksum source | cmp - source.sum && echo kept; }\n\
     cksum source > source.sum\n";

/// Runs lines of a shell that may mount: `img` and the reference's `qemu-img` are in its path. `None`, with a word on
/// standard error, where this machine gives no mount namespaces.
fn run(lines: &str) -> Option<Output> {
    let folder = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir(folder.path().join("small")).expect("a directory");
    fs::create_dir(folder.path().join("bin")).expect("a directory");
    symlink(img_binary(), folder.path().join("bin/img")).expect("a link");
    fs::create_dir(folder.path().join("as")).expect("a directory");
    symlink(img_binary(), folder.path().join("as/qemu-img")).expect("a link");
    assert_eq!(oracle("qemu-img"), "qemu-img", "found by its name");
    let script = format!("PATH=$PWD/bin:$PATH\n{HEAD}{lines}");
    let output = Run::new("unshare", folder.path()).args(["-rm", "sh", "-c", &script]).output();
    if output.code == 77 || output.stderr.contains("unshare failed") {
        writeln!(io::stderr(), "SKIPPED: no small disk can be mounted here: {}", output.stderr)
            .expect("told");
        return None;
    }
    assert_eq!(output.code, 0, "{output}");
    Some(output)
}

/// The lines that a script has to print, each as a text that is part of it.
#[track_caller]
fn expect(output: &Output, lines: &[&str]) {
    let told: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(told.len(), lines.len(), "{output}");
    for (line, expected) in told.iter().zip(lines) {
        assert!(line.contains(expected), "'{expected}' is not in '{line}': {output}");
    }
}

#[test]
fn what_was_made_goes() {
    for format in ["raw", "qcow2", "qed", "vmdk", "vpc"] {
        let Some(output) = run(&format!(
            "fails img convert -O {format} source small/new\n\
             fails img dd -O {format} bs=1M if=source of=small/new\n\
             ls small; kept"
        )) else {
            return;
        };
        let place = "small/new: write at byte 0x";
        assert_eq!(output.stdout.matches(place).count(), 2, "{format}: {output}");
        expect(&output, &["code 1: img: error while writing", "code 1: img: error while writing", "kept"]);
        assert_eq!(output.stdout.matches("No space left on device").count(), 2, "{format}: {output}");
    }
}

#[test]
fn what_was_there_is_sound_and_takes_the_rest_later() {
    for format in ["qcow2", "qed", "vmdk", "vpc"] {
        let Some(output) = run(&format!(
            "img create -q -f {format} small/old 8M\n\
             fails img bench -q -w -c 64 -s 128k -d 1 --pattern 113 -f {format} small/old >/dev/null\n\
             cat err\n\
             sound -f {format} small/old\n\
             fails img convert -n -O {format} source small/old\n\
             sound -f {format} small/old; kept\n\
             mount -o remount,size=40m small\n\
             img check -q -r all -f {format} small/old >/dev/null 2>&1\n\
             img convert -n -O {format} source small/old && sound -f {format} small/old\n\
             img compare -f {format} -F raw small/old source | tail -n 1"
        )) else {
            return;
        };
        let expected = [
            "img: Failed request: No space left on device (small/old: ",
            "sound",
            "code 1: img: error while writing",
            "sound",
            "kept",
            "sound",
            "Images are identical.",
        ];
        expect(&output, &expected);
    }
}

/// Layers: what was to be moved stays where it was, and a second try ends the work.
#[test]
fn chains_keep_their_data() {
    for format in ["qcow2", "qed"] {
        let Some(output) = run(&format!(
            "img create -q -f {format} small/base 8M\n\
             img create -q -f {format} -b small/base -F {format} top\n\
             img bench -q -w -c 64 -s 128k -d 1 --pattern 113 -f {format} top >/dev/null\n\
             cksum top > top.sum\n\
             fails img commit -q -f {format} top\n\
             cksum top | cmp - top.sum && sound -f {format} small/base\n\
             img compare -q -f {format} -F raw top source && kept\n\
             mount -o remount,size=40m small\n\
             img commit -q -f {format} top && sound -f {format} small/base\n\
             img compare -f {format} -F raw small/base source\n\
             mount -o remount,size=40m small && rm small/base\n\
             mount -o remount,size=6m small\n\
             img create -q -f {format} -b $PWD/source -F raw small/over 8M\n\
             fails img rebase -f {format} -b '' small/over\n\
             sound -f {format} small/over; kept\n\
             img compare -f {format} -F raw small/over source"
        )) else {
            return;
        };
        expect(
            &output,
            &[
                "small/base: write at byte 0x",
                "sound",
                "kept",
                "sound",
                "Images are identical.",
                "small/over: write at byte 0x",
                "sound",
                "kept",
                "Images are identical.",
            ],
        );
    }
}

#[test]
fn changes_of_a_full_image_are_refused_whole() {
    let Some(output) = run("img create -q -f qcow2 small/full 8M\n\
         img bench -q -w -c 40 -s 128k -d 1 --pattern 7 small/full >/dev/null\n\
         img convert -O raw small/full before\n\
         dd if=/dev/zero of=small/fill bs=1k >/dev/null 2>&1\n\
         fails img snapshot -c s small/full\n\
         fails img amend -o refcount_bits=64 small/full\n\
         fails img bitmap --add small/full b\n\
         fails img resize --preallocation=full small/full 16M\n\
         fails img bench -q -w -c 1 -o 6M -s 128k -d 1 small/full >/dev/null; cat err\n\
         fails img create -q -f qcow2 small/new 1M\n\
         fails img map --plot small/picture.svg small/full\n\
         ls small; sound small/full; qemu-img check small/full >/dev/null 2>&1; [ $? = 0 -o $? = 3 ] && echo theirs\n\
         img compare -f qcow2 -F raw small/full before")
    else {
        return;
    };
    expect(
        &output,
        &[
            "Could not create snapshot 's': No space left on device (small/full: ",
            "small/full: write at byte 0x",
            "small/full: write at byte 0x",
            "small/full: write zeros for preallocation at byte 0x",
            "Failed request: No space left on device (small/full: write at byte 0x",
            "small/new: write at byte 0x",
            "small/picture.svg",
            "fill",
            "full",
            "sound",
            "theirs",
            "Images are identical.",
        ],
    );
}

/// Space that was asked for is had, or the disk keeps its size.
#[test]
fn a_disk_that_cannot_be_filled_does_not_grow() {
    for (format, options) in [
        ("raw", ""),
        ("qcow2", ""),
        ("qcow2", "-o data_file=data"),
        ("vmdk", "-o subformat=monolithicFlat"),
        ("vpc", "-o subformat=fixed,force_size=on"),
    ] {
        for how in ["full", "falloc"] {
            let Some(output) = run(&format!(
                "img create -q -f {format} {options} small/old 1M\n\
                 img bench -q -w -c 1 -s 64k -d 1 --pattern 7 -f {format} small/old >/dev/null\n\
                 img convert -f {format} -O raw small/old before\n\
                 fails img resize --preallocation={how} -f {format} small/old 16M\n\
                 img compare -f {format} -F raw small/old before\n\
                 fails img bench -q -w -c 16 -s 64k -d 1 --pattern 113 -f {format} small/old >/dev/null; cat err\n\
                 [ {format} != qcow2 ] || sound small/old"
            )) else {
                return;
            };
            let mut expected = vec!["No space left on device", "Images are identical."];
            expected.extend((format == "qcow2").then_some("sound"));
            expect(&output, &expected);
            assert!(output.stdout.starts_with("code 1: "), "{output}");
        }
    }
}

/// Under the reference's name it is told in its words.
#[test]
fn a_full_disk_is_told_as_the_reference_tells_it() {
    let tells = "tells() { rm -f small/*; small=$1; shift; \
                 [ $small = none ] || qemu-img create -q -f $small small/new 1M; \"$@\" 2>&1 | sed 's/byte [0-9]*/byte N/'; }\n\
                 same() { small=$1; shift; theirs=$(tells $small qemu-img \"$@\"); ours=$(tells $small as/qemu-img \"$@\"); \
                 if [ \"$theirs\" = \"$ours\" ]; then echo \"$ours\"; else echo \"DIFFER: $theirs | $ours\"; fi; }\n";
    let Some(output) = run(&format!(
        "{tells}\
         for format in raw qcow2 qed vmdk vpc; do same none convert -O $format source small/new; done\n\
         for how in full falloc; do\n\
         same none create -q -f raw -o preallocation=$how small/new 8M\n\
         same raw resize -f raw --preallocation=$how small/new 16M\n\
         same none convert -O raw -o preallocation=$how source small/new\n\
         done"
    )) else {
        return;
    };
    let mut expected = vec!["qemu-img: error while writing at byte N: No space left on device"; 5];
    expected.extend(["Could not write zeros for preallocation: No space left on device"; 3]);
    expected.extend(["Could not preallocate new data: No space left on device"; 3]);
    expect(&output, &expected);
    assert!(!output.stdout.contains("DIFFER"), "{output}");
}
