//! `img convert ... -`: what comes out of the pipe, caught in a file, is the image that `qemu-img` reads; memory
//! does not grow with the disk; what a pipe cannot be is refused by name.

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::FileExt as _,
    process::{Command, Stdio},
};

use img_tests::{
    command::{img_binary, qemu_img, shell},
    pattern::noise,
};
use tempfile::TempDir;

/// A disk of 600 MiB: noise, text, stored zeroes, holes, and an end inside a cluster.
fn source() -> TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = File::create(directory.path().join("base.raw")).expect("a new file");
    let noise = noise(1, 300_000);
    file.set_len((600 << 20) + 512).expect("a sparse file");
    file.write_all_at(&noise, 0).expect("written");
    file.write_all_at(&b"some words of text, again and again; ".repeat(90_000), 5 << 20).expect("written");
    file.write_all_at(&vec![0; 1 << 20], 100 << 20).expect("written");
    file.write_all_at(&noise, 513 << 20).expect("written");
    file.write_all_at(b"the end", (600 << 20) + 500).expect("written");
    directory
}

#[test]
fn every_layout_is_what_the_reference_reads() {
    let directory = source();
    let at = directory.path();
    for (format, options) in [
        ("raw", ""),
        ("qcow2", ""),
        ("qcow2", "-c"),
        ("qcow2", "-c -m 1"),
        ("qcow2", "-c -o compression_type=zstd,cluster_size=2M"),
        ("qcow2", "-c -o extended_l2=on"),
        ("qcow2", "-c -o compat=0.10,cluster_size=4k"),
        ("qcow2", "-o cluster_size=512,refcount_bits=64"),
        ("vmdk", "-o subformat=streamOptimized"),
        ("vmdk", "-o subformat=streamOptimized,adapter_type=lsilogic,compat6=on"),
        ("vpc", "-o force_size=on"),
    ] {
        let line = format!("$img convert -f raw -O {format} {options} base.raw - | cat >caught");
        assert_eq!(shell(at, &line).success(), "", "{line}");
        let compare = qemu_img(at, ["compare", "-f", "raw", "-F", format, "base.raw", "caught"]);
        assert_eq!(compare.output().success(), "Images are identical.\n", "{line}");
        if matches!(format, "qcow2" | "vmdk") {
            let check = qemu_img(at, ["check", "-f", format, "caught"]).output().success();
            assert!(check.starts_with("No errors were found on the image.\n"), "{line}: {check}");
        }
    }
    // The reference takes a fixed VHD for a raw image; its footer is ours to read.
    let line = "$img convert -f raw -O vpc -o subformat=fixed,force_size=on base.raw /dev/stdout | cat >caught && \
                $img compare -f raw -F vpc base.raw caught";
    assert_eq!(shell(at, line).success(), "Images are identical.\n");
}

#[test]
fn overlays_snapshots_and_several_sources_become_one_disk() {
    let directory = source();
    let at = directory.path();
    let line = "qemu-img convert -f raw -O qcow2 base.raw base.qcow2 && \
                qemu-img snapshot -c before base.qcow2 && \
                qemu-io -c 'write -P 1 3M 70k' base.qcow2 >over.log && \
                qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 over && \
                qemu-io -c 'write -P 2 520M 1M' -c 'write -z 5M 1M' over >over.log && \
                $img convert -O qcow2 -c over - >caught && qemu-img compare over caught && \
                $img convert -l before -O qcow2 base.qcow2 - >caught && qemu-img compare -f raw base.raw -F qcow2 caught && \
                $img convert -O qcow2 over base.raw - >caught && qemu-img convert -O qcow2 over base.raw both && \
                qemu-img compare both caught";
    assert_eq!(shell(at, line).success(), "Images are identical.\n".repeat(3));
}

