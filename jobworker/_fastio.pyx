# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Moves the bytes: from a job's pipes to its log on disk, and from there to its readers.

    pipe ──splice──▶ segment ──pread──▶ ring ──encode──▶ finished DataChunk messages
            ▲
            └── index record first: which stream the next bytes are, and since when

A `Pump` owns a few native threads that share one epoll set and never take the GIL. A
`Log` is one job's output. This file knows bytes, descriptors and the layout of a DataChunk;
what a job is, who may read it, and when it has ended is decided elsewhere.

Order is everything here. An index record is an intent: it is written before the bytes it
describes are moved, so that a run reaches to the next record and the last run to the end of
the segment. Bytes are moved by splice, so they are in the pipe or on disk and never only in
this process. They are published (`end` grows) after that. So whoever kills this process,
whenever, both the bytes and whose they are can be read back exactly.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EBADMSG, EINTR, EIO, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy
from posix.stat cimport fstat, struct_stat
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.types cimport off_t
from posix.unistd cimport close, pread, pwrite, read, write

cdef extern from "<fcntl.h>" nogil:
    enum: O_CLOEXEC, O_CREAT, O_RDONLY, O_RDWR, F_SETPIPE_SZ, SPLICE_F_MOVE, SPLICE_F_NONBLOCK
    int openat(int directory, const char *path, int flags, ...)
    int fcntl(int fd, int command, ...)
    ssize_t splice(int source, off_t *source_offset, int target, off_t *target_offset,
                   size_t length, unsigned int flags)

cdef extern from "<sys/ioctl.h>" nogil:
    enum: FIONREAD
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<poll.h>" nogil:
    enum: POLLIN, POLLHUP
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
    enum: EPOLLIN, EPOLLONESHOT, EPOLLEXCLUSIVE
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int capacity, int timeout)

cdef extern from "<sys/eventfd.h>" nogil:
    enum: EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE
    int eventfd(unsigned int initial, int flags)

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    enum: SIG_SETMASK
    int sigfillset(sigset_t *signals)

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_attr_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_attr_init(pthread_attr_t *attributes)
    int pthread_attr_setstacksize(pthread_attr_t *attributes, size_t size)
    int pthread_attr_destroy(pthread_attr_t *attributes)
    int pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                       void *(*start)(void *) noexcept nogil, void *argument)
    int pthread_join(pthread_t thread, void **result)
    int pthread_sigmask(int how, const sigset_t *signals, sigset_t *before)

# Streams, on disk and on the wire.
STDOUT = 1
STDERR = 2
# What `Pump.news` says of a log.
ARRIVED = 1   # bytes, for a reader that waits
FINISHED = 2  # all there will ever be is on disk, both pipes are closed
TROUBLE = 4   # `Log.error` has changed: the disk refuses, or takes bytes again

SEGMENT_BYTES = 64 << 20

cdef enum:
    NEWS_ARRIVED = 1
    NEWS_FINISHED = 2
    NEWS_TROUBLE = 4

    THREADS = 4                   # one stuck in a slow disk leaves three
    STACK_BYTES = 128 << 10
    TURN_BYTES = 1 << 20          # what one pipe may move before the next has its turn
    RETRY_MILLISECONDS = 100      # between tries while the disk is full: nothing wakes us
    DEFAULT_PIPE_BYTES = 64 << 10
    LOUD_PIPE_BYTES = 1 << 20
    LOUD_PIPES = 64               # at most so many pipes of that size: it is kernel memory
    RING_BYTES = 64 << 10
    LOUD_RING_BYTES = 1 << 20
    RING_RUNS = 256               # a power of two
    MESSAGE_RUNS = 1024           # of a message read from disk, at most 24 KiB of it
    SHARED_MESSAGES = 4           # a log keeps so many for readers that come to the same place

    INDEX_HEADER_BYTES = 16
    RUN_BYTES = 16
    STREAM_SHIFT = 56
    NAME_BYTES = 64

cdef uint64_t OFFSET_MASK = (<uint64_t> 1 << STREAM_SHIFT) - 1
cdef uint64_t FINE_SLOT_NS = 10_000_000       # runs of one stream coalesce within a slot
cdef uint64_t COARSE_SLOT_NS = 1_000_000_000  # once the index would outgrow the log
cdef const char *INDEX_MAGIC = "jwindex\x01"  # the last byte is the version of the format


# A run of bytes of one stream, as it stands in the index: 16 bytes, host byte order.
cdef struct Run:
    uint64_t place    # offset of its first byte, and the stream in the top 8 bits
    uint64_t time_ns  # when that byte came, since the epoch

# The two files of one segment, open during one turn.
cdef struct Files:
    uint64_t first    # the offset that names them
    int segment
    int index

cdef struct PumpState:
    pthread_mutex_t lock  # taken after a log's lock, never before it
    int epoll
    int wake              # semaphore: one count for each kicked log, or for each thread at the end
    int bell              # readable while somebody has news for Python
    int directory
    uint64_t segment_bytes
    bint stopping
    LogState *kicked      # to be served though no pipe is readable
    LogState *retrying    # the disk refused their bytes
    uint64_t retry_at_ns
    LogState *news
    LogState *unused      # see LogState
    size_t ring_budget
    size_t ring_used
    int loud_pipes
    pthread_t threads[THREADS]
    int thread_count

