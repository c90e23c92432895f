//! Command lines that make no sense are refused in the reference's words, before any file is touched.

use img_tests::twin::Twins;

#[test]
fn the_program() {
    Twins::new(&[])
        .lines(&[
            "qemu-img",
            "qemu-img bogus",
            "qemu-img -Z",
            "qemu-img --bogus info",
            "qemu-img -T",
            "qemu-img --trace",
            "qemu-img -T foo",
            "qemu-img -Tenable=foo bogus",
            "qemu-img --tra info",
            "qemu-img -T file=x bogus",
            "../bin/qemu-img bogus",
            "../bin/qemu-img create -Z",
            "../bin/qemu-img create",
            "qemu-img -- bogus",
        ])
        .agree();
}

#[test]
fn options_of_all_commands() {
    let mut twins = Twins::new(&[]);
    for command in ["check", "compare", "convert", "create", "info", "map", "resize", "snapshot"] {
        for words in
            ["", "-Z", "a b c d", "-f", "--bogus=1", "--bogus", "-fraw -q=", "-- -f", "--object", "-"]
        {
            // `-q` is not an option of all; `-` is a file name.
            twins.line(&format!("qemu-img {command} {words}"));
        }
    }
    twins.agree();
}

#[test]
fn long_options_may_be_short_if_unambiguous() {
    Twins::new(&[])
        .lines(&[
            "qemu-img create --b",
            "qemu-img create --o help",
            "qemu-img create --backing",
            "qemu-img create --quiet=yes x 1M",
            "qemu-img create --form qcow2 x 1M",
            "qemu-img info --f",
            "qemu-img info --o",
            "qemu-img map --f",
            "qemu-img map --o",
            "qemu-img check --f",
            "qemu-img check --o",
            "qemu-img convert --b",
            "qemu-img convert --o",
            "qemu-img convert --s",
            "qemu-img convert --t",
            "qemu-img snapshot --f",
        ])
        .agree();
}

#[test]
fn values_of_options() {
    Twins::new(&["qemu-img create -q a 1M"])
        .lines(&[
            "qemu-img info --output xml a",
            "qemu-img info --output= a",
            "qemu-img info --image-opts -f raw driver=raw,file.filename=a",
            "qemu-img map --output foo a",
            "qemu-img map -s x a",
            "qemu-img map -s -1 a",
            "qemu-img map -s 9E a",
            "qemu-img map -l x a",
            "qemu-img map -s 1 -l 9E a",
            "qemu-img check -r foo a",
            "qemu-img check --output foo a",
            "qemu-img check -T foo a",
            "qemu-img check -u a",
            "qemu-img compare -T foo a a",
            "qemu-img compare --image-opts -f raw a a",
            "qemu-img compare --image-opts -F raw a a",
            "qemu-img snapshot -l -c x a",
            "qemu-img snapshot -c x -d y a",
            "qemu-img snapshot -l -l a",
            "qemu-img snapshot -c x",
            "qemu-img snapshot --image-opts -f qcow2 -c io driver=qcow2,file.filename=a",
            "qemu-img snapshot --output json -l a",
            "qemu-img resize a 1M 2M",
            "qemu-img resize --preallocation=foo a 1M",
            "qemu-img resize -q a --shrink -10M",
            "qemu-img info --object foo a",
            "qemu-img info --object foo,id=x a",
        ])
        .agree();
}

#[test]
fn convert() {
    Twins::new(&["qemu-img create -q a 1M", "qemu-img create -q b 1M"])
        .lines(&[
            "qemu-img convert",
            "qemu-img convert a",
            "qemu-img convert -C -S 4k a o",
            "qemu-img convert -C -c a o",
            "qemu-img convert --salvage -C a o",
            "qemu-img convert -o size=1M -n a b",
            "qemu-img convert -S foo a o",
            "qemu-img convert -S 1000 a o",
            "qemu-img convert -S 17M a o",
            "qemu-img convert -S -1 a o",
            "qemu-img convert -S 8E a o",
            "qemu-img convert -m 17 a o",
            "qemu-img convert -m 0 a o",
            "qemu-img convert -m x a o",
            "qemu-img convert -m 8k a o",
            "qemu-img convert -m 99999999999999999999 a o",
            "qemu-img convert -r x a o",
            "qemu-img convert -r -1 a o",
            "qemu-img convert -r 8E a o",
            "qemu-img convert -T foo a o",
            "qemu-img convert --target-is-zero a o",
            "qemu-img convert --skip-broken-bitmaps -O qcow2 a o",
            "qemu-img convert -o , a o",
            "qemu-img convert -l snapshot.foo=s1 a o",
            "qemu-img convert -l s1 a b o",
            "qemu-img convert --image-opts -f raw a o",
            "qemu-img convert --target-image-opts a o",
            "qemu-img convert --target-image-opts -O raw -n a o",
            "qemu-img convert -s x a o",
            "qemu-img convert -e a o",
            "qemu-img convert -6 a o",
            "qemu-img convert -n a b c -o help",
            "qemu-img convert -o help -O qcow2",
            "qemu-img convert -o help -O qcow2 a",
            "qemu-img convert -o help -O qcow2 a b",
            "qemu-img convert -o cluster_size=4k,? a b",
        ])
        .agree();
}
