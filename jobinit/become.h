/* Becoming a job: in the forked child. */

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
	for (i = 0; i < COUNT; i++) {
		trees[i] = copy_tree(open_in(old, own[i], O_DIRECTORY), 0);
		if (trees[i] < 0 && !is_absent())
			return false;
	}
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

/* Who has a descriptor of the machine's /proc, and anybody can hand one to a job, finds there the
 * processes of all jobs, and of those of its own user the environment, and all open files. But not
 * from within a domain of Landlock's. This one refuses nothing else, but signals to the first
 * process of the job's namespace, where that has the same user: others are out of reach anyhow.
 * Older kernels have none that does so little, and some have none at all. */
static bool enter_domain(void)
{
	struct { uint64_t files, network, scoped; } domain = {.scoped = KEEP_SIGNALS_IN};
	int fd = syscall(CALL_LANDLOCK_CREATE_RULESET, &domain, sizeof domain, 0);
	bool done;

	if (fd < 0)
		return !is_shortage();
	done = syscall(CALL_LANDLOCK_RESTRICT_SELF, fd, 0) == 0;
	close(fd);
	return done;
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
	if (request->is_confined)
		must(enter_domain(), STEP_PRIVILEGES);
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
