// SPDX-License-Identifier: GPL-2.0-or-later
// Programs whose memory is switched: each checks itself, and says what was wrong with it when SIGUSR2 comes.
//
//   spin     general and vector registers, flags, the red zone and memory; counts queued signals from a child
//   sleep    waits in many ways; being interrupted, or woken too early, is wrong
//   threads  64 threads at full load, the first among them
//   filter   a seccomp filter that permits read, write, exit and madvise(MADV_DONTNEED); answers each byte with the same
//   busy     the same filter, and one call after the other
//   wait     waits for input
//   rseq     counts in restartable sequences, and the same without (x86-64)
//   sve      holds values in SVE registers, without any system call (aarch64)
//   exec     replaces itself again and again
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#if __has_include(<sys/rseq.h>)
#include <sys/rseq.h>
#endif

#define SIZE (16 << 20)
static volatile sig_atomic_t over;
static volatile long came, out_of_order;
static long errors;
static unsigned char *memory;

static void wrong(const char *what)
{
	if (errors++ < 5) {
		char line[200];
		int n = snprintf(line, sizeof line, "wrong: %s\n", what);
		write(2, line, n);
	}
}

static void end(int number) { over = 1; }

static void queued(int number, siginfo_t *info, void *context)
{
	if (info->si_value.sival_int != came)
		out_of_order++;
	came++;
}

static void fill(void)
{
	memory = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (long i = 0; i < SIZE; i += 8)
		*(long *)(memory + i) = (i / 4096 % 64) * 0x0101010101010101;
}

static void check_memory(void)
{
	for (long i = 0; i < SIZE; i += 8)
		if (*(long *)(memory + i) != (i / 4096 % 64) * 0x0101010101010101)
			return wrong("memory");
}

unsigned char vectors[16 * 32] __attribute__((aligned(32))), found[16 * 32] __attribute__((aligned(32)));

#ifdef __x86_64__
#define AUDIT_ARCH 0xc000003e
long rounds;
double pi;

// Registers hold known values for some thousand rounds, with a system call in each (kind 1), or none.
#define REGISTERS(X) X(rbx) X(rcx) X(rdx) X(rsi) X(rdi) X(rbp) X(r8) X(r9) X(r10) X(r11) X(r12) X(r13) X(r14) X(r15)
#define LOAD(r) "movq $0x1234567" ", %%" #r "\n addq $(0x" "0f" "), %%" #r "\n"
#define COMPARE(r) "cmpq $0x1234576, %%" #r "\n jne 3f\n"

