# The probe's guest: a 64 KiB firmware image, the whole of which is this file. It does what every stock kernel does:
# real mode, protected mode, cpuid, rdtsc, page tables, long mode, IDT, PIC, PIT and local APIC timer, and sleeps by hlt.
# In each of the three modes it also counts LOOPS down. Where KVM really runs guest code that takes milliseconds;
# where "KVM" interprets every instruction (about a million a second), it takes seconds and the time box catches it.
# Progress goes to the serial port: r 1 (real mode), p 2 (protected), l 3 (long), t (PIT ticks), a (APIC ticks).
# The end is a write to isa-debug-exit at 0xf4: QEMU exits with status 33.
#
# Built by: gcc -c -m64 -x assembler-with-cpp probe_guest.S -o g.o && objcopy -O binary -j .text g.o g.rom
# The bytes stand in probe_guest.py; tests/unit/test_engine_probe.py compares them where a compiler is installed.
#define LOOPS 3000000
.macro say c
 mov $\c, %al
 mov $0x3f8, %dx
 out %al, %dx
.endm
.code16
.org 0
base:
 cli
 cs lgdtl gdtr - base
 say 'r'
 mov $LOOPS, %ecx
9: dec %ecx
 jnz 9b
 say '1'
 mov %cr0, %eax
 or $1, %al
 mov %eax, %cr0
 ljmpl $8, $(0xffff0000 + prot - base)
.balign 8
gdt: .quad 0
 .quad 0x00cf9b000000ffff
 .quad 0x00cf93000000ffff
 .quad 0x00af9b000000ffff
gdtr: .word 31
 .long 0xffff0000 + gdt - base
.code32
prot:
 mov $16, %ax
 mov %ax, %ds
 mov %ax, %es
 mov %ax, %ss
 mov $0x9000, %esp
 say 'p'
 mov $LOOPS, %ecx
9: dec %ecx
 jnz 9b
 say '2'
 xor %eax,%eax
 cpuid
 rdtsc
 # page tables at 0x1000 (pml4) 0x2000 (pdpt: 4 x 1 GiB via pd 0x3000..0x6fff)
 mov $0x1000, %edi
 xor %eax, %eax
 mov $0x1800, %ecx
 rep stosl
 movl $0x2003, 0x1000
 movl $0x3003, 0x2000
 movl $0x4003, 0x2008
 movl $0x5003, 0x2010
 movl $0x6003, 0x2018
 mov $0x3000, %edi
 mov $0x83, %eax
 mov $2048, %ecx
1: mov %eax, (%edi)
 movl $0, 4(%edi)
 add $8, %edi
 add $0x200000, %eax
 loop 1b
 mov $0x1000, %eax
 mov %eax, %cr3
 mov %cr4, %eax
 or $0x20, %eax
 mov %eax, %cr4
 mov $0xc0000080, %ecx
 rdmsr
 or $0x100, %eax
 wrmsr
 mov %cr0, %eax
 or $0x80000000, %eax
 mov %eax, %cr0
 ljmp $24, $(0xffff0000 + long - base)
.code64
long:
 say 'l'
 mov $LOOPS, %ecx
9: dec %ecx
 jnz 9b
 say '3'
 # idt at 0x8000: vectors 0x20 (PIT), 0x30 (LAPIC)
 xor %eax, %eax
 mov $0x8000, %edi
 mov $0x400, %ecx
 rep stosl
 mov $0xffff0000 + tick - base, %ebx
 mov $0x8200, %edi
 call gate
 mov $0xffff0000 + ltick - base, %ebx
 mov $0x8300, %edi
 call gate
 movw $0xfff, 0x7000
 movq $0x8000, 0x7002
 lidt 0x7000
 # PIC: irq0 -> 0x20, only irq0 open
 mov $0x11, %al; out %al, $0x20; out %al, $0xa0
 mov $0x20, %al; out %al, $0x21
 mov $0x28, %al; out %al, $0xa1
 mov $4, %al; out %al, $0x21
 mov $2, %al; out %al, $0xa1
 mov $1, %al; out %al, $0x21; out %al, $0xa1
 mov $0xfe, %al; out %al, $0x21
 mov $0xff, %al; out %al, $0xa1
 # PIT channel 0, mode 2, 1000 Hz
 mov $0x34, %al; out %al, $0x43
 mov $0xa9, %al; out %al, $0x40
 mov $0x04, %al; out %al, $0x40
 xor %r8d, %r8d
 xor %r9d, %r9d
 # LAPIC: enable, LVT0 = ExtINT
 mov $0xfee00000, %esi
 movl $0x1ff, 0xf0(%rsi)
 movl $0x700, 0x350(%rsi)
 sti
2: hlt
 cmp $5, %r8d
 jb 2b
 say 't'
 mov $0xff, %al; out %al, $0x21
 movl $0xb, 0x3e0(%rsi)
 movl $0x20030, 0x320(%rsi)
 movl $1000000, 0x380(%rsi)
3: hlt
 cmp $5, %r9d
 jb 3b
 say 'a'
 mov $0x10, %al
 out %al, $0xf4
4: hlt
 jmp 4b
tick: inc %r8d
 push %rax
 mov $0x20, %al
 out %al, $0x20
 pop %rax
 iretq
ltick: inc %r9d
 movl $0, 0xb0(%rsi)
 iretq
gate: mov %bx, (%rdi)
 movw $24, 2(%rdi)
 movw $0x8e00, 4(%rdi)
 shr $16, %ebx
 mov %bx, 6(%rdi)
 movl $0, 8(%rdi)
 movl $0, 12(%rdi)
 ret
end:
.org 0xfff0
.code16
 ljmp $0xf000, $0
.org 0x10000
