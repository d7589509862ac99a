/* jobinit - the parent of all jobs.
 *
 * A server asks it, over a unix socket, to start commands. For each it forks; the child joins
 * the job's cgroup, lets go of all that is not the job's, and execs. jobinit stays: it
 * outlives the server, keeps the read ends of the jobs' pipes open (so that a job whose server
 * is away waits on a full pipe, and gets no SIGPIPE), and keeps each ending until a server has
 * acknowledged it. Once it holds no job and no server is connected, it ends by itself.
 *
 *   jobinit --serve                       file descriptor 3 is the listening socket
 *   jobinit --serve-confined              the same, as root, for confined jobs only
 *   jobinit [--cgroup DIR] -- CMD ARG...  runs one job by hand, and ends as that does
 *
 * One thread, and nothing that blocks. It forks and does not vfork: one slow exec or one hung
 * filesystem must hold up nobody else, and from so small a process fork is as fast.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/magic.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <linux/sockios.h>
#include <limits.h>
#include <malloc.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* The same on every architecture, and newer than the headers of the systems that wheels are
 * built on. */
enum {
	CALL_PIDFD_SEND_SIGNAL = 424, CALL_OPEN_TREE = 428, CALL_MOVE_MOUNT = 429,
	CALL_PIDFD_OPEN = 434, CALL_CLOSE_RANGE = 436, CALL_OPENAT2 = 437,
	CALL_MOUNT_SETATTR = 442,
};
enum { CLOSE_UNSHARED = 2 };         /* CLOSE_RANGE_UNSHARE */
enum { CLONED_TREE = 1 };            /* OPEN_TREE_CLONE */
enum { FROM_EMPTY_PATH = 4, TO_EMPTY_PATH = 0x40 }; /* MOVE_MOUNT_{F,T}_EMPTY_PATH */
enum { NO_MAGIC_LINKS = 2, NO_LINKS = 4, IN_ROOT = 0x10 }; /* RESOLVE_... of openat2 */
enum { WHOLE_TREE = 0x8000 };        /* AT_RECURSIVE */
enum { READ_ONLY = 1, NO_SUID = 2, NO_DEVICES = 4 }; /* MOUNT_ATTR_... */
enum { SIGNAL_PROCESS_GROUP = 4 }; /* of pidfd_send_signal, since Linux 6.9 */
enum { SET_DELEGATION = 1040 };    /* F_SETDELEG, since Linux 6.19 */
enum { IS_EXITING = 4 };           /* PF_EXITING of include/linux/sched.h */
enum { PROCESS_NAME_BYTES = 16 };  /* TASK_COMM_LEN, with the end of the string */

/* ==== The protocol, which engine/jobinit.py mirrors ====
 *
 * Messages of a header and a body, in host byte order. A packet from the server holds one, a
 * packet to it as many as fit, with the descriptors of all of them in order.
 *
 * All but ASK_START and ASK_VIEW is frozen: every later version understands it, so that a newer
 * server can take over the jobs of an older jobinit. A later version may lengthen a body; what a
 * reader does not know at its end, it ignores. Steps keep their numbers. */

enum { PROTOCOL_MAGIC = 0x54494e4a, PROTOCOL_VERSION = 2 };

enum {
	ASK_START = 1,       /* struct start and its strings: here, or in a memfd; then the input */
	ASK_SIGNAL = 2,      /* struct to_signal */
	ASK_ACKNOWLEDGE = 3, /* the ending is recorded: forget the job */
	ASK_LIST = 4,        /* tell of all jobs that are held, then TELL_LISTED */
	ASK_VIEW = 5,        /* struct view_asked and its strings: make it, then TELL_VIEW */
};

enum {
	TELL_HELLO = 101,    /* struct hello, first of all */
	TELL_STARTING = 102, /* only in a list: how the start ends is not known yet */
	TELL_STARTED = 103,  /* struct started, and the descriptors that it names */
	TELL_FAILED = 104,   /* struct failed: the command never ran */
	TELL_EXITED = 105,   /* struct exited */
	TELL_LISTED = 106,
	TELL_REFUSED = 107,  /* struct refused: to a message that makes no sense */
	TELL_VIEW = 108,     /* struct view_told, and which step of it failed, in words */
};

struct header { uint16_t type, descriptors; uint32_t size; uint64_t job; };
struct hello { uint32_t magic, version; int32_t pid, unused; };
/* Then come the groups, 32 bits each, and then the strings: executable, directory, cgroup, root,
 * for each limit a file in the cgroup and what is to be written to it, for each bind its source,
 * its destination, and "ro" or nothing, arguments, variables. */
struct start { uint32_t flags, arguments, variables, groups, uid, gid, limits, view, binds; };
struct to_signal { int32_t number, unused; };
struct started { int32_t pid; uint32_t having; uint64_t started_ns; };
struct failed {
	uint32_t step;
	int32_t error, wait_status;
	uint32_t item; /* which of the start's limits, or binds, it was about; 0: none of them */
	uint64_t ended_ns;
};
struct exited {
	int32_t wait_status, unused;
	uint64_t ended_ns, user_us, system_us, max_rss_kib;
};
struct refused { uint32_t type; int32_t error; };
/* Then come the paths that are hidden, and those that are read-only. */
struct view_asked {
	uint32_t number, flags;
	uint64_t tmp_bytes;
	uint32_t tmp_inodes, hidden, read_only, unused;
};
struct view_told { uint32_t number; int32_t error; };

/* start.flags */
enum {
	MERGE_OUTPUT = 1,
	HAS_INPUT = 2, /* the last descriptor is what the job reads, else /dev/null is */
	SET_USER = 4,  /* uid, gid and groups count; else the job is jobinit's user */
	CONFINED = 8,  /* nothing that it executes gives it rights that its user has not */
	MAKE_CGROUP = 16, /* there is none with that path yet; else the job joins it */
	NO_NETWORK = 32,
	READ_ONLY_FILES = 64, /* all but what each job has of its own, and the binds */
	KNOWN_FLAGS = MERGE_OUTPUT | HAS_INPUT | SET_USER | CONFINED | MAKE_CGROUP | NO_NETWORK
		      | READ_ONLY_FILES,
};
enum { HAS_PIDFD = 1, HAS_STDOUT = 2, HAS_STDERR = 4 }; /* started.having, in this order */

/* Of becoming a job, by the order in which they were invented. In `struct failed` STEP_EXEC
 * without an error says that the child was killed before its exec; the wait status says by what. */
enum step {
	STEP_FORK = 1, STEP_DESCRIPTORS, STEP_CGROUP, STEP_SESSION, STEP_OPEN_FILES_LIMIT,
	STEP_OOM_SCORE, STEP_NAMESPACES, STEP_LIMITS, STEP_PRIVILEGES, STEP_USER, STEP_DIRECTORY,
	STEP_CALL_FILTER, STEP_EXEC, STEP_PID_NAMESPACE, STEP_NETWORK, STEP_VIEW, STEP_PROC,
	STEP_TMP, STEP_TERMINALS, STEP_ROOT, STEP_BIND_SOURCE, STEP_BIND_DESTINATION,
	STEP_READ_ONLY,
};

enum {
	LONGEST_INLINE_START = 64 << 10, /* seqpacket messages end near 200 KB */
	LONGEST_START = 1 << 20,         /* in a memfd; the server allows half of that */
	PACKET_BYTES = 16 << 10,
	PACKET_DESCRIPTORS = 253,        /* SCM_MAX_FD; with one more the kernel says EINVAL */
	LONGEST_OF_ONE_JOB = 2 * sizeof(struct header) + sizeof(struct started)
			     + sizeof(struct exited),
	DESCRIPTORS_OF_ONE_JOB = 3,
};

enum {
	FIRST_CONNECTION_MS = 10 * 1000,
	RETRY_MS = 20,
	EVENTS_OF_ONE_PACKET = 16, /* before the server is told what came of them */
	REAPS_OF_ONE_PACKET = 64,  /* the same */
	FIRST_PROCESS_SECONDS = 10,
	OWN_DESCRIPTORS = 128, /* kept from jobs: for accept, /proc, and a packet's pidfds */
	MOST_CLOSING = 1024,   /* more than a socket's buffer holds */
	CLOSER_MS = 50,
	MOST_GROUPS = 65536,   /* NGROUPS_MAX */
	MOST_VIEWS = 8,
	MOST_BINDS = 32,
	LONGEST_PROBLEM = 256,
	JOBS_OOM_SCORE = 200,  /* above the server's */
	OWN_FAILURE = 125,     /* exit code by hand, as of env(1) and its like */
};

/* ==== State ==== */

enum state {
	STARTING,  /* forked; whether it execs is not known */
	DOOMED,    /* it will never exec: to be told once it is reaped, so that nothing is left */
	RUNNING,   /* the exec is proved */
	EXITED,    /* reaped, until acknowledged */
	UNSTARTED, /* the same for one that never ran */
};

enum { OWES_STARTING = 1, OWES_STARTED = 2, OWES_ENDING = 4 };

struct job {
	struct job *next_by_id, *next_by_pid, *next_owing;
	uint64_t id;
	uint64_t started_ns, ended_ns, user_us, system_us, max_rss_kib;
	pid_t pid;
	pid_t first;              /* of its namespace of process ids; 0: it has none of its own */
	int stdout_fd, stderr_fd; /* dups of what the server reads from */
	int status_fd;            /* while STARTING */
	int group_fd;             /* pidfd of a reaped leader whose group lives on */
	int wait_status, error;
	uint32_t item;            /* as in `struct failed` */
	char newborn_name[PROCESS_NAME_BYTES]; /* see the proof of the exec */
	uint8_t state, step;
	uint8_t owes;             /* what the server is yet to be told */
	bool is_owing;            /* in that queue */
	bool is_followed;         /* the connected server knows it: started or listed it */
	bool is_ending_told;      /* to the connected server */
	bool is_reaped;
	bool has_cgroup;
};

enum { BUCKETS = 4096 };

static struct job *jobs_by_id[BUCKETS], *jobs_by_pid[BUCKETS];
static unsigned job_count;

/* What a confined job sees of the files of this machine: mounts that were made once, of which
 * each job gets a copy. */
struct view {
	int fd;        /* of their namespace; -1: not made */
	int user_fd;   /* of the user namespace that owns it; -1: it is jobinit's own */
	int report_fd; /* of the process that is making them; -1: none is */
	char tmp_options[96];
	bool is_owed;  /* the server is to be told how it went */
	int error;
	char problem[LONGEST_PROBLEM];
};

static struct view views[MOST_VIEWS]; /* number 1 is the first */
static int own_pid_namespace_fd = -1;
static unsigned capability_count; /* that this kernel knows */
static bool has_renounced;        /* what each confined job has to give up: see `renounce_early` */

static struct job *first_owing, **last_owing = &first_owing;
static bool owes_hello, owes_listed, owes_refusal;
static struct refused refusal;
static uint64_t refused_job;

static int epoll_fd, signal_fd, listener_fd = 3, server_fd = -1;
static uint32_t server_interest;
static bool was_connected, must_retry, listener_rests, has_dead;

static struct rlimit original_open_files;
static int descriptor_ceiling;
static char jobs_oom_score[12] = "0";

static int closer_fd = -1; /* a socket to who closes jobs' outputs */

/* What an epoll event is about; anything else is the address of a starting job. */
enum { LISTENER_EVENT = 1, SERVER_EVENT, SIGNAL_EVENT, FIRST_VIEW_EVENT };

/* ==== Small things ==== */

/* The log may be a pipe that nobody reads: better a line less than a jobinit that waits. */
static void __attribute__((format(printf, 1, 2))) say(const char *format, ...)
{
	struct pollfd log = {.fd = STDERR_FILENO, .events = POLLOUT};
	char line[512] = "jobinit: ";
	size_t used = strlen(line);
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(line + used, sizeof line - used - 1, format, arguments);
	va_end(arguments);
	strcat(line, "\n");
	if (poll(&log, 1, 0) == 1 && write(STDERR_FILENO, line, strlen(line)) < 0)
		return;
}

