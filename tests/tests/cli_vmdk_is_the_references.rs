//! VMDK on the command line: create, info, map, check, convert, compare.
//!
//! Content ids are random in both, and space on the host depends on the moment; everything else is compared.

use std::fs;

use img_tests::{
    command::{img, qemu_img, qemu_io},
    twin::Twins,
    vmdk::descriptor,
};

/// What differs from run to run: content ids, and the space that the host has set aside by now.
const IDS: &[&str] = &["cid: ", "\"cid\": ", "\"parent-cid\": ", "disk size: ", "\"actual-size\": "];

const KINDS: [&str; 5] =
    ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"];

#[test]
fn new_images_are_laid_out_and_described_alike() {
    let mut twins =
        Twins::new(&["qemu-img create -q -f vmdk base.vmdk 3G"]).ignoring("cid: ").without_disk_use();
    for kind in KINDS {
        twins.line(&format!("qemu-img create -f vmdk -o subformat={kind} {kind}.vmdk 10M"));
        for command in
            ["info", "info --output=json", "map", "map --output=json", "check", "check --output=json"]
        {
            twins.line_seen_through(&format!("qemu-img {command} {kind}.vmdk"), IDS);
        }
    }
    twins.lines(&[
        "qemu-img create -f vmdk plain.vmdk 1000",
        "qemu-img create -f vmdk -o subformat=twoGbMaxExtentSparse many.vmdk 5G",
        "qemu-img create -f vmdk -o subformat=twoGbMaxExtentFlat flat.x.img 5G",
        "qemu-img create -f vmdk -o subformat=monolithicFlat noending 1M",
        "qemu-img create -f vmdk -o zeroed_grain,adapter_type=lsilogic,compat6,toolsversion=77 z.vmdk 100G",
        "qemu-img create -f vmdk -o hwversion=7,adapter_type=buslogic hw.vmdk 1M",
        "qemu-img create -f vmdk -o subformat=streamOptimized,zeroed_grain stream.vmdk 1G",
        "qemu-img create -f vmdk -b base.vmdk -F vmdk over.vmdk",
        "qemu-img create -f vmdk -o subformat=twoGbMaxExtentSparse,zeroed_grain -b base.vmdk -F vmdk over2.vmdk 4G",
        "qemu-img create -f vmdk -o help",
    ]);
    for name in ["many.vmdk", "flat.x.img", "over.vmdk", "over2.vmdk", "z.vmdk"] {
        twins.line_seen_through(&format!("qemu-img info {name}"), IDS);
        twins.line_seen_through(&format!("qemu-img info --output=json --backing-chain {name}"), IDS);
    }
    twins.agree();
}

#[test]
fn refusals_are_in_the_same_words() {
    let setup = ["qemu-img create -q -f raw raw 1M", "qemu-img create -q -f vmdk base.vmdk 1M"];
    Twins::new(&setup)
        .ignoring("cid: ")
        .without_files()
        .lines(&[
            "qemu-img create -f vmdk -b raw -F raw x.vmdk",
            "qemu-img create -f vmdk -b base.vmdk x.vmdk",
            "qemu-img create -f vmdk -u -b nope -F vmdk x.vmdk 1M",
            "qemu-img create -f vmdk -o subformat=foo x.vmdk 1M",
            "qemu-img create -f vmdk -o adapter_type=foo x.vmdk 1M",
            "qemu-img create -f vmdk -o compat6,hwversion=4 x.vmdk 1M",
            "qemu-img create -f vmdk -o subformat=monolithicFlat,zeroed_grain x.vmdk 1M",
            "qemu-img create -f vmdk -o subformat=monolithicFlat -b base.vmdk -F vmdk x.vmdk 1M",
            "qemu-img create -f vmdk -o foo=1 x.vmdk 1M",
            "qemu-img create -f vmdk x.vmdk",
            "qemu-img resize base.vmdk +1M",
            "qemu-img check -r all base.vmdk",
            "qemu-img snapshot -l base.vmdk",
            "qemu-img info --image-opts driver=vmdk,file.filename=base.vmdk,foo=1",
            "qemu-img convert -c -f raw -O vmdk -o subformat=monolithicFlat raw y.vmdk",
            "qemu-img info -f vmdk raw",
            "qemu-img rebase -b raw -F vmdk base.vmdk",
            "qemu-img create -q -f qcow2 q 1M; qemu-img rebase -b raw -F vmdk q",
        ])
        .agree();
}

const CONTENT: &[&str] = &[
    "qemu-img create -q -f raw r.raw 70M",
    "qemu-io -f raw -c 'write -P 1 0 3M' -c 'write -P 2 5000k 77k' -c 'write -P 3 40M 1M' -c 'write -P 4 71600k 80k' r.raw \
     >/dev/null",
];

