//! A guest of a few hundred instructions that does what it is told over its serial port: a letter and a number of four
//! bytes, least significant first, each time. It says `ready` when it begins.

use std::arch::global_asm;

/// Where the code is loaded, and begins.
const LOAD_ADDRESS: u64 = 0x10_0000;
/// Each word of what it writes is the sector's number times this, plus the word's number.
const PATTERN: u32 = 0x9E37_79B1;
/// What it reads and writes at once.
pub const BLOCK_BYTES: usize = 4096;

global_asm!(
    r#"
    .pushsection .rodata.commanded_guest, "a", @progbits
    .code32
    .globl img_commanded_guest_start
    .globl img_commanded_guest_end
    .set sector, 0x180030
    .set count, 0x180034

img_commanded_guest_start:
guest_start:
    movl $stack, %esp
    cld
    call start_disk
    movl $(text_ready - guest_start + {load}), %esi
    call print

next:
    call read_byte
    movzbl %al, %edx
    call read_byte
    movb %al, %bl
    call read_byte
    movb %al, %bh
    call read_byte
    shll $16, %eax
    movl %eax, %ecx
    call read_byte
    shll $24, %eax
    andl $0x00FF0000, %ecx
    orl %ecx, %eax
    movzwl %bx, %ebx
    orl %eax, %ebx
    movl %ebx, sector
    cmpb $'W', %dl
    je 1f
    cmpb $'R', %dl
    je 2f
    cmpb $'F', %dl
    je 3f
    cmpb $'C', %dl
    je 4f
    cmpb $'L', %dl
    je 5f
    cmpb $'P', %dl
    je 7f
    cmpb $'O', %dl
    je switch_off
    cmpb $'B', %dl
    je 9f
    cmpb $'T', %dl
    je 10f
    cmpb $'S', %dl
    je 13f
    cmpb $'I', %dl
    je 14f
    movl $(text_what - guest_start + {load}), %esi
    call print
    jmp next

    # Write a block of the pattern at the sector.
1:  call write_block
    jmp 8f
    # Read a block, and print the sum of its words.
2:  movl sector, %ebp
    xorl %eax, %eax
    call disk_request
    testb %al, %al
    jnz 8f
    movl $buffer, %esi
    movl $(block_bytes / 4), %ecx
    xorl %ebx, %ebx
21: lodsl
    addl %eax, %ebx
    loop 21b
    call print_number
    jmp next
    # Flush.
3:  movl $4, %eax
    xorl %ebp, %ebp
    call disk_request
    jmp 8f
    # Print the disk's size in sectors.
4:  movl config, %ebx
    movl (%ebx), %ebx
    call print_number
    jmp next
    # Write one block after the other, 256 of them from the sector on, again and again, until something is typed. Then
    # print how many.
5:  movl $0, count
6:  movl count, %eax
    andl $255, %eax
    shll $3, %eax
    pushl sector
    addl %eax, sector
    call write_block
    popl sector
    testb %al, %al
    jnz 8f
    incl count
    movw $0x3FD, %dx
    inb %dx, %al
    testb $1, %al
    jz 6b
    call read_byte
    movl count, %ebx
    call print_number
    jmp next
    # Wait until the power button's pin has pulsed: it is the second one of the second interrupt controller.
7:  movb $0x0A, %al            # read the requests
    outb %al, $0xA0
    inb $0xA0, %al
    testb $2, %al
    jz 7b
    movl $(text_button - guest_start + {load}), %esi
    call print
    jmp next
    # Say what came of it.
8:  movl $(text_ok - guest_start + {load}), %esi
    testb %al, %al
    jz 81f
    movl $(text_error - guest_start + {load}), %esi
81: call print
    jmp next
    # Reset.
9:  movb $1, %al
    outb %al, $0x92
91: hlt
    jmp 91b
    # An exception that cannot be delivered.
10: lidt text_ready - guest_start + {load}
    ud2

    # Say something for ever.
13: movb $'s', %al
    call print_byte
    jmp 13b

    # Tell the runner that what a guest's init does begins now.
14: movb $1, {init_register}
    xorb %al, %al
    jmp 8b

write_block:
    movl sector, %ebp
    imull ${pattern}, %ebp, %eax
    movl $buffer, %edi
    movl $(block_bytes / 4), %ecx
11: stosl
    incl %eax
    loop 11b
    movl $1, %eax
    jmp disk_request

    # Wait for a typed byte.
read_byte:
    pushl %edx
12: movw $0x3FD, %dx
    pause
    inb %dx, %al
    testb $1, %al
    jz 12b
    movw $0x3F8, %dx
    inb %dx, %al
    popl %edx
    movzbl %al, %eax
    ret

text_ready: .asciz "ready\n"
text_ok: .asciz "ok\n"
text_error: .asciz "error\n"
text_button: .asciz "button\n"
text_what: .asciz "what?\n"
    "#,
    include_str!("../../../vmm-runner/src/demo/driver.s"),
    r#"
img_commanded_guest_end:
    .code64
    .popsection
    "#,
    load = const LOAD_ADDRESS,
    pattern = const PATTERN,
    // ACPI's sleep control port, and what switches off.
    sleep_port = const 0xCD0,
    sleep_off = const 5 << 2 | 0x20,
    init_register = const vmm_runner::machine::layout::INIT_REGISTER,
    options(att_syntax)
);