#[test]
fn a_named_pipe_is_a_target() {
    let directory = source();
    let line = "mkfifo pipe && { cat pipe >caught & } && $img convert -f raw -O qcow2 base.raw pipe && \
                wait && qemu-img compare -f raw -F qcow2 base.raw caught && test -p pipe";
    assert_eq!(shell(directory.path(), line).success(), "Images are identical.\n");
}

#[test]
fn what_a_pipe_cannot_be_is_refused_by_name() {
    let directory = source();
    for (line, says) in [
        ("-O qed base.raw -", "qed images cannot be written to a pipe"),
        ("-O vmdk base.raw -", "a monolithicSparse VMDK cannot be written to a pipe"),
        ("-O qcow2 -o preallocation=full base.raw -", "the option 'preallocation' has no meaning for a pipe"),
        ("-O qcow2 -o data_file=x base.raw -", "the option 'data_file' has no meaning for a pipe"),
        ("-n -O qcow2 base.raw -", "-n (there is no image yet)"),
        ("-O qcow2 -B base.raw -F raw base.raw -", "-B (a backing file)"),
        ("-O qcow2 --bitmaps base.raw -", "--bitmaps (bitmaps)"),
        ("-S 4k base.raw -", "-S (holes)"),
        ("-C base.raw -", "-C (copying by the host)"),
        ("-W base.raw -", "-W (writing out of order)"),
        ("-t none base.raw -", "-t (a cache mode)"),
        ("-p base.raw -", "-p (--progress) writes to standard output"),
        ("-O vpc -c base.raw -", "Compression not supported for this file format"),
    ] {
        let output = shell(directory.path(), &format!("$img convert -f raw {line}"));
        assert_eq!((output.code, output.stdout.as_str()), (1, ""), "{line}: {output}");
        assert!(output.stderr.contains(says), "{line}: {output}");
    }
    assert!(!directory.path().join("-").exists());
    // Under the reference's name a dash is a file like any other.
    let line = "ln -s $img qemu-img && ./qemu-img convert -f raw base.raw - && cmp base.raw ./-";
    assert_eq!(shell(directory.path(), line).success(), "");
}

#[test]
fn a_reader_that_goes_is_an_error() {
    let directory = source();
    let output = shell(directory.path(), "$img convert -f raw -O raw base.raw - | head -c 100000 >caught");
    assert_eq!(output.code, 1, "{output}");
    assert!(output.stderr.contains("standard output: write at byte"), "{output}");
}

/// 8 TiB of disk with data all over it, whose first-level table alone takes 32 MiB.
#[test]
fn memory_does_not_grow_with_the_disk() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = directory.path();
    shell(at, "qemu-img create -q -f qcow2 -o cluster_size=4k big 8T").success();
    let commands: Vec<String> =
        (0..400_u64).map(|index| format!("write -q -P 7 {} 4k", index * (20 << 30))).collect();
    img_tests::command::qemu_io(at, "qcow2", "big", &commands).output().success();
    for options in
        [&["-O", "qcow2"][..], &["-O", "qcow2", "-c"], &["-O", "vmdk", "-o", "subformat=streamOptimized"]]
    {
        let mut child = Command::new(img_binary())
            .args(["convert", "-f", "qcow2"])
            .args(options)
            .args(["big", "-"])
            .current_dir(at)
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut out = child.stdout.take().expect("piped");
        // All but what the pipe itself holds is read, so that the program is still there to be asked.
        let (mut kept, mut peak, mut buffer) = (0_u64, 0, vec![0; 16 << 10]);
        loop {
            peak = peak.max(peak_kib(child.id()));
            match out.read(&mut buffer).expect("it writes") {
                0 => break,
                count => kept += count as u64,
            }
        }
        assert!(child.wait().expect("it ends").success(), "{options:?}");
        assert!(kept > 400 * 100, "{options:?}: {kept} bytes");
        assert!((1..=64 << 10).contains(&peak), "{options:?}: {peak} KiB at the peak");
    }
}

/// The most memory that a process had so far; 0 when it is gone.
fn peak_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
}