# The memory of a LogState is used again but never freed while the pump runs: a thread may
# hold an event for a log that another thread has just finished. It then serves whatever log
# lives there now, one turn too many, which does no harm.
cdef struct LogState:
    pthread_mutex_t lock   # guards all below that does not say otherwise
    PumpState *pump
    void *owner            # the Log; borrowed, the Pump holds it until it is finished
    LogState *next_unused
    uint64_t job

    # Only the serving thread touches these. `serving` makes it one at a time.
    Run run                # the newest index record
    bint run_is_new        # no byte of it has been published yet
    uint64_t index_first   # the segment that `index_bytes` belongs to
    uint64_t index_bytes
    bint was_enlarged[2]   # we asked for a larger pipe
    bint is_loud[2]        # and got it
    bint serving
    int pending            # streams whose turn came while the log was being served

    int pipes[2]           # our read ends; -1 once closed
    uint64_t end           # what readers may see
    uint64_t stream_bytes[2]
    bint draining          # nobody may write any more: take what is in the pipes and finish
    uint64_t drain_left[2]
    bint finished
    int error              # errno of a disk that refuses; 0: it takes bytes

    char *ring             # the hot tail: [ring_start, end), the byte at x in ring[x % size]
    size_t ring_bytes
    uint64_t ring_start
    Run *runs              # those of the ring's window
    uint64_t run_first     # counted from 0, the index in `runs` is modulo RING_RUNS
    uint64_t run_count
    int readers

    bint waited_for        # a reader sleeps until `end` grows
    int news_bits
    LogState *next_news
    # Guarded by the pump's lock, and left alone when the memory is used again.
    bint is_kicked
    LogState *next_kicked
    bint is_retrying
    LogState *next_retrying


# ── from the pipe to the disk: native threads, no GIL ───────────────────────────────────

cdef void *pump_thread(void *argument) noexcept nogil:
    cdef PumpState *pump = <PumpState *> argument
    cdef epoll_event event
    cdef uint64_t count = 0
    cdef LogState *log
    cdef int ready
    while not pump.stopping:
        # One event at a time: what a slow disk delays is one pipe, not a batch of them.
        ready = epoll_wait(pump.epoll, &event, 1,
                           RETRY_MILLISECONDS if pump.retrying != NULL else -1)
        if pump.retrying != NULL:
            kick_retrying(pump)
        if ready <= 0:
            continue
        if event.data.u64 != 0:
            serve_log(<LogState *> (event.data.u64 & ~<uint64_t> 1), 1 << (event.data.u64 & 1))
        elif read(pump.wake, &count, 8) == 8:
            log = pop_kicked(pump)
            if log != NULL:
                serve_log(log, 3)
    return NULL


cdef void serve_log(LogState *log, int streams) noexcept nogil:
    """Gives each of these streams (bits) a turn; one thread at a time serves a log."""
    cdef int stream
    cdef bint draining
    pthread_mutex_lock(&log.lock)
    log.pending |= streams
    if log.serving or log.finished:
        pthread_mutex_unlock(&log.lock)
        return
    log.serving = True
    while log.pending:
        streams = log.pending
        log.pending = 0
        draining = log.draining
        pthread_mutex_unlock(&log.lock)
        for stream in range(2):
            if streams & (1 << stream) and log.pipes[stream] >= 0:
                serve_pipe(log, stream, draining)
        pthread_mutex_lock(&log.lock)
    log.serving = False
    if log.readers == 0:
        free_ring(log)
    if log.pipes[0] < 0 and log.pipes[1] < 0:
        log.finished = True
        tell(log, NEWS_FINISHED)
    pthread_mutex_unlock(&log.lock)


cdef void serve_pipe(LogState *log, int stream, bint draining) noexcept nogil:
    """One bounded turn of one pipe."""
    cdef int pipe = log.pipes[stream]
    cdef int64_t left = TURN_BYTES
    cdef int64_t waiting, moved
    cdef bint over = False
    cdef int error = 0
    cdef Files files
    files.first = 0
    files.segment = files.index = -1
    while left > 0:
        # Asking first keeps an index record from being written for nothing.
        waiting = bytes_waiting(pipe)
        if waiting >= DEFAULT_PIPE_BYTES and not log.was_enlarged[stream]:
            enlarge_pipe(log, stream)
        if draining:
            waiting = min(waiting, <int64_t> log.drain_left[stream])
        if waiting == 0:
            over = draining or is_hung_up(pipe)
            break
        moved = move_bytes(log, stream, min(waiting, left), &files)
        if moved < 0:
            if moved != -EAGAIN and moved != -EINTR:
                error = <int> -moved
                break
            continue
        left -= moved
        if draining:
            log.drain_left[stream] -= moved
    close_files(&files)
    note_error(log, error)
    if over:
        close_pipe(log, stream)
    elif error:
        retry_later(log)
    else:
        watch_pipe(log, stream, EPOLL_CTL_MOD)