static _Noreturn void die(const char *what)
{
	say("%s: %s", what, strerror(errno));
	exit(OWN_FAILURE);
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static int open_pidfd(pid_t pid)
{
	return syscall(CALL_PIDFD_OPEN, pid, 0);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static uint64_t microseconds(struct timeval time)
{
	return time.tv_sec * 1000000ull + time.tv_usec;
}

static bool watch(int operation, int fd, uint32_t events, uint64_t about)
{
	struct epoll_event event = {.events = events, .data.u64 = about};

	return epoll_ctl(epoll_fd, operation, fd, &event) == 0;
}

/* Explicitly, before the close: a child that has not closed its copy yet would keep the
 * registration alive. */
static void unwatch_and_close(int *fd)
{
	watch(EPOLL_CTL_DEL, *fd, 0, 0);
	close_fd(fd);
}

/* ==== The tables of jobs ==== */

static struct job **id_bucket(uint64_t id)
{
	return &jobs_by_id[id % BUCKETS];
}

static struct job **pid_bucket(pid_t pid)
{
	return &jobs_by_pid[(unsigned)pid % BUCKETS];
}

static struct job *find_by_id(uint64_t id)
{
	struct job *job = *id_bucket(id);

	while (job && job->id != id)
		job = job->next_by_id;
	return job;
}

static struct job *find_by_pid(pid_t pid)
{
	struct job *job = *pid_bucket(pid);

	while (job && job->pid != pid)
		job = job->next_by_pid;
	return job;
}

static void for_each_job(void (*visit)(struct job *))
{
	struct job *job;
	unsigned i;

	for (i = 0; i < BUCKETS; i++)
		for (job = jobs_by_id[i]; job; job = job->next_by_id)
			visit(job);
}

static struct job *add_job(uint64_t id)
{
	struct job *job = calloc(1, sizeof *job);

	if (!job)
		return NULL;
	job->id = id;
	job->stdout_fd = job->stderr_fd = job->status_fd = job->group_fd = -1;
	job->is_reaped = true; /* until there is a process */
	job->is_followed = true;
	job->next_by_id = *id_bucket(id);
	*id_bucket(id) = job;
	job_count++;
	return job;
}

static void set_pid(struct job *job, pid_t pid)
{
	job->pid = pid;
	job->is_reaped = false;
	job->next_by_pid = *pid_bucket(pid);
	*pid_bucket(pid) = job;
}

/* The number may be another process's from now on. */
static void release_pid(struct job *job)
{
	struct job **place = pid_bucket(job->pid);

	while (*place != job)
		place = &(*place)->next_by_pid;
	*place = job->next_by_pid;
	job->is_reaped = true;
}

static void leave_queue(struct job *job)
{
	struct job **place = &first_owing;

	if (!job->is_owing)
		return;
	while (*place != job)
		place = &(*place)->next_owing;
	*place = job->next_owing;
	if (last_owing == &job->next_owing)
		last_owing = place;
	job->is_owing = false;
	job->owes = 0;
}

/* ---- The last close of a job's pipe ----
 *
 * It waits for the pipe's lock, which another job that was handed the pipe can keep as long as it
 * likes. So another process does it, and where that is stuck, or has died, the next one. */

/* What is there, or else at least one where it may wait. Returns how many. */
static unsigned receive_outputs(int queue, int outputs[], bool may_wait)
{
	unsigned count = 0, received;

	for (;;) {
		union { char room[CMSG_SPACE(2 * sizeof(int))]; struct cmsghdr align; } control;
		char byte;
		struct iovec part = {&byte, sizeof byte};
		struct msghdr message = {
			.msg_iov = &part,
			.msg_iovlen = 1,
			.msg_control = control.room,
			.msg_controllen = sizeof control.room,
		};
		struct cmsghdr *header;

		if (count + 2 > MOST_CLOSING
		    || recvmsg(queue, &message, may_wait && !count ? 0 : MSG_DONTWAIT) <= 0)
			return count;
		header = CMSG_FIRSTHDR(&message);
		received = header ? (header->cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;
		if (received)
			memcpy(outputs + count, CMSG_DATA(header), received * sizeof(int));
		count += received;
	}
}

/* Ends once jobinit has; or has another one. */
static _Noreturn void be_closer(int queue)
{
	static const struct timespec pause = {0, CLOSER_MS * 1000 * 1000};
	static int outputs[2][MOST_CLOSING]; /* of this round, and of the one before */
	unsigned counts[2] = {0, 0}, round = 0;
	bool is_idle;

	dup2(queue, STDIN_FILENO);
	syscall(CALL_CLOSE_RANGE, STDERR_FILENO, ~0u, 0);
	for (;;) {
		is_idle = !counts[!round];
		counts[round] = receive_outputs(STDIN_FILENO, outputs[round], is_idle);
		if (is_idle && !counts[round])
			_exit(0);
		/* Who was forked before jobinit gave them away has them too, and closes them: by now,
		 * so that it does not come last. */
		nanosleep(&pause, NULL);
		round = !round;
		if (!counts[round])
			continue;
		while (counts[round])
			close(outputs[round][--counts[round]]);
		/* Sockets that wait in each other's queues, with whatever else a job has put there, outlive
		 * it: the kernel looks for such only as a socket is closed, by whomever. */
		close(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	}
}

static bool start_closer(void)
{
	int ends[2];
	pid_t pid;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
		return false;
	prctl(PR_SET_NAME, "jobinit: closer"); /* which it has from its first moment */
	pid = fork();
	if (pid == 0)
		be_closer(ends[0]);
	prctl(PR_SET_NAME, "jobinit");
	close(ends[0]);
	if (pid < 0) {
		close(ends[1]);
		return false;
	}
	close_fd(&closer_fd);
	closer_fd = ends[1];
	return true;
}

static bool give_to_closer(const int outputs[2])
{
	union { char room[CMSG_SPACE(2 * sizeof(int))]; struct cmsghdr align; } control;
	struct iovec part = {"", 1};
	size_t size = (outputs[1] < 0 ? 1 : 2) * sizeof(int);
	struct msghdr message = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = control.room,
		.msg_controllen = CMSG_SPACE(size),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(size);
	memcpy(CMSG_DATA(header), outputs, size);
	return sendmsg(closer_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == 1;
}

static void close_output(struct job *job)
{
	const int outputs[2] = {job->stdout_fd, job->stderr_fd};

	if (outputs[0] >= 0 && !give_to_closer(outputs)
	    && (errno == EAGAIN || errno == EPIPE || errno == ECONNRESET) && start_closer())
		give_to_closer(outputs);
	close_fd(&job->stdout_fd);
	close_fd(&job->stderr_fd);
}

static void remove_job(struct job *job)
{
	struct job **place = id_bucket(job->id);

	while (*place != job)
		place = &(*place)->next_by_id;
	*place = job->next_by_id;
	leave_queue(job);
	close_output(job);
	close_fd(&job->group_fd);
	free(job);
	job_count--;
}

/* ==== What a job is asked to be ==== */

struct request {
	const char *executable, *directory, *cgroup; /* cgroup: empty for none */
	const char *root;                            /* empty: that of the view */
	char **limits;                               /* file and value of each */
	char **binds;                                /* source, destination and options of each */
	char **arguments, **environment;             /* both end with NULL */
	const gid_t *groups;
	size_t limit_count, bind_count, group_count;
	uid_t uid;
	gid_t gid;
	bool merge_output, has_input, set_user, is_confined, make_cgroup, no_network, is_read_only;
	const struct view *view; /* NULL: the machine's files as they are */
	int input_fd; /* -1: /dev/null */
	void *memory; /* of these arrays; the strings stay where they came in */
};

/* Reads the body of an ASK_START, and trusts nothing in it: each string ends inside, and
 * there are exactly as many as announced. Returns 0 or an errno. */
static int parse_start(char *data, size_t size, struct request *request)
{
	struct start start;
	char *place, *end = data + size;
	char **strings;
	size_t count, first, i;

	if (size <= sizeof start || data[size - 1] != '\0')
		return EBADMSG;
	memcpy(&start, data, sizeof start);
	if (start.flags & ~KNOWN_FLAGS)
		return EOPNOTSUPP;
	/* It would lack what it is to have. */
	if (has_renounced && !(start.flags & CONFINED))
		return EPERM;
	/* It would be mounted on the machine itself. */
	if (start.view && !(start.flags & CONFINED))
		return EBADMSG;
	if (start.view > MOST_VIEWS || (start.view && views[start.view - 1].fd < 0))
		return ENOENT;
	if (start.groups > MOST_GROUPS || start.groups > (size - sizeof start) / sizeof(gid_t))
		return EBADMSG;
	place = data + sizeof start + start.groups * sizeof(gid_t);
	if (start.arguments < 1 || start.arguments > size || start.variables > size
	    || start.limits > size || start.binds > MOST_BINDS)
		return EBADMSG;
	first = 4 + 2 * (size_t)start.limits + 3 * start.binds; /* of the arguments */
	count = first + start.arguments + start.variables;
	strings = calloc(count + 2, sizeof *strings); /* a NULL behind each of the two lists */
	if (!strings)
		return ENOMEM;
	for (i = 0; i < count && place < end; i++) {
		strings[i < first + start.arguments ? i : i + 1] = place;
		place += strlen(place) + 1;
	}
	if (i < count || place != end) {
		free(strings);
		return EBADMSG;
	}
	/* What is arranged is a copy of the view, with the rights of the job's user. */
	if ((*strings[3] || start.binds || start.flags & READ_ONLY_FILES)
	    && !(start.view && start.flags & CONFINED && start.flags & SET_USER)) {
		free(strings);
		return EINVAL;
	}
	*request = (struct request){
		.executable = strings[0],
		.directory = strings[1],
		.cgroup = strings[2],
		.root = strings[3],
		.limits = strings + 4,
		.limit_count = start.limits,
		.binds = strings + 4 + 2 * start.limits,
		.bind_count = start.binds,
		.arguments = strings + first,
		.environment = strings + first + start.arguments + 1,
		.groups = (gid_t *)(data + sizeof start), /* malloc has aligned it */
		.group_count = start.groups,
		.uid = start.uid,
		.gid = start.gid,
		.set_user = start.flags & SET_USER,
		.is_confined = start.flags & CONFINED,
		.make_cgroup = start.flags & MAKE_CGROUP,
		.no_network = start.flags & NO_NETWORK,
		.is_read_only = start.flags & READ_ONLY_FILES,
		.view = start.view ? &views[start.view - 1] : NULL,
		.merge_output = start.flags & MERGE_OUTPUT,
		.has_input = start.flags & HAS_INPUT,
		.input_fd = -1,
		.memory = strings,
	};
	return 0;
}

/* ==== What a confined job may not ask the kernel for ====
 *
 * Most of it takes privileges that the job has not; but it is where the kernel's own mistakes
 * have been found, and a job has no honest use for it. All else stays allowed. */

#if defined(__x86_64__)
enum { OWN_ARCHITECTURE = AUDIT_ARCH_X86_64 };
#elif defined(__aarch64__)
enum { OWN_ARCHITECTURE = AUDIT_ARCH_AARCH64 };
#elif defined(__riscv) && __riscv_xlen == 64
enum { OWN_ARCHITECTURE = AUDIT_ARCH_RISCV64 };
#else
#error "add this architecture, once the table below has been reviewed for it"
#endif

/* Up to here, which is Linux 6.18, all calls have been looked at. Later ones do not exist for a
 * confined job; nor do those of x32, whose numbers are far higher. */
enum { LAST_REVIEWED_CALL = 469 };

enum verdict {
	ALLOW, FORBID, UNKNOWN, UNSUPPORTED, PLAIN_CLONES, KNOWN_SOCKETS, NO_LATE_ENDS, PLAIN_FCNTLS,
	PLAIN_IOCTLS, OWN_CORE, NO_CORES_1, NO_CORES_2, FEW_PAGES, FEW_MOVES, FEW_MESSAGES, FEW_OPERATIONS,
	PLAIN_MODE_1, PLAIN_MODE_2, PLAIN_OPEN_1, PLAIN_OPEN_2, PLAIN_MODE_ELSEWHERE,
	VERDICTS,
};

struct rule { unsigned call; enum verdict verdict; };

/* By number where the headers of the systems that wheels are built on may not have the name. */
static struct rule rules[] = {
	/* Namespaces, and children of the parent: of a job's main process that is jobinit, which would
	 * have to reap them all. clone3 has its flags in memory, where a filter cannot look: C
	 * libraries use clone where it does not exist. */
	{SYS_clone, PLAIN_CLONES}, {SYS_unshare, PLAIN_CLONES}, {435 /* clone3 */, UNKNOWN},
	{SYS_setns, FORBID},
	/* Of other families: those for drivers, and AF_VSOCK, which reaches the machine's own host
	 * from any network namespace. */
	{SYS_socket, KNOWN_SOCKETS}, {SYS_socketpair, KNOWN_SOCKETS},
	/* Whoever comes last to close a TCP socket with SO_LINGER waits, for as long as is said there, or
	 * for ever. Of sockets that a job leaves in each other's queues that is a thread of the kernel,
	 * and what is behind them stays, also of jobs to come: memory that no limit counts any more.
	 * A TCP socket that is closed, and gets no answer, stays until the kernel has tried for 100 s; with
	 * TCP_USER_TIMEOUT it tries for up to 24 days, in which the memory of what is unsent stays, its
	 * port, and its namespace of the network.
	 * Both are answered as if they had been done, as programs give up else that would not miss them. */
	{SYS_setsockopt, NO_LATE_ENDS},
	/* What is mounted */
	{SYS_mount, FORBID}, {SYS_umount2, FORBID}, {SYS_pivot_root, FORBID},
	{SYS_chroot, FORBID}, {428 /* open_tree */, FORBID}, {429 /* move_mount */, FORBID},
	{430 /* fsopen */, FORBID}, {431 /* fsconfig */, FORBID}, {432 /* fsmount */, FORBID},
	{433 /* fspick */, FORBID}, {442 /* mount_setattr */, FORBID},
	{467 /* open_tree_attr */, FORBID}, {SYS_quotactl, FORBID},
	{443 /* quotactl_fd */, FORBID}, {SYS_open_by_handle_at, FORBID},
	{SYS_fanotify_init, FORBID},
	/* Other processes */
	{SYS_ptrace, FORBID}, {SYS_process_vm_readv, FORBID}, {SYS_process_vm_writev, FORBID},
	{SYS_kcmp, FORBID}, {438 /* pidfd_getfd */, FORBID}, {440 /* process_madvise */, FORBID},
	/* The kernel itself */
	{SYS_kexec_load, FORBID}, {SYS_init_module, FORBID}, {SYS_finit_module, FORBID},
	{SYS_delete_module, FORBID}, {SYS_reboot, FORBID}, {SYS_syslog, FORBID},
	{SYS_bpf, FORBID}, {SYS_perf_event_open, FORBID}, {SYS_userfaultfd, FORBID},
	/* Programs do without these where they do not exist. */
	{425 /* io_uring_setup */, UNKNOWN}, {426 /* io_uring_enter */, UNKNOWN},
	{427 /* io_uring_register */, UNKNOWN},
	/* So do they without this; the whole machine has a number of these, fs.aio-max-nr. */
	{SYS_io_setup, UNKNOWN},
	/* Some kernels write to the caller's memory while they hold the lock of all mounts. */
	{457 /* statmount */, UNKNOWN}, {458 /* listmount */, UNKNOWN},
	/* While they wait for a socket that has nothing, they hold the lock of the pipe that they write
	 * to: whoever looks at the other end of a job's output waits as long, and cannot even be
	 * killed. Programs copy by themselves where these say that they do not go together. */
	{SYS_splice, UNSUPPORTED}, {SYS_sendfile, UNSUPPORTED},
	/* Leases: who opens the file waits for the lease's holder: the server for its own code, where its
	 * jobs have its user. And signals for whole groups of processes: who reads a job's output sends
	 * them, for each time that the job has opened it, to each process, and cannot be killed before.
	 * The same for who reads in a folder, such as /usr/lib, where one process has asked to be told of
	 * that for each of its descriptors; inotify, which came after it, has a limit. */
	{SYS_fcntl, PLAIN_FCNTLS},
	/* For some it looks for modules, as for sockets that it does not know; some reach what the
	 * view hides. */
	{SYS_ioctl, PLAIN_IOCTLS},
	/* By PR_SCHED_CORE, whose processes run beside no others on a core keep its sibling idle, which
	 * counts for no limit on CPU. */
	{SYS_prctl, OWN_CORE},
	/* While it writes of a crash, even to nowhere, the kernel looks at all addresses that the job has
	 * reserved, which may be 128 TiB, and up to Linux 6.1 at least no signal ends that. So the limit
	 * on core dumps stays what it is; answered as done, as many programs lower or raise it. */
#ifdef SYS_setrlimit
	{SYS_setrlimit, NO_CORES_1},
#endif
	{SYS_prlimit64, NO_CORES_2},
	/* They go through as much as they are asked about, and no signal ends that: mincore of all
	 * addresses takes minutes, of each thread, in which some kernels let nothing else run on that
	 * processor. A change of semaphores that many wait for, with many operations each, makes the
	 * kernel go through these anew for each that goes on, under one spin lock. */
	{SYS_mincore, FEW_PAGES}, {SYS_move_pages, FEW_MOVES}, {SYS_recvmmsg, FEW_MESSAGES},
	{SYS_semop, FEW_OPERATIONS}, {SYS_semtimedop, FEW_OPERATIONS},
	/* The set-user-ID bit, where jobs have jobinit's user: another user of the machine who ran
	 * such a program, outside of any job, would have that user too. The numbers are those of the
	 * argument that is the mode, from 0 on, or the flags before it; openat2 has both in memory. */
	{SYS_fchmod, PLAIN_MODE_1}, {SYS_fchmodat, PLAIN_MODE_2}, {SYS_mknodat, PLAIN_MODE_2},
	{452 /* fchmodat2 */, PLAIN_MODE_2}, {SYS_openat, PLAIN_OPEN_2},
	{437 /* openat2 */, PLAIN_MODE_ELSEWHERE},
	/* Keys, which no namespace separates */
	{SYS_keyctl, FORBID}, {SYS_add_key, FORBID}, {SYS_request_key, FORBID},
	/* The machine as a whole */
	{SYS_swapon, FORBID}, {SYS_swapoff, FORBID}, {SYS_acct, FORBID},
	{SYS_settimeofday, FORBID}, {SYS_clock_settime, FORBID}, {SYS_sethostname, FORBID},
	{SYS_setdomainname, FORBID}, {SYS_vhangup, FORBID}, {SYS_nfsservctl, FORBID},
#ifdef SYS_kexec_file_load
	{SYS_kexec_file_load, FORBID},
#endif
#ifdef __x86_64__
	{SYS_iopl, FORBID}, {SYS_ioperm, FORBID}, {SYS_uselib, FORBID}, {SYS__sysctl, FORBID},
	{SYS_modify_ldt, FORBID},
	{SYS_chmod, PLAIN_MODE_1}, {SYS_creat, PLAIN_MODE_1}, {SYS_mknod, PLAIN_MODE_1},
	{SYS_open, PLAIN_OPEN_1},
#endif
};

enum {
	NEW_TIME = 0x80, /* CLONE_NEWTIME, which only unshare has: to clone, a signal of no use */
	REFUSED_CLONES = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER
			 | CLONE_NEWPID | CLONE_NEWNET | NEW_TIME | CLONE_PARENT,
	RULES = sizeof rules / sizeof *rules,
	LONGEST_TREE = 2 * RULES, /* two comparisons for each rule at most */
	LONGEST_FILTER = 256, /* as far as a jump reaches */
	FIRST_VERDICT = 256 - VERDICTS, /* jumps that are longer reach no instruction, but mean one */
};

_Static_assert(LONGEST_TREE < FIRST_VERDICT, "jumps in the tree would mean verdicts");

static struct sock_filter filter[LONGEST_FILTER];
static unsigned filter_size;

static unsigned emit(unsigned code, unsigned operand, unsigned if_true, unsigned if_false)
{
	if (filter_size == LONGEST_FILTER) /* its length differs by architecture and user */
		abort();
	filter[filter_size] = (struct sock_filter){code, if_true, if_false, operand};
	return filter_size++;
}

/* Calls from this number on, up to where the next one begins. */
struct interval { unsigned first; enum verdict verdict; };

/* What lies between rules is allowed, and what neighbours with the same verdict make is one. The
 * rules are sorted. Returns how many there are. */
static unsigned make_intervals(struct interval intervals[])
{
	unsigned next = 0, count = 0, i;

	for (i = 0; i < RULES; i++) {
		if (rules[i].call > next || !count)
			intervals[count++] = (struct interval){next, ALLOW};
		if (rules[i].verdict != intervals[count - 1].verdict)
			intervals[count++] = (struct interval){rules[i].call, rules[i].verdict};
		next = rules[i].call + 1;
	}
	intervals[count++] = (struct interval){next, ALLOW};
	intervals[count++] = (struct interval){LAST_REVIEWED_CALL + 1, UNKNOWN};
	return count;
}

/* A tree of comparisons that finds the interval of a number, and jumps to its verdict: for now
 * that stands in the place of the jump. To install a filter the kernel walks it once for each call
 * that there is, so each comparison halves the numbers, as nearly as it can. end: of the last one. */
static void emit_tree(const struct interval intervals[], unsigned count, unsigned end)
{
	unsigned half = intervals[0].first + (end - intervals[0].first) / 2, middle = 1, jump;

	while (middle + 1 < count && intervals[middle + 1].first <= half)
		middle++;
	jump = emit(BPF_JMP | BPF_JGE | BPF_K, intervals[middle].first, 0, 0);
	if (middle == 1)
		filter[jump].jf = FIRST_VERDICT + intervals[0].verdict;
	else
		emit_tree(intervals, middle, intervals[middle].first);
	filter[jump].jt = filter_size - jump - 1;
	if (count - middle == 1)
		filter[jump].jt = FIRST_VERDICT + intervals[middle].verdict;
	else
		emit_tree(intervals + middle, count - middle, end);
}

static int compare_rules(const void *left, const void *right)
{
	const struct rule *a = left, *b = right;

	return (a->call > b->call) - (a->call < b->call);
}

/* For what it does not know of these families, protocols and kinds of socket, the kernel has a
 * program of root's look for a module, outside of any job. Raw ones take rights that no job has. Of
 * netlink there are only routes, which C libraries ask for: the rest tells of all processes and
 * devices of the machine, or has modules looked for by what is sent to it. Those of ping have 65,536
 * numbers in the whole machine: who asks for one that is free when none is goes through all of them
 * for seconds, under one lock, and nothing else runs on that processor. Sockets of unix are of few
 * kinds, all known, and need no rule. */
struct socket_kind { unsigned family, type, protocol; };

static const struct socket_kind socket_kinds[] = {
	{AF_INET, SOCK_STREAM, 0}, {AF_INET, SOCK_STREAM, IPPROTO_TCP},
	{AF_INET, SOCK_STREAM, 262 /* IPPROTO_MPTCP, which Go takes by default */},
	{AF_INET, SOCK_DGRAM, 0}, {AF_INET, SOCK_DGRAM, IPPROTO_UDP},
	{AF_INET6, SOCK_STREAM, 0}, {AF_INET6, SOCK_STREAM, IPPROTO_TCP},
	{AF_INET6, SOCK_STREAM, 262},
	{AF_INET6, SOCK_DGRAM, 0}, {AF_INET6, SOCK_DGRAM, IPPROTO_UDP},
	{AF_NETLINK, SOCK_RAW, NETLINK_ROUTE}, {AF_NETLINK, SOCK_DGRAM, NETLINK_ROUTE},
};

enum { SOCKET_KINDS = sizeof socket_kinds / sizeof *socket_kinds };

/* Not each kernel has IPv6, or MPTCP. It looks for a module now, and not once more for each job that
 * asks. Other errors than these are about what jobinit may, or has. */
static bool is_known(const struct socket_kind *kind)
{
	int fd = socket(kind->family, kind->type, kind->protocol);

	if (fd < 0)
		return errno != EAFNOSUPPORT && errno != EPROTONOSUPPORT && errno != ESOCKTNOSUPPORT;
	close(fd);
	return true;
}

/* Returns where it begins. Of each argument the lower half: the kernel takes them as ints, too. All
 * three become one number, which is one of those that are allowed, or not. */
static unsigned make_socket_filter(void)
{
	enum { FAMILY_PLACE = 20, TYPE_PLACE = 16, TYPE_BITS = 0xf /* the rest are flags */ };
	unsigned families[SOCKET_KINDS], numbers[SOCKET_KINDS], family_count = 0, count = 0, i, first;
	const struct socket_kind *kind;

	for (kind = socket_kinds; kind < socket_kinds + SOCKET_KINDS; kind++) {
		if (!is_known(kind))
			continue;
		if (!family_count || families[family_count - 1] != kind->family)
			families[family_count++] = kind->family;
		numbers[count++] = kind->family << FAMILY_PLACE | kind->type << TYPE_PLACE
				   | kind->protocol;
	}
	first = emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0]), 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, AF_UNIX, 0, 1);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	for (i = 0; i < family_count; i++)
		emit(BPF_JMP | BPF_JEQ | BPF_K, families[i], family_count - i, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EAFNOSUPPORT, 0, 0);
	emit(BPF_ALU | BPF_LSH | BPF_K, FAMILY_PLACE, 0, 0);
	emit(BPF_MISC | BPF_TAX, 0, 0, 0);
	emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1]), 0, 0);
	emit(BPF_ALU | BPF_AND | BPF_K, TYPE_BITS, 0, 0);
	emit(BPF_ALU | BPF_LSH | BPF_K, TYPE_PLACE, 0, 0);
	emit(BPF_ALU | BPF_OR | BPF_X, 0, 0, 0);
	emit(BPF_MISC | BPF_TAX, 0, 0, 0);
	emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2]), 0, 0);
	emit(BPF_JMP | BPF_JGE | BPF_K, 1u << TYPE_PLACE, 1 + count, 0); /* to what refuses */
	emit(BPF_ALU | BPF_OR | BPF_X, 0, 0, 0);
	for (i = 0; i < count; i++)
		emit(BPF_JMP | BPF_JEQ | BPF_K, numbers[i], count - i, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPROTONOSUPPORT, 0, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	return first;
}

