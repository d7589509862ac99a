/* Views: what confined jobs see of the machine's files.
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

/* A mount of what is there now, that belongs nowhere yet; or a negative errno. */
static int keep_mount(const char *path)
{
	int fd = syscall(CALL_OPEN_TREE, AT_FDCWD, path, CLONED_TREE | O_CLOEXEC);

	return fd < 0 ? -errno : fd;
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

/* found: a mount of the machine's own, for where nobody may make any, as in a user namespace; or a
 * negative errno. What passes, as where jobs have left no namespace of mounts, which each takes, is
 * told, and not the refusal to make one. */
static void make_node(size_t i, int found)
{
	if (mknod(nodes[i].path, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)) == 0) {
		close(found);
		return;
	}
	if (found < 0 && found != -ENOENT)
		errno = -found;
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
	need(set_attributes(AT_FDCWD, "/run", WHOLE_TREE, READ_ONLY) || is_absent(),
	     "make read-only:", "/run");
	/* After that, as it is read-only by what it is bound from. */
	if (lstat("/var/run", &info) == 0 && S_ISDIR(info.st_mode))
		need(bind_mount("/run", "/var/run"), "mount", "/var/run");
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

	for (i = 0; i < mount_line_count; i++) {
		if (!is_of_cgroups(&mount_lines[i]))
			continue;
		if (statfs(mount_lines[i].point, &info) < 0)
			need(!is_shortage(), "look at", mount_lines[i].point);
		else if (info.f_type == CGROUP_SUPER_MAGIC || info.f_type == CGROUP2_SUPER_MAGIC)
			need(bind_mount(HIDDEN_FOLDER, mount_lines[i].point), "hide",
			     mount_lines[i].point);
	}
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
	bool has_resolver;
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
	has_resolver = realpath("/etc/resolv.conf", resolver);
	need(has_resolver || !is_shortage(), "look at", "/etc/resolv.conf");
	if (has_resolver && is_in(resolver, "/run")) {
		resolver_fd = keep_mount(resolver);
		errno = -resolver_fd; /* where it failed */
		need(resolver_fd >= 0 || is_out_of_reach(), "mount", resolver);
	}
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