#[test]
fn conversions_come_out_alike() {
    let mut twins = Twins::new(CONTENT).ignoring("cid: ").without_disk_use();
    for kind in &KINDS[..4] {
        twins.line(&format!("qemu-img convert -f raw -O vmdk -o subformat={kind} r.raw {kind}.vmdk"));
        for command in ["map --output=json", "map", "check"] {
            twins.line(&format!("qemu-img {command} {kind}.vmdk"));
        }
        twins.line(&format!("qemu-img convert -O raw {kind}.vmdk {kind}.raw"));
        twins.line(&format!("qemu-img compare {kind}.vmdk r.raw"));
    }
    twins.lines(&[
        "qemu-img convert -c -f raw -O vmdk r.raw c.vmdk",
        "qemu-img convert -O vmdk -o zeroed_grain=on -S 0 monolithicSparse.vmdk all.vmdk",
        "qemu-img convert -O qcow2 twoGbMaxExtentSparse.vmdk q.qcow2",
    ]);
    twins.agree();
}

/// Ours is a stream of another layout: the disk and what the map says of it are the same.
#[test]
fn streams_hold_the_same_disk() {
    let mut twins = Twins::new(CONTENT).ignoring("cid: ").without_disk_use().without_files();
    twins.lines(&[
        "qemu-img convert -f raw -O vmdk -o subformat=streamOptimized r.raw s.vmdk",
        "qemu-img map --output=json s.vmdk",
        "qemu-img map s.vmdk",
        "qemu-img check s.vmdk",
        "qemu-img compare s.vmdk r.raw",
        "qemu-img convert -O vmdk -o subformat=streamOptimized s.vmdk again.vmdk",
        "qemu-img convert -c -W -O vmdk -o subformat=streamOptimized s.vmdk third.vmdk",
        "qemu-img convert -O raw again.vmdk again.raw",
        "cmp r.raw again.raw",
        "qemu-img compare third.vmdk r.raw",
        // The other implementation reads what was made here.
        "command -p qemu-img check s.vmdk",
        "command -p qemu-img compare s.vmdk r.raw",
        "command -p qemu-img compare again.vmdk r.raw",
    ]);
    twins.line_seen_through("qemu-img info s.vmdk", &["cid: ", "file length: ", "disk size: "]);
    twins.agree();
}

#[test]
fn grains_behind_the_end_of_the_file_are_found_alike() {
    // Grains 0 and 3 of a table that begins at sector 35.
    let setup = [
        "qemu-img create -q -f vmdk d.vmdk 70M",
        "qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 40M 1M' d.vmdk >/dev/null",
        "for at in 17920 17932; do cp d.vmdk t$at.vmdk && printf '\\377\\377\\377\\177' | \
         dd of=t$at.vmdk bs=1 seek=$at conv=notrunc 2>/dev/null; done",
    ];
    let mut twins = Twins::new(&setup).without_files();
    for line in
        ["check t17920.vmdk", "check --output=json t17932.vmdk", "check d.vmdk", "check -q t17920.vmdk"]
    {
        // The reason in the last line is our own.
        twins.line(&format!("qemu-img {line} 2> said; echo $?; grep ERROR said; rm said"));
    }
    twins.agree();
}

/// What the reference takes for an empty table is an error here.
#[test]
fn a_table_behind_the_end_of_the_file_is_an_error() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    img(folder.path(), ["create", "-q", "-f", "vmdk", "d.vmdk", "70M"]).output().success();
    let path = folder.path().join("d.vmdk");
    let mut bytes = fs::read(&path).expect("readable");
    bytes[17408..17412].copy_from_slice(&[0xff; 4]);
    fs::write(&path, bytes).expect("written");
    for (arguments, code) in
        [(&["check", "d.vmdk"][..], 1), (&["convert", "-O", "raw", "d.vmdk", "r.raw"], 1)]
    {
        let output = img(folder.path(), arguments).output();
        assert_eq!(output.code, code, "{}", output.stderr);
        assert!(output.stderr.contains("grain directory entry at byte 0x4400"), "{}", output.stderr);
    }
}