/* Returns where it begins. */
static unsigned make_socket_end_filter(void)
{
	unsigned first;

	first = emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1]), 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, SOL_SOCKET, 0, 2);
	emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2]), 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, SO_LINGER, 4, 3);
	emit(BPF_JMP | BPF_JEQ | BPF_K, IPPROTO_TCP, 0, 2);
	emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2]), 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, TCP_USER_TIMEOUT, 1, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 0, 0, 0);
	return first;
}

/* Returns where it begins. */
static unsigned make_fcntl_filter(void)
{
	unsigned first;

	first = emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1]), 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, F_NOTIFY, 6, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, F_SETLEASE, 5, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, SET_DELEGATION, 4, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, F_SETOWN_EX, 3, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, F_SETOWN, 0, 3);
	emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2]), 0, 0);
	emit(BPF_JMP | BPF_JSET | BPF_K, 1u << 31 /* negative: a group */, 0, 1);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM, 0, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	return first;
}

/* Returns where it begins. */
static unsigned make_ioctl_filter(void)
{
	static const unsigned refused[] = {
		TIOCSETD, SIOCGIFBR, SIOCSIFBR, SIOCBRADDBR, SIOCBRDELBR, SIOCBRADDIF, SIOCBRDELIF,
		SIOCGIFVLAN, SIOCSIFVLAN,
		/* As F_SETOWN: who is signalled about a socket. */
		FIOSETOWN, SIOCSPGRP,
		/* btrfs' snapshot of a subvolume of the job's user has all that is hidden in there; the
		 * third removes one by its number: SNAP_CREATE, SNAP_CREATE_V2, SNAP_DESTROY_V2. */
		0x50009401, 0x50009417, 0x5000943f,
		/* bcachefs' takes any subvolume, whose ever: SUBVOLUME_CREATE, and its second version. */
		0x4020bc10, 0x4030bc1d,
		/* The key of an encrypted folder is its user's, in any user namespace: whoever takes it away
		 * closes the folder for all. FS_IOC_ADD_ENCRYPTION_KEY, FS_IOC_REMOVE_ENCRYPTION_KEY. */
		0xc0506617, 0xc0406618,
	};
	enum { COUNT = sizeof refused / sizeof *refused };
	unsigned i, first;

	first = emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1]), 0, 0);
	for (i = 0; i < COUNT; i++)
		emit(BPF_JMP | BPF_JEQ | BPF_K, refused[i], COUNT - i, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM, 0, 0);
	return first;
}

/* Returns where it begins. */
static unsigned make_prctl_filter(void)
{
	unsigned first = emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0]), 0, 0);

	emit(BPF_JMP | BPF_JEQ | BPF_K, 62 /* PR_SCHED_CORE */, 0, 1);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM, 0, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	return first;
}

/* Returns where it begins. limit: the number of the argument that says where the new limit is. The one
 * before it says of what it is, and the one after it, for prlimit, where the old one is to be told:
 * either place may be NULL. A filter cannot tell the old one, so that is refused with a new one. */
static unsigned make_core_filter(unsigned limit)
{
	const unsigned size = sizeof(((struct seccomp_data *)0)->args[0]), half = size / 2;
	const unsigned place = offsetof(struct seccomp_data, args) + limit * size;
	const unsigned tells_old = limit == 2 ? 4 : 0; /* instructions */
	unsigned first;

	first = emit(BPF_LD | BPF_W | BPF_ABS, place - size, 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, RLIMIT_CORE, 0, 6 + tells_old);
	emit(BPF_LD | BPF_W | BPF_ABS, place, 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 2);
	emit(BPF_LD | BPF_W | BPF_ABS, place + half, 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, 0, 2 + tells_old, 0);
	if (tells_old) {
		emit(BPF_LD | BPF_W | BPF_ABS, place + size, 0, 0);
		emit(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 3);
		emit(BPF_LD | BPF_W | BPF_ABS, place + size + half, 0, 0);
		emit(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1);
	}
	emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 0, 0, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM, 0, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	return first;
}

/* Returns where it begins. argument: the number of the one that must not be larger. */
static unsigned make_count_filter(unsigned argument, unsigned most)
{
	const unsigned size = sizeof(((struct seccomp_data *)0)->args[0]), half = size / 2;
	const unsigned place = offsetof(struct seccomp_data, args) + argument * size;
	unsigned first;

	first = emit(BPF_LD | BPF_W | BPF_ABS, place + half, 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 3);
	emit(BPF_LD | BPF_W | BPF_ABS, place, 0, 0);
	emit(BPF_JMP | BPF_JGT | BPF_K, most, 1, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | E2BIG, 0, 0);
	return first;
}

/* Returns where it begins. flags: the number of the argument that says whether there is a mode; 0:
 * there always is. */
static unsigned make_mode_filter(unsigned mode, unsigned flags)
{
	const unsigned size = sizeof(((struct seccomp_data *)0)->args[0]);
	const unsigned place = offsetof(struct seccomp_data, args), first = filter_size;

	if (flags) {
		emit(BPF_LD | BPF_W | BPF_ABS, place + flags * size, 0, 0);
		emit(BPF_JMP | BPF_JSET | BPF_K, O_CREAT | (O_TMPFILE & ~O_DIRECTORY), 0, 2);
	}
	emit(BPF_LD | BPF_W | BPF_ABS, place + mode * size, 0, 0);
	emit(BPF_JMP | BPF_JSET | BPF_K, S_ISUID, 1, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM, 0, 0);
	return first;
}

static unsigned char jump_to(unsigned char jump, const unsigned targets[], unsigned from)
{
	return jump < FIRST_VERDICT ? jump : targets[jump - FIRST_VERDICT] - from - 1;
}

/* The verdicts come last, as jumps go forwards only. */
static void make_filter(void)
{
	struct interval intervals[2 * RULES + 2];
	unsigned targets[VERDICTS], tree, tree_end, i;

	qsort(rules, RULES, sizeof *rules, compare_rules);
	emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch), 0, 0);
	emit(BPF_JMP | BPF_JEQ | BPF_K, OWN_ARCHITECTURE, 1, 0);
	emit(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS, 0, 0);
	tree = emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0, 0) + 1;
	emit_tree(intervals, make_intervals(intervals), LAST_REVIEWED_CALL + 1);
	tree_end = filter_size;
	targets[UNKNOWN] = emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS, 0, 0);
	/* The first argument's lower half; all of these architectures are little-endian. */
	targets[PLAIN_CLONES] =
		emit(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0]), 0, 0);
	emit(BPF_JMP | BPF_JSET | BPF_K, REFUSED_CLONES, 1, 0);
	targets[ALLOW] = emit(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	targets[FORBID] = emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM, 0, 0);
	targets[UNSUPPORTED] = emit(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EINVAL, 0, 0);
	targets[KNOWN_SOCKETS] = make_socket_filter();
	targets[NO_LATE_ENDS] = make_socket_end_filter();
	targets[PLAIN_FCNTLS] = make_fcntl_filter();
	targets[PLAIN_IOCTLS] = make_ioctl_filter();
	targets[OWN_CORE] = make_prctl_filter();
	targets[NO_CORES_1] = make_core_filter(1);
	targets[NO_CORES_2] = make_core_filter(2);
	targets[FEW_PAGES] = make_count_filter(1, 1 << 30 /* bytes */);
	targets[FEW_MOVES] = make_count_filter(1, 1 << 16);
	targets[FEW_MESSAGES] = make_count_filter(2, 1024 /* as the kernel's own of sendmmsg */);
	targets[FEW_OPERATIONS] = make_count_filter(2, 8);
	for (i = PLAIN_MODE_1; i <= PLAIN_MODE_ELSEWHERE; i++)
		targets[i] = targets[ALLOW];
	if (geteuid() != 0) {
		targets[PLAIN_MODE_1] = make_mode_filter(1, 0);
		targets[PLAIN_MODE_2] = make_mode_filter(2, 0);
		targets[PLAIN_OPEN_1] = make_mode_filter(2, 1);
		targets[PLAIN_OPEN_2] = make_mode_filter(3, 2);
		targets[PLAIN_MODE_ELSEWHERE] = targets[UNKNOWN];
	}
	for (i = tree; i < tree_end; i++) {
		filter[i].jt = jump_to(filter[i].jt, targets, i);
		filter[i].jf = jump_to(filter[i].jf, targets, i);
	}
}

/* ==== Becoming a job: in the forked child ==== */

/* The child's ends. input -1: /dev/null. */
struct ends { int input, output, errors, status; };

struct step_failure { uint32_t step; int32_t error; uint32_t item; };

enum { REPORT_FD = 3, VIEW_FD = 4 };

static _Noreturn void fail_with(int report_fd, struct step_failure failure)
{
	/* A pipe takes so little at once. Were it to fail, the end would still be seen as one
	 * before the exec. */
	ssize_t written = write(report_fd, &failure, sizeof failure);

	(void)written;
	_exit(OWN_FAILURE);
}

static _Noreturn void fail_step(int report_fd, enum step step)
{
	fail_with(report_fd, (struct step_failure){step, errno, 0});
}

static void must(bool done, enum step step)
{
	if (!done)
		fail_step(REPORT_FD, step);
}

