//! A disk that only a PC's firmware can start is started: unmodified SeaBIOS finds the disk, and a boot sector made
//! for this test reads and writes it with the firmware's services.

use std::{arch::global_asm, fs, path::Path, process::Command};

const SECTOR: usize = 512;
/// What the boot sector reads, prints and writes back inverted.
const TEXT_AT: usize = SECTOR;
const COPY_AT: usize = 9 * SECTOR;
const COPY_SECTORS: usize = 8;
const DISK_BYTES: usize = 4 << 20;
const FIRMWARE: &str = "/usr/share/seabios/bios-256k.bin";

// 16-bit code that the firmware loads to 0x7C00, with the number of its disk in DL.
global_asm!(
    r#"
    .pushsection .rodata.boot_sector, "a", @progbits
    .code16
    .globl img_boot_sector
img_boot_sector:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7C00, %sp
    cld
    # Extended read: the packet at DS:SI says how many sectors, where to, and from which sector.
    movw $(90f - img_boot_sector + 0x7C00), %si
    movb $0x42, %ah
    int $0x13
    jc 30f
    # Print it by the screen's service, up to a zero.
    movw $0x8000, %si
10: lodsb
    testb %al, %al
    jz 20f
    movb $0x0E, %ah
    xorw %bx, %bx
    int $0x10
    jmp 10b
    # Invert it and write it behind.
20: movw $0x8000, %si
    movw $({sectors} * 512 / 2), %cx
21: notw (%si)
    addw $2, %si
    loop 21b
    movw $(90f - img_boot_sector + 0x7C00), %si
    movl $9, 8(%si)
    movw $0x4300, %ax
    int $0x13
    jc 30f
    # Power management 1 control, where SeaBIOS puts it: soft off.
    movw $0x604, %dx
    movw $0x2000, %ax
    outw %ax, %dx
30: movb $'!', %al
    movw $0x3F8, %dx
    outb %al, %dx
31: hlt
    jmp 31b
90: .byte 16, 0
    .word {sectors}, 0x8000, 0
    .quad 1
    .org img_boot_sector + 510
    .byte 0x55, 0xAA
    .code64
    .popsection
"#,
    sectors = const COPY_SECTORS,
    options(att_syntax)
);

unsafe extern "C" {
    #[link_name = "img_boot_sector"]
    static BOOT_SECTOR: [u8; SECTOR];
}

/// A disk with the boot sector and something to read.
fn disk(path: &Path) -> Vec<u8> {
    // SAFETY: the symbol names this many bytes above, which nobody writes.
    let sector = unsafe { BOOT_SECTOR };
    let mut bytes = vec![0; DISK_BYTES];
    bytes[..SECTOR].copy_from_slice(&sector);
    for (at, byte) in bytes[TEXT_AT..COPY_AT].iter_mut().enumerate() {
        *byte = u8::try_from(at % 251).expect("below 251");
    }
    let text = b"\r\nstarted by firmware\r\n\0";
    bytes[TEXT_AT..TEXT_AT + text.len()].copy_from_slice(text);
    fs::write(path, &bytes).expect("room");
    bytes
}

fn vmm_runner(arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vmm-runner")).args(arguments).output().expect("it runs");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_boot_sector_reads_and_writes_through_seabios() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
    let (image, log) = (path("disk.raw"), path("log"));
    let before = disk(Path::new(&image));
    let spec = format!("path={image},format=raw");
    let arguments = ["--disk", &spec, "--memory", "64M", "--firmware", FIRMWARE, "--firmware-log", &log];
    let (success, stdout, stderr) = vmm_runner(&arguments);
    if !Path::new("/dev/kvm").exists() {
        assert!(stderr.contains("cannot open /dev/kvm"), "{stdout}{stderr}");
        return;
    }
    let log = fs::read_to_string(log).unwrap_or_default();
    assert!(success, "{stdout}{stderr}{log}");
    assert!(stdout.contains("started by firmware"), "{stdout}{log}");
    let mut expected = before;
    for at in 0..COPY_SECTORS * SECTOR {
        expected[COPY_AT + at] = !expected[TEXT_AT + at];
    }
    assert!(fs::read(&image).expect("there") == expected, "what was written is the inverse of what was read");
    assert!(log.contains("SeaBIOS"), "{log}");
}

#[test]
fn a_disk_without_a_kernel_is_left_to_its_boot_sector() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.raw");
    disk(&image);
    let spec = format!("path={},format=raw", image.to_str().expect("text"));
    let found =
        format!("vmm-runner: no kernel was found in the disk; booting its boot sector with {FIRMWARE}\n");
    let (success, stdout, stderr) = vmm_runner(&["--disk", &spec, "--memory", "64M", "--snapshot"]);
    assert!(stderr.starts_with(&found), "{stderr}");
    assert!(
        !Path::new("/dev/kvm").exists() || success && stdout.contains("started by firmware"),
        "{stdout}{stderr}"
    );
    // Words for a kernel want a kernel.
    let (success, _, stderr) = vmm_runner(&["--disk", &spec, "--append", "quiet"]);
    assert!(!success);
    assert_eq!(stderr, "vmm-runner: no kernel was found in the disk; give --kernel or --firmware\n");
}

#[test]
fn what_is_no_firmware_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("short");
    fs::write(&path, [0; 100]).expect("room");
    let name = path.to_str().expect("text");
    let (success, _, stderr) = vmm_runner(&["--firmware", name]);
    assert!(!success);
    let reason = "not firmware: its size must be a multiple of 4096 bytes and at most 16 MiB";
    assert_eq!(stderr, format!("vmm-runner: {name}: {reason}\n"));
    let (success, _, stderr) = vmm_runner(&["--firmware", name, "--kernel", name]);
    assert!(!success && stderr.contains("cannot be used with"), "{stderr}");
}