/// No command reads files of the host because a descriptor says so, until the user says so too.
#[test]
fn extents_outside_the_folder_need_the_users_word() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let secret = folder.path().join("secret");
    fs::write(&secret, [7; 4096]).expect("written");
    let inner = folder.path().join("in");
    fs::create_dir(&inner).expect("made");
    for name in ["../secret", secret.to_str().expect("UTF-8")] {
        let text = descriptor("monolithicFlat", &format!("RW 8 FLAT \"{name}\" 0"));
        fs::write(inner.join("d.vmdk"), text).expect("written");
        for arguments in
            [&["info", "d.vmdk"][..], &["convert", "-O", "raw", "d.vmdk", "out"], &["map", "d.vmdk"]]
        {
            let output = img(&inner, arguments).output();
            assert_eq!(output.code, 1, "{arguments:?}");
            assert!(output.stderr.contains("extent-names=any"), "{}", output.stderr);
            assert!(!inner.join("out").exists());
        }
        let named = "driver=vmdk,extent-names=any,file.filename=d.vmdk";
        img(&inner, ["convert", "--image-opts", "-O", "raw", named, "out"]).output().success();
        assert_eq!(fs::read(inner.join("out")).expect("readable"), [7; 4096]);
        fs::remove_file(inner.join("out")).expect("removed");
    }
}

/// A parent that has changed since is another disk.
#[test]
fn a_changed_parent_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let folder = folder.path();
    qemu_img(folder, ["create", "-q", "-f", "vmdk", "base.vmdk", "1M"]).output().success();
    qemu_img(folder, ["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "top.vmdk"])
        .output()
        .success();
    img(folder, ["compare", "top.vmdk", "base.vmdk"]).output().success();
    qemu_io(folder, "vmdk", "base.vmdk", &["write -q 0 512"]).output().success();
    let output = img(folder, ["convert", "-O", "raw", "top.vmdk", "out"]).output();
    assert_eq!(output.code, 1);
    assert!(output.stderr.contains("the parent has changed since"), "{}", output.stderr);
    img(folder, ["info", "top.vmdk"]).output().success();
}

#[test]
fn a_parent_is_found_and_its_content_id_is_watched() {
    let setup = [
        "qemu-img create -q -f vmdk base.vmdk 10M",
        "qemu-io -c 'write -P 1 0 1M' base.vmdk >/dev/null",
        "qemu-img create -q -f vmdk -b base.vmdk -F vmdk top.vmdk",
        "qemu-io -c 'write -P 2 64k 100k' top.vmdk >/dev/null",
        "mkdir sub && qemu-img create -q -f vmdk -b ../base.vmdk -F vmdk sub/top.vmdk 20M",
    ];
    let mut twins = Twins::new(&setup).ignoring("cid: ").without_disk_use();
    for name in ["top.vmdk", "sub/top.vmdk"] {
        twins.line(&format!("qemu-img map --output=json {name}"));
        twins.line(&format!("qemu-img convert -O raw {name} out.raw"));
        twins.line_seen_through(&format!("qemu-img info --backing-chain {name}"), IDS);
    }
    twins.agree();
}

/// The reference reads and writes what `img` made larger; under its own name it is refused as there.
#[test]
fn grown_images_are_the_references_too() {
    for kind in ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let at = folder.path();
        qemu_img(at, ["create", "-q", "-f", "vmdk", "-o", &format!("subformat={kind}"), "d.vmdk", "10M"])
            .output()
            .success();
        qemu_io(at, "vmdk", "d.vmdk", &["write -P 3 0 1M", "write -P 5 9M 1M"]).output().success();
        img(at, ["resize", "d.vmdk", "+100M"]).output().success();
        let ours = ["read -P 3 0 1M", "read -P 5 9M 1M", "read -P 0 10M 100M", "write -P 9 105M 5M"];
        qemu_io(at, "vmdk", "d.vmdk", &ours).output().success();
        img(at, ["resize", "d.vmdk", "1500M"]).output().success();
        qemu_img(at, ["check", "d.vmdk"]).output().success();
        let theirs = ["read -P 9 105M 5M", "read -P 0 110M 1390M", "write -P 7 1499M 1M"];
        qemu_io(at, "vmdk", "d.vmdk", &theirs).output().success();
        let mended = img(at, ["check", "-r", "all", "d.vmdk"]).output().success();
        assert_eq!(mended, "No errors were found on the image.\n", "{kind}");
        img(at, ["convert", "-O", "raw", "d.vmdk", "ours.raw"]).output().success();
        qemu_img(at, ["compare", "-f", "vmdk", "-F", "raw", "d.vmdk", "ours.raw"]).output().success();
    }
    let setup = "qemu-img create -q -f vmdk d.vmdk 10M && qemu-io -c 'write 0 1M' d.vmdk >/dev/null";
    let mut twins = Twins::new(&[setup]).ignoring("cid: ").without_disk_use();
    twins.lines(&[
        "qemu-img resize d.vmdk 20M",
        "qemu-img check -r all d.vmdk",
        "qemu-img check -r leaks d.vmdk",
    ]);
    twins.agree();
}