static bool write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC), error = 0;

	if (fd < 0)
		return false;
	if (write(fd, text, strlen(text)) < 0)
		error = errno;
	close(fd);
	errno = error;
	return !error;
}

/* 0 to 2 become the job's, 3 the pipe to report on, 4 its view; all else is closed for good: a
 * child that hangs below must not hold other jobs' pipes, or the server's connection. */
static void take_descriptors(const struct ends *ends, const struct view *view)
{
	int input = ends->input < 0 ? open("/dev/null", O_RDONLY | O_CLOEXEC) : ends->input;

	/* dup2 also takes away O_CLOEXEC, except from a descriptor that is in its place. */
	if (input < 0 || dup2(input, STDIN_FILENO) < 0
	    || dup2(ends->output, STDOUT_FILENO) < 0 || dup2(ends->errors, STDERR_FILENO) < 0)
		fail_step(ends->status, STEP_DESCRIPTORS);
	if (ends->status != REPORT_FD && dup3(ends->status, REPORT_FD, O_CLOEXEC) < 0)
		fail_step(ends->status, STEP_DESCRIPTORS);
	if (view && view->fd != VIEW_FD && dup3(view->fd, VIEW_FD, O_CLOEXEC) < 0)
		fail_step(REPORT_FD, STEP_DESCRIPTORS);
	must(syscall(CALL_CLOSE_RANGE, view ? VIEW_FD + 1 : VIEW_FD, ~0u, 0) == 0,
	     STEP_DESCRIPTORS);
}

static bool write_cgroup(const char *directory, const char *file, const char *text)
{
	char path[4096];

	if (snprintf(path, sizeof path, "%s/%s", directory, file) >= (int)sizeof path) {
		errno = ENAMETOOLONG;
		return false;
	}
	return write_file(path, text);
}

/* Here and not in the server, which would need a thread for calls that may block. Where it
 * fails it is no more. */
static void make_cgroup(const struct request *request)
{
	char **limit = request->limits;
	struct step_failure failure;
	uint32_t i;

	must(mkdir(request->cgroup, 0700) == 0, STEP_CGROUP);
	for (i = 1; i <= request->limit_count; i++, limit += 2) {
		if (write_cgroup(request->cgroup, limit[0], limit[1]))
			continue;
		failure = (struct step_failure){STEP_CGROUP, errno, i};
		rmdir(request->cgroup);
		fail_with(REPORT_FD, failure);
	}
}

static void join_cgroup(const struct request *request)
{
	struct pollfd report = {.fd = REPORT_FD};

	must(write_cgroup(request->cgroup, "cgroup.procs", "0"), STEP_CGROUP); /* whoever writes it */
	/* Where jobinit has died, the server may have looked into this cgroup before it was made.
	 * Who comes to here before is found in it. */
	if (poll(&report, 1, 0) == 1 && report.revents & POLLERR)
		_exit(OWN_FAILURE);
}

/* What jobinit itself ignores, and what would stay so through the exec. It blocks some, too. */
static const int ignored_signals[] = {
	SIGPIPE, /* the log's reader may go */
	SIGHUP, SIGINT, /* of a terminal, to whom it may concern: the jobs say how long it is needed */
};

static void reset_signals(void)
{
	sigset_t none;
	size_t i;

	for (i = 0; i < sizeof ignored_signals / sizeof *ignored_signals; i++)
		signal(ignored_signals[i], SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

static bool set_oom_score(void)
{
	bool done;

	/* The file belongs to root while the process is not dumpable. Nobody gains by that
	 * moment: no descriptor of jobinit's is left here. */
	prctl(PR_SET_DUMPABLE, 1);
	done = write_file("/proc/self/oom_score_adj", jobs_oom_score);
	prctl(PR_SET_DUMPABLE, 0);
	/* Raising is free to all. Lowering one that was inherited is not: such a job stays a
	 * likelier victim than it need be, which harms nobody else. */
	return done || errno == EACCES;
}

/* Of what goes by number or by name among processes that have nothing to do with each other:
 * System V's and POSIX' message queues, shared memory and semaphores, which also end with the
 * job; the machine's name; and where in the tree of cgroups it is. With a view also a copy of
 * its mounts; all at once, as that is cheaper. */
static void enter_namespaces(const struct request *request)
{
	int kinds = CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP;

	if (request->view) {
		kinds |= CLONE_NEWNS;
		must(setns(VIEW_FD, CLONE_NEWNS) == 0, STEP_VIEW);
		close(VIEW_FD);
	}
	must(unshare(kinds) == 0, STEP_NAMESPACES);
}

/* One of its own, in which nothing but the loopback interface is. */
static bool leave_network(void)
{
	struct ifreq loopback = {.ifr_name = "lo", .ifr_flags = IFF_UP};
	bool done;
	int fd;

	if (unshare(CLONE_NEWNET) < 0)
		return false;
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return false; /* with its errno */
	done = ioctl(fd, SIOCSIFFLAGS, &loopback) == 0;
	close(fd);
	return done;
}

/* What view makes, and what is bound over it for one job. */
#define HIDDEN_FOLDER "/dev/.hidden/folder"
#define HIDDEN_FILE "/dev/.hidden/file"

/* A part of this machine's that is not there does no harm. */
static bool is_absent(void)
{
	return errno == ENOENT || errno == ENOTDIR;
}

static bool bind_mount(const char *from, const char *to)
{
	return mount(from, to, NULL, MS_BIND, NULL) == 0;
}

/* Shows the job's own processes only, and of these not the first: that is in the machine's mounts
 * and network, and the kernel shows both to whoever sees it. All of it is read-only, as most files
 * in it are the machine's. Those are hidden that tell all users what is no job's business, the
 * machine's memory, and its file locks: while somebody goes through these, a job's many among them,
 * nobody else takes or releases one. */
static bool mount_proc(void)
{
	static const char *const hidden[] = {
		"/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/locks", NULL,
	};
	const char *const *path;

	/* ptraceable: also from who is in root's group (Linux 5.8 and later). */
	if (mount("proc", "/proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "hidepid=4") < 0)
		return false;
	for (path = hidden; *path; path++)
		if (!bind_mount(HIDDEN_FILE, *path) && !is_absent())
			return false;
	return true;
}

/* One file system under three names: it is the mounting of each that costs. What is in it is
 * charged to the job, and gone with it. */
static bool mount_tmp(const char *options)
{
	return mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options) == 0
	       && (bind_mount("/tmp", "/var/tmp") || is_absent()) && bind_mount("/tmp", "/dev/shm");
}

/* Its own: who opens a terminal of another job's user could read what is typed there. Some only,
 * as all jobs together may have no more than kernel.pty.max. */
static bool mount_terminals(void)
{
	return mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
		     "newinstance,ptmxmode=0666,mode=0620,max=64") == 0;
}

static void complete_view(const struct request *request)
{
	must(mount_proc(), STEP_PROC);
	must(mount_tmp(request->view->tmp_options), STEP_TMP);
	must(mount_terminals(), STEP_TERMINALS);
}

static bool change_attributes(int fd, const char *path, unsigned flags, uint64_t set, uint64_t clear)
{
	struct { uint64_t set, clear, propagation, user_namespace; } change = {set, clear, 0, 0};

	return syscall(CALL_MOUNT_SETATTR, fd, path, flags, &change, sizeof change) == 0;
}

static bool set_attributes(int fd, const char *path, unsigned flags, uint64_t attributes)
{
	return change_attributes(fd, path, flags, attributes, 0);
}

/* ---- What one job asks for: a root of its own, binds, nothing that it can write to ----
 *
 * All of it is taken from the job's own view, so that no way leads to what that hides; by
 * descriptors, so that what was looked up is what is mounted; through no symbolic link, which
 * somebody could change meanwhile; and with the file rights of the job's user, so that it reaches
 * nothing that it could not reach anyhow. Mounting takes another right, which these leave. */

static void take_file_rights(uid_t uid, gid_t gid)
{
	setfsgid(gid);
	setfsuid(uid);
}

/* path: below that folder, also where it begins with a slash or has `..`. */
static int open_in(int folder, const char *path, int flags)
{
	struct { uint64_t flags, mode, resolve; } how = {
		.flags = O_PATH | O_CLOEXEC | flags,
		.resolve = NO_LINKS | NO_MAGIC_LINKS | IN_ROOT,
	};

	return syscall(CALL_OPENAT2, folder, path, &how, sizeof how);
}

/* All that is mounted there, as mounts that belong nowhere yet; closes fd. */
static int copy_tree(int fd, uint64_t attributes)
{
	int tree = -1;

	if (fd >= 0)
		tree = syscall(CALL_OPEN_TREE, fd, "",
			       CLONED_TREE | WHOLE_TREE | AT_EMPTY_PATH | O_CLOEXEC);
	close_fd(&fd);
	if (tree >= 0 && !set_attributes(tree, "", WHOLE_TREE | AT_EMPTY_PATH, attributes))
		return -1;
	return tree;
}

static bool put_tree(int tree, int place)
{
	return syscall(CALL_MOVE_MOUNT, tree, "", place, "", FROM_EMPTY_PATH | TO_EMPTY_PATH) == 0;
}

static void must_of(bool done, enum step step, size_t place)
{
	if (!done)
		fail_with(REPORT_FD, (struct step_failure){step, errno, place + 1});
}

static void copy_sources(const struct request *request, int trees[])
{
	int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	char **bind = request->binds;
	uint64_t attributes;
	size_t i;

	for (i = 0; i < request->bind_count; i++, bind += 3) {
		attributes = NO_SUID | NO_DEVICES | (*bind[2] ? READ_ONLY : 0);
		trees[i] = copy_tree(open_in(root, bind[0], 0), attributes);
		must_of(trees[i] >= 0, STEP_BIND_SOURCE, i);
	}
	close_fd(&root);
}

/* Becomes /. What the job has of its own comes with it, to where there are folders for it. */
static bool change_root(const struct request *request)
{
	static const char *const own[] = {"/proc", "/dev", "/tmp", "/var/tmp"};
	enum { COUNT = sizeof own / sizeof *own };
	uint64_t attributes = NO_SUID | NO_DEVICES | (request->is_read_only ? READ_ONLY : 0);
	int old = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC), trees[COUNT], root, place, i;

	root = copy_tree(open_in(old, request->root, O_DIRECTORY), attributes);
	if (root < 0)
		return false;
	for (i = 0; i < COUNT; i++)
		trees[i] = copy_tree(open_in(old, own[i], O_DIRECTORY), 0);
	/* It has to be somewhere, and this one is done with. */
	place = open_in(old, "/proc", O_DIRECTORY);
	if (place < 0 || !put_tree(root, place))
		return false;
	close_fd(&place);
	for (i = 0; i < COUNT; i++) {
		place = open_in(root, own[i], O_DIRECTORY);
		if (place < 0 ? !is_absent() : trees[i] >= 0 && !put_tree(trees[i], place))
			return false;
		close_fd(&place);
		close_fd(&trees[i]);
	}
	/* The old one is then mounted over the new one, and goes. */
	return fchdir(root) == 0 && syscall(SYS_pivot_root, ".", ".") == 0
	       && umount2(".", MNT_DETACH) == 0 && chdir("/") == 0 && close(root) == 0
	       && close(old) == 0;
}

static bool make_files_read_only(void)
{
	static const char *const own[] = {"/tmp", "/var/tmp", "/dev/shm", "/dev/pts", NULL};
	const char *const *path;

	if (!set_attributes(AT_FDCWD, "/", WHOLE_TREE, READ_ONLY))
		return false;
	for (path = own; *path; path++)
		if (!change_attributes(AT_FDCWD, *path, 0, 0, READ_ONLY) && !is_absent())
			return false;
	return true;
}

/* In the job's /tmp, which is its own and empty: anywhere else it would be made for others too. */
static bool make_mount_point(int tmp, const char *path, int tree)
{
	char folder[PATH_MAX];
	const char *slash = path;
	struct stat info;

	while ((slash = strchr(slash + 1, '/'))) {
		snprintf(folder, sizeof folder, "%.*s", (int)(slash - path), path);
		if (mkdirat(tmp, folder, 0755) < 0 && errno != EEXIST)
			return false;
	}
	if (fstat(tree, &info) < 0)
		return false;
	if (S_ISDIR(info.st_mode))
		return mkdirat(tmp, path, 0755) == 0 || errno == EEXIST;
	return mknodat(tmp, path, S_IFREG | 0644, 0) == 0 || errno == EEXIST;
}

/* own_tmp: its device: who can write to the root's folder may take ours off it. */
static void make_mount_points(const struct request *request, const int trees[], dev_t own_tmp)
{
	static const char tmp_path[] = "/tmp/";
	int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC), tmp = open_in(root, "/tmp", O_DIRECTORY);
	char **bind = request->binds;
	struct stat info;
	size_t i;

	if (tmp >= 0 && fstat(tmp, &info) == 0 && info.st_dev == own_tmp)
		for (i = 0; i < request->bind_count; i++, bind += 3)
			if (!strncmp(bind[1], tmp_path, strlen(tmp_path)))
				must_of(make_mount_point(tmp, bind[1] + strlen(tmp_path), trees[i]),
					STEP_BIND_DESTINATION, i);
	close_fd(&tmp);
	close_fd(&root);
}

static void put_binds(const struct request *request, int trees[])
{
	int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC), place;
	char **bind = request->binds;
	size_t i;

	for (i = 0; i < request->bind_count; i++, bind += 3) {
		place = open_in(root, bind[1], 0);
		must_of(place >= 0 && put_tree(trees[i], place), STEP_BIND_DESTINATION, i);
		close_fd(&place);
		close_fd(&trees[i]);
	}
	close_fd(&root);
}

/* Before anything is read-only, lest the binds be so too; all mount points before any bind, lest
 * they be made in what is bound. */
static void arrange_files(const struct request *request)
{
	int trees[MOST_BINDS];
	struct stat tmp;

	must(setgroups(request->group_count, request->groups) == 0, STEP_USER);
	take_file_rights(request->uid, request->gid);
	must(stat("/tmp", &tmp) == 0, STEP_TMP);
	copy_sources(request, trees);
	if (*request->root)
		must(change_root(request), STEP_ROOT);
	else if (request->is_read_only)
		must(make_files_read_only(), STEP_READ_ONLY);
	if (request->bind_count) {
		make_mount_points(request, trees, tmp.st_dev);
		put_binds(request, trees);
	}
	take_file_rights(geteuid(), getegid());
}

/* Of what the kernel counts for a user: jobs that have jobinit's own leave it a quarter of what it
 * may have itself, to start others and to pass on their descriptors. */
static bool leave_room(int resource, rlim_t own)
{
	struct rlimit limit;

	if (own == RLIM_INFINITY)
		return true;
	getrlimit(resource, &limit);
	if (limit.rlim_max > own - own / 4)
		limit.rlim_max = own - own / 4;
	if (limit.rlim_cur > limit.rlim_max)
		limit.rlim_cur = limit.rlim_max;
	return setrlimit(resource, &limit) == 0;
}

/* Nothing of a job's that crashes is written anywhere, and it cannot come before others by a
 * real-time priority. What of its limits is higher than usual was given to the server. */
static bool lower_limits(bool has_own_user)
{
	/* Less than any dump; and of 0 a program that core_pattern names would be told. No job can
	 * change that: see the rules above. Who may not raise one that is 0 leaves it. */
	static const struct rlimit none, least_core = {1, 1};
	struct rlimit processes;

	getrlimit(RLIMIT_NPROC, &processes);
	return (setrlimit(RLIMIT_CORE, &least_core) == 0 || errno == EPERM)
	       && setrlimit(RLIMIT_RTPRIO, &none) == 0
	       && setrlimit(RLIMIT_NICE, &none) == 0
	       && (has_own_user
		   || (leave_room(RLIMIT_NOFILE, original_open_files.rlim_max)
		       && leave_room(RLIMIT_NPROC, processes.rlim_cur)));
}

