# A virtio-blk driver without an operating system (virtio 1.2, sections 3.1.1, 4.1 and 5.2), for 32-bit protected mode
# without paging. It polls and takes no interrupt, so that it runs wherever there is a /dev/kvm, however slowly that
# executes instructions. Who includes it begins with the label guest_start at the address {load}.

    .set descriptors, 0x190000
    .set available, 0x191000
    .set used, 0x192000
    .set request, 0x193000
    .set buffer, 0x1A0000
    .set stack, 0x1F0000
    .set queue_size, 16
    .set block_bytes, 4096
    # Guest addresses of the structures of the device, by their kind.
    .set common, 0x180004
    .set notify, 0x180008
    .set config, 0x180010
    .set multiplier, 0x180020
    .set doorbell, 0x180024

# Finds the first block device and starts it; prints why and switches off where that fails.
# Looks for a virtio block device of version 1 in each slot of the root bus.
start_disk:
    xorl %ecx, %ecx
10: movl %ecx, %ebp
    shll $11, %ebp
    orl $0x80000000, %ebp
    xorl %eax, %eax
    call read_config
    cmpl $0x10421AF4, %eax
    je 20f
    incl %ecx
    cmpl $32, %ecx
    jb 10b
    movl $(text_no_disk - guest_start + {load}), %esi
    jmp print_and_end

    # Walk its capabilities for the common structure, the doorbells and the configuration.
20: movl $0x34, %eax
    call read_config
    movzbl %al, %edi
21: testl %edi, %edi
    jz 30f
    movl %edi, %eax
    call read_config
    movl %eax, %esi            # id, next, length, kind
    cmpb $9, %al
    jne 24f
    movl %esi, %ecx
    shrl $24, %ecx
    cmpl $4, %ecx
    ja 24f
    leal 4(%edi), %eax
    call read_config
    andl $7, %eax              # which BAR
    leal 0x10(,%eax,4), %eax
    call read_config
    andl $~15, %eax
    pushl %eax
    leal 8(%edi), %eax
    call read_config
    popl %edx
    addl %edx, %eax
    movl %eax, common - 4(,%ecx,4)
    cmpl $2, %ecx
    jne 24f
    leal 16(%edi), %eax
    call read_config
    movl %eax, multiplier
24: movl %esi, %eax
    movzbl %ah, %edi
    jmp 21b

    # Reset, acknowledge, features, queue, go.
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
    movl $(text_refused - guest_start + {load}), %esi
    jz print_and_end
    movw $0, 22(%ebx)
    movw $queue_size, 24(%ebx)
    movl $descriptors, 32(%ebx)
    movl $0, 36(%ebx)
    movl $available, 40(%ebx)
    movl $0, 44(%ebx)
    movl $used, 48(%ebx)
    movl $0, 52(%ebx)
    movzwl 30(%ebx), %eax
    imull multiplier, %eax
    addl notify, %eax
    movl %eax, doorbell
    movl $0, available         # a guest that was reset finds its old rings
    movl $0, used
    movw $1, 28(%ebx)
    movb $15, 20(%ebx)
    ret

# One request of kind eax at sector ebp, through the buffer. Returns its status in al when it is done.
disk_request:
    movl %eax, request
    movl $0, request + 4
    movl %ebp, request + 8
    movl $0, request + 12
    movb $0xFF, request + 16
    movl $request, descriptors
    movl $0, descriptors + 4
    movl $16, descriptors + 8
    movl $0x00010001, descriptors + 12     # next: 1
    cmpl $4, %eax
    jne 81f
    movl $0x00020001, descriptors + 12     # a flush has no data
81: movl $buffer, descriptors + 16
    movl $0, descriptors + 20
    movl $block_bytes, descriptors + 24
    movl $0x00020001, descriptors + 28     # next: 2
    testl %eax, %eax
    jnz 82f
    orl $2, descriptors + 28               # the device writes it
82: movl $(request + 16), descriptors + 32
    movl $0, descriptors + 36
    movl $1, descriptors + 40
    movl $2, descriptors + 44
    movzwl available + 2, %eax
    movl %eax, %edx
    andl $(queue_size - 1), %edx
    movw $0, available + 4(,%edx,2)
    incl %eax
    movw %ax, available + 2
    lock orl $0, (%esp)
    movl doorbell, %edx
    movw $0, (%edx)
83: pause
    cmpw %ax, used + 2
    jne 83b
    movb request + 16, %al
    ret

# Reads register eax of the PCI function that ebp selects.
read_config:
    pushl %edx
    andl $0xFC, %eax
    orl %ebp, %eax
    movw $0xCF8, %dx
    outl %eax, %dx
    movw $0xCFC, %dx
    inl %dx, %eax
    popl %edx
    ret

# Prints ebx in eight digits, and a new line.
print_number:
    pushl %ecx
    movl $8, %ecx
40: roll $4, %ebx
    movl %ebx, %eax
    andl $15, %eax
    movb digits - guest_start + {load}(%eax), %al
    call print_byte
    loop 40b
    popl %ecx
    movb $10, %al
    jmp print_byte

# Prints the text at esi.
print:
    lodsb
    testb %al, %al
    jz 51f
    call print_byte
    jmp print
51: ret

# Prints the byte in al.
print_byte:
    pushl %edx
    movw $0x3F8, %dx
    outb %al, %dx
    popl %edx
    ret

# Prints the text at esi and switches off.
print_and_end:
    call print
switch_off:
    movw ${sleep_port}, %dx
    movb ${sleep_off}, %al
    outb %al, %dx
62: hlt
    jmp 62b

text_no_disk: .asciz "guest: there is no virtio block device\n"
text_refused: .asciz "guest: the disk refused its features\n"
digits: .ascii "0123456789abcdef"
