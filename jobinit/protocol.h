/* The protocol, which engine/jobinit.py mirrors.
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