cdef int64_t move_bytes(LogState *log, int stream, int64_t length, Files *files) noexcept nogil:
    """Moves up to `length` bytes into one segment. Returns how many, or -errno."""
    cdef uint64_t segment_bytes = log.pump.segment_bytes
    cdef uint64_t first = log.end - log.end % segment_bytes
    cdef off_t position
    cdef ssize_t moved
    cdef int error
    error = open_files(log, first, files)
    if error == 0:
        error = write_intent(log, stream, files)
    if error:
        return -error
    length = min(length, <int64_t> (first + segment_bytes - log.end))
    position = log.end - first
    moved = splice(log.pipes[stream], NULL, files.segment, &position, length,
                   SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
    if moved < 0:
        return -errno
    if moved == 0:
        return -EAGAIN  # some were waiting, and somebody else took them
    publish(log, stream, moved, files)
    return moved


cdef int write_intent(LogState *log, int stream, Files *files) noexcept nogil:
    """Says in the index whose the next bytes are, where that or the time slot changed."""
    cdef uint64_t now = realtime_ns()
    cdef uint64_t slot = FINE_SLOT_NS
    cdef uint64_t position
    cdef bint starts_segment = log.index_first != files.first or log.index_bytes == 0
    cdef Run run
    if now < log.run.time_ns:
        now = log.run.time_ns  # the clock was set back; the order of times stays right
    if not starts_segment:
        # Time resolution is given up before the index outgrows what it describes.
        if log.index_bytes > (64 << 10) + (log.end - files.first) // 8:
            slot = COARSE_SLOT_NS
        if run_stream(&log.run) == stream + 1 and now // slot == log.run.time_ns // slot:
            return 0
        position = log.index_bytes
        if run_offset(&log.run) == log.end:
            position -= RUN_BYTES  # the last intent came to nothing: replace it
    else:
        if pwrite(files.index, INDEX_MAGIC, 8, 0) != 8:
            return errno or EIO
        if pwrite(files.index, &files.first, 8, 8) != 8:
            return errno or EIO
        position = INDEX_HEADER_BYTES
    run.place = log.end | (<uint64_t> (stream + 1) << STREAM_SHIFT)
    run.time_ns = now
    if pwrite(files.index, &run, RUN_BYTES, position) != RUN_BYTES:
        return errno or EIO
    log.run = run
    log.run_is_new = True
    log.index_first = files.first
    log.index_bytes = position + RUN_BYTES
    return 0


cdef void publish(LogState *log, int stream, int64_t length, Files *files) noexcept nogil:
    """Makes bytes that are on disk visible, and hot where somebody reads."""
    cdef char *ring
    cdef uint64_t end = log.end + length
    cdef bint copied = False
    pthread_mutex_lock(&log.lock)
    ring = log.ring
    if ring != NULL and end - log.ring_start > log.ring_bytes:
        log.ring_start = end - log.ring_bytes  # what is about to be overwritten
    pthread_mutex_unlock(&log.lock)
    # Nobody frees or replaces the ring meanwhile: that is the serving thread's, and ours.
    if ring != NULL:
        copied = fill_ring(log, end, length, files)
    pthread_mutex_lock(&log.lock)
    if log.ring != NULL:
        if ring == NULL or not copied:
            restart_ring(log, end)  # it came, or failed, in between
        elif log.run_is_new:
            push_run(log, &log.run)
    log.run_is_new = False
    log.end = end
    log.stream_bytes[stream] += length
    if log.ring != NULL and length * 2 > <int64_t> log.ring_bytes:
        grow_ring(log)
    if log.waited_for:
        log.waited_for = False
        tell(log, NEWS_ARRIVED)
    pthread_mutex_unlock(&log.lock)


cdef bint fill_ring(LogState *log, uint64_t end, uint64_t length, Files *files) noexcept nogil:
    """Reads the last bytes before `end` back from the segment into the ring."""
    cdef uint64_t offset = end - min(length, <uint64_t> log.ring_bytes)
    cdef uint64_t place, part
    while offset < end:
        place = offset % log.ring_bytes
        part = min(end - offset, log.ring_bytes - place)
        if pread(files.segment, log.ring + place, part, offset - files.first) != <ssize_t> part:
            return False
        offset += part
    return True


cdef int64_t bytes_waiting(int pipe) noexcept nogil:
    cdef int waiting = 0
    if ioctl(pipe, FIONREAD, &waiting) < 0:
        return 0
    return waiting


cdef bint is_hung_up(int pipe) noexcept nogil:
    """True once nobody can write any more and nothing is left to read."""
    cdef pollfd asked
    asked.fd = pipe
    asked.events = POLLIN
    asked.revents = 0
    return poll(&asked, 1, 0) > 0 and asked.revents & POLLHUP and not asked.revents & POLLIN


cdef void enlarge_pipe(LogState *log, int stream) noexcept nogil:
    """A loud job's pipe gets 1 MiB, which doubles its throughput and more."""
    cdef PumpState *pump = log.pump
    log.was_enlarged[stream] = True  # asked once, though it may be refused
    pthread_mutex_lock(&pump.lock)
    if (pump.loud_pipes < LOUD_PIPES
            and fcntl(log.pipes[stream], F_SETPIPE_SZ, LOUD_PIPE_BYTES) >= 0):
        pump.loud_pipes += 1
        log.is_loud[stream] = True
    pthread_mutex_unlock(&pump.lock)


cdef int open_files(LogState *log, uint64_t first, Files *files) noexcept nogil:
    """Opens the segment and the index that `first` names; they stay open for one turn only,
    so that a job that writes nothing costs no descriptor. Returns errno, or 0."""
    if files.segment >= 0 and files.first == first:
        return 0
    close_files(files)
    files.first = first
    files.segment = open_file(log.pump.directory, log.job, first, b"log", O_RDWR | O_CREAT)
    if files.segment < 0:
        return errno
    files.index = open_file(log.pump.directory, log.job, first, b"idx", O_RDWR | O_CREAT)
    if files.index < 0:
        return errno
    return 0


cdef int open_file(int directory, uint64_t job, uint64_t first, const char *kind,
                   int flags) noexcept nogil:
    cdef char name[NAME_BYTES]
    snprintf(name, NAME_BYTES, "%llu.%llu.%s",
             <unsigned long long> job, <unsigned long long> first, kind)
    return openat(directory, name, flags | O_CLOEXEC, 0o600)


cdef void close_files(Files *files) noexcept nogil:
    if files.segment >= 0:
        close(files.segment)
    if files.index >= 0:
        close(files.index)
    files.segment = files.index = -1


cdef void watch_pipe(LogState *log, int stream, int operation) noexcept nogil:
    """One event, then silence until the next call: so one thread at a time gets a pipe."""
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLONESHOT
    event.data.u64 = <uint64_t> log | <uint64_t> stream
    epoll_ctl(log.pump.epoll, operation, log.pipes[stream], &event)


cdef void close_pipe(LogState *log, int stream) noexcept nogil:
    cdef int pipe = log.pipes[stream]
    # Closing alone would not do: jobinit's duplicate keeps the registration alive.
    epoll_ctl(log.pump.epoll, EPOLL_CTL_DEL, pipe, NULL)
    pthread_mutex_lock(&log.lock)
    log.pipes[stream] = -1
    pthread_mutex_unlock(&log.lock)
    if log.is_loud[stream]:
        pthread_mutex_lock(&log.pump.lock)
        log.pump.loud_pipes -= 1
        pthread_mutex_unlock(&log.pump.lock)
    close(pipe)


cdef void note_error(LogState *log, int error) noexcept nogil:
    pthread_mutex_lock(&log.lock)
    if log.error != error:
        log.error = error
        tell(log, NEWS_TROUBLE)
    pthread_mutex_unlock(&log.lock)


cdef void retry_later(LogState *log) noexcept nogil:
    """The disk refused: the job waits on its full pipe, and nothing is lost."""
    pthread_mutex_lock(&log.pump.lock)
    if log.pump.retrying == NULL:
        log.pump.retry_at_ns = monotonic_ns() + RETRY_MILLISECONDS * 1_000_000
    if not log.is_retrying:
        log.is_retrying = True
        log.next_retrying = log.pump.retrying
        log.pump.retrying = log
    pthread_mutex_unlock(&log.pump.lock)


cdef void kick_retrying(PumpState *pump) noexcept nogil:
    cdef LogState *log
    pthread_mutex_lock(&pump.lock)
    if monotonic_ns() >= pump.retry_at_ns:
        while pump.retrying != NULL:
            log = pump.retrying
            pump.retrying = log.next_retrying
            log.is_retrying = False
            kick_locked(log)
    pthread_mutex_unlock(&pump.lock)


cdef void kick_locked(LogState *log) noexcept nogil:
    """Has a thread serve the log though no pipe is readable. The pump's lock is held."""
    cdef uint64_t one = 1
    if log.is_kicked:
        return
    log.is_kicked = True
    log.next_kicked = log.pump.kicked
    log.pump.kicked = log
    write(log.pump.wake, &one, 8)


cdef LogState *pop_kicked(PumpState *pump) noexcept nogil:
    cdef LogState *log
    pthread_mutex_lock(&pump.lock)
    log = pump.kicked
    if log != NULL:
        pump.kicked = log.next_kicked
        log.is_kicked = False
    pthread_mutex_unlock(&pump.lock)
    return log


cdef void tell(LogState *log, int bits) noexcept nogil:
    """Puts the log on the list that Python reads. The log's lock is held."""
    cdef PumpState *pump = log.pump
    cdef uint64_t one = 1
    cdef bint is_listed = log.news_bits != 0
    cdef bint rings
    log.news_bits |= bits
    if is_listed:
        return
    pthread_mutex_lock(&pump.lock)
    rings = pump.news == NULL
    log.next_news = pump.news
    pump.news = log
    pthread_mutex_unlock(&pump.lock)
    if rings:
        write(pump.bell, &one, 8)


cdef uint64_t clock_ns(int clock) noexcept nogil:
    cdef timespec now
    clock_gettime(clock, &now)
    return <uint64_t> now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef uint64_t realtime_ns() noexcept nogil:
    return clock_ns(CLOCK_REALTIME)


cdef uint64_t monotonic_ns() noexcept nogil:
    return clock_ns(CLOCK_MONOTONIC)


cdef uint64_t run_offset(const Run *run) noexcept nogil:
    return run.place & OFFSET_MASK


cdef int run_stream(const Run *run) noexcept nogil:
    return run.place >> STREAM_SHIFT


# ── the ring: the hot tail of a log that somebody reads. The log's lock is held ─────────

cdef void make_ring(LogState *log, size_t size) noexcept nogil:
    """Nothing happens where memory or the budget is short: readers then read from disk."""
    cdef char *ring
    cdef Run *runs = log.runs
    if not reserve(log.pump, size):
        return
    ring = <char *> malloc(size)
    if runs == NULL:
        runs = <Run *> malloc(RING_RUNS * sizeof(Run))
    if ring == NULL or runs == NULL:
        free(ring)
        if runs != log.runs:
            free(runs)
        release(log.pump, size)
        return
    free(log.ring)
    release(log.pump, log.ring_bytes)
    log.ring = ring
    log.ring_bytes = size
    log.runs = runs
    restart_ring(log, log.end)


cdef void grow_ring(LogState *log) noexcept nogil:
    if log.ring_bytes < LOUD_RING_BYTES:
        make_ring(log, LOUD_RING_BYTES)


cdef void free_ring(LogState *log) noexcept nogil:
    if log.ring == NULL:
        return
    free(log.ring)
    free(log.runs)
    release(log.pump, log.ring_bytes)
    log.ring = NULL
    log.runs = NULL
    log.ring_bytes = 0


cdef void restart_ring(LogState *log, uint64_t offset) noexcept nogil:
    """Empties the ring: it now starts at `offset`, inside the newest run."""
    cdef Run run = log.run
    if run_offset(&run) < offset:
        run.place = offset | (run.place & ~OFFSET_MASK)
    log.ring_start = offset
    log.run_first = log.run_count = 0
    push_run(log, &run)


cdef void push_run(LogState *log, const Run *run) noexcept nogil:
    if log.run_count == RING_RUNS:
        log.run_first += 1
        log.run_count -= 1
    log.runs[(log.run_first + log.run_count) % RING_RUNS] = run[0]
    log.run_count += 1


cdef bint reserve(PumpState *pump, size_t size) noexcept nogil:
    cdef bint fits
    pthread_mutex_lock(&pump.lock)
    fits = pump.ring_used + size <= pump.ring_budget
    if fits:
        pump.ring_used += size
    pthread_mutex_unlock(&pump.lock)
    return fits


cdef void release(PumpState *pump, size_t size) noexcept nogil:
    pthread_mutex_lock(&pump.lock)
    pump.ring_used -= size
    pthread_mutex_unlock(&pump.lock)


# ── finished messages ───────────────────────────────────────────────────────────────────

# A DataChunk (proto/job_worker.proto), encoded by hand: payload, offset, next_offset, runs.
# The payload stands first, so that what a client of the old protocol reads is a prefix.
cdef enum:
    TAG_PAYLOAD = 0x0A
    TAG_OFFSET = 0x10
    TAG_NEXT_OFFSET = 0x18
    TAG_RUN = 0x22
    TAG_RUN_STREAM = 0x08
    TAG_RUN_LENGTH = 0x10
    TAG_RUN_TIME = 0x19


cdef struct Span:
    uint64_t offset  # of the first byte
    uint64_t limit   # one more than the last
    int only         # the one stream asked for; 0: both
    Run *runs        # those that cover it; the first may start before it
    size_t run_count


cdef size_t span_run_length(const Span *span, size_t i) noexcept nogil:
    """How many bytes of the i-th run are in the span, and asked for."""
    cdef uint64_t start = max(span.offset, run_offset(&span.runs[i]))
    cdef uint64_t limit = span.limit
    if span.only and run_stream(&span.runs[i]) != span.only:
        return 0
    if i + 1 < span.run_count:
        limit = min(limit, run_offset(&span.runs[i + 1]))
    return limit - start if limit > start else 0


cdef size_t span_payload_bytes(const Span *span) noexcept nogil:
    cdef size_t i, total = 0
    for i in range(span.run_count):
        total += span_run_length(span, i)
    return total


cdef size_t span_tail_bytes(const Span *span) noexcept nogil:
    cdef size_t i, length
    cdef size_t total = 2 + varint_bytes(span.offset) + varint_bytes(span.limit)
    for i in range(span.run_count):
        length = span_run_length(span, i)
        if length:
            total += 2 + run_bytes(length)
    return total


cdef size_t run_bytes(size_t length) noexcept nogil:
    return 2 + 1 + varint_bytes(length) + 9


cdef size_t varint_bytes(uint64_t value) noexcept nogil:
    cdef size_t count = 1
    while value >= 0x80:
        value >>= 7
        count += 1
    return count


cdef char *put_varint(char *place, uint64_t value) noexcept nogil:
    while value >= 0x80:
        place[0] = <char> (value | 0x80)
        place += 1
        value >>= 7
    place[0] = <char> value
    return place + 1


cdef char *put_tail(char *place, const Span *span) noexcept nogil:
    cdef size_t i, length
    place[0] = TAG_OFFSET
    place = put_varint(place + 1, span.offset)
    place[0] = TAG_NEXT_OFFSET
    place = put_varint(place + 1, span.limit)
    for i in range(span.run_count):
        length = span_run_length(span, i)
        if length == 0:
            continue
        place[0] = TAG_RUN
        place[1] = <char> run_bytes(length)
        place[2] = TAG_RUN_STREAM
        place[3] = <char> run_stream(&span.runs[i])
        place[4] = TAG_RUN_LENGTH
        place = put_varint(place + 5, length)
        place[0] = TAG_RUN_TIME
        memcpy(place + 1, &span.runs[i].time_ns, 8)
        place += 9
    return place


cdef object new_message(const Span *span, char **payload):
    """The bytes of a DataChunk, complete but for the payload, whose place is handed back."""
    cdef size_t length = span_payload_bytes(span)
    cdef object message = PyBytes_FromStringAndSize(
        NULL, 1 + varint_bytes(length) + length + span_tail_bytes(span))
    cdef char *place = PyBytes_AS_STRING(message)
    place[0] = TAG_PAYLOAD
    payload[0] = put_varint(place + 1, length)
    put_tail(payload[0] + length, span)
    return message


cdef uint64_t cut(uint64_t offset, uint64_t end, uint64_t max_bytes) noexcept nogil:
    """Where a message from `offset` ends: at a multiple of its largest size, so that readers
    who catch up come to the same places, and share their messages from there on."""
    return min(end, (offset // max_bytes + 1) * max_bytes)


cdef class Pump:
    """The native threads that drain all jobs' pipes to disk.

    directory: an open directory descriptor, for the segments and indexes; stays the caller's.
    ring_budget: bytes, of the hot tails of all logs together.
    """

    cdef PumpState state
    cdef dict logs  # job id -> Log, until it is finished: the threads know only addresses
    cdef bint closed

    def __cinit__(self, int directory, size_t ring_budget, uint64_t segment_bytes=SEGMENT_BYTES):
        cdef epoll_event event
        self.logs = {}
        self.closed = True
        self.state.epoll = self.state.wake = self.state.bell = -1
        self.state.directory = directory
        self.state.ring_budget = ring_budget
        self.state.segment_bytes = segment_bytes
        pthread_mutex_init(&self.state.lock, NULL)
        self.closed = False
        self.state.epoll = epoll_create1(EPOLL_CLOEXEC)
        self.state.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE)
        self.state.bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.state.epoll < 0 or self.state.wake < 0 or self.state.bell < 0:
            raise_errno()
        event.events = EPOLLIN | EPOLLEXCLUSIVE
        event.data.u64 = 0
        if epoll_ctl(self.state.epoll, EPOLL_CTL_ADD, self.state.wake, &event) < 0:
            raise_errno()
        self.start_threads()

    cdef start_threads(self):
        cdef sigset_t all_signals, before
        cdef pthread_attr_t attributes
        cdef int error = 0
        # Signals are the event loop's: a thread that took one would only delay it.
        sigfillset(&all_signals)
        pthread_sigmask(SIG_SETMASK, &all_signals, &before)
        pthread_attr_init(&attributes)
        pthread_attr_setstacksize(&attributes, STACK_BYTES)
        while self.state.thread_count < THREADS and error == 0:
            error = pthread_create(&self.state.threads[self.state.thread_count], &attributes,
                                   pump_thread, &self.state)
            if error == 0:
                self.state.thread_count += 1
        pthread_attr_destroy(&attributes)
        pthread_sigmask(SIG_SETMASK, &before, NULL)
        if error:
            self.close()
            raise OSError(error, "cannot start the output threads")

    def __dealloc__(self):
        cdef LogState *log
        self.stop_threads()
        for descriptor in (self.state.epoll, self.state.wake, self.state.bell):
            if descriptor >= 0:
                close(descriptor)
        while self.state.unused != NULL:
            log = self.state.unused
            self.state.unused = log.next_unused
            pthread_mutex_destroy(&log.lock)
            free(log)
        pthread_mutex_destroy(&self.state.lock)

    def fileno(self):
        return self.state.bell

    def news(self):
        cdef LogState *state
        cdef LogState *next_state
        cdef uint64_t count = 0
        cdef int bits
        cdef list found = []
        read(self.state.bell, &count, 8)
        pthread_mutex_lock(&self.state.lock)
        state = self.state.news
        self.state.news = NULL
        pthread_mutex_unlock(&self.state.lock)
        while state != NULL:
            next_state = state.next_news
            pthread_mutex_lock(&state.lock)
            bits = state.news_bits
            state.news_bits = 0
            pthread_mutex_unlock(&state.lock)
            log = <object> state.owner
            found.append((log, bits))
            if bits & NEWS_FINISHED:
                del self.logs[state.job]
            state = next_state
        return found

    def close(self):
        self.stop_threads()
        for log in self.logs.values():
            (<Log> log).abandon()
        self.logs.clear()

    cdef void stop_threads(self) noexcept:
        cdef uint64_t one = 1
        cdef int _number
        if self.closed:
            return
        self.closed = True
        self.state.stopping = True
        with nogil:
            for _number in range(self.state.thread_count):
                write(self.state.wake, &one, 8)
            for _number in range(self.state.thread_count):
                pthread_join(self.state.threads[_number], NULL)

    cdef LogState *take_state(self) except NULL:
        cdef LogState *state = self.state.unused
        if state != NULL:
            self.state.unused = state.next_unused
            return state
        state = <LogState *> calloc(1, sizeof(LogState))
        if state == NULL:
            raise MemoryError
        pthread_mutex_init(&state.lock, NULL)
        state.pump = &self.state
        state.finished = True  # no thread touches it before `Log` says so
        return state


cdef class Log:
    """One job's output, from the moment its pipes are ours until all of it is on disk."""

    cdef Pump pump
    cdef LogState *state
    cdef dict shared  # (offset, largest size) -> (message, next offset), the newest few

    def __cinit__(self, Pump pump, uint64_t job, int stdout, int stderr):
        if pump.closed:
            raise ValueError("the pump is closed")
        if job in pump.logs:
            raise ValueError(f"job {job} has a log already")
        self.pump = pump
        self.shared = {}
        self.state = pump.take_state()
        self.reset_state(job, stdout, stderr)
        pump.logs[job] = self
        for stream in range(2):
            if self.state.pipes[stream] >= 0:
                watch_pipe(self.state, stream, EPOLL_CTL_ADD)

    cdef void reset_state(self, uint64_t job, int stdout, int stderr) noexcept:
        cdef LogState *state = self.state
        cdef int stream
        pthread_mutex_lock(&state.lock)
        state.owner = <void *> self
        state.job = job
        state.run.place = state.run.time_ns = 0
        state.run_is_new = False
        state.index_first = state.index_bytes = 0
        state.pending = 0
        state.end = 0
        state.pipes[0] = stdout
        state.pipes[1] = stderr
        for stream in range(2):
            state.was_enlarged[stream] = state.is_loud[stream] = False
            state.stream_bytes[stream] = state.drain_left[stream] = 0
        state.draining = state.finished = False
        state.error = 0
        state.readers = 0
        state.waited_for = False
        state.news_bits = 0
        pthread_mutex_unlock(&state.lock)

    def __dealloc__(self):
        if self.state == NULL:
            return
        pthread_mutex_lock(&self.state.lock)
        free_ring(self.state)
        pthread_mutex_unlock(&self.state.lock)
        self.state.next_unused = self.pump.state.unused
        self.pump.state.unused = self.state

    cdef void abandon(self) noexcept:
        """The threads are gone: closes the pipes, whatever is in them."""
        cdef int stream
        for stream in range(2):
            if self.state.pipes[stream] >= 0:
                close_pipe(self.state, stream)
        self.state.finished = True

    @property
    def job(self):
        return self.state.job

    @property
    def end(self):
        pthread_mutex_lock(&self.state.lock)
        end = self.state.end
        pthread_mutex_unlock(&self.state.lock)
        return end

    @property
    def stream_bytes(self):
        cdef uint64_t out, err
        pthread_mutex_lock(&self.state.lock)
        out = self.state.stream_bytes[0]
        err = self.state.stream_bytes[1]
        pthread_mutex_unlock(&self.state.lock)
        return out, err

    @property
    def finished(self):
        return bool(self.state.finished)

    @property
    def error(self):
        return self.state.error

    def drain(self):
        cdef LogState *state = self.state
        cdef int stream
        pthread_mutex_lock(&state.lock)
        if not state.draining and not state.finished:
            for stream in range(2):
                if state.pipes[stream] >= 0:
                    state.drain_left[stream] = bytes_waiting(state.pipes[stream])
            state.draining = True
            pthread_mutex_lock(&state.pump.lock)
            kick_locked(state)
            pthread_mutex_unlock(&state.pump.lock)
        pthread_mutex_unlock(&state.lock)

    def add_reader(self):
        cdef LogState *state = self.state
        pthread_mutex_lock(&state.lock)
        state.readers += 1
        if state.ring == NULL and not state.finished:
            make_ring(state, RING_BYTES)
        pthread_mutex_unlock(&state.lock)

    def remove_reader(self):
        cdef LogState *state = self.state
        pthread_mutex_lock(&state.lock)
        state.readers -= 1
        if state.readers == 0 and not state.serving:
            free_ring(state)  # else the serving thread does it
        pthread_mutex_unlock(&state.lock)
        if state.readers < 2:
            self.shared.clear()

    def wait_from(self, uint64_t offset):
        cdef LogState *state = self.state
        cdef bint waits
        pthread_mutex_lock(&state.lock)
        waits = state.end <= offset and not state.finished
        if waits:
            state.waited_for = True
        pthread_mutex_unlock(&state.lock)
        return waits

    def message(self, uint64_t offset, uint64_t max_bytes, int stream=0):
        cdef LogState *state = self.state
        cdef object found
        cdef bint shares = stream == 0 and state.readers > 1
        if shares:
            found = self.shared.get((offset, max_bytes))
            if found is not None:
                return found
        pthread_mutex_lock(&state.lock)
        try:
            found = ring_message(state, offset, max_bytes, stream)
        finally:
            pthread_mutex_unlock(&state.lock)
        if shares and found is not None and found[0] is not None:
            if len(self.shared) == SHARED_MESSAGES:
                del self.shared[next(iter(self.shared))]
            self.shared[offset, max_bytes] = found
        return found


cdef object ring_message(LogState *log, uint64_t offset, uint64_t max_bytes, int stream):
    """(message or None, next offset) from the ring; None where the ring does not have it."""
    cdef Run runs[RING_RUNS]
    cdef Span span
    cdef uint64_t first, i
    cdef char *place = NULL
    cdef size_t length
    if offset >= log.end:
        return None, offset
    if log.ring == NULL or offset < log.ring_start:
        return None
    if offset < run_offset(&log.runs[log.run_first % RING_RUNS]):
        return None
    first = find_ring_run(log, offset)
    span.offset = offset
    span.limit = cut(offset, log.end, max_bytes)
    span.only = stream
    span.runs = runs
    span.run_count = 0
    for i in range(first, log.run_first + log.run_count):
        if run_offset(&log.runs[i % RING_RUNS]) >= span.limit:
            break
        runs[span.run_count] = log.runs[i % RING_RUNS]
        span.run_count += 1
    if span_payload_bytes(&span) == 0:
        return None, span.limit
    message = new_message(&span, &place)
    for i in range(span.run_count):
        length = span_run_length(&span, i)
        copy_from_ring(log, place, max(offset, run_offset(&runs[i])), length)
        place += length
    return message, span.limit


cdef uint64_t find_ring_run(LogState *log, uint64_t offset) noexcept nogil:
    """The number of the last run that starts at or before `offset`."""
    cdef uint64_t low = log.run_first
    cdef uint64_t high = log.run_first + log.run_count
    cdef uint64_t middle
    while high - low > 1:
        middle = (low + high) // 2
        if run_offset(&log.runs[middle % RING_RUNS]) <= offset:
            low = middle
        else:
            high = middle
    return low


cdef void copy_from_ring(
        LogState *log, char *target, uint64_t offset, size_t length) noexcept nogil:
    cdef size_t place = offset % log.ring_bytes
    cdef size_t part = min(length, log.ring_bytes - place)
    memcpy(target, log.ring + place, part)
    memcpy(target + part, log.ring, length - part)


# ── history: messages from the segments on disk ─────────────────────────────────────────

def read_message(int directory, uint64_t job, uint64_t end, uint64_t offset,
                 uint64_t max_bytes, int stream=0, uint64_t segment_bytes=SEGMENT_BYTES):
    cdef uint64_t first = offset - offset % segment_bytes
    cdef Run runs[MESSAGE_RUNS]
    cdef Span span
    cdef char *payload = NULL
    cdef int error
    if offset >= end:
        return None, offset
    span.offset = offset
    span.limit = cut(offset, min(end, first + segment_bytes), max_bytes)
    span.only = stream
    span.runs = runs
    span.run_count = 0
    with nogil:
        error = load_runs(directory, job, first, &span)
    if error:
        raise_damage(error, job, first, "idx")
    if span_payload_bytes(&span) == 0:
        return None, span.limit
    message = new_message(&span, &payload)
    with nogil:
        error = load_payload(directory, job, first, &span, payload)
    if error:
        raise_damage(error, job, first, "log")
    return message, span.limit


cdef int load_runs(int directory, uint64_t job, uint64_t first, Span *span) noexcept nogil:
    """Fills the span's runs from the index, and shortens the span to what they cover.
    Returns errno, or 0."""
    cdef int index = open_file(directory, job, first, b"idx", O_RDONLY)
    cdef int error
    if index < 0:
        return errno
    error = load_runs_from(index, span)
    close(index)
    return error


cdef int load_runs_from(int index, Span *span) noexcept nogil:
    cdef struct_stat info
    cdef char header[INDEX_HEADER_BYTES]
    cdef uint64_t low, high, middle
    cdef Run run
    cdef ssize_t got
    if pread(index, header, INDEX_HEADER_BYTES, 0) != INDEX_HEADER_BYTES:
        return EBADMSG
    if memcmp(header, INDEX_MAGIC, 8) != 0 or fstat(index, &info) < 0:
        return EBADMSG
    low = 0
    high = (info.st_size - INDEX_HEADER_BYTES) // RUN_BYTES
    while high - low > 1:
        middle = (low + high) // 2
        if pread(index, &run, RUN_BYTES, index_position(middle)) != RUN_BYTES:
            return EBADMSG
        if run_offset(&run) <= span.offset:
            low = middle
        else:
            high = middle
    got = pread(index, span.runs, MESSAGE_RUNS * RUN_BYTES, index_position(low))
    if got < RUN_BYTES or run_offset(&span.runs[0]) > span.offset:
        return EBADMSG
    limit_to_runs(span, got // RUN_BYTES)
    return 0


cdef off_t index_position(uint64_t number) noexcept nogil:
    return INDEX_HEADER_BYTES + number * RUN_BYTES


cdef void limit_to_runs(Span *span, size_t loaded) noexcept nogil:
    """Drops the runs behind the span. Where as many were loaded as there is room for, the
    last one is only good for saying where the one before it ends."""
    if loaded == MESSAGE_RUNS and run_offset(&span.runs[loaded - 1]) < span.limit:
        loaded -= 1
        span.limit = run_offset(&span.runs[loaded])
    while loaded > 1 and run_offset(&span.runs[loaded - 1]) >= span.limit:
        loaded -= 1
    span.run_count = loaded


cdef int load_payload(int directory, uint64_t job, uint64_t first, const Span *span,
                      char *place) noexcept nogil:
    cdef int segment = open_file(directory, job, first, b"log", O_RDONLY)
    cdef uint64_t offset
    cdef size_t i, length
    cdef int error = 0
    if segment < 0:
        return errno
    for i in range(span.run_count):
        length = span_run_length(span, i)
        offset = max(span.offset, run_offset(&span.runs[i]))
        if error == 0 and length:
            error = pread_all(segment, place, length, offset - first)
        place += length
    close(segment)
    return error


cdef int pread_all(int fd, char *place, size_t length, off_t position) noexcept nogil:
    cdef ssize_t got
    while length:
        got = pread(fd, place, length, position)
        if got < 0 and errno == EINTR:
            continue
        if got <= 0:
            return errno if got < 0 else EBADMSG
        place += got
        position += got
        length -= got
    return 0


cdef raise_errno():
    raise OSError(errno, "cannot set up the output threads")


cdef raise_damage(int error, uint64_t job, uint64_t first, str kind):
    name = f"{job}.{first}.{kind}"
    if error == EBADMSG:
        raise OSError(error, "shorter than, or different from, what was written", name)
    raise OSError(error, "cannot read the output of a job", name)
