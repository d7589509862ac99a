/* The floor of the job rate: what the kernel takes for starting and ending a job, and nothing
 * else. For each job a cgroup is made and two pipes; a child joins the cgroup and executes
 * the command; its exec is proved, its output read to the end, its status collected, its
 * cgroup removed. Each worker does one job after the other; no record is kept.
 *
 *     floor CGROUP JOBS WORKERS COMMAND    prints the seconds that all jobs took
 *
 * CGROUP is an existing directory of a cgroup v2, below which each job gets its own.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PATH_BYTES = 512 };

static void run_job(const char *path, const char *command);
static void be_job(const char *path, const char *command, int out, int err, int proof);
static void join_cgroup(const char *path);
static void require_exec(int proof, const char *command);
static void read_to_end(int pipe);
static void make_pipe(int ends[2]);
static double now_seconds(void);

static void work(const char *base, int worker, int jobs, const char *command) {
    char path[PATH_BYTES];
    for (int i = 0; i < jobs; i++) {
        snprintf(path, sizeof path, "%s/floor-%d-%d", base, worker, i);
        run_job(path, command);
    }
}

int main(int argc, char **argv) {
    if (argc != 5)
        errx(2, "usage: floor CGROUP JOBS WORKERS COMMAND");
    int jobs = atoi(argv[2]), workers = atoi(argv[3]), status, failures = 0;
    double started = now_seconds();
    for (int worker = 0; worker < workers; worker++) {
        pid_t pid = fork();
        if (pid < 0)
            err(1, "fork");
        if (pid == 0) {
            work(argv[1], worker, jobs / workers, argv[4]);
            _exit(0);
        }
    }
    while (wait(&status) > 0)
        failures += status != 0;
    if (failures)
        errx(1, "%d workers failed", failures);
    printf("%.6f\n", now_seconds() - started);
    return 0;
}

static void run_job(const char *path, const char *command) {
    int out[2], error[2], proof[2], status;
    if (mkdir(path, 0700) < 0)
        err(1, "mkdir %s", path);
    make_pipe(out);
    make_pipe(error);
    make_pipe(proof);
    pid_t pid = fork();
    if (pid < 0)
        err(1, "fork");
    if (pid == 0)
        be_job(path, command, out[1], error[1], proof[1]);
    close(out[1]);
    close(error[1]);
    close(proof[1]);
    require_exec(proof[0], command);
    read_to_end(out[0]);
    read_to_end(error[0]);
    if (waitpid(pid, &status, 0) != pid || status != 0)
        errx(1, "%s ended with status %d", command, status);
    if (rmdir(path) < 0)
        err(1, "rmdir %s", path);
}

static void be_job(const char *path, const char *command, int out, int error, int proof) {
    int failed;
    join_cgroup(path);
    dup2(out, STDOUT_FILENO);
    dup2(error, STDERR_FILENO);
    execl(command, command, (char *)NULL);
    failed = errno;
    if (write(proof, &failed, sizeof failed) < 0)
        _exit(126);
    _exit(127);
}

static void join_cgroup(const char *path) {
    char procs[PATH_BYTES + 16];
    snprintf(procs, sizeof procs, "%s/cgroup.procs", path);
    int fd = open(procs, O_WRONLY | O_CLOEXEC);
    /* 0 is whoever writes it. */
    if (fd < 0 || write(fd, "0", 1) != 1)
        err(1, "%s", procs);
    close(fd);
}

/* The descriptor closes on exec: nothing to read means that it happened. */
static void require_exec(int proof, const char *command) {
    int failed;
    if (read(proof, &failed, sizeof failed) == sizeof failed)
        errx(1, "exec %s: %s", command, strerror(failed));
    close(proof);
}

static void read_to_end(int pipe) {
    char buffer[4096];
    while (read(pipe, buffer, sizeof buffer) > 0)
        ;
    close(pipe);
}

static void make_pipe(int ends[2]) {
    if (pipe2(ends, O_CLOEXEC) < 0)
        err(1, "pipe2");
}

static double now_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}
