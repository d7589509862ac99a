/* jobinit.c as a fuzz target: what a server may send it, in whatever order.
 *
 * All of jobinit's own code runs, up to the exec of a job, over a real socket. Nothing that it
 * asks for happens to the machine: fork returns as vfork does, and the calls with which a child
 * becomes a job only read what they are given. Those that are not known here are refused by the
 * kernel (`forbid_the_rest`), so a new one costs coverage and no harm.
 *
 * Under clang: libFuzzer. With BLIND defined, for other compilers, a main of its own, which
 * changes what it is given at random, without a look at what that reaches.
 *
 * An input is a list of records: a byte `how`, the length of what follows (32 bits), and that.
 *   how & 3       so many memfds go with the message: their contents are the next records
 *   how >> 2 & 3  so many other descriptors do
 *   how & 128     no message but an event, see `let_happen`
 * The layout of the messages themselves is known to engine/jobinit.py, which the seeds are of. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <malloc.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ==== What is played instead of the kernel's part ==== */

enum { DEEPEST = 4, MOST_PROCESSES = 64, CHILD_FDS = 16, NO_SUCH_PID = 1 << 30 };

static jmp_buf levels[DEEPEST]; /* of children that play at the moment, one in another */
static int level;
static pid_t processes[MOST_PROCESSES];
static int process_count;
static int dead_count, dead_status; /* how many of them, the newest first, are zombies */
static int null_fd;
static int child_fds[CHILD_FDS]; /* what the child has put there; 0: nothing */
static int calls_until_failure;  /* of the next child; 0: none fails */
static bool may_not_fork, is_not_in_proc;
/* The next child is not played: its fork is in a function that returns, as setjmp's may not. */
static bool is_unplayed;
static unsigned long execs, touched;

static void touch(const char *text)
{
	touched += text ? strlen(text) : 0;
}

static void touch_all(char *const *texts)
{
	while (texts && *texts)
		touch(*texts++);
}

static int play(void)
{
	if (calls_until_failure && --calls_until_failure == 0) {
		errno = EPERM;
		return -1;
	}
	return 0;
}

static bool take_unplayed(void)
{
	bool was = is_unplayed;

	is_unplayed = false;
	return was;
}

static pid_t new_pid(void)
{
	pid_t pid = is_not_in_proc ? NO_SUCH_PID + process_count : getpid();

	memset(child_fds, 0, sizeof child_fds);
	calls_until_failure = 0;
	processes[process_count++] = pid;
	return pid;
}

static int refuse_fork(void)
{
	if (!may_not_fork && level < DEEPEST && process_count < MOST_PROCESSES)
		return 0;
	errno = EAGAIN;
	return 1;
}

static _Noreturn void end_child(void)
{
	if (!level)
		abort(); /* jobinit itself would be gone */
	longjmp(levels[--level], 1);
}

static _Noreturn void play_exit(int code)
{
	(void)code;
	end_child();
}

static int play_execve(const char *path, char *const *arguments, char *const *environment)
{
	if (play() < 0)
		return -1;
	touch(path);
	touch_all(arguments);
	touch_all(environment);
	execs++;
	end_child();
}

static int play_open(const char *path, int flags, ...)
{
	touch(path);
	if (level)
		return play() < 0 ? -1 : null_fd;
	if ((flags & O_ACCMODE) == O_RDONLY && !strncmp(path, "/proc/", 6))
		return open(path, flags);
	errno = EACCES;
	return -1;
}

static int play_openat(int folder, const char *path, int flags, ...)
{
	(void)folder;
	return play_open(path, flags);
}

/* Of jobinit's own are only pairs: this is a child's, whose close is played too. */
static int play_socket(int family, int type, int protocol)
{
	(void)family, (void)type, (void)protocol;
	return play() < 0 ? -1 : null_fd;
}

static int play_close(int fd)
{
	return level || fd == null_fd ? 0 : close(fd);
}

static ssize_t play_write(int fd, const void *data, size_t size)
{
	if (level && fd >= 0 && fd < CHILD_FDS && child_fds[fd])
		return write(child_fds[fd], data, size); /* the report of a step that failed */
	if (level && play() < 0)
		return -1;
	return size;
}

