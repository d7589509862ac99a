/* A program that executes another from a second thread, and never comes to its end: the thread has
 * the process' number by then, and waits, as the kernel looks at its list of robust futexes, for
 * memory that nobody fills. */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096 };

static char stack[1 << 16] __attribute__((aligned(16)));
static struct { char *list; long offset; void *pending; } robust;

static int be_thread(void *unused)
{
	char *arguments[] = {"true", NULL};

	(void)unused;
	syscall(SYS_set_robust_list, &robust, sizeof robust);
	execv("/bin/true", arguments);
	return 1;
}

int main(void)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register region = {.mode = UFFDIO_REGISTER_MODE_MISSING};
	int filler = syscall(SYS_userfaultfd, O_CLOEXEC);

	robust.list = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	region.range.start = (uintptr_t)robust.list;
	region.range.len = PAGE_BYTES;
	if (filler < 0 || ioctl(filler, UFFDIO_API, &api) < 0
	    || ioctl(filler, UFFDIO_REGISTER, &region) < 0)
		err(1, "userfaultfd");
	clone(be_thread, stack + sizeof stack,
	      CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM, NULL);
	for (;;)
		pause();
}