unsafe extern "C" {
    static img_commanded_guest_start: u8;
    static img_commanded_guest_end: u8;
}

fn code() -> &'static [u8] {
    // SAFETY: both symbols are defined above, in this order, in one section that nobody writes.
    unsafe {
        let start = &raw const img_commanded_guest_start;
        let end = &raw const img_commanded_guest_end;
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

/// What the guest writes at a sector.
#[must_use]
pub fn block(sector: u32) -> Vec<u8> {
    let first = sector.wrapping_mul(PATTERN);
    (0..u32::try_from(BLOCK_BYTES / 4).expect("small"))
        .flat_map(|word| first.wrapping_add(word).to_le_bytes())
        .collect()
}

/// What the guest prints for a block that it has read.
#[must_use]
pub fn sum(block: &[u8]) -> String {
    let words = block.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")));
    format!("{:08x}", words.fold(0, u32::wrapping_add))
}

/// The guest as an ELF file with a PVH entry, which a runner takes for a kernel: a header, two program headers, a note
/// and the code (System V ABI, "Object files"; Xen `public/elfnote.h`, `XEN_ELFNOTE_PHYS32_ENTRY`).
#[must_use]
pub fn elf() -> Vec<u8> {
    const HEADER_BYTES: u16 = 64;
    const PROGRAM_HEADER_BYTES: u16 = 56;
    const NOTE_BYTES: u64 = 12 + 4 + 8;
    let code = code();
    let note_at = u64::from(HEADER_BYTES + 2 * PROGRAM_HEADER_BYTES);
    let code_at = (note_at + NOTE_BYTES).next_multiple_of(16);
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let mut put = |bytes: &[u8]| file.extend(bytes);
    put(&2_u16.to_le_bytes()); // an executable
    put(&62_u16.to_le_bytes()); // x86-64
    put(&1_u32.to_le_bytes());
    put(&LOAD_ADDRESS.to_le_bytes());
    put(&u64::from(HEADER_BYTES).to_le_bytes()); // program headers
    put(&[0; 8 + 4]);
    for half in [HEADER_BYTES, PROGRAM_HEADER_BYTES, 2, 0, 0, 0] {
        put(&half.to_le_bytes());
    }
    let segments =
        [(1_u32, code_at, LOAD_ADDRESS, code.len() as u64, 16_u64), (4, note_at, 0, NOTE_BYTES, 4)];
    for (kind, at, address, length, align) in segments {
        put(&kind.to_le_bytes());
        put(&5_u32.to_le_bytes()); // read, execute
        for number in [at, address, address, length, length, align] {
            put(&number.to_le_bytes());
        }
    }
    for number in [4_u32, 8, 18] {
        put(&number.to_le_bytes());
    }
    put(b"Xen\0");
    put(&LOAD_ADDRESS.to_le_bytes());
    file.resize(usize::try_from(code_at).expect("small"), 0);
    file.extend(code);
    file
}
