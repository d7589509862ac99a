/* What a confined job may not ask the kernel for.
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
	PLAIN_MODE_1, PLAIN_MODE_2, PLAIN_OPEN_1, PLAIN_OPEN_2,
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
	/* The set-user-ID bit: another user of the machine who ran such a program, outside of any job,
	 * would have the job's user, and so reach all its jobs, or those that get that number later. The
	 * numbers are those of the argument that is the mode, from 0 on, or the flags before it; openat2
	 * has both in memory. */
	{SYS_fchmod, PLAIN_MODE_1}, {SYS_fchmodat, PLAIN_MODE_2}, {SYS_mknodat, PLAIN_MODE_2},
	{452 /* fchmodat2 */, PLAIN_MODE_2}, {SYS_openat, PLAIN_OPEN_2},
	{437 /* openat2 */, UNKNOWN},
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
	if (filter_size == LONGEST_FILTER) /* its length differs by architecture */
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
	targets[PLAIN_MODE_1] = make_mode_filter(1, 0);
	targets[PLAIN_MODE_2] = make_mode_filter(2, 0);
	targets[PLAIN_OPEN_1] = make_mode_filter(2, 1);
	targets[PLAIN_OPEN_2] = make_mode_filter(3, 2);
	for (i = tree; i < tree_end; i++) {
		filter[i].jt = jump_to(filter[i].jt, targets, i);
		filter[i].jf = jump_to(filter[i].jf, targets, i);
	}
}
