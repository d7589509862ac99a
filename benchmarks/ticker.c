/* A job that writes the time: `ticker COUNT PERIOD_MS`, 8 bytes each, in ns of the monotonic
 * clock, which is the same for all processes of a machine. Host byte order. */
#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    int64_t period_ns = atoll(argv[2]) * 1000000, due_ns = now_ns(), written_ns;
    for (int left = atoi(argv[1]); left > 0; left--) {
        written_ns = now_ns();
        if (write(STDOUT_FILENO, &written_ns, sizeof written_ns) != sizeof written_ns)
            return 1;
        due_ns += period_ns;
        struct timespec due = {due_ns / 1000000000, due_ns % 1000000000};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
    }
    return 0;
}