/* Not by a setuid program, not by a file's capabilities, and not by root's either. */
static bool renounce_privileges(void)
{
	unsigned capability;

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return false;
	/* Who has no capabilities cannot drop them here, and with the bit above cannot gain them
	 * either. */
	for (capability = 0; capability < capability_count; capability++)
		if (prctl(PR_CAPBSET_DROP, capability) < 0 && (errno != EPERM || geteuid() == 0))
			return false;
	return true;
}

/* In a user namespace that a server made which is not root, a job has all capabilities, and
 * would keep them up to its exec. */
static bool drop_capabilities(void)
{
	static const struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3];
	struct __user_cap_header_struct version_3 = {.version = _LINUX_CAPABILITY_VERSION_3};

	return syscall(SYS_capset, &version_3, none) == 0;
}

/* The groups first, as only root may change them. With the uid go all capabilities. */
static bool become_user(const struct request *request)
{
	/* So that the job may open /dev/stdout and the like again. */
	return fchown(STDOUT_FILENO, request->uid, request->gid) == 0
	       && fchown(STDERR_FILENO, request->uid, request->gid) == 0
	       && setgroups(request->group_count, request->groups) == 0
	       && setresgid(request->gid, request->gid, request->gid) == 0
	       && setresuid(request->uid, request->uid, request->uid) == 0;
}

static bool install_filter(void)
{
	struct sock_fprog program = {filter_size, filter};

	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

/* The steps, in an order that matters. Where one fails, its number and errno travel back. */
static _Noreturn void become_job(const struct request *request, const struct ends *ends)
{
	/* Before anything that may hang. */
	take_descriptors(ends, request->view);
	/* Early, so that what follows is charged to the job, and killed with it. */
	if (request->make_cgroup)
		make_cgroup(request);
	if (*request->cgroup)
		join_cgroup(request);
	/* So that one signal reaches all of it, and that of no terminal does. */
	must(setsid() >= 0, STEP_SESSION);
	reset_signals();
	umask(022);
	must(setrlimit(RLIMIT_NOFILE, &original_open_files) == 0, STEP_OPEN_FILES_LIMIT);
	must(set_oom_score(), STEP_OOM_SCORE);
	/* After the cgroup, which becomes the root of what the job sees. */
	if (request->is_confined)
		enter_namespaces(request);
	if (request->no_network)
		must(leave_network(), STEP_NETWORK);
	/* After the namespaces, whose own is mounted; as long as there is the right to. */
	if (request->view)
		complete_view(request);
	/* Of what is there then, as the job sees it. */
	if (request->view && (*request->root || request->bind_count || request->is_read_only))
		arrange_files(request);
	if (request->is_confined)
		must(lower_limits(request->set_user), STEP_LIMITS);
	/* Before the uid changes: afterwards nothing can be dropped. */
	if (request->is_confined && !has_renounced)
		must(renounce_privileges(), STEP_PRIVILEGES);
	/* Before the uid changes, too: the machine's memory for compiled filters is limited
	 * (net.core.bpf_jit_limit), and jobs can use up what of it is for those without rights. */
	if (request->is_confined)
		must(install_filter(), STEP_CALL_FILTER);
	/* What follows makes no call that it refuses. */
	if (request->set_user)
		must(become_user(request), STEP_USER);
	else if (request->is_confined)
		must(drop_capabilities(), STEP_PRIVILEGES);
	/* Last, as with the rights and the view of the job. Both may hang, for long. */
	must(chdir(request->directory) == 0, STEP_DIRECTORY);
	execve(request->executable, request->arguments, request->environment);
	fail_step(REPORT_FD, STEP_EXEC);
}

/* ==== The proof of the exec ====
 *
 * The status pipe brings the step that failed, or ends. It ends at the exec; but also when the
 * child is killed before, and only /proc can tell these apart, until the child is reaped: who
 * does not exit has executed. Who does, and has the name that it was born with, never has: an
 * exec gives another one, and no program can know that. (PF_FORKNOEXEC would not do: each new
 * thread has it, and one that executes has the process' own number before it loses it.) */

enum proof { NOT_YET, PROVED, DISPROVED };

/* For all that is forked from now on, until `prctl` gives jobinit its own name again. */
static void name_newborn(char name[PROCESS_NAME_BYTES])
{
	uint64_t number;

	if (getrandom(&number, sizeof number, GRND_NONBLOCK) != sizeof number)
		number = now_ns(); /* the machine has just started */
	snprintf(name, PROCESS_NAME_BYTES, "%015llx", (unsigned long long)number >> 4);
	prctl(PR_SET_NAME, name);
}

/* Of one whose status pipe has ended, or that is dead. Returns 1 or 0, or -1 where /proc does not
 * tell. */
static int has_execed(pid_t pid, const char *newborn_name)
{
	char path[32], text[1024], *name, *place;
	unsigned flags;
	ssize_t size;
	char state;
	int fd;

	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	size = read(fd, text, sizeof text - 1);
	close(fd);
	text[size > 0 ? size : 0] = '\0';
	name = strchr(text, '(');
	place = strrchr(text, ')'); /* the name before it may hold anything */
	/* proc_pid_stat(5): state ppid pgrp session tty_nr tpgid flags */
	if (!name || !place
	    || sscanf(place + 1, " %c %*d %*d %*d %*d %*d %u", &state, &flags) != 2) {
		errno = EBADMSG;
		return -1;
	}
	*place = '\0';
	return !(state == 'Z' || state == 'X' || flags & IS_EXITING) || strcmp(name + 1, newborn_name);
}

/* is_dead: it is not reaped yet, and writes nothing any more. That the pipe has not ended says
 * nothing then: the first process of some namespace, which copies and closes jobinit's
 * descriptors, has its other end for a moment. */
static enum proof prove_exec(int status_fd, pid_t pid, const char *newborn_name, bool is_dead,
			     struct step_failure *failure)
{
	ssize_t size = read(status_fd, failure, sizeof *failure);
	int answer;

	if (size < 0 && (errno == EAGAIN || errno == EINTR) && !is_dead)
		return NOT_YET;
	if (size == sizeof *failure)
		return DISPROVED;
	answer = has_execed(pid, newborn_name);
	if (answer > 0)
		return PROVED;
	*failure = (struct step_failure){STEP_EXEC, answer < 0 ? errno : 0, 0};
	if (answer < 0)
		kill(pid, SIGKILL); /* what cannot be proved to run must not run */
	return DISPROVED;
}

/* ==== Views: what confined jobs see of the machine's files ====
 *
 * All that is the same for every job is mounted once, by a process that then ends; a descriptor
 * keeps its namespace. Each job gets a copy, and mounts there what is its own alone.
 *
 *   /proc, /tmp, /var/tmp, /dev/shm, /dev/pts   each job's own: `complete_view`
 *   /dev       nothing but the harmless devices
 *   /run       empty, so that no daemon's socket is in reach, but for the resolv.conf
 *   /sys       read-only, and nothing mounted in it
 *   cgroups    nowhere: they show nothing of a job's own, and who lists a folder for long keeps the
 *              server, and the machine, from making cgroups in it
 *   the rest   is the machine's, less what is hidden; set-user-ID and devices have no effect
 */

struct view_request {
	struct view_asked asked;
	const char *hidden, *read_only; /* strings, one behind the other */
};

struct view_report { int32_t error; char problem[LONGEST_PROBLEM]; };

/* All that exists for a moment only, in the process that makes one. */
struct mount_line { char *point, *filesystem; };

static struct mount_line *mount_lines;
static size_t mount_line_count;
static bool is_in_user_namespace;

static const char *after(const char *string)
{
	return string + strlen(string) + 1;
}

/* Returns 0 or an errno. */
static int parse_view(const char *data, size_t size, struct view_request *request)
{
	struct view_asked *asked = &request->asked;
	const char *place, *end = data + size;
	uint64_t count = 0;

	memcpy(asked, data, sizeof *asked);
	if (asked->flags)
		return EOPNOTSUPP;
	if (asked->number < 1 || asked->number > MOST_VIEWS)
		return EINVAL;
	request->hidden = request->read_only = data + sizeof *asked;
	for (place = request->hidden; place < end; place = after(place)) {
		if (!memchr(place, '\0', end - place))
			return EBADMSG;
		if (++count == asked->hidden)
			request->read_only = after(place);
	}
	return count == (uint64_t)asked->hidden + asked->read_only ? 0 : EBADMSG;
}

enum { VIEW_NAMESPACES = 2 }; /* of mounts, and of users where that is not jobinit's */

static _Noreturn void report_view(int error, const char *what, const char *path,
				  const int fds[VIEW_NAMESPACES])
{
	struct view_report report = {.error = error};
	size_t size = (fds && fds[1] >= 0 ? 2 : 1) * sizeof *fds;
	union {
		char room[CMSG_SPACE(VIEW_NAMESPACES * sizeof *fds)];
		struct cmsghdr align;
	} control;
	struct iovec part = {&report, sizeof report};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
	ssize_t sent;

	snprintf(report.problem, sizeof report.problem, "%s %s", what, path);
	if (fds) {
		control.align.cmsg_level = SOL_SOCKET;
		control.align.cmsg_type = SCM_RIGHTS;
		control.align.cmsg_len = CMSG_LEN(size);
		memcpy(CMSG_DATA(&control.align), fds, size);
		message.msg_control = control.room;
		message.msg_controllen = CMSG_SPACE(size);
	}
	sent = sendmsg(REPORT_FD, &message, MSG_NOSIGNAL);
	/* Until jobinit has let go of the older view. This process lets go of it last, as with it
	 * may go file systems that the machine has unmounted meanwhile, and that can take long. */
	while (sent >= 0 && read(REPORT_FD, &report, 1) < 0 && errno == EINTR)
		;
	_exit(sent < 0 ? OWN_FAILURE : 0);
}

static void need(bool done, const char *what, const char *path)
{
	if (!done)
		report_view(errno, what, path, NULL);
}

static void make_read_only(const char *path)
{
	need(set_attributes(AT_FDCWD, path, WHOLE_TREE, READ_ONLY), "make read-only:", path);
}

/* A mount of what is there now, that belongs nowhere yet. -1 where there is nothing. */
static int keep_mount(const char *path)
{
	return syscall(CALL_OPEN_TREE, AT_FDCWD, path, CLONED_TREE | O_CLOEXEC);
}

static void put_mount(int fd, const char *path)
{
	need(syscall(CALL_MOVE_MOUNT, fd, "", AT_FDCWD, path, FROM_EMPTY_PATH) == 0, "mount", path);
	close(fd);
}

static void make_file(const char *path, mode_t mode)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);

	need(fd >= 0, "make", path);
	close(fd);
}

static bool is_in(const char *path, const char *folder)
{
	size_t length = strlen(folder);

	return !strncmp(path, folder, length) && (!path[length] || path[length] == '/');
}

/* As in proc_pid_mountinfo(5): \040 is a space. */
static void unescape(char *text)
{
	char *to = text;

	for (; *text; text++, to++) {
		*to = *text;
		if (*text == '\\' && strlen(text) > 3) {
			*to = (text[1] - '0') << 6 | (text[2] - '0') << 3 | (text[3] - '0');
			text += 3;
		}
	}
	*to = '\0';
}

/* Not in the first one, in which each number is itself. */
static void look_for_user_namespace(void)
{
	FILE *file = fopen("/proc/self/uid_map", "re");
	unsigned inside, outside, count;

	need(file, "read", "/proc/self/uid_map");
	is_in_user_namespace = fscanf(file, "%u %u %u", &inside, &outside, &count) != 3
			       || inside || outside || count != UINT32_MAX;
	fclose(file);
}

static void read_mounts(void)
{
	FILE *file = fopen("/proc/self/mountinfo", "re");
	char *line = NULL, *point, *filesystem;
	size_t size = 0;

	need(file, "read", "/proc/self/mountinfo");
	while (getline(&line, &size, file) > 0) {
		if (sscanf(line, "%*s %*s %*s %*s %ms", &point) != 1)
			continue;
		filesystem = strstr(line, " - ");
		if (!filesystem || sscanf(filesystem + 3, "%ms", &filesystem) != 1)
			continue;
		unescape(point);
		mount_lines = reallocarray(mount_lines, mount_line_count + 1, sizeof *mount_lines);
		need(mount_lines, "read", "/proc/self/mountinfo");
		mount_lines[mount_line_count++] = (struct mount_line){point, filesystem};
	}
	fclose(file);
}

static bool is_of_cgroups(const struct mount_line *line)
{
	return !strcmp(line->filesystem, "cgroup") || !strcmp(line->filesystem, "cgroup2");
}

static bool is_replaced(const struct view_request *request, const struct mount_line *line)
{
	static const char *const replaced[] = {
		"/proc", "/dev", "/run", "/tmp", "/var/tmp", NULL,
	};
	const char *const *folder, *hidden = request->hidden, *point = line->point;
	uint32_t i;

	/* Where a user namespace owns the mounts, only who sees a /proc may mount another. */
	if (is_in_user_namespace && !strcmp(point, "/proc"))
		return false;
	for (folder = replaced; *folder; folder++)
		if (is_in(point, *folder))
			return true;
	for (i = 0; i < request->asked.hidden; i++, hidden = after(hidden))
		if (is_in(point, hidden))
			return true;
	return is_of_cgroups(line) || (is_in(point, "/sys") && strcmp(point, "/sys"));
}

/* What no job sees: each mount that is not there need not be copied. Where the kernel lets one
 * not go, it is covered by what comes. */
static void drop_mounts(const struct view_request *request)
{
	size_t i;

	for (i = mount_line_count; i-- > 0;)
		if (is_replaced(request, &mount_lines[i]))
			umount2(mount_lines[i].point, MNT_DETACH | UMOUNT_NOFOLLOW);
}

static const struct { const char *path; unsigned major, minor; } nodes[] = {
	{"/dev/null", 1, 3}, {"/dev/zero", 1, 5}, {"/dev/full", 1, 7},
	{"/dev/random", 1, 8}, {"/dev/urandom", 1, 9}, {"/dev/tty", 5, 0},
};

enum { NODES = sizeof nodes / sizeof *nodes };

/* found: mounts of the machine's own, for where nobody may make any, as in a user namespace. */
static void make_node(size_t i, int found)
{
	if (mknod(nodes[i].path, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)) == 0) {
		close(found);
		return;
	}
	need(found >= 0, "make", nodes[i].path);
	make_file(nodes[i].path, 0666);
	put_mount(found, nodes[i].path);
}

static void make_dev(const int found[NODES])
{
	static const char *const links[][2] = {
		{"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"},
		{"/proc/self/fd/1", "/dev/stdout"}, {"/proc/self/fd/2", "/dev/stderr"},
		{"pts/ptmx", "/dev/ptmx"},
	};
	static const char *const folders[] = {"/dev/pts", "/dev/shm", "/dev/.hidden"};
	size_t i;

	need(mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=1m") == 0,
	     "mount a tmpfs on", "/dev");
	for (i = 0; i < NODES; i++)
		make_node(i, found[i]);
	for (i = 0; i < sizeof links / sizeof *links; i++)
		need(symlink(links[i][0], links[i][1]) == 0, "make", links[i][1]);
	for (i = 0; i < sizeof folders / sizeof *folders; i++)
		need(mkdir(folders[i], 0755) == 0, "make", folders[i]);
	need(mkdir(HIDDEN_FOLDER, 0) == 0, "make", HIDDEN_FOLDER);
	make_file(HIDDEN_FILE, 0);
	make_read_only("/dev");
}

/* The folders above a file. */
static void make_folders(const char *path)
{
	char folder[PATH_MAX];
	const char *slash = path;

	while ((slash = strchr(slash + 1, '/'))) {
		snprintf(folder, sizeof folder, "%.*s", (int)(slash - path), path);
		need(mkdir(folder, 0755) == 0 || errno == EEXIST, "make", folder);
	}
}

