/* For linux.uml, which has room for 2,696 bytes of a process' vector registers: that is all of them
 * up to AVX-512 and PKRU (arch/x86/um/user-offsets.c). On processors with more, as AMX, the kernel
 * takes them only whole (EFAULT, arch/x86/kernel/fpu/regset.c), and no process would ever start.
 * So this is preloaded: it asks for all, hands some on, and puts all back, the rest as not in use. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

enum {
	ALL_BYTES = 64 << 10,
	PRESENT_AT = 512, /* in the XSAVE header: a bit for each kind of registers that is not zero */
	HANDED_ON = 0x2ff, /* x87 to AVX-512, and PKRU */
};

typedef long trace(enum __ptrace_request request, pid_t pid, void *address, void *data);

static trace *find_ptrace(void)
{
	static trace *found;

	if (!found)
		found = (trace *)dlsym(RTLD_NEXT, "ptrace");
	return found;
}

static long read_or_write(enum __ptrace_request request, pid_t pid, struct iovec *some)
{
	static char all[ALL_BYTES];
	struct iovec whole = {all, sizeof all};
	void *kind = (void *)NT_X86_XSTATE;
	uint64_t present;

	if (find_ptrace()(PTRACE_GETREGSET, pid, kind, &whole) < 0)
		return -1;
	if (some->iov_len > whole.iov_len)
		some->iov_len = whole.iov_len;
	if (request == PTRACE_GETREGSET) {
		memcpy(some->iov_base, all, some->iov_len);
		return 0;
	}
	memcpy(all, some->iov_base, some->iov_len);
	memcpy(&present, all + PRESENT_AT, sizeof present);
	present &= HANDED_ON;
	memcpy(all + PRESENT_AT, &present, sizeof present);
	return find_ptrace()(request, pid, kind, &whole);
}

long ptrace(enum __ptrace_request request, ...)
{
	void *address, *data;
	va_list rest;
	pid_t pid;

	va_start(rest, request);
	pid = va_arg(rest, pid_t);
	address = va_arg(rest, void *);
	data = va_arg(rest, void *);
	va_end(rest);
	if (address == (void *)NT_X86_XSTATE
	    && (request == PTRACE_GETREGSET || request == PTRACE_SETREGSET))
		return read_or_write(request, pid, data);
	return find_ptrace()(request, pid, address, data);
}