static int play_dup2(int fd, int place)
{
	if (play() < 0)
		return -1;
	if (place >= 0 && place < CHILD_FDS)
		child_fds[place] = fd;
	return place;
}

static int play_dup3(int fd, int place, int flags)
{
	(void)flags;
	return play_dup2(fd, place);
}

static long play_syscall(long number, ...)
{
	enum { PIDFD_OPEN = 434 };

	if (level)
		return play();
	if (number == SYS_clone) { /* a process that only waits, for a namespace's sake */
		is_unplayed = true;
		return NO_SUCH_PID - 1;
	}
	if (number == PIDFD_OPEN)
		return fcntl(null_fd, F_DUPFD_CLOEXEC, 0);
	errno = ESRCH;
	return -1;
}

static int play_prctl(int what, ...)
{
	return what == PR_CAPBSET_READ ? -1 : play();
}

/* No user namespaces, whoever runs this: a job in one is forked in a function that returns. */
static int play_unshare(int kinds)
{
	errno = EPERM;
	return kinds & CLONE_NEWUSER ? -1 : play();
}

static int play_setgroups(size_t count, const gid_t *groups)
{
	while (count--)
		touched += groups[count];
	return play();
}

static int play_path(const char *path)
{
	touch(path);
	return play();
}

static int play_kill(pid_t pid, int number)
{
	(void)pid, (void)number;
	errno = ESRCH;
	return -1;
}

static int play_waitid(idtype_t type, id_t id, siginfo_t *info, int options)
{
	(void)type, (void)id, (void)options;
	if (dead_count && process_count)
		info->si_pid = processes[process_count - 1];
	return 0;
}

static pid_t play_wait4(pid_t pid, int *status, int options, struct rusage *usage)
{
	(void)pid, (void)options;
	if (level || !process_count) {
		errno = ECHILD;
		return -1;
	}
	memset(usage, 0, sizeof *usage);
	*status = dead_status;
	dead_count -= dead_count > 0;
	return processes[--process_count];
}

static int play_epoll_wait(int epoll, struct epoll_event *events, int room, int timeout);

/* setjmp here, and not in a function: its caller must not have returned. */
#define fork() (refuse_fork() ? -1 : take_unplayed() ? new_pid() : setjmp(levels[level++]) == 0 ? 0 : new_pid())
#define _exit play_exit
#define execve play_execve
#define open play_open
#define openat play_openat
#define close play_close
#define socket play_socket
#define write play_write
#define dup2 play_dup2
#define dup3 play_dup3
#define syscall play_syscall
#define prctl play_prctl
#define kill play_kill
#define waitid play_waitid
#define wait4 play_wait4
#define epoll_wait play_epoll_wait
#define setgroups play_setgroups
#define chdir play_path
#define mkdir(path, ...) play_path(path)
#define rmdir play_path
#define setns(...) play()
#define mount(...) play()
#define umount2(...) play()
#define symlink(...) play()
#define mknod(...) play()
#define mkdirat(folder, path, ...) play_path(path)
#define mknodat(folder, path, ...) play_path(path)
#define fchdir(...) play()
#define setfsuid(...) play()
#define setfsgid(...) play()
#define pivot_root(...) play()
#define ioctl(...) play()
#define setsid play
#define setrlimit(...) play()
#define setresuid(...) play()
#define setresgid(...) play()
#define fchown(...) play()
#define unshare play_unshare
#define poll(...) 0 /* nobody reads the log */
#define main jobinit_main

#include "../../jobinit.c"

#undef fork
#undef _exit
#undef open
#undef close
#undef socket
#undef write
#undef syscall
#undef prctl
#undef epoll_wait
#undef setrlimit
#undef main

/* ==== The server ==== */

enum { MOST_JOBS = 256 };

static int peer_fd = -1;
static struct sockaddr_un listener_address;
static socklen_t listener_address_size;
static uint64_t known_jobs[MOST_JOBS];
static unsigned known_count;

static void expect(bool holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "not so: %s: %s\n", what, strerror(errno));
	abort();
}

static void note_job(uint64_t id)
{
	unsigned i;

	for (i = 0; i < known_count; i++)
		if (known_jobs[i] == id)
			return;
	if (known_count < MOST_JOBS)
		known_jobs[known_count++] = id;
}