static long hold(long calls, int avx)
{
	long bad;
	rounds = calls ? 300 : 200000;
	if (avx)
		for (int i = 0; i < 1; i++)
			asm volatile("vmovdqa 0(%0),%%ymm0\n vmovdqa 32(%0),%%ymm1\n vmovdqa 64(%0),%%ymm2\n"
				     "vmovdqa 96(%0),%%ymm7\n vmovdqa 128(%0),%%ymm8\n vmovdqa 160(%0),%%ymm15\n" ::"r"(vectors));
	else
		asm volatile("movdqa 0(%0),%%xmm0\n movdqa 32(%0),%%xmm1\n movdqa 64(%0),%%xmm2\n"
			     "movdqa 96(%0),%%xmm7\n movdqa 128(%0),%%xmm8\n movdqa 160(%0),%%xmm15\n" ::"r"(vectors));
	asm volatile("fldpi\n");
	asm volatile("subq $256, %%rsp\n pushq %%rbp\n pushq %%rbx\n"
		     "movq $0x5a5a5a, -8(%%rsp)\n movq $0x5a5a5b, -128(%%rsp)\n"
		     "testq %1, %1\n jnz 5f\n"
		     // Without calls: rax, rcx and r11 hold, too.
		     REGISTERS(LOAD) "movq $0x77, %%rax\n stc\n"
		     "1: decq rounds(%%rip)\n jnz 1b\n"
		     "jnc 3f\n cmpq $0x77, %%rax\n jne 3f\n" REGISTERS(COMPARE) "jmp 6f\n"
		     "5:" REGISTERS(LOAD)
		     "7: movl $110, %%eax\n syscall\n"
		     "movq $0x1234576, %%rcx\n movq $0x1234576, %%r11\n"
		     REGISTERS(COMPARE) "decq rounds(%%rip)\n jnz 7b\n"
		     "6: cmpq $0x5a5a5a, -8(%%rsp)\n jne 3f\n cmpq $0x5a5a5b, -128(%%rsp)\n jne 3f\n"
		     "xorl %%eax, %%eax\n jmp 4f\n"
		     "3: movl $1, %%eax\n"
		     "4: popq %%rbx\n popq %%rbp\n addq $256, %%rsp\n"
		     : "=a"(bad) : "r"(calls)
		     : "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
	asm volatile("fstpl pi(%%rip)\n" ::: "memory");
	memset(found, 0, sizeof found);
	if (avx)
		asm volatile("vmovdqa %%ymm0,0(%0)\n vmovdqa %%ymm1,32(%0)\n vmovdqa %%ymm2,64(%0)\n"
			     "vmovdqa %%ymm7,96(%0)\n vmovdqa %%ymm8,128(%0)\n vmovdqa %%ymm15,160(%0)\n vzeroupper\n"
			     ::"r"(found) : "memory");
	else
		asm volatile("movdqa %%xmm0,0(%0)\n movdqa %%xmm1,32(%0)\n movdqa %%xmm2,64(%0)\n"
			     "movdqa %%xmm7,96(%0)\n movdqa %%xmm8,128(%0)\n movdqa %%xmm15,160(%0)\n" ::"r"(found) : "memory");
	return bad;
}

static void spin(void)
{
	int avx = __builtin_cpu_supports("avx");
	long n = 0;
	for (int i = 0; i < 6 * 32; i++)
		vectors[i] = avx || i % 32 < 16 ? i * 7 + 1 : 0;
	while (!over) {
		// memset between may use the registers, so vectors are compared after each.
		if (hold(n & 1, avx))
			wrong(n & 1 ? "registers over system calls" : "registers");
		if (memcmp(vectors, found, 6 * 32))
			wrong("vector registers");
		if (pi < 3.14159 || pi > 3.1416)
			wrong("x87 register");
		if (n++ % 64 == 0)
			check_memory();
	}
}

#else
#define AUDIT_ARCH 0xc00000b7
// The same with x1 to x30 and all of the vector registers: hold(calls, vectors, found). x0 counts, or x28 over calls.
#define EACH(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) \
	X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(29) X(30)
#define LOAD(n) "mov x" #n ", #0x1000 + " #n "\n"
#define COMPARE(n) "mov x0, #0x1000 + " #n "\n cmp x" #n ", x0\n b.ne 3f\n"
#define VECTORS(V) V("0", "3") V("4", "7") V("8", "11") V("12", "15") V("16", "19") V("20", "23") V("24", "27") V("28", "31")
#define LOAD_VECTORS(a, b) "ld1 {v" a ".16b-v" b ".16b}, [x1], #64\n"
#define STORE_VECTORS(a, b) "st1 {v" a ".16b-v" b ".16b}, [x1], #64\n"
long hold(long calls, void *from, void *to);
asm(".text\n.balign 4\nhold:\n"
    "stp x29, x30, [sp, #-16]!\n stp x27, x28, [sp, #-16]!\n stp x25, x26, [sp, #-16]!\n stp x23, x24, [sp, #-16]!\n"
    "stp x21, x22, [sp, #-16]!\n stp x19, x20, [sp, #-16]!\n stp d14, d15, [sp, #-16]!\n stp d12, d13, [sp, #-16]!\n"
    "stp d10, d11, [sp, #-16]!\n stp d8, d9, [sp, #-16]!\n stp x18, x2, [sp, #-16]!\n"
    VECTORS(LOAD_VECTORS)
    "cbnz x0, 5f\n"
    // Without calls: x8 and x28 hold, too.
    EACH(LOAD) LOAD(8) LOAD(28) "mov x0, #0x30000\n"
    "1: subs x0, x0, #1\n b.ne 1b\n"
    "cbnz x0, 3f\n" COMPARE(8) COMPARE(28) "b 6f\n"
    "5:" EACH(LOAD) "mov x28, #300\n"
    "7: mov x8, #173\n svc #0\n subs x28, x28, #1\n b.ne 7b\n"
    "6:" EACH(COMPARE) "mov x0, #0\n b 4f\n"
    "3: mov x0, #1\n"
    "4: ldp x18, x1, [sp], #16\n"
    VECTORS(STORE_VECTORS)
    "ldp d8, d9, [sp], #16\n ldp d10, d11, [sp], #16\n ldp d12, d13, [sp], #16\n ldp d14, d15, [sp], #16\n"
    "ldp x19, x20, [sp], #16\n ldp x21, x22, [sp], #16\n ldp x23, x24, [sp], #16\n ldp x25, x26, [sp], #16\n"
    "ldp x27, x28, [sp], #16\n ldp x29, x30, [sp], #16\n ret\n");

static void spin(void)
{
	for (int i = 0; i < sizeof vectors; i++)
		vectors[i] = i * 7 + 1;
	for (long n = 0; !over; n++) {
		if (hold(n & 1, vectors, found))
			wrong(n & 1 ? "registers over system calls" : "registers");
		if (memcmp(vectors, found, sizeof vectors))
			wrong("vector registers");
		if (n % 64 == 0)
			check_memory();
	}
}

static void sve(void)
{
	while (!over) {
		long bad;
		asm volatile(".arch_extension sve\n ptrue p0.b\n dup z0.b, #7\n mov %0, #0x10000\n"
			     "1: subs %0, %0, #1\n b.ne 1b\n"
			     "dup z1.b, #7\n cmpne p1.b, p0/z, z0.b, z1.b\n cset %0, ne\n" : "=&r"(bad) :: "v0", "v1", "cc");
		if (bad)
			wrong("SVE registers");
	}
}
#endif

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void waited(const char *what, long result, long expected, double begin, double least)
{
	if (over)
		return;
	if (result != expected)
		wrong(what);
	else if (now() - begin < least - 1e-4)
		wrong("woken too early");
}

static void sleep_in_many_ways(void)
{
	struct timespec t = {0, 3000000}, rest;
	int nothing = 0, ends[2];
	pipe(ends);
	struct pollfd fd = {ends[0], POLLIN, 0};
	while (!over) {
		double begin = now();
		waited("poll", poll(&fd, 1, 3), 0, begin, .003);
		begin = now();
		waited("nanosleep", nanosleep(&t, &rest), 0, begin, .003);
		begin = now();
		waited("clock_nanosleep", clock_nanosleep(CLOCK_MONOTONIC, 0, &t, 0), 0, begin, .003);
		begin = now();
		errno = 0;
		waited("futex", syscall(SYS_futex, &nothing, FUTEX_WAIT, 0, &t, 0, 0) + (errno == ETIMEDOUT), 0, begin, .003);
		begin = now();
		waited("ppoll", ppoll(&fd, 1, &t, 0), 0, begin, .003);
		// Restarted for as long as it takes: a child that ends.
		pid_t child = fork();
		if (!child) {
			usleep(3000);
			_exit(7);
		}
		int status;
		begin = now();
		waited("waitpid", waitpid(child, &status, 0), child, begin, 0);
		char byte;
		child = fork();
		if (!child) {
			usleep(3000);
			write(ends[1], "x", 1);
			_exit(7);
		}
		waited("read", read(ends[0], &byte, 1), 1, begin, 0);
		waited("waitpid", waitpid(child, &status, 0), child, begin, 0);
	}
}

static void *load(void *unused)
{
	volatile double x = 1;
	while (!over)
		for (long i = 0; i < 100000; i++)
			x = x * 1.0000001 + memory[i * 61 % SIZE];
	return 0;
}

static void filtered(int busy)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH, 0, 7),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_read, 6, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 5, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit, 4, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 2),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MADV_DONTNEED, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		abort();
	char byte;
	while (busy) {
		// Only what the filter permits may come back from it.
		if (syscall(SYS_write, -1, "", 0) != -1 || errno != EBADF)
			syscall(SYS_exit, 99);
		if (madvise(memory, 0, MADV_DONTNEED))
			syscall(SYS_exit, 98);
	}
	while (syscall(SYS_read, 0, &byte, 1) == 1) {
		if (byte == 'k')
			syscall(SYS_getppid);
		syscall(SYS_write, 1, &byte, 1);
	}
	for (long i = 0; i < SIZE; i += 8)
		if (*(long *)(memory + i) != (i / 4096 % 64) * 0x0101010101010101)
			syscall(SYS_exit, 97);
	syscall(SYS_exit, 0);
}

