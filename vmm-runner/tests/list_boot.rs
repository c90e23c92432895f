//! What a disk can boot is found in its partitions, by the files that boot loaders read.

use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    process::Command,
};

const MIB: u64 = 1 << 20;

/// An ext4 file system with these files.
fn ext4(dir: &Path, size_mib: u64, files: &[(&str, &str)]) -> Vec<u8> {
    let tree = dir.join("tree");
    for (path, text) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().expect("a directory")).expect("room");
        fs::write(path, text).expect("room");
    }
    let image = dir.join("ext4");
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(&tree)
        .arg(&image)
        .arg(format!("{size_mib}M"))
        .status()
        .expect("mke2fs (package e2fsprogs)");
    assert!(made.success());
    fs::remove_dir_all(tree).expect("there");
    fs::read(image).expect("just made")
}

/// A FAT file system with these files.
fn fat(size_mib: u64, files: &[(&str, &str)]) -> Vec<u8> {
    let mut disk = std::io::Cursor::new(vec![0; usize::try_from(size_mib * MIB).expect("small")]);
    fatfs::format_volume(&mut disk, fatfs::FormatVolumeOptions::new()).expect("room");
    {
        let volume = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new()).expect("just made");
        for (path, text) in files {
            let mut dir = volume.root_dir();
            let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
            for part in parents.split('/').filter(|part| !part.is_empty()) {
                dir = dir.create_dir(part).expect("room");
            }
            dir.create_file(name).expect("room").write_all(text.as_bytes()).expect("room");
        }
    }
    disk.into_inner()
}

/// A disk with a GPT and these partitions.
fn gpt(path: &Path, parts: &[Vec<u8>]) {
    let total: u64 = parts.iter().map(|part| part.len() as u64).sum::<u64>() + 8 * MIB;
    let mut file = fs::File::create_new(path).expect("room");
    file.set_len(total).expect("room");
    let sectors = u32::try_from(total / 512 - 1).expect("small");
    gpt::mbr::ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut file).expect("room");
    let config = gpt::GptConfig::new().writable(true).logical_block_size(gpt::disk::LogicalBlockSize::Lb512);
    let mut disk = config.create(path).expect("a table");
    let mut starts = Vec::new();
    for part in parts {
        let kind = gpt::partition_types::LINUX_FS;
        let number = disk.add_partition("part", part.len() as u64, kind, 0, Some(2048)).expect("room");
        starts.push(
            disk.partitions()[&number].bytes_start(gpt::disk::LogicalBlockSize::Lb512).expect("a place"),
        );
    }
    disk.write().expect("room");
    let mut file = fs::OpenOptions::new().write(true).open(path).expect("there");
    for (start, part) in starts.into_iter().zip(parts) {
        file.seek(SeekFrom::Start(start)).expect("there");
        file.write_all(part).expect("room");
    }
}

fn run(arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vmm-runner")).args(arguments).output().expect("it runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.success(), text(output.stdout), text(output.stderr))
}

const GRUB: &str = "set default=0\nmenuentry 'Debian' {\n linux /boot/vmlinuz root=/dev/vda2 ro\n initrd /boot/initrd\n}\n\
                    menuentry 'Gone' {\n linux /boot/removed\n}\n";

#[test]
fn entries_of_all_loaders_are_shown_with_where_their_files_are() {
    let dir = tempfile::tempdir().expect("room");
    let disk = dir.path().join("disk.raw");
    let entry = "title Own entry\nlinux /vmlinuz-6\noptions root=LABEL=x\n";
    let esp = fat(40, &[("loader/entries/own.conf", entry), ("vmlinuz-6", "kernel")]);
    let files = [("boot/grub/grub.cfg", GRUB), ("boot/vmlinuz", "kernel"), ("boot/initrd", "initrd")];
    gpt(&disk, &[esp, ext4(dir.path(), 16, &files)]);
    let (success, stdout, stderr) = run(&["--list-boot", disk.to_str().expect("text")]);
    assert!(success, "{stderr}");
    assert_eq!(
        stdout,
        "  Own entry\n    kernel  /vmlinuz-6 (partition 1)\n    options root=LABEL=x\n\
         * Debian\n    kernel  /boot/vmlinuz (partition 2)\n    initrd  /boot/initrd\n    options root=/dev/vda2 ro\n"
    );
}

#[test]
fn a_disk_without_partitions_is_one_volume() {
    let dir = tempfile::tempdir().expect("room");
    let disk = dir.path().join("disk.raw");
    let conf = "DEFAULT a\nLABEL a\n LINUX ../vmlinuz\n APPEND quiet\n";
    fs::write(
        &disk,
        ext4(dir.path(), 16, &[("boot/extlinux/extlinux.conf", conf), ("boot/vmlinuz", "kernel")]),
    )
    .expect("room");
    let (success, stdout, stderr) = run(&["--list-boot", disk.to_str().expect("text")]);
    assert!(success, "{stderr}");
    assert_eq!(stdout, "* a\n    kernel  /boot/vmlinuz (the disk)\n    options quiet\n");
}

#[test]
fn what_cannot_be_booted_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().expect("room");
    let disk = dir.path().join("disk.raw");
    let mut file = fs::File::create_new(&disk).expect("room");
    file.set_len(4 * MIB).expect("room");
    let name = disk.to_str().expect("text");
    let (success, _, stderr) = run(&["--serial", "off", name]);
    assert!(!success);
    assert_eq!(stderr, "vmm-runner: no kernel was found in the disk; give --kernel or --firmware\n");
    file.write_all(b"XFSB").expect("room");
    let (_, _, stderr) = run(&["--serial", "off", name]);
    assert_eq!(
        stderr,
        "vmm-runner: no kernel was found in the disk; the disk: XFS cannot be read here; give --kernel or --firmware\n"
    );
    let mut head = Vec::new();
    fs::File::open(&disk).expect("there").take(4).read_to_end(&mut head).expect("there");
    assert_eq!(head, b"XFSB");
}

#[test]
fn damaged_tables_and_file_systems_are_answered() {
    let dir = tempfile::tempdir().expect("room");
    let disk = dir.path().join("disk.raw");
    gpt(&disk, &[ext4(dir.path(), 16, &[("boot/grub/grub.cfg", GRUB), ("boot/vmlinuz", "kernel")])]);
    let good = fs::read(&disk).expect("there");
    // A table of four billion entries, and a superblock and boot sector with every kind of nonsense.
    for (at, bytes) in [
        (512 + 80, vec![0xFF; 4]),
        (446 + 4, vec![0x05]),
        (1 << 20, vec![0xFF; 64]),
        ((1 << 20) + 1024, vec![0xFF; 56]),
    ] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(&bytes);
        fs::write(&disk, &bad).expect("room");
        let (_, stdout, stderr) = run(&["--list-boot", disk.to_str().expect("text")]);
        assert!(!stdout.is_empty() || stderr.starts_with("vmm-runner: "), "{at}: {stdout}{stderr}");
        assert!(!stderr.contains("panicked"), "{at}: {stderr}");
    }
}
