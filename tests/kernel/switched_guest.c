// SPDX-License-Identifier: GPL-2.0-or-later
// What a virtual machine runs while its memory is switched: it fills 16 MiB, checks them again and again, and says on
// its debug console (port 0xe9) "." each time that they are right, "!" where they are not. QEMU's -kernel starts it
// (Multiboot 1: 32 bits, no paging).
#define FIRST (4 << 20)
#define SIZE (16 << 20)
#define MAGIC 0x1badb002

__attribute__((section(".text.0"), used)) static const unsigned header[] = {MAGIC, 0, -MAGIC};

static void say(char letter) { asm volatile("outb %0, $0xe9" ::"a"(letter)); }

static unsigned content(unsigned at) { return (at / 4096 % 64) * 0x01010101; }

__attribute__((used)) static void run(void)
{
	for (unsigned at = 0; at < SIZE; at += 4)
		*(volatile unsigned *)(FIRST + at) = content(at);
	for (;;) {
		int right = 1;
		for (unsigned at = 0; at < SIZE; at += 4)
			right &= *(volatile unsigned *)(FIRST + at) == content(at);
		say(right ? '.' : '!');
	}
}

asm(".globl _start\n_start: movl $0x300000, %esp\n call run\n");