#if defined RSEQ_SIG && defined __x86_64__
static void sequences(void)
{
	// A sequence that was interrupted begins again. One that goes on finds that the kernel has forgotten it: rseq_cs is 0.
	struct rseq *own = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	static struct rseq_cs section;
	static long tally;
	long expected = 0;
	while (!over) {
		long done = 0;
		asm volatile("lea 10f(%%rip), %%rax\n movq %%rax, 8(%[s])\n lea 11f(%%rip), %%rcx\n subq %%rax, %%rcx\n"
			     "movq %%rcx, 16(%[s])\n lea 12f(%%rip), %%rcx\n movq %%rcx, 24(%[s])\n"
			     "movq %[s], 8(%[own])\n"
			     "10: movq %[tally], %%rcx\n movl $3000, %%eax\n"
			     "1: decl %%eax\n jnz 1b\n"
			     "cmpq %[s], 8(%[own])\n jne 14f\n"
			     "incq %%rcx\n movq %%rcx, %[tally]\n"
			     "11: movl $6000, %%eax\n 2: decl %%eax\n jnz 2b\n movq $0, 8(%[own])\n movq $1, %[done]\n jmp 13f\n"
			     "14: movq $2, %[done]\n jmp 13f\n"
			     ".long 0x53053053\n"
			     "12: movq $0, 8(%[own])\n movq $0, %[done]\n"
			     "13:\n"
			     : [done] "+r"(done), [tally] "+m"(tally)
			     : [s] "r"(&section), [own] "r"(own)
			     : "rax", "rcx", "memory", "cc");
		if (done == 2)
			wrong("a restartable sequence that went on");
		expected += done == 1;
		if (tally != expected)
			wrong("a restartable sequence"), expected = tally;
	}
}
#endif

