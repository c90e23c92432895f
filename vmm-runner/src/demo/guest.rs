//! The guest of the demonstration: a few hundred instructions without an operating system, with a virtio-blk
//! driver of their own (`driver.s`).
//!
//! It reads [`READ_BYTES`] from the start of the disk and adds them up, writes [`WRITE_BYTES`] of a pattern at
//! [`WRITE_AT`], flushes, says what it did on the serial port, and switches the machine off.

use std::arch::global_asm;

/// Where the code is loaded, and begins.
pub(super) const LOAD_ADDRESS: u64 = 0x10_0000;
/// Guest RAM that it needs.
pub(super) const RAM_BYTES: u64 = 32 << 20;
/// It moves data in blocks of this size.
pub(super) const BLOCK_BYTES: u32 = 4096;
/// What it reads, from the start of the disk.
pub(super) const READ_BYTES: u32 = 256 << 10;
/// What it writes.
pub(super) const WRITE_BYTES: u32 = 256 << 10;
/// Where it writes.
pub(super) const WRITE_AT: u32 = 1 << 20;
/// Each word of a block is the block's number times this, plus the word's number.
pub(super) const PATTERN: u32 = 0x9E37_79B1;

// 32-bit protected mode without paging. A label's address in the guest is its distance from the start plus where the
// code is loaded.
global_asm!(
    r#"
    .pushsection .rodata.demo_guest, "a", @progbits
    .code32
    .globl img_demo_guest_start
    .globl img_demo_guest_end
    .set sum, 0x180030

img_demo_guest_start:
guest_start:
    movl $stack, %esp
    cld
    call start_disk

    # Read, and add up.
    movl $0, sum
    xorl %ebp, %ebp            # sector
1:  xorl %eax, %eax            # VIRTIO_BLK_T_IN
    call checked_request
    movl $buffer, %esi
    movl $(block_bytes / 4), %ecx
    movl sum, %edx
2:  lodsl
    roll $1, %edx
    addl %eax, %edx
    loop 2b
    movl %edx, sum
    addl $(block_bytes / 512), %ebp
    cmpl ${read_bytes} / 512, %ebp
    jb 1b

    # Write the pattern.
    movl ${write_at} / 512, %ebp
3:  movl %ebp, %eax
    shrl $3, %eax              # the block's number
    imull ${pattern}, %eax, %eax
    movl $buffer, %edi
    movl $(block_bytes / 4), %ecx
4:  stosl
    incl %eax
    loop 4b
    movl $1, %eax              # VIRTIO_BLK_T_OUT
    call checked_request
    addl $(block_bytes / 512), %ebp
    cmpl $({write_at} + {write_bytes}) / 512, %ebp
    jb 3b
    movl $4, %eax              # VIRTIO_BLK_T_FLUSH
    xorl %ebp, %ebp
    call checked_request

    # Say so, and switch off.
    movl $(text_done - guest_start + {load}), %esi
    call print
    movl sum, %ebx
    call print_number
    jmp switch_off

checked_request:
    call disk_request
    testb %al, %al
    jz 5f
    movl $(text_failed - guest_start + {load}), %esi
    jmp print_and_end
5:  ret

text_done: .asciz "guest: done "
text_failed: .asciz "guest: a request failed\n"
    "#,
    include_str!("driver.s"),
    r#"
img_demo_guest_end:
    .code64
    .popsection
    "#,
    load = const LOAD_ADDRESS,
    read_bytes = const READ_BYTES,
    write_bytes = const WRITE_BYTES,
    write_at = const WRITE_AT,
    pattern = const PATTERN,
    sleep_port = const vmm_runner::devices::SLEEP_CONTROL_PORT,
    sleep_off = const vmm_runner::devices::SLEEP_TYPE_OFF << 2 | 0x20,
    options(att_syntax)
);

unsafe extern "C" {
    static img_demo_guest_start: u8;
    static img_demo_guest_end: u8;
}

/// The code.
pub(super) fn code() -> &'static [u8] {
    // SAFETY: both symbols are defined above, in this order, in one section that nobody writes.
    unsafe {
        let start = &raw const img_demo_guest_start;
        let end = &raw const img_demo_guest_end;
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

/// What the guest adds up over what it reads.
pub(super) fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks_exact(4).fold(0u32, |sum, word| {
        sum.rotate_left(1).wrapping_add(u32::from_le_bytes(word.try_into().expect("four bytes")))
    })
}

/// What the guest writes.
pub(super) fn written() -> Vec<u8> {
    let words = BLOCK_BYTES / 4;
    let first = WRITE_AT / BLOCK_BYTES;
    (first..first + WRITE_BYTES / BLOCK_BYTES)
        .flat_map(|block| (0..words).map(move |word| block.wrapping_mul(PATTERN).wrapping_add(word)))
        .flat_map(u32::to_le_bytes)
        .collect()
}

/// What the guest says at its end, with its sum.
pub(super) fn farewell(sum: u32) -> String {
    format!("guest: done {sum:08x}\n")
}