/* resolver: where the machine's resolv.conf really is, and a mount of it; -1: not in /run. */
static void make_run(const char *resolver, int resolver_fd)
{
	struct stat info;

	need(mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755,size=1m") == 0
	     || is_absent(), "mount a tmpfs on", "/run");
	if (resolver_fd >= 0) {
		make_folders(resolver);
		make_file(resolver, 0444);
		put_mount(resolver_fd, resolver);
	}
	if (lstat("/var/run", &info) == 0 && S_ISDIR(info.st_mode))
		need(bind_mount("/run", "/var/run"), "mount", "/var/run");
	set_attributes(AT_FDCWD, "/run", WHOLE_TREE, READ_ONLY);
}

/* What its user cannot reach, a job in a user namespace cannot either. */
static bool is_out_of_reach(void)
{
	return is_absent() || (is_in_user_namespace && errno == EACCES);
}

/* By a folder of its user's own, which a job could open again. Rights over one end where its group
 * has no number in the namespace. */
static bool is_closed_by_its_user(const char *path)
{
	char folder[PATH_MAX] = "/";
	const char *slash = path;
	struct stat info, closed = {.st_uid = 0};

	while (stat(folder, &info) == 0) {
		closed = info;
		slash = strchr(slash + 1, '/');
		if (!slash)
			break;
		snprintf(folder, sizeof folder, "%.*s", (int)(slash - path), path);
	}
	return closed.st_uid == geteuid();
}

static void protect_paths(const struct view_request *request)
{
	const char *path = request->read_only;
	uint32_t i;

	for (i = 0; i < request->asked.read_only; i++, path = after(path)) {
		if (!strcmp(path, "/")) /* nobody comes onto a mount over their own root */
			need(set_attributes(AT_FDCWD, path, 0, READ_ONLY), "make read-only:", path);
		else if (mount(path, path, NULL, MS_BIND | MS_REC, NULL) == 0)
			make_read_only(path);
		else
			need(is_out_of_reach(), "mount", path);
	}
}

static void hide_paths(const struct view_request *request)
{
	const char *path = request->hidden;
	struct stat info;
	uint32_t i;

	for (i = 0; i < request->asked.hidden; i++, path = after(path)) {
		if (stat(path, &info) == 0) {
			need(bind_mount(S_ISDIR(info.st_mode) ? HIDDEN_FOLDER : HIDDEN_FILE, path),
			     "hide", path);
			continue;
		}
		need(is_out_of_reach(), "look at", path);
		if (errno == EACCES && is_closed_by_its_user(path)) {
			errno = EBUSY; /* and no refusal of the kernel's, as it passes */
			need(false, "look, as a folder of this user's is closed, at", path);
		}
	}
}

/* Those that the kernel did not let go, as in a user namespace. */
static void hide_cgroups(void)
{
	struct statfs info;
	size_t i;

	for (i = 0; i < mount_line_count; i++)
		if (is_of_cgroups(&mount_lines[i]) && statfs(mount_lines[i].point, &info) == 0
		    && (info.f_type == CGROUP_SUPER_MAGIC || info.f_type == CGROUP2_SUPER_MAGIC))
			need(bind_mount(HIDDEN_FOLDER, mount_lines[i].point), "hide",
			     mount_lines[i].point);
}

static void protect_kernel_files(void)
{
	need(set_attributes(AT_FDCWD, "/sys", WHOLE_TREE, READ_ONLY) || is_absent()
	     || errno == EINVAL /* nothing is mounted there */, "make read-only:", "/sys");
}

static void write_own(const char *path, const char *text)
{
	need(write_file(path, text), "write", path);
}

/* For who is not root: in it this process may mount, and nothing outside of it may it do that it
 * could not before. Users and groups keep their numbers; those of others have none. */
static void make_user_namespace(void)
{
	char uid[32], gid[32];

	snprintf(uid, sizeof uid, "%u %u 1", (unsigned)geteuid(), (unsigned)geteuid());
	snprintf(gid, sizeof gid, "%u %u 1", (unsigned)getegid(), (unsigned)getegid());
	need(unshare(CLONE_NEWUSER) == 0, "make", "a user namespace");
	/* The files belong to root while the process is not dumpable. */
	prctl(PR_SET_DUMPABLE, 1);
	write_own("/proc/self/uid_map", uid);
	/* Who could leave a group could gain what its members are kept from. */
	write_own("/proc/self/setgroups", "deny");
	write_own("/proc/self/gid_map", gid);
	prctl(PR_SET_DUMPABLE, 0);
}

/* Its number, which statx has told since Linux 5.8. */
static uint64_t root_mount(void)
{
	enum { MOUNT_NUMBER = 0x1000 /* STATX_MNT_ID */ };
	struct { char before[144]; uint64_t number, after[13]; } found = {.number = 0};

	need(syscall(SYS_statx, AT_FDCWD, "/", 0, MOUNT_NUMBER, &found) == 0, "look at", "/");
	return found.number;
}

/* Jobs come to the root of all mounts, and so out of any chroot: to what nothing here is done to. */
static void refuse_chroot(int namespace_fd)
{
	uint64_t own = root_mount();

	need(setns(namespace_fd, CLONE_NEWNS) == 0, "enter", "the own mounts");
	errno = EPERM;
	need(root_mount() == own, "separate jobs from", "the outside of a chroot");
}

/* The steps, in an order that matters. */
static _Noreturn void build_view(const struct view_request *request, bool has_user_namespace)
{
	char resolver[PATH_MAX];
	int namespaces[VIEW_NAMESPACES] = {-1, -1}, resolver_fd = -1, found[NODES];
	size_t i;

	umask(0);
	/* It owns what is made from here on. */
	if (geteuid() != 0) {
		if (!has_user_namespace)
			make_user_namespace();
		namespaces[1] = open("/proc/self/ns/user", O_RDONLY | O_CLOEXEC);
		need(namespaces[1] >= 0, "open", "/proc/self/ns/user");
	}
	/* Before anything is mounted, nothing of it may reach the machine: not as this process is
	 * in its namespace, and not as mounts propagate. */
	need(unshare(CLONE_NEWNS) == 0, "unshare", "the mounts");
	need(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "make private:", "/");
	namespaces[0] = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
	need(namespaces[0] >= 0, "open", "/proc/self/ns/mnt");
	refuse_chroot(namespaces[0]);
	/* While all is there. */
	look_for_user_namespace();
	read_mounts();
	for (i = 0; i < NODES; i++)
		found[i] = keep_mount(nodes[i].path);
	/* After these, and before any is made. */
	need(set_attributes(AT_FDCWD, "/", WHOLE_TREE, NO_SUID | NO_DEVICES),
	     "no set-user-ID and devices (Linux 5.12 and later):", "/");
	if (realpath("/etc/resolv.conf", resolver) && is_in(resolver, "/run"))
		resolver_fd = keep_mount(resolver);
	drop_mounts(request);
	make_dev(found);
	make_run(resolver, resolver_fd);
	/* What is hidden may be in what is read-only. */
	protect_paths(request);
	hide_paths(request);
	hide_cgroups();
	protect_kernel_files();
	report_view(0, "made", "", namespaces);
}

static void fail_view(struct view *view, int error, const char *problem)
{
	close_fd(&view->fd); /* what an older one shows may not be what is wanted now */
	view->error = error;
	snprintf(view->problem, sizeof view->problem, "%s", problem);
	view->is_owed = server_fd >= 0;
}

static void make_view(const struct view_request *request)
{
	const struct view_asked *asked = &request->asked;
	struct view *view = &views[asked->number - 1];
	int ends[2];
	pid_t pid = -1;

	if (view->report_fd >= 0)
		unwatch_and_close(&view->report_fd); /* of a server that has gone */
	snprintf(view->tmp_options, sizeof view->tmp_options, "mode=1777,size=%llu,nr_inodes=%u",
		 (unsigned long long)asked->tmp_bytes, asked->tmp_inodes);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) {
		fail_view(view, errno, "make a socket");
		return;
	}
	if (watch(EPOLL_CTL_ADD, ends[0], EPOLLIN, FIRST_VIEW_EVENT + asked->number - 1))
		pid = fork();
	if (pid == 0) {
		if (dup2(ends[1], REPORT_FD) < 0)
			_exit(OWN_FAILURE);
		/* The kernel counts by it how many processes a user has: those of older views and
		 * those to come are to be counted together. */
		need(view->user_fd < 0 || setns(view->user_fd, CLONE_NEWUSER) == 0, "enter",
		     "the user namespace");
		/* The older view is kept: see report_view. */
		if ((view->fd >= 0 && dup2(view->fd, VIEW_FD) < 0)
		    || syscall(CALL_CLOSE_RANGE, view->fd < 0 ? VIEW_FD : VIEW_FD + 1, ~0u, 0) < 0)
			_exit(OWN_FAILURE);
		build_view(request, view->user_fd >= 0);
	}
	close(ends[1]);
	view->report_fd = ends[0];
	if (pid < 0) {
		fail_view(view, errno, "fork");
		unwatch_and_close(&view->report_fd);
	}
}