int main(int count, char **argument)
{
	const char *mode = argument[1];
	struct sigaction act = {.sa_handler = end}, queue = {.sa_sigaction = queued, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigaction(SIGUSR2, &act, 0);
	fill();
	if (!strcmp(mode, "exec")) {
		char *again[] = {argument[0], argument[1], "again", 0};
		if (count == 2) {
			printf("%d\n", getpid());
			fflush(stdout);
		}
		usleep(2000);
		execv("/proc/self/exe", again);
	}
	long send = count > 2 ? atol(argument[2]) : 0, sent = 0;
	int ends[2];
	pipe(ends);
	pid_t parent = getpid(), child = 0;
	if (send) {
		sigaction(SIGRTMIN, &queue, 0);
		child = fork();
		if (!child) {
			while (!over && getppid() == parent) {
				union sigval value = {.sival_int = sent};
				if (!sigqueue(parent, SIGRTMIN, value))
					sent++;
				usleep(send);
			}
			write(ends[1], &sent, sizeof sent);
			_exit(0);
		}
	}
	printf("%d\n", parent);
	fflush(stdout);
	if (!strcmp(mode, "spin"))
		spin();
	else if (!strcmp(mode, "sleep"))
		sleep_in_many_ways();
	else if (!strcmp(mode, "filter") || !strcmp(mode, "busy"))
		filtered(!strcmp(mode, "busy"));
#ifdef __aarch64__
	else if (!strcmp(mode, "sve"))
		sve();
#endif
#if defined RSEQ_SIG && defined __x86_64__
	else if (!strcmp(mode, "rseq"))
		sequences();
#endif
	else if (!strcmp(mode, "threads")) {
		pthread_t thread;
		for (int i = 0; i < 63; i++)
			pthread_create(&thread, 0, load, 0);
		load(0);
	} else {
		char byte;
		if (read(0, &byte, 1) < 0 && !over)
			wrong("read");
	}
	check_memory();
	if (child) {
		kill(child, SIGUSR2);
		while (read(ends[0], &sent, sizeof sent) < 0 && errno == EINTR)
			;
		while (waitpid(child, 0, 0) < 0 && errno == EINTR)
			;
		if (came != sent || out_of_order)
			wrong("signals");
	}
	printf("%ld errors, %ld signals of %ld\n", errors, came, sent);
	return errors != 0;
}
