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
 * In jobinit/, as parts of this one unit: the protocol; what becomes of a forked child; what a
 * confined job may not ask the kernel for; and what it sees of the machine's files.
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
	CALL_MOUNT_SETATTR = 442, CALL_LANDLOCK_CREATE_RULESET = 444,
	CALL_LANDLOCK_RESTRICT_SELF = 446,
};
enum { CLOSE_UNSHARED = 2 };         /* CLOSE_RANGE_UNSHARE */
enum { CLONED_TREE = 1 };            /* OPEN_TREE_CLONE */
enum { FROM_EMPTY_PATH = 4, TO_EMPTY_PATH = 0x40 }; /* MOVE_MOUNT_{F,T}_EMPTY_PATH */
enum { NO_MAGIC_LINKS = 2, NO_LINKS = 4, IN_ROOT = 0x10 }; /* RESOLVE_... of openat2 */
enum { WHOLE_TREE = 0x8000 };        /* AT_RECURSIVE */
enum { READ_ONLY = 1, NO_SUID = 2, NO_DEVICES = 4 }; /* MOUNT_ATTR_... */
enum { KEEP_SIGNALS_IN = 2 };      /* LANDLOCK_SCOPE_SIGNAL, since Linux 6.12 */
enum { SIGNAL_PROCESS_GROUP = 4 }; /* of pidfd_send_signal, since Linux 6.9 */
enum { SET_DELEGATION = 1040 };    /* F_SETDELEG, since Linux 6.19 */
enum { IS_EXITING = 4 };           /* PF_EXITING of include/linux/sched.h */
enum { PROCESS_NAME_BYTES = 16 };  /* TASK_COMM_LEN, with the end of the string */

#include "jobinit/protocol.h"

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
static uint32_t server_interest; /* what it is watched for */
static const uint32_t UNWATCHED = ~0u;
static bool was_connected, must_retry, must_prove, listener_rests, has_dead;

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

/* What passes, as where jobs have taken all descriptors of the machine. */
static bool is_shortage(void)
{
	return errno == EMFILE || errno == ENFILE || errno == ENOMEM;
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
	union { char room[CMSG_SPACE(2 * sizeof(int))]; struct cmsghdr align; } control = {0};
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

#include "jobinit/filter.h"

#include "jobinit/become.h"

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
	close(fd); /* and leaves errno as it is */
	if (size < 0)
		return -1;
	text[size] = '\0';
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
	/* It may have run, and written what must not be lost. */
	if (answer < 0 && is_shortage()) {
		must_prove = true;
		return NOT_YET;
	}
	*failure = (struct step_failure){STEP_EXEC, answer < 0 ? errno : 0, 0};
	if (answer < 0)
		kill(pid, SIGKILL); /* what cannot be proved to run must not run */
	return DISPROVED;
}

#include "jobinit/view.h"

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
	static const struct timespec patience = {FIRST_PROCESS_SECONDS, 0}, pause = {1, 0};
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
	/* It need not have ended where there is no pidfd: no descriptor may be left on this machine, or
	 * what the server runs in refuses the call. */
	while ((job.fd = open_pidfd(2)) < 0 && (kill(2, 0) == 0 || errno == EPERM))
		nanosleep(&pause, NULL);
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

	/* Once for each change, as its end may have to wait for its proof. */
	if (make_pipes(&pipes, request->merge_output)
	    && watch(EPOLL_CTL_ADD, pipes.status[0], EPOLLIN | EPOLLET, (uintptr_t)job)) {
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

static void resolve_again(struct job *job)
{
	if (job->state == STARTING)
		resolve_start(job, false);
}

/* The starts whose proof had to wait, and what is dead, which is reaped after it. */
static void prove_again(void)
{
	if (!must_prove)
		return;
	must_prove = false;
	has_dead = true;
	for_each_job(resolve_again);
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
	if (job && job->state == STARTING) { /* for now nothing proves it */
		has_dead = false;
		return;
	}
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

	if (pidfd < 0 && !job->is_reaped && is_shortage())
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
	if (interest == server_interest)
		return;
	if (watch(server_interest == UNWATCHED ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, server_fd, interest,
		  SERVER_EVENT))
		server_interest = interest;
	else
		must_retry = true; /* for now this user has no watch left */
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
	watch(EPOLL_CTL_MOD, listener_fd, EPOLLIN, LISTENER_EVENT);
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
	/* It stays watched: once it were not, jobs of this user may have taken the last watch of epoll
	 * that it may have (fs.epoll.max_user_watches), and no server would come in any more. */
	watch(EPOLL_CTL_MOD, listener_fd, 0, LISTENER_EVENT);
	server_fd = fd;
	server_interest = UNWATCHED; /* until what it is owed is sent */
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
	if (must_retry || must_prove || listener_rests)
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
	       || must_prove || listener_rests || has_dead) {
		rouse_listener();
		prove_again();
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
	static const struct timespec pause = {0, RETRY_MS * 1000 * 1000};
	struct step_failure failure;
	enum proof proof;

	while ((proof = prove_exec(status_fd, pid, newborn_name, false, &failure)) == NOT_YET)
		nanosleep(&pause, NULL);
	if (proof == PROVED)
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
