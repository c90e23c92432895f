//! The guest of the demonstration: a few hundred instructions without an operating system, with a virtio-blk
//! driver of their own.
//!
//! It finds the disk on the PCI bus by its capabilities, sets up one queue, reads [`READ_BYTES`] from the start of
//! the disk and adds them up, writes [`WRITE_BYTES`] of a pattern at [`WRITE_AT`], flushes, says what it did on the
//! serial port, and switches the machine off. It polls and takes no interrupt, so that it runs wherever there is a
//! `/dev/kvm`, however slowly that executes instructions.

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

/// Guest addresses of its variables, rings and buffer.
const VARIABLES: u32 = 0x18_0000;
const DESCRIPTORS: u32 = 0x19_0000;
const AVAILABLE: u32 = 0x19_1000;
const USED: u32 = 0x19_2000;
const REQUEST: u32 = 0x19_3000;
const BUFFER: u32 = 0x1A_0000;
const STACK: u32 = 0x1F_0000;
/// Descriptors in its queue.
const QUEUE_SIZE: u32 = 16;

// 32-bit protected mode without paging. A label's address in the guest is its distance from the start plus where the
// code is loaded.
global_asm!(
    r#"
    .pushsection .rodata.demo_guest, "a", @progbits
    .code32
    .globl img_demo_guest_start
    .globl img_demo_guest_end
    .set common, {variables}
    .set notify, {variables} + 4
    .set multiplier, {variables} + 8
    .set doorbell, {variables} + 12
    .set sum, {variables} + 16

img_demo_guest_start:
    movl ${stack}, %esp
    cld
    # Look for a virtio block device of version 1 in each slot of the root bus.
    xorl %ecx, %ecx
10: movl %ecx, %ebp
    shll $11, %ebp
    orl $0x80000000, %ebp
    xorl %eax, %eax
    call 70f
    cmpl $0x10421AF4, %eax
    je 20f
    incl %ecx
    cmpl $32, %ecx
    jb 10b
    movl $(91f - img_demo_guest_start + {load}), %esi
    jmp 60f

    # Walk its capabilities for the common structure and the doorbells.
20: movl $0x34, %eax
    call 70f
    movzbl %al, %edi
21: testl %edi, %edi
    jz 30f
    movl %edi, %eax
    call 70f
    movl %eax, %esi            # id, next, length, kind
    cmpb $9, %al
    jne 24f
    movl %esi, %ecx
    shrl $24, %ecx
    cmpl $2, %ecx
    ja 24f                     # 1 is the common structure, 2 are the doorbells
    testl %ecx, %ecx
    jz 24f
    leal 4(%edi), %eax
    call 70f
    andl $7, %eax              # which BAR
    leal 0x10(,%eax,4), %eax
    call 70f
    andl $~15, %eax
    pushl %eax
    leal 8(%edi), %eax
    call 70f
    popl %edx
    addl %edx, %eax
    movl %eax, common - 4(,%ecx,4)
    cmpl $2, %ecx
    jne 24f
    leal 16(%edi), %eax
    call 70f
    movl %eax, multiplier
24: movl %esi, %eax
    movzbl %ah, %edi
    jmp 21b

    # Section 3.1.1: reset, acknowledge, features, queue, go.
30: movl common, %ebx
    movb $0, 20(%ebx)
31: cmpb $0, 20(%ebx)
    jne 31b
    movb $1, 20(%ebx)
    movb $3, 20(%ebx)
    movl $0, 0(%ebx)
    movl 4(%ebx), %eax
    andl $0x200, %eax          # flush, where offered
    movl $0, 8(%ebx)
    movl %eax, 12(%ebx)
    movl $1, 8(%ebx)
    movl $1, 12(%ebx)          # version 1
    movb $11, 20(%ebx)
    testb $8, 20(%ebx)
    movl $(92f - img_demo_guest_start + {load}), %esi
    jz 60f
    movw $0, 22(%ebx)
    movw ${queue_size}, 24(%ebx)
    movl ${descriptors}, 32(%ebx)
    movl $0, 36(%ebx)
    movl ${available}, 40(%ebx)
    movl $0, 44(%ebx)
    movl ${used}, 48(%ebx)
    movl $0, 52(%ebx)
    movzwl 30(%ebx), %eax
    imull multiplier, %eax
    addl notify, %eax
    movl %eax, doorbell
    movw $1, 28(%ebx)
    movb $15, 20(%ebx)

    # Read, and add up.
    movl $0, sum
    xorl %ebp, %ebp            # sector
33: xorl %eax, %eax            # VIRTIO_BLK_T_IN
    call 80f
    movl ${buffer}, %esi
    movl ${block_bytes} / 4, %ecx
    movl sum, %edx
34: lodsl
    roll $1, %edx
    addl %eax, %edx
    loop 34b
    movl %edx, sum
    addl ${block_bytes} / 512, %ebp
    cmpl ${read_bytes} / 512, %ebp
    jb 33b

    # Write the pattern.
    movl ${write_at} / 512, %ebp
35: movl %ebp, %eax
    shrl $3, %eax              # the block's number
    imull ${pattern}, %eax, %eax
    movl ${buffer}, %edi
    movl ${block_bytes} / 4, %ecx
36: stosl
    incl %eax
    loop 36b
    movl $1, %eax              # VIRTIO_BLK_T_OUT
    call 80f
    addl ${block_bytes} / 512, %ebp
    cmpl $({write_at} + {write_bytes}) / 512, %ebp
    jb 35b
    movl $4, %eax              # VIRTIO_BLK_T_FLUSH
    xorl %ebp, %ebp
    call 80f

    # Say so, and switch off.
    movl $(93f - img_demo_guest_start + {load}), %esi
    call 50f
    movl sum, %ebx
    movl $8, %ecx
40: roll $4, %ebx
    movl %ebx, %eax
    andl $15, %eax
    movb 95f - img_demo_guest_start + {load}(%eax), %al
    call 55f
    loop 40b
    movb $10, %al
    call 55f
    jmp 61f

    # Print the text at esi.
50: lodsb
    testb %al, %al
    jz 51f
    call 55f
    jmp 50b
51: ret
    # Print the byte in al.
55: pushl %edx
    movw $0x3F8, %dx
    outb %al, %dx
    popl %edx
    ret

    # Print the text at esi and end.
60: call 50b
61: movw ${sleep_port}, %dx
    movb ${sleep_off}, %al
    outb %al, %dx
62: hlt
    jmp 62b

    # Read register eax of the function that ebp selects.
70: pushl %edx
    andl $0xFC, %eax
    orl %ebp, %eax
    movw $0xCF8, %dx
    outl %eax, %dx
    movw $0xCFC, %dx
    inl %dx, %eax
    popl %edx
    ret

    # One request of kind eax at sector ebp, and wait for it.
80: movl %eax, {request}
    movl $0, {request} + 4
    movl %ebp, {request} + 8
    movl $0, {request} + 12
    movb $0xFF, {request} + 16
    movl ${request}, {descriptors}
    movl $16, {descriptors} + 8
    movl $0x00010001, {descriptors} + 12   # next: 1
    cmpl $4, %eax
    jne 81f
    movl $0x00020001, {descriptors} + 12   # a flush has no data
81: movl ${buffer}, {descriptors} + 16
    movl ${block_bytes}, {descriptors} + 24
    movl $0x00020001, {descriptors} + 28   # next: 2
    testl %eax, %eax
    jnz 82f
    orl $2, {descriptors} + 28             # the device writes it
82: movl ${request} + 16, {descriptors} + 32
    movl $1, {descriptors} + 40
    movl $2, {descriptors} + 44
    movzwl {available} + 2, %eax
    movl %eax, %edx
    andl ${queue_size} - 1, %edx
    movw $0, {available} + 4(,%edx,2)
    incl %eax
    movw %ax, {available} + 2
    lock orl $0, (%esp)
    movl doorbell, %edx
    movw $0, (%edx)
83: pause
    cmpw %ax, {used} + 2
    jne 83b
    cmpb $0, {request} + 16
    movl $(94f - img_demo_guest_start + {load}), %esi
    jne 60b
    ret

91: .asciz "guest: there is no virtio block device\n"
92: .asciz "guest: the disk refused its features\n"
93: .asciz "guest: done "
94: .asciz "guest: a request failed\n"
95: .ascii "0123456789abcdef"
img_demo_guest_end:
    .code64
    .popsection
    "#,
    load = const LOAD_ADDRESS,
    variables = const VARIABLES,
    stack = const STACK,
    descriptors = const DESCRIPTORS,
    available = const AVAILABLE,
    used = const USED,
    request = const REQUEST,
    buffer = const BUFFER,
    queue_size = const QUEUE_SIZE,
    block_bytes = const BLOCK_BYTES,
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
