//! `check` and `compare`: what is found, and the exit codes.

use img_tests::twin::Twins;

/// A refcount of `IMAGE` is set by hand: `poke IMAGE CLUSTER COUNT`, for 16-bit counts in cluster 2.
const POKE: &str = "poke() { printf \"\\\\$(printf %03o $(($3 / 256)))\\\\$(printf %03o $(($3 % 256)))\" | \
    dd of=$1 bs=1 seek=$((0x20000 + 2 * $2)) conv=notrunc 2>/dev/null; }";

fn poke(line: &str) -> String {
    format!("{POKE}; {line}")
}

#[test]
fn check_of_sound_and_broken_images() {
    let mut twins = Twins::new(&[
        "qemu-img create -q -f qcow2 a 64M",
        "qemu-io -c 'write 0 1M' -c 'write -c 2M 128k' -c 'write 10M 64k' -c 'write 1M 64k' a >/dev/null",
        "qemu-img create -q r 1M",
        "qemu-img create -q -f qcow2 -o compat=0.10 v2 0",
        "qemu-img create -q -f qcow2 -u -b gone -F raw e 1G",
        &poke("cp a leak && truncate -s +200k leak && poke leak 40 1 && poke leak 25 3"),
        &poke("cp leak both && poke both 8 0"),
        &poke("cp a over && poke over 8 2"),
    ]);
    twins.lines(&[
        "qemu-img check a",
        "qemu-img check --output json a",
        "qemu-img check -q a",
        "qemu-img check v2",
        "qemu-img check -U -T none a",
        "qemu-img check r",
        "qemu-img check -f raw r",
        "qemu-img check --output json r",
        "qemu-img check -r all r",
        "qemu-img check -r all -f raw r",
        "qemu-img check none",
        "qemu-img check -r leaks -U a",
        "qemu-img check e",
        "qemu-img check -f qcow2 r",
        "qemu-img check -f nope r",
        "qemu-img check --image-opts driver=qcow2,file.filename=a",
    ]);
    for broken in ["leak", "both", "over"] {
        for repair in ["", "-r leaks", "-r all"] {
            for output in ["human", "json", "human -q", "json -q"] {
                twins.line(&format!("cp {broken} t; qemu-img check {repair} --output {output} t"));
                twins.line(&format!("cp {broken} t; qemu-img check {repair} --output {output} t 2>&1"));
            }
        }
    }
    twins.agree();
}

const PAIRS: &[&str] = &[
    "qemu-img create -q -f qcow2 c1 64M && qemu-io -c 'write -P 1 0 1M' c1 >/dev/null",
    "cp c1 c2 && qemu-io -c 'write -P 3 3M 64k' c2 >/dev/null",
    "qemu-img create -q -f qcow2 big 100M",
    "qemu-img create -q -f qcow2 small 50M",
    "qemu-img create -q -f qcow2 bigd 100M && qemu-io -c 'write -P 3 90M 64k' bigd >/dev/null",
    "qemu-img create -q -f qcow2 zz 50M && qemu-io -c 'write -z 1M 1M' zz >/dev/null",
    "qemu-img create -q -f qcow2 z2 50M && qemu-io -c 'write -P 0 1M 1M' z2 >/dev/null",
    "qemu-img convert c1 c1.raw",
    "qemu-img create -q odd 1000",
    "qemu-img create -q -f qcow2 -b c1 -F qcow2 over",
    "cp c1 sect && qemu-io -c 'write -P 9 5120 512' sect >/dev/null",
];

#[test]
fn compare_of_all_pairs() {
    let mut twins = Twins::new(PAIRS).without_files();
    let names = ["c1", "c2", "big", "small", "bigd", "zz", "z2", "c1.raw", "odd", "over", "sect"];
    for a in names {
        for b in names {
            twins.line(&format!("qemu-img compare {a} {b}"));
        }
    }
    twins.agree();
}

#[test]
fn compare_options_and_refusals() {
    Twins::new(PAIRS)
        .without_files()
        .lines(&[
            "qemu-img compare -q c1 c2",
            "qemu-img compare -q small big",
            "qemu-img compare none c1",
            "qemu-img compare c1 none",
            "qemu-img compare none none2",
            "qemu-img compare c1 ''",
            "qemu-img compare -f raw c1 c2",
            "qemu-img compare -f raw -F qcow2 c1 c1.raw",
            "qemu-img compare -f nope c1 c1",
            "qemu-img compare -T none -U c1 c1",
            "qemu-img compare --image-opts driver=qcow2,file.filename=c1 driver=qcow2,file.filename=c1",
            "qemu-img compare -p -q c1 c2",
            "qemu-img compare -p c1 none",
            "qemu-img compare -p -s big small",
            "qemu-img compare -s c1 c1",
            "qemu-img compare -s small big",
            "qemu-img compare -s zz z2",
            "qemu-img compare -s c1 odd",
        ])
        .agree();
}

/// What cannot be read is not different: that has exit codes of its own. The reasons given are ours.
#[test]
fn compare_tells_bad_tables_from_bad_data() {
    let mut twins = Twins::new(&[
        "qemu-img create -q -f qcow2 good 1M",
        "qemu-io -c 'write -P 5 0 64k' -c 'write -P 6 128k 64k' good >/dev/null",
        "cp good l2 && printf '\\002' | dd of=l2 bs=1 seek=$((0x40016)) conv=notrunc 2>/dev/null",
        "cp good l1 && printf '\\002' | dd of=l1 bs=1 seek=$((0x30006)) conv=notrunc 2>/dev/null",
        "qemu-img convert -O qcow2 -c good zip",
        "cp zip data && yes | dd of=data bs=1 seek=$((0x50000)) count=80 conv=notrunc 2>/dev/null",
        "qemu-img create -q -f qcow2 other 1M && qemu-io -c 'write -P 7 0 64k' other >/dev/null",
    ])
    .without_files();
    for broken in ["l1", "l2", "data"] {
        for sound in ["good", "zip", "other"] {
            twins.line(&format!("qemu-img compare {broken} {sound} 2>/dev/null"));
            twins.line(&format!("qemu-img compare {sound} {broken} 2>/dev/null"));
            twins.line(&format!("qemu-img compare -s {sound} {broken} 2>/dev/null"));
        }
    }
    for line in ["map l1", "map l2", "convert l1 o", "convert l2 o", "convert data o", "compare l1 l1"] {
        twins.line(&format!("qemu-img {line} >/dev/null 2>&1"));
    }
    twins.agree();
}