static void take_view(struct view *view)
{
	struct view_report report = {.error = 0};
	union {
		char room[CMSG_SPACE(VIEW_NAMESPACES * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = {&report, sizeof report};
	struct msghdr message = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = control.room,
		.msg_controllen = sizeof control.room,
	};
	struct cmsghdr *header;
	ssize_t size;

	if (view->report_fd < 0)
		return;
	size = recvmsg(view->report_fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	header = CMSG_FIRSTHDR(&message);
	if (size != sizeof report) {
		fail_view(view, EPIPE, "killed while it was made");
	} else if (report.error || !header) {
		fail_view(view, report.error ? report.error : EMFILE, report.problem);
	} else {
		fail_view(view, 0, "");
		memcpy(&view->fd, CMSG_DATA(header), sizeof view->fd);
		close_fd(&view->user_fd); /* the same one */
		if (header->cmsg_len == CMSG_LEN(VIEW_NAMESPACES * sizeof(int)))
			memcpy(&view->user_fd, CMSG_DATA(header) + sizeof(int), sizeof(int));
	}
	unwatch_and_close(&view->report_fd); /* last: its maker waits for that */
}

/* ==== What the server is owed ====
 *
 * A full socket neither blocks jobinit nor loses a message: what is owed is noted in the job,
 * and made into messages when there is room. */

static void owe(struct job *job, unsigned what)
{
	if (!job->is_followed)
		return;
	job->owes |= what;
	if (job->is_owing)
		return;
	job->is_owing = true;
	job->next_owing = NULL;
	*last_owing = job;
	last_owing = &job->next_owing;
}

/* One at a time: as long as it is owed, nothing is read from the server. */
static void refuse(unsigned type, uint64_t id, int error)
{
	say("refused message %u for job %llu: %s", type, (unsigned long long)id, strerror(error));
	refusal = (struct refused){type, error};
	refused_job = id;
	owes_refusal = true;
}

/* ==== Starting ==== */

struct pipes { int output[2], errors[2], status[2]; };

static void close_pipes(struct pipes *pipes)
{
	int *fds = (int *)pipes;
	size_t i;

	for (i = 0; i < sizeof *pipes / sizeof *fds; i++)
		close_fd(&fds[i]);
}

/* Only the read end does not block: a job that finds its stdout non-blocking loses output. */
static bool make_pipe(int ends[2])
{
	if (pipe2(ends, O_CLOEXEC) < 0)
		return false;
	/* The lowest free numbers are given out: these say how many are in use. */
	if (ends[0] >= descriptor_ceiling || ends[1] >= descriptor_ceiling) {
		errno = EMFILE;
		return false;
	}
	return fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0;
}

static bool make_pipes(struct pipes *pipes, bool merge_output)
{
	*pipes = (struct pipes){{-1, -1}, {-1, -1}, {-1, -1}};
	return make_pipe(pipes->output) && (merge_output || make_pipe(pipes->errors))
	       && make_pipe(pipes->status);
}

static void end_unstarted(struct job *job)
{
	job->state = UNSTARTED;
	job->ended_ns = now_ns();
	close_output(job);
	owe(job, OWES_ENDING);
}

static void fail_start(struct job *job, enum step step, int error)
{
	job->step = step;
	job->error = error;
	end_unstarted(job);
}

/* The first process of a confined job's namespace of process ids. The job is the second: to a
 * first one the kernel delivers no signal that it has no handler for, not even its own abort().
 * What the job leaves behind becomes a child of this one; with the last of these it ends, and
 * were it to end before, all of them would.
 *
 * It is not in the job's cgroup, which is empty once the job is gone. Not dumpable, with no
 * descriptor open, it gives nothing away to a job, whose /proc does not show it. */
static _Noreturn void be_first_in_namespace(void)
{
	static const struct timespec patience = {FIRST_PROCESS_SECONDS, 0};
	struct pollfd job = {.events = POLLIN};
	sigset_t all, told;

	/* The table is jobinit's own until then: nothing has to be copied to be closed. To keep it
	 * would keep all pipes of all jobs open. */
	if (syscall(CALL_CLOSE_RANGE, 0, ~0u, CLOSE_UNSHARED) < 0)
		_exit(OWN_FAILURE);
	prctl(PR_SET_DUMPABLE, 0); /* also where it came to a user namespace, which may change it */
	prctl(PR_SET_NAME, "jobinit: pid 1");
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	/* jobinit tells that it has reaped the job, so that this process wakes once for all. Where it
	 * has died, or something else is reaped before, the end of the job is waited for here. */
	sigemptyset(&told);
	sigaddset(&told, SIGCHLD);
	sigtimedwait(&told, NULL, &patience);
	/* The kernel reaps, but for what ended before this. */
	signal(SIGCHLD, SIG_IGN);
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
	job.fd = open_pidfd(2);
	if (job.fd >= 0)
		poll(&job, 1, -1);
	while (wait(NULL) >= 0 || errno == EINTR)
		;
	_exit(0);
}

/* As fork, for the second process of a namespace of process ids. It is our child as any other. */
static pid_t fork_into_namespace(pid_t *first, enum step *step)
{
	pid_t pid = -1;
	int error;

	/* First whether there is a way back, which takes rights in the user namespace that owns it:
	 * those of a container may lack them. */
	*step = STEP_PID_NAMESPACE;
	if (setns(own_pid_namespace_fd, CLONE_NEWPID) < 0 || unshare(CLONE_NEWPID) < 0)
		return -1;
	*first = syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
	if (*first == 0)
		be_first_in_namespace();
	*step = STEP_FORK;
	if (*first > 0)
		pid = fork();
	if (pid == 0)
		return 0;
	error = errno;
	if (setns(own_pid_namespace_fd, CLONE_NEWPID) < 0)
		die("back to the own namespace of process ids");
	if (*first > 0 && pid < 0)
		kill(*first, SIGKILL);
	errno = error;
	return pid;
}

struct siblings { pid_t first, job; uint32_t step; int32_t error; };

/* Returns in the job only. */
static void make_siblings(int user_fd, int report_fd)
{
	struct siblings made = {.first = -1, .job = -1, .step = STEP_PID_NAMESPACE};

	if (setns(user_fd, CLONE_NEWUSER) == 0 && unshare(CLONE_NEWPID) == 0)
		made.first = syscall(SYS_clone, CLONE_PARENT | CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
	if (made.first == 0)
		be_first_in_namespace();
	if (made.first > 0) {
		made.step = STEP_FORK;
		made.job = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
	}
	if (made.job == 0)
		return;
	made.error = errno;
	if (made.first > 0 && made.job < 0)
		kill(made.first, SIGKILL);
	_exit(write(report_fd, &made, sizeof made) < 0 ? OWN_FAILURE : 0);
}

/* As fork_into_namespace, for a view that a user namespace owns. Nobody comes back from one: so a
 * process enters it that makes the two as children of ours, and ends. It does nothing that could
 * hang, so it is waited for. */
static pid_t fork_into_user_namespace(int user_fd, pid_t *first, enum step *step)
{
	struct siblings made = {.job = -1, .step = STEP_FORK, .error = EPIPE};
	int ends[2];
	pid_t between;

	if (pipe2(ends, O_CLOEXEC) < 0)
		return -1;
	between = fork();
	if (between == 0) {
		make_siblings(user_fd, ends[1]);
		return 0;
	}
	if (between < 0)
		made.error = errno;
	close(ends[1]);
	/* Were it killed before it tells, the job would find its pipe closed as it joins its cgroup. */
	if (between > 0 && read(ends[0], &made, sizeof made) < 0)
		made.error = errno;
	close(ends[0]);
	if (between > 0)
		waitpid(between, NULL, 0);
	*first = made.first;
	*step = made.step;
	errno = made.error;
	return made.job;
}

static pid_t fork_confined(const struct request *request, pid_t *first, enum step *step)
{
	if (request->view && request->view->user_fd >= 0)
		return fork_into_user_namespace(request->view->user_fd, first, step);
	return fork_into_namespace(first, step);
}

static void start_job(struct job *job, const struct request *request)
{
	enum step step = STEP_FORK;
	struct pipes pipes;
	struct ends theirs;
	pid_t pid = -1;

	if (make_pipes(&pipes, request->merge_output)
	    && watch(EPOLL_CTL_ADD, pipes.status[0], EPOLLIN, (uintptr_t)job)) {
		name_newborn(job->newborn_name);
		pid = request->is_confined ? fork_confined(request, &job->first, &step) : fork();
		if (pid != 0)
			prctl(PR_SET_NAME, "jobinit");
	}
	if (pid < 0) {
		int error = errno;

		close_pipes(&pipes);
		fail_start(job, step, error);
		return;
	}
	theirs = (struct ends){
		request->input_fd,
		pipes.output[1],
		pipes.errors[1] < 0 ? pipes.output[1] : pipes.errors[1],
		pipes.status[1],
	};
	if (pid == 0)
		become_job(request, &theirs);
	job->state = STARTING;
	job->step = STEP_EXEC; /* where nothing else is reported */
	job->has_cgroup = *request->cgroup;
	job->stdout_fd = pipes.output[0];
	job->stderr_fd = pipes.errors[0];
	job->status_fd = pipes.status[0];
	/* Before the next fork, as the pipes' ends depend on it. */
	close_fd(&pipes.output[1]);
	close_fd(&pipes.errors[1]);
	close_fd(&pipes.status[1]);
	set_pid(job, pid);
}

static void resolve_start(struct job *job, bool is_dead)
{
	struct step_failure failure;
	enum proof proof = prove_exec(job->status_fd, job->pid, job->newborn_name, is_dead, &failure);

	if (proof == NOT_YET)
		return;
	unwatch_and_close(&job->status_fd);
	job->owes &= ~OWES_STARTING;
	if (proof == PROVED) {
		job->state = RUNNING;
		job->started_ns = now_ns();
		owe(job, OWES_STARTED);
	} else {
		job->state = DOOMED;
		job->step = failure.step;
		job->error = failure.error;
		job->item = failure.item;
	}
}

/* ==== Ending ==== */

/* To the group of a main process that is reaped: its number may be another's by now, but a
 * pidfd still means the same group. Returns false where nobody is left in it. */
static bool signal_orphans(struct job *job, int number)
{
	if (job->group_fd < 0)
		return false;
	if (syscall(CALL_PIDFD_SEND_SIGNAL, job->group_fd, number, NULL, SIGNAL_PROCESS_GROUP) == 0)
		return true;
	if (errno != EINVAL)
		return errno == EPERM;
	/* Before Linux 6.9. A group keeps its number from being given to a process, so where no
	 * process has it, the group is still ours, or gone. */
	return kill(job->pid, 0) < 0 && errno == ESRCH && kill(-job->pid, number) == 0;
}

static void signal_job(struct job *job, int number)
{
	if (job->is_reaped)
		signal_orphans(job, number);
	else if (kill(-job->pid, number) < 0 && errno == ESRCH)
		kill(job->pid, number); /* forked, and not yet a group of its own */
}

static void end_job(struct job *job, int wait_status, const struct rusage *usage)
{
	release_pid(job);
	job->wait_status = wait_status;
	if (job->state != RUNNING) {
		end_unstarted(job);
		return;
	}
	job->state = EXITED;
	job->ended_ns = now_ns();
	job->user_us = microseconds(usage->ru_utime);
	job->system_us = microseconds(usage->ru_stime);
	job->max_rss_kib = usage->ru_maxrss;
	if (!signal_orphans(job, 0))
		close_fd(&job->group_fd);
	owe(job, OWES_ENDING);
}

/* A zombie: a job's main process, or an orphan of a job, which came to us as sub-reaper. */
static void reap(pid_t pid)
{
	struct job *job = find_by_pid(pid);
	struct rusage usage;
	int wait_status;

	/* SIGCHLD may come before the end of the status pipe is seen, and /proc forgets the
	 * process with the reap: so first the start, then the end. */
	if (job && job->state == STARTING)
		resolve_start(job, true);
	/* Where there is a cgroup, that is killed. */
	if (job && job->state == RUNNING && !job->has_cgroup)
		job->group_fd = open_pidfd(pid);
	if (wait4(pid, &wait_status, 0, &usage) != pid || !job)
		return;
	/* The number is still its: the kernel keeps it until all others of its namespace are reaped. */
	if (job->first > 0)
		kill(job->first, SIGCHLD);
	end_job(job, wait_status, &usage);
}

/* Signals of one kind are merged: one may stand for many. */
static void take_signals(void)
{
	struct signalfd_siginfo taken;

	while (read(signal_fd, &taken, sizeof taken) > 0)
		;
	has_dead = true;
}

/* So many only, as no signal tells how many there are, and more may come all the time. */
static void reap_some(void)
{
	siginfo_t dead;
	unsigned left;

	for (left = REAPS_OF_ONE_PACKET; has_dead && left; left--) {
		dead.si_pid = 0;
		has_dead = waitid(P_ALL, 0, &dead, WEXITED | WNOHANG | WNOWAIT) == 0 && dead.si_pid;
		if (has_dead)
			reap(dead.si_pid);
	}
}

/* ==== To the server ==== */

struct packet {
	size_t size, descriptor_count, pidfd_count;
	unsigned job_count; /* that many of the queue are in it */
	bool has_listed;
	int descriptors[PACKET_DESCRIPTORS], pidfds[PACKET_DESCRIPTORS];
	char bytes[PACKET_BYTES];
};

static bool has_room(const struct packet *packet)
{
	return packet->size + LONGEST_OF_ONE_JOB <= PACKET_BYTES
	       && packet->descriptor_count + DESCRIPTORS_OF_ONE_JOB <= PACKET_DESCRIPTORS;
}

static void append(struct packet *packet, unsigned type, unsigned descriptors, uint64_t id,
		   const void *body, size_t size)
{
	struct header header = {type, descriptors, size, id};

	memcpy(packet->bytes + packet->size, &header, sizeof header);
	packet->size += sizeof header;
	if (size)
		memcpy(packet->bytes + packet->size, body, size);
	packet->size += size;
}

/* Returns false where there is no room for a pidfd for now. */
static bool append_started(struct packet *packet, const struct job *job)
{
	struct started body = {job->pid, HAS_STDOUT, job->started_ns};
	size_t before = packet->descriptor_count;
	/* Until it is reaped, the number is certainly its own. */
	int pidfd = job->is_reaped ? -1 : open_pidfd(job->pid);

	if (pidfd < 0 && !job->is_reaped && (errno == EMFILE || errno == ENFILE || errno == ENOMEM))
		return false;
	if (pidfd >= 0) {
		packet->pidfds[packet->pidfd_count++] = pidfd;
		packet->descriptors[packet->descriptor_count++] = pidfd;
		body.having |= HAS_PIDFD;
	}
	packet->descriptors[packet->descriptor_count++] = job->stdout_fd;
	if (job->stderr_fd >= 0) {
		packet->descriptors[packet->descriptor_count++] = job->stderr_fd;
		body.having |= HAS_STDERR;
	}
	append(packet, TELL_STARTED, packet->descriptor_count - before, job->id, &body, sizeof body);
	return true;
}

static void append_ending(struct packet *packet, const struct job *job)
{
	struct failed failed = {
		job->step, job->error, job->wait_status, job->item, job->ended_ns,
	};
	struct exited exited = {
		.wait_status = job->wait_status,
		.ended_ns = job->ended_ns,
		.user_us = job->user_us,
		.system_us = job->system_us,
		.max_rss_kib = job->max_rss_kib,
	};

	if (job->state == UNSTARTED)
		append(packet, TELL_FAILED, 0, job->id, &failed, sizeof failed);
	else
		append(packet, TELL_EXITED, 0, job->id, &exited, sizeof exited);
}

static bool append_job(struct packet *packet, const struct job *job)
{
	if (job->owes & OWES_STARTED && !append_started(packet, job))
		return false;
	if (job->owes & OWES_STARTING)
		append(packet, TELL_STARTING, 0, job->id, NULL, 0);
	if (job->owes & OWES_ENDING)
		append_ending(packet, job);
	return true;
}

static void append_views(struct packet *packet)
{
	struct { struct view_told told; char problem[LONGEST_PROBLEM]; } body;
	unsigned i;

	for (i = 0; i < MOST_VIEWS; i++) {
		if (!views[i].is_owed)
			continue;
		body.told = (struct view_told){i + 1, views[i].error};
		strcpy(body.problem, views[i].problem);
		append(packet, TELL_VIEW, 0, 0, &body, sizeof body.told + strlen(body.problem));
	}
}

static void fill(struct packet *packet)
{
	struct hello hello = {PROTOCOL_MAGIC, PROTOCOL_VERSION, getpid(), 0};
	struct job *job;

	memset(packet, 0, offsetof(struct packet, descriptors));
	if (owes_hello)
		append(packet, TELL_HELLO, 0, 0, &hello, sizeof hello);
	if (owes_refusal)
		append(packet, TELL_REFUSED, 0, refused_job, &refusal, sizeof refusal);
	append_views(packet);
	for (job = first_owing; job && has_room(packet); job = job->next_owing) {
		if (!append_job(packet, job))
			return;
		packet->job_count++;
	}
	if (!job && owes_listed && has_room(packet)) {
		append(packet, TELL_LISTED, 0, 0, NULL, 0);
		packet->has_listed = true;
	}
}

/* Returns 0 or an errno. */
static int send_packet(struct packet *packet)
{
	static union {
		char room[CMSG_SPACE(PACKET_DESCRIPTORS * sizeof(int))];
		struct cmsghdr align;
	} control;
	size_t size = packet->descriptor_count * sizeof(int);
	struct iovec part = {packet->bytes, packet->size};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

	if (size) {
		control.align.cmsg_level = SOL_SOCKET;
		control.align.cmsg_type = SCM_RIGHTS;
		control.align.cmsg_len = CMSG_LEN(size);
		memcpy(CMSG_DATA(&control.align), packet->descriptors, size);
		message.msg_control = control.room;
		message.msg_controllen = CMSG_SPACE(size);
	}
	return sendmsg(server_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? errno : 0;
}

static void close_pidfds(struct packet *packet)
{
	while (packet->pidfd_count)
		close_fd(&packet->pidfds[--packet->pidfd_count]);
}

static void owe_no_views(void)
{
	unsigned i;

	for (i = 0; i < MOST_VIEWS; i++)
		views[i].is_owed = false;
}

/* What a server that is gone wanted to be made; the next one must not take it for its own. */
static void leave_unmade_views(void)
{
	unsigned i;

	for (i = 0; i < MOST_VIEWS; i++)
		if (views[i].report_fd >= 0)
			unwatch_and_close(&views[i].report_fd);
}

static bool owes_views(void)
{
	unsigned i;

	for (i = 0; i < MOST_VIEWS; i++)
		if (views[i].is_owed)
			return true;
	return false;
}

static void settle(struct packet *packet)
{
	owes_hello = owes_refusal = false;
	owe_no_views();
	if (packet->has_listed)
		owes_listed = false;
	while (packet->job_count--) {
		if (first_owing->owes & OWES_ENDING)
			first_owing->is_ending_told = true;
		leave_queue(first_owing);
	}
}

/* What the server socket is to be watched for afterwards. It is not read as long as something
 * is owed: so there is a bound to what can be owed, and to what the server can have open. */
static uint32_t send_all_owed(void)
{
	static struct packet packet;
	int error;

	while (owes_hello || owes_refusal || owes_listed || first_owing || owes_views()) {
		fill(&packet);
		error = packet.size ? send_packet(&packet) : EMFILE;
		close_pidfds(&packet);
		switch (error) {
		case EAGAIN:
			return EPOLLOUT;
		case EMFILE:       /* for a pidfd */
		case ETOOMANYREFS: /* too many descriptors are on their way to the server */
		case ENOBUFS:
		case ENOMEM:
			must_retry = true; /* as no event tells when there is room again */
			return 0;
		default: /* sent; or the server is gone, as the next read will find */
			settle(&packet);
		}
	}
	return EPOLLIN;
}

static void send_owed(void)
{
	uint32_t interest;

	must_retry = false;
	if (server_fd < 0)
		return;
	interest = send_all_owed();
	if (interest != server_interest)
		watch(EPOLL_CTL_MOD, server_fd, interest, SERVER_EVENT);
	server_interest = interest;
}

/* ==== From the server ==== */

/* The caller frees. NULL with errno. The copy is ours alone: what is in a memfd could change
 * between a check and its use. */
static char *load_start(const char *body, size_t *size, int memfd)
{
	struct stat info;
	char *data;

	if (memfd >= 0) {
		if (fstat(memfd, &info) < 0)
			return NULL;
		if (!S_ISREG(info.st_mode) || info.st_size > LONGEST_START) {
			errno = EMSGSIZE;
			return NULL;
		}
		*size = info.st_size;
	}
	data = malloc(*size + 1);
	if (!data)
		return NULL;
	if (memfd < 0) {
		memcpy(data, body, *size);
	} else if (pread(memfd, data, *size, 0) != (ssize_t)*size) {
		free(data);
		errno = EBADMSG;
		return NULL;
	}
	return data;
}

/* What came with a message: of a start, a memfd with its body where that is long, and then the
 * job's input. */
struct received { int count, fds[2]; };

static void start_anew(uint64_t id, const char *body, size_t size, const struct received *received)
{
	bool is_in_memfd = size == 0;
	struct request request = {.memory = NULL};
	struct job *job;
	char *data = load_start(body, &size, is_in_memfd ? received->fds[0] : -1);
	int error = data ? parse_start(data, size, &request) : errno;

	if (!error && received->count != is_in_memfd + request.has_input)
		error = EBADMSG;
	if (error) {
		refuse(ASK_START, id, error);
		free(request.memory);
		free(data);
		return;
	}
	if (request.has_input)
		request.input_fd = received->fds[received->count - 1];
	job = add_job(id);
	if (job)
		start_job(job, &request);
	else
		refuse(ASK_START, id, ENOMEM);
	free(request.memory);
	free(data);
}

/* Asked again, by a server that did not hear the answer: never started twice. */
static void start_again(struct job *job)
{
	job->is_followed = true;
	if (job->state == RUNNING || job->state == EXITED)
		owe(job, OWES_STARTED);
	if (job->state == UNSTARTED || (job->state == EXITED && !job->is_ending_told))
		owe(job, OWES_ENDING);
}

static void handle_acknowledge(uint64_t id, struct job *job)
{
	if (job && (job->state == EXITED || job->state == UNSTARTED))
		remove_job(job);
	else if (job)
		refuse(ASK_ACKNOWLEDGE, id, EBUSY);
}

static void handle_signal(uint64_t id, struct job *job, const char *body)
{
	struct to_signal asked;

	memcpy(&asked, body, sizeof asked);
	if (asked.number < 1 || asked.number >= NSIG)
		refuse(ASK_SIGNAL, id, EINVAL);
	else if (job)
		signal_job(job, asked.number);
}

static void list_job(struct job *job)
{
	job->is_followed = true;
	if (job->state == STARTING || job->state == DOOMED)
		owe(job, OWES_STARTING);
	if (job->state == RUNNING || job->state == EXITED)
		owe(job, OWES_STARTED);
	if (job->state == EXITED || job->state == UNSTARTED)
		owe(job, OWES_ENDING);
}

static void handle_list(void)
{
	for_each_job(list_job);
	owes_listed = true;
}

static void handle_view(const char *body, size_t size)
{
	struct view_request request;
	char *strings;
	int error;

	/* With a NUL behind it all. */
	strings = calloc(1, size + 1);
	if (!strings) {
		refuse(ASK_VIEW, 0, ENOMEM);
		return;
	}
	memcpy(strings, body, size);
	error = parse_view(strings, size, &request);
	if (error)
		refuse(ASK_VIEW, 0, error);
	else
		make_view(&request);
	free(strings);
}

/* Returns 0 or an errno, with as much of the header as there is. */
static int parse_message(const char *packet, size_t size, struct header *header)
{
	*header = (struct header){0};
	memcpy(header, packet, size < sizeof *header ? size : sizeof *header);
	if (size < sizeof *header || header->size != size - sizeof *header)
		return EBADMSG;
	switch (header->type) {
	case ASK_START: /* which is looked at where all of it is there */
	case ASK_ACKNOWLEDGE:
	case ASK_LIST:
		return 0;
	case ASK_SIGNAL:
		return header->size < sizeof(struct to_signal) ? EBADMSG : 0;
	case ASK_VIEW:
		return header->size < sizeof(struct view_asked) ? EBADMSG : 0;
	default:
		return EOPNOTSUPP;
	}
}

static void handle_message(const char *packet, size_t size, const struct received *received)
{
	const char *body = packet + sizeof(struct header);
	struct header header;
	struct job *job;
	int error = parse_message(packet, size, &header);

	if (error) {
		refuse(header.type, header.job, error);
		return;
	}
	job = find_by_id(header.job);
	switch (header.type) {
	case ASK_START:
		if (job)
			start_again(job);
		else
			start_anew(header.job, body, header.size, received);
		break;
	case ASK_SIGNAL:
		handle_signal(header.job, job, body);
		break;
	case ASK_ACKNOWLEDGE:
		handle_acknowledge(header.job, job);
		break;
	case ASK_LIST:
		handle_list();
		break;
	case ASK_VIEW:
		handle_view(body, header.size);
		break;
	}
}

/* Those that a start may bring; what comes beyond them is closed. */
static void keep_descriptors(struct msghdr *message, struct received *received)
{
	struct cmsghdr *part;
	size_t i, count;
	int fd;

	for (part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
		if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
			continue;
		count = (part->cmsg_len - CMSG_LEN(0)) / sizeof fd;
		for (i = 0; i < count; i++) {
			memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
			if (received->count < 2)
				received->fds[received->count++] = fd;
			else
				close(fd);
		}
	}
}

static void unfollow(struct job *job)
{
	leave_queue(job);
	job->is_followed = job->is_ending_told = false;
}

static void lose_server(void)
{
	for_each_job(unfollow);
	owes_hello = owes_listed = owes_refusal = false;
	owe_no_views();
	leave_unmade_views();
	unwatch_and_close(&server_fd);
	watch(EPOLL_CTL_ADD, listener_fd, EPOLLIN, LISTENER_EVENT);
}

static void receive_message(void)
{
	static char packet[sizeof(struct header) + LONGEST_INLINE_START];
	union {
		char room[CMSG_SPACE(4 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = {packet, sizeof packet};
	struct msghdr message = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = control.room,
		.msg_controllen = sizeof control.room,
	};
	ssize_t size = recvmsg(server_fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	struct received received = {0, {-1, -1}};

	/* ECONNRESET comes once, and before what the server has said last (it ended without
	 * reading all from us). */
	if (size < 0 && (errno == EAGAIN || errno == EINTR || errno == ECONNRESET))
		return;
	if (size <= 0) {
		lose_server();
		return;
	}
	keep_descriptors(&message, &received);
	if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
		struct header header;

		parse_message(packet, size, &header);
		refuse(header.type, header.job, EMSGSIZE);
	} else {
		handle_message(packet, size, &received);
	}
	close_fd(&received.fds[0]);
	close_fd(&received.fds[1]);
}

static void handle_server(uint32_t events)
{
	if (server_fd < 0)
		return;
	if (server_interest == EPOLLIN)
		receive_message();
	else if (events & (EPOLLHUP | EPOLLERR))
		lose_server(); /* gone, and owed what can never be sent */
}

/* A server of the same user, or root's. One at a time, so that no job has two masters: the
 * next one waits in the backlog. */
static void accept_server(void)
{
	struct ucred peer;
	socklen_t size = sizeof peer;
	int fd = accept4(listener_fd, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0) {
		/* Of what there may be more in a while, descriptors or memory: to ask at once, and
		 * again, would only take the processor from who could give it back. */
		listener_rests = errno != EAGAIN && watch(EPOLL_CTL_MOD, listener_fd, 0, LISTENER_EVENT);
		return;
	}
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0
	    || (peer.uid != geteuid() && peer.uid != 0)) {
		say("refused a connection of user %d", (int)peer.uid);
		close(fd);
		return;
	}
	watch(EPOLL_CTL_DEL, listener_fd, 0, 0);
	server_fd = fd;
	server_interest = EPOLLIN;
	watch(EPOLL_CTL_ADD, server_fd, server_interest, SERVER_EVENT);
	was_connected = true;
	owes_hello = true;
}

static void rouse_listener(void)
{
	if (listener_rests)
		watch(EPOLL_CTL_MOD, listener_fd, EPOLLIN, LISTENER_EVENT);
	listener_rests = false;
}

/* ==== Serving ==== */

static void take_own_descriptors(void)
{
	int fd = open("/dev/null", O_RDWR);

	if (fd < 0 || dup2(fd, STDIN_FILENO) < 0 || dup2(fd, STDOUT_FILENO) < 0)
		die("/dev/null");
	/* Whatever the server's own parent left open. stderr stays, for the log. */
	if (syscall(CALL_CLOSE_RANGE, listener_fd + 1, ~0u, 0) < 0)
		die("close_range, which Linux has since 5.9");
	if (fcntl(listener_fd, F_SETFD, FD_CLOEXEC) < 0
	    || fcntl(listener_fd, F_SETFL, O_NONBLOCK) < 0)
		die("file descriptor 3 is no listening socket");
}

static void raise_open_files_limit(void)
{
	struct rlimit limit;
	rlim_t own;

	getrlimit(RLIMIT_NOFILE, &original_open_files);
	limit = original_open_files;
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	getrlimit(RLIMIT_NOFILE, &limit);
	if (limit.rlim_cur > INT32_MAX)
		limit.rlim_cur = INT32_MAX;
	own = limit.rlim_cur / 4 < OWN_DESCRIPTORS ? limit.rlim_cur / 4 : OWN_DESCRIPTORS;
	descriptor_ceiling = limit.rlim_cur - own;
}

/* Once, and for all jobs: they would inherit what jobinit has inherited as ignored. With SIGCHLD
 * among it, the kernel would keep no zombie, and endings be lost. */
static void default_signals(void)
{
	/* The kernel's struct, all of it zero: SIG_DFL. glibc's sigaction refuses the two signals
	 * that it uses itself, and those may have been inherited as ignored too. */
	static const unsigned long by_default[8];
	int number;

	for (number = 1; number < NSIG; number++)
		syscall(SYS_rt_sigaction, number, by_default, NULL, NSIG / 8);
}

static void take_own_signals(void)
{
	sigset_t signals;
	size_t i;

	default_signals();
	sigfillset(&signals);
	sigprocmask(SIG_UNBLOCK, &signals, NULL);
	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	/* Jobs may stop and go on as often as they like. */
	sigaction(SIGCHLD, &(struct sigaction){.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDSTOP}, NULL);
	for (i = 0; i < sizeof ignored_signals / sizeof *ignored_signals; i++)
		signal(ignored_signals[i], SIG_IGN);
	signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signal_fd < 0)
		die("signalfd");
}

/* When the memory of all is short, the kernel ends whose processes have most of it mapped: of a
 * server, and jobs that hold theirs in files of /tmp or in memfds, that is the server. So jobs go
 * first, unless it has grown by so many thousandths of all that memory: what clients have it take
 * must not end others' jobs. */
static void choose_oom_score(void)
{
	FILE *file = fopen("/proc/self/oom_score_adj", "re");
	int servers = 0, score;

	if (file && fscanf(file, "%d", &servers) != 1)
		servers = 0;
	if (file)
		fclose(file);
	score = (servers < 0 ? 0 : servers) + JOBS_OOM_SCORE;
	snprintf(jobs_oom_score, sizeof jobs_oom_score, "%d", score < 1000 ? score : 1000);
}

static void protect_oneself(void)
{
	/* Allowed to root only. When memory is short, one process knows how all jobs end. */
	write_file("/proc/self/oom_score_adj", "-900");
	/* No job may trace it, or read its memory. Each gets its own leave back at its exec.
	 * Last, as it makes root the owner of the files in /proc/self. */
	prctl(PR_SET_DUMPABLE, 0);
}

static void prepare_confinement(void)
{
	unsigned i;

	for (i = 0; i < MOST_VIEWS; i++)
		views[i].fd = views[i].user_fd = views[i].report_fd = -1;
	while (prctl(PR_CAPBSET_READ, capability_count) >= 0)
		capability_count++;
	own_pid_namespace_fd = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
	if (own_pid_namespace_fd < 0)
		die("/proc/self/ns/pid");
}

/* Where no job is to have these privileges: what jobinit has given up, all that it forks is
 * without, and need not give it up anew, which takes as long as to mount a /proc. It goes on with
 * the capabilities that it has: these say what an exec can give. Not in a user namespace, which
 * gives all back to who enters it. */
static void renounce_early(void)
{
	if (geteuid() != 0 || !renounce_privileges())
		die("cannot renounce all privileges");
	has_renounced = true;
}

static void watch_events(void)
{
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (epoll_fd < 0 || !watch(EPOLL_CTL_ADD, signal_fd, EPOLLIN, SIGNAL_EVENT)
	    || !watch(EPOLL_CTL_ADD, listener_fd, EPOLLIN, LISTENER_EVENT))
		die("epoll");
}

static void handle_event(const struct epoll_event *event)
{
	switch (event->data.u64) {
	case LISTENER_EVENT:
		accept_server();
		break;
	case SERVER_EVENT:
		handle_server(event->events);
		break;
	case SIGNAL_EVENT:
		take_signals();
		break;
	case FIRST_VIEW_EVENT ... FIRST_VIEW_EVENT + MOST_VIEWS - 1:
		take_view(&views[event->data.u64 - FIRST_VIEW_EVENT]);
		break;
	default:
		resolve_start((struct job *)(uintptr_t)event->data.u64, false);
	}
}

static int patience_ms(void)
{
	if (has_dead)
		return 0;
	if (must_retry || listener_rests)
		return RETRY_MS;
	if (job_count || server_fd >= 0)
		return -1;
	/* 0: another server may wait already. */
	return was_connected ? 0 : FIRST_CONNECTION_MS;
}

/* With those that have come meanwhile, as the server is woken by each packet, and by one for
 * several just as well. One at a time: what is done for one may close what the next is about. */
static void handle_in_company(struct epoll_event *event)
{
	int left = EVENTS_OF_ONE_PACKET;

	do
		handle_event(event);
	while (--left && !owes_refusal && epoll_wait(epoll_fd, event, 1, 0) > 0);
}

static void handle_events(void)
{
	struct epoll_event event;
	int count;

	while ((count = epoll_wait(epoll_fd, &event, 1, patience_ms())) != 0 || must_retry
	       || listener_rests || has_dead) {
		rouse_listener();
		if (count > 0)
			handle_in_company(&event);
		reap_some();
		send_owed();
	}
}

static int serve(bool confines_all)
{
	prctl(PR_SET_NAME, "jobinit"); /* it may have been started by a descriptor's number */
	/* Fixed, as it would else grow with the largest start, and memory be kept for ever. */
	mallopt(M_MMAP_THRESHOLD, 64 << 10);
	make_filter();
	take_own_descriptors();
	raise_open_files_limit();
	take_own_signals();
	/* What jobs leave behind is reaped here, even where no init does that. */
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	if (chdir("/") < 0)
		die("/");
	choose_oom_score();
	protect_oneself();
	if (!start_closer())
		die("closer");
	prepare_confinement();
	if (confines_all)
		renounce_early();
	watch_events();
	handle_events();
	return 0;
}

/* ==== By hand ==== */

static const char *find_command(const char *name)
{
	static char path[4096];
	const char *folder = getenv("PATH");
	size_t length;

	if (strchr(name, '/') || !folder)
		return name;
	for (;; folder += length + 1) {
		length = strcspn(folder, ":");
		snprintf(path, sizeof path, "%.*s/%s", (int)length, folder, name);
		if (length && access(path, X_OK) == 0)
			return path;
		if (!folder[length])
			return name;
	}
}

/* Until it has ended, passing on what a terminal or a supervisor sends. Returns its status. */
static int wait_by_hand(pid_t pid, const sigset_t *signals)
{
	int status, number;

	while (waitpid(pid, &status, WNOHANG) == 0)
		if (sigwait(signals, &number) == 0 && number != SIGCHLD)
			kill(-pid, number);
	return status;
}

static int report_by_hand(int status_fd, pid_t pid, const char *newborn_name, const char *command)
{
	struct step_failure failure;

	if (prove_exec(status_fd, pid, newborn_name, false, &failure) == PROVED)
		return 0;
	if (failure.error == 0)
		say("%s: killed before its exec", command);
	else
		say("%s: step %u: %s", command, failure.step, strerror(failure.error));
	return failure.step == STEP_EXEC && failure.error == ENOENT ? 127 : 126;
}

static int run_by_hand(const char *cgroup, char **arguments)
{
	struct request request = {
		.executable = find_command(arguments[0]),
		.directory = ".",
		.cgroup = cgroup,
		.arguments = arguments,
		.environment = environ,
	};
	struct ends theirs = {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO, -1};
	char newborn_name[PROCESS_NAME_BYTES];
	int status_pipe[2], failed, status;
	sigset_t signals;
	pid_t pid;

	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigaddset(&signals, SIGHUP);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	default_signals();
	getrlimit(RLIMIT_NOFILE, &original_open_files);
	name_newborn(newborn_name);
	if (pipe2(status_pipe, O_CLOEXEC) < 0 || (pid = fork()) < 0)
		die("fork");
	theirs.status = status_pipe[1];
	if (pid == 0)
		become_job(&request, &theirs);
	close(status_pipe[1]);
	failed = report_by_hand(status_pipe[0], pid, newborn_name, arguments[0]);
	status = wait_by_hand(pid, &signals);
	if (failed)
		return failed;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int show_usage(void)
{
	fputs("usage: jobinit [--cgroup DIR] -- COMMAND [ARGUMENT...]\n"
	      "       jobinit --serve             (file descriptor 3: a listening seqpacket socket)\n"
	      "       jobinit --serve-confined    (the same, as root, for confined jobs only)\n",
	      stderr);
	return OWN_FAILURE;
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "--serve"))
		return serve(false);
	if (argc == 2 && !strcmp(argv[1], "--serve-confined"))
		return serve(true);
	if (argc > 2 && !strcmp(argv[1], "--"))
		return run_by_hand("", argv + 2);
	if (argc > 4 && !strcmp(argv[1], "--cgroup") && !strcmp(argv[3], "--"))
		return run_by_hand(argv[2], argv + 4);
	return show_usage();
}