/* All that jobinit says is whole messages, with as many descriptors as they announce. */
static void check_packet(const char *packet, size_t size, size_t descriptors)
{
	struct header header;
	size_t announced = 0;

	while (size) {
		expect(size >= sizeof header, "a message has a header");
		memcpy(&header, packet, sizeof header);
		expect(size - sizeof header >= header.size, "a message is whole");
		packet += sizeof header + header.size;
		size -= sizeof header + header.size;
		announced += header.descriptors;
		if (header.type != TELL_REFUSED && header.job)
			note_job(header.job);
	}
	expect(announced == descriptors, "descriptors are announced");
}

static void hear(void)
{
	static char packet[1 << 20];
	static union {
		char room[CMSG_SPACE(256 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = {packet, sizeof packet};
	struct cmsghdr *rights;
	size_t count, i;
	ssize_t size;

	for (;;) {
		struct msghdr message = {
			.msg_iov = &part,
			.msg_iovlen = 1,
			.msg_control = control.room,
			.msg_controllen = sizeof control.room,
		};
		size = recvmsg(peer_fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
		if (size <= 0)
			return;
		count = 0;
		rights = CMSG_FIRSTHDR(&message);
		if (rights)
			count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (i = 0; i < count; i++)
			close(((int *)CMSG_DATA(rights))[i]);
		check_packet(packet, size, count);
	}
}

/* jobinit's loop ends here where it would wait. */
static int play_epoll_wait(int epoll, struct epoll_event *events, int room, int timeout)
{
	(void)timeout;
	if (peer_fd >= 0)
		hear();
	return epoll_wait(epoll, events, room, 0);
}

static void run_jobinit(void)
{
	handle_events();
	if (peer_fd >= 0)
		hear();
}

static void say_to_jobinit(const void *data, size_t size, const int *fds, size_t count)
{
	union {
		char room[CMSG_SPACE(8 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = {(void *)data, size};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

	if (count) {
		control.align.cmsg_level = SOL_SOCKET;
		control.align.cmsg_type = SCM_RIGHTS;
		control.align.cmsg_len = CMSG_LEN(count * sizeof(int));
		memcpy(CMSG_DATA(&control.align), fds, count * sizeof(int));
		message.msg_control = control.room;
		message.msg_controllen = CMSG_SPACE(count * sizeof(int));
	}
	/* An empty packet could not be told from the end. */
	if (size)
		expect(sendmsg(peer_fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0, "it listens");
	run_jobinit();
}

static void ask(unsigned type, uint64_t job)
{
	struct header header = {type, 0, 0, job};

	say_to_jobinit(&header, sizeof header, NULL, 0);
}

static void come(void)
{
	peer_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	expect(connect(peer_fd, (struct sockaddr *)&listener_address, listener_address_size) == 0,
	       "a server can connect");
	run_jobinit();
}

static void go(void)
{
	close_fd(&peer_fd);
	run_jobinit();
}

static void end_processes(int count, int status)
{
	uint64_t one = 1;

	dead_count = count;
	dead_status = status;
	expect(write(signal_fd, &one, sizeof one) == sizeof one, "a signal comes");
	run_jobinit();
	dead_count = 0;
}

static void let_happen(const uint8_t *data, size_t size)
{
	static const char long_packet[100 << 10];
	uint8_t what = size ? data[0] : 0, detail = size > 1 ? data[1] : 0;

	switch (what % 7) {
	case 0:
		/* By an exit code, or by a signal. */
		end_processes(1, detail & 1 ? detail >> 1 : detail << 7);
		break;
	case 1:
		go();
		come();
		break;
	case 2:
		calls_until_failure = detail;
		break;
	case 3:
		may_not_fork = !may_not_fork;
		break;
	case 4:
		is_not_in_proc = !is_not_in_proc;
		break;
	case 5:
		say_to_jobinit(long_packet, sizeof long_packet, NULL, 0);
		break;
	case 6:
		ask(ASK_LIST, 0);
		break;
	}
}

/* ==== One input ==== */

struct input { const uint8_t *data; size_t size; };

struct record { uint8_t how; const uint8_t *data; size_t size; };

static bool take_record(struct input *input, struct record *record)
{
	uint32_t size;

	if (input->size < 5)
		return false;
	record->how = input->data[0];
	memcpy(&size, input->data + 1, sizeof size);
	record->data = input->data + 5;
	record->size = size < input->size - 5 ? size : input->size - 5;
	input->data = record->data + record->size;
	input->size -= 5 + record->size;
	return true;
}

static int make_memfd(struct input *input)
{
	struct record record = {0, NULL, 0};
	int fd = memfd_create("start", MFD_CLOEXEC);

	take_record(input, &record);
	if (record.size)
		expect(write(fd, record.data, record.size) == (ssize_t)record.size, "a memfd");
	return fd;
}

static void send_record(struct input *input, const struct record *record)
{
	int fds[6], count = 0, memfds = record->how & 3, others = record->how >> 2 & 3;

	while (count < memfds)
		fds[count++] = make_memfd(input);
	for (; count < memfds + others; count++)
		fds[count] = count % 2 ? dup(null_fd) : open("/", O_RDONLY | O_CLOEXEC);
	say_to_jobinit(record->data, record->size, fds, count);
	while (count)
		close(fds[--count]);
}

/* Of the first 64, as bits. */
static uint64_t open_fds(void)
{
	uint64_t found = 0;
	int fd;

	for (fd = 0; fd < 64; fd++)
		if (fcntl(fd, F_GETFD) >= 0)
			found |= 1ull << fd;
	return found;
}

/* Whatever was said: it still answers, and nothing of any job is left. */
static void clean_up(void)
{
	unsigned i;

	may_not_fork = is_not_in_proc = false;
	calls_until_failure = 0;
	go();
	come();
	end_processes(MOST_PROCESSES, 0);
	ask(ASK_LIST, 0);
	for (i = 0; i < known_count; i++)
		ask(ASK_ACKNOWLEDGE, known_jobs[i]);
	ask(ASK_ACKNOWLEDGE, 0);
	known_count = 0;
	go();
	expect(job_count == 0, "no job is left");
}

static void run(const uint8_t *data, size_t size)
{
	static uint64_t fds;
	struct input input = {data, size};
	struct record record;

	come();
	while (take_record(&input, &record)) {
		if (record.how & 128)
			let_happen(record.data, record.size);
		else
			send_record(&input, &record);
	}
	clean_up();
	if (!fds)
		fds = open_fds();
	/* A view that is being made outlives its server: a leak is what grows without end. */
	expect(__builtin_popcountll(open_fds() & ~fds) <= 2 * MOST_VIEWS, "few descriptors are left");
}

/* ==== Setting up ==== */

#define FORBID(name) \
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 1), \
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)

/* Should jobinit come to ask for them in a way that is not played here. */
static void forbid_the_rest(void)
{
	struct sock_filter calls[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		/* Threads, and what looks for leaks, share their folder; no process would. */
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 435 /* clone3 */, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 4),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
		BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_FS, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
#ifdef SYS_fork
		FORBID(fork), FORBID(vfork), FORBID(mkdir), FORBID(rmdir), FORBID(unlink),
		FORBID(rename), FORBID(link), FORBID(symlink), FORBID(mknod), FORBID(chmod),
		FORBID(chown), FORBID(creat),
#endif
		FORBID(execve), FORBID(execveat), FORBID(mkdirat), FORBID(unlinkat),
		FORBID(renameat2), FORBID(linkat), FORBID(symlinkat), FORBID(mknodat),
		FORBID(fchmodat), FORBID(fchmod), FORBID(fchownat), FORBID(fchown),
		FORBID(setuid), FORBID(setgid), FORBID(setresuid), FORBID(setresgid),
		FORBID(setgroups), FORBID(setsid), FORBID(setpgid), FORBID(chdir), FORBID(fchdir),
		FORBID(chroot), FORBID(pivot_root), FORBID(mount), FORBID(umount2),
		FORBID(open_tree), FORBID(move_mount), FORBID(fsopen), FORBID(fsmount),
		FORBID(unshare), FORBID(setns), FORBID(sethostname), FORBID(setdomainname),
		FORBID(capset), FORBID(kill), FORBID(bpf), FORBID(keyctl),
		FORBID(sendto),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof calls / sizeof *calls, calls};

	expect(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
	       && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0, "seccomp");
}

static void listen_for_servers(void)
{
	listener_address.sun_family = AF_UNIX;
	listener_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	/* Without a name the kernel gives it one, in no folder. */
	expect(bind(listener_fd, (struct sockaddr *)&listener_address, sizeof(sa_family_t)) == 0
	       && listen(listener_fd, 8) == 0, "a socket");
	listener_address_size = sizeof listener_address;
	getsockname(listener_fd, (struct sockaddr *)&listener_address, &listener_address_size);
}

static void set_up(void)
{
	null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	signal_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	listen_for_servers();
	make_filter();
	raise_open_files_limit();
	prepare_confinement();
	watch_events();
	forbid_the_rest();
}

#ifndef BLIND

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc, (void)argv;
	set_up();
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	run(data, size);
	return 0;
}

#else

enum { LONGEST_INPUT = 100 << 10, MOST_SEEDS = 64, HANG_SECONDS = 20 };

static uint8_t seeds[MOST_SEEDS][LONGEST_INPUT];
static size_t seed_sizes[MOST_SEEDS], seed_count;
static uint64_t random_state;

static unsigned draw(unsigned below)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return below ? (random_state >> 16) % below : 0;
}

static size_t change(uint8_t *data, size_t size)
{
	static const uint32_t numbers[] = {0, 1, 2, 255, 65535, 65536, 1 << 20, INT32_MAX, UINT32_MAX};
	const uint8_t *other = seeds[draw(seed_count)];
	size_t place = draw(size), length = draw(size - place < 64 ? size - place : 64);

	switch (draw(6)) {
	case 0:
		data[place] ^= 1 << draw(8);
		break;
	case 1:
		data[place] = draw(256);
		break;
	case 2:
		if (size - place >= sizeof *numbers)
			memcpy(data + place, &numbers[draw(9)], sizeof *numbers);
		break;
	case 3: /* a piece less */
		memmove(data + place, data + place + length, size - place - length);
		size -= length;
		break;
	case 4: /* a piece twice */
		if (size + length <= LONGEST_INPUT) {
			memmove(data + place + length, data + place, size - place);
			size += length;
		}
		break;
	case 5: /* of another */
		memcpy(data + place, other + draw(LONGEST_INPUT - length), length);
		break;
	}
	return size;
}

/* jobinit_messages SECONDS CURRENT SEED...: in the file CURRENT is the input that runs, or that
 * ended it, behind its length. With 0 seconds each seed runs once, as it is. */
int main(int argc, char **argv)
{
	unsigned long count = 0;
	uint64_t end;
	struct { uint64_t size; uint8_t data[LONGEST_INPUT]; } *current;
	FILE *file = fopen(argv[2], "w+");
	int i;

	expect(argc > 3 && file && ftruncate(fileno(file), sizeof *current) == 0, "arguments");
	current = mmap(NULL, sizeof *current, PROT_WRITE, MAP_SHARED, fileno(file), 0);
	expect(current != MAP_FAILED, "the current input");
	for (i = 3; i < argc && seed_count < MOST_SEEDS; i++) {
		file = fopen(argv[i], "r");
		expect(file != NULL, argv[i]);
		seed_sizes[seed_count] = fread(seeds[seed_count], 1, LONGEST_INPUT, file);
		seed_count++;
		fclose(file);
	}
	set_up();
	random_state = now_ns() | 1;
	end = now_ns() + strtoull(argv[1], NULL, 10) * 1000000000;
	do {
		size_t seed = count % seed_count;
		unsigned changes = strcmp(argv[1], "0") ? 1 + draw(8) : 0;

		alarm(HANG_SECONDS);
		current->size = seed_sizes[seed];
		memcpy(current->data, seeds[seed], current->size);
		while (changes-- && current->size)
			current->size = change(current->data, current->size);
		run(current->data, current->size);
		count++;
	} while (count < seed_count || now_ns() < end);
	printf("runs %lu execs %lu\n", count, execs);
	return 0;
}

#endif
