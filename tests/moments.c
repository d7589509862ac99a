/* For LD_PRELOAD: makes moments long that a busy machine makes long by chance, and has the kernel
 * refuse what another process may have used up. Each as often as the test says. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { LONG_MICROSECONDS = 500000 };

atomic_int slow_events;     /* of a pipe, between the event and its use */
atomic_int slow_questions;  /* how much is in a pipe */
atomic_int refused_watches; /* of a pipe, with ENOSPC */

static int takes_one(atomic_int *count)
{
	return atomic_fetch_sub(count, 1) > 0 || (atomic_fetch_add(count, 1), 0);
}

int epoll_wait(int epoll, struct epoll_event *events, int capacity, int timeout)
{
	int (*real)(int, struct epoll_event *, int, int) = dlsym(RTLD_NEXT, "epoll_wait");
	int ready = real(epoll, events, capacity, timeout);

	if (ready > 0 && events->data.u64 && takes_one(&slow_events))
		usleep(LONG_MICROSECONDS);
	return ready;
}

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
	int (*real)(int, int, int, struct epoll_event *) = dlsym(RTLD_NEXT, "epoll_ctl");

	if (operation == EPOLL_CTL_ADD && takes_one(&refused_watches)) {
		errno = ENOSPC;
		return -1;
	}
	return real(epoll, operation, fd, event);
}

int ioctl(int fd, unsigned long request, ...)
{
	int (*real)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
	va_list rest;
	void *argument;

	va_start(rest, request);
	argument = va_arg(rest, void *);
	va_end(rest);
	if (request == FIONREAD && takes_one(&slow_questions))
		usleep(LONG_MICROSECONDS);
	return real(fd, request, argument);
}
