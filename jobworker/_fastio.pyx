# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, auto_pickle=False
"""Moves the bytes: from a job's pipes to its log on disk, and from there to its readers.

    pipe ──splice──▶ segment ──pread──▶ ring ──encode──▶ finished DataChunk messages
            ▲
            └── index record first: which stream the next bytes are, and since when

A `Pump` owns a few native threads that share one epoll set and never take the GIL, and gets more
where jobs keep these. A `Log` is one job's output. This file knows bytes, descriptors and the
layout of a DataChunk; what a job is, who may read it, and when it has ended is decided elsewhere.

Order is everything here. An index record is an intent: it is written before the bytes it
describes are moved, so that a run reaches to the next record and the last run to the end of
the segment. Bytes are moved by splice, so they are in the pipe or on disk and never only in
this process. They are published (`end` grows) after that. So whoever kills this process,
whenever, both the bytes and whose they are can be read back exactly, and the next process
goes on where this one was.

A quota, or a full disk, can have bytes dropped. Dropped bytes have offsets like all others:
what of [0, end) is in no segment, or in a gap, was dropped, and readers are told how much.
A gap is a run of no stream in the index, of which the last record says how far it goes. It
is written after its bytes were dropped, once a turn: who is killed in between has counted up
to TURN_BYTES too few, at offsets that no reader had been given.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport (
    EAGAIN, EBADMSG, EDQUOT, EEXIST, EFBIG, EINTR, EIO, ENOENT, ENOSPC, errno)
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc, strtoull
from libc.string cimport memcmp, memcpy, memset, strcmp, strerror, strncmp
from posix.stat cimport fstat, fstatat, struct_stat
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.types cimport off_t
from posix.unistd cimport close, ftruncate, pread, pwrite, read, write

cdef extern from "<fcntl.h>" nogil:
    enum: O_CLOEXEC, O_CREAT, O_DIRECTORY, O_RDONLY, O_RDWR, O_WRONLY
    enum: F_SETPIPE_SZ, SPLICE_F_MOVE, SPLICE_F_NONBLOCK
    int c_open "open"(const char *path, int flags, ...)
    int openat(int directory, const char *path, int flags, ...)
    int fcntl(int fd, int command, ...)
    ssize_t splice(int source, off_t *source_offset, int target, off_t *target_offset,
                   size_t length, unsigned int flags)

cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>
    /* Neither call waits for a disk: they fail with EAGAIN where they would have to. Newer than
       some C libraries, so by number; a kernel without them refuses them. */
    static int open_cached(int directory, const char *path, int flags) {
        struct { unsigned long long flags, mode, resolve; } how = {flags, 0, 0x20};
        return syscall(437 /* openat2, RESOLVE_CACHED */, directory, path, &how, sizeof how);
    }
    static ssize_t pread_cached(int fd, void *place, size_t length, off_t position) {
        struct iovec part = {place, length};
        return preadv2(fd, &part, 1, position, 0x8 /* RWF_NOWAIT */);
    }
    """
    int open_cached(int directory, const char *path, int flags) nogil
    ssize_t pread_cached(int fd, void *place, size_t length, off_t position) nogil

cdef extern from "<unistd.h>" nogil:
    int rmdir(const char *path)
    int unlinkat(int directory, const char *path, int flags)

cdef extern from "<dirent.h>" nogil:
    ctypedef struct DIR:
        pass
    struct dirent:
        char *d_name
    DIR *fdopendir(int fd)
    dirent *readdir(DIR *folder)
    int closedir(DIR *folder)

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
LIMIT = 8     # the quota is used up, and is no ring: from now on all is dropped

SEGMENT_BYTES = 64 << 20

cdef enum:
    NEWS_ARRIVED = 1
    NEWS_FINISHED = 2
    NEWS_TROUBLE = 4
    NEWS_LIMIT = 8

    THREADS = 4                   # one stuck in a slow disk leaves three
    MOST_THREADS = 1024           # with those that were added, as others were stuck
    STUCK_MILLISECONDS = 100      # in which no turn ends, and nobody waits for an event
    STACK_BYTES = 128 << 10
    TURN_BYTES = 1 << 20          # what one pipe may move before the next has its turn
    RETRY_MILLISECONDS = 100      # between tries while the disk is full: nothing wakes us
    RETRY_NS = 100_000_000
    DEFAULT_PIPE_BYTES = 64 << 10
    LOUD_PIPE_BYTES = 1 << 20
    LOUD_PIPES = 64               # at most so many pipes of that size: it is kernel memory
    RING_BYTES = 64 << 10
    RING_RUNS = 256               # a power of two
    MESSAGE_RUNS = 1024           # of a message read from disk, at most 24 KiB of it

    HEADER_BYTES = 48             # as many as sizeof(Header)
    RUN_BYTES = 16
    INDEX_ROOM_BYTES = 96         # what moving bytes once may add to the indexes, at the most
    STREAM_SHIFT = 56
    STREAMS = 2
    NAME_BYTES = 64
    SMALL_FILE_BYTES = 64 << 10

cdef uint64_t NOT_MEASURED = ~<uint64_t> 0
cdef uint64_t OFFSET_MASK = (<uint64_t> 1 << STREAM_SHIFT) - 1
# No log comes to that; a damaged index may say so.
cdef uint64_t LARGEST_OFFSET = <uint64_t> 1 << (STREAM_SHIFT - 1)
cdef uint64_t FINE_SLOT_NS = 10_000_000       # runs of one stream coalesce within a slot
cdef uint64_t COARSE_SLOT_NS = 1_000_000_000  # once the index would outgrow the log
cdef const char *INDEX_MAGIC = "jwindex\x01"  # the last byte is the version of the format


# The head of an index; host byte order, like all of it. What it counts is counted up to the
# first record, so that the newest index is enough to know all about a log's size.
cdef struct Header:
    char magic[8]
    uint64_t first            # the offset that names the segment
    uint64_t segment_bytes    # of a full one
    uint64_t stream_bytes[2]  # what the job had written
    uint64_t stored_bytes     # how many of them had been put on disk, ever

# A run of bytes of one stream, as it stands in the index: 16 bytes.
cdef struct Run:
    uint64_t place    # offset of its first byte, and the stream in the top 8 bits
    # When that byte came, since the epoch; of a gap (stream 0): how many of its bytes were
    # stdout's.
    uint64_t time_ns

# The two files of one segment, open during one turn.
cdef struct Files:
    uint64_t first    # the offset that names them
    int segment
    int index

# A native thread that serves logs.
cdef struct Worker:
    PumpState *pump
    pthread_t thread
    bint is_there         # to be joined
    bint has_left         # which takes no time

cdef struct PumpState:
    pthread_mutex_t lock  # taken after a log's lock, never before it
    int epoll
    int wake              # semaphore: one count for each kicked log, or for each thread at the end
    int bell              # readable while somebody has news for Python
    int directory
    int nowhere           # /dev/null, for what is dropped
    bint drops_when_full  # else the job waits
    bint stopping
    LogState *kicked      # to be served though no pipe is readable
    LogState *retrying    # the disk refused their bytes
    uint64_t retry_at_ns
    LogState *news
    LogState *unused      # see LogState
    size_t ring_budget
    size_t ring_used
    int loud_pipes
    Worker workers[MOST_THREADS]
    int waiting           # workers that wait for an event
    uint64_t turns        # that have ended
    pthread_t relief      # adds workers
    bint has_relief
    bint is_relief_awake
    int alarm             # eventfd that wakes it

# The memory of a LogState is used again but never freed while the pump runs: a thread may
# hold an event for a log that another thread has just finished. It then serves whatever log
# lives there now, one turn too many, also where that is not watched yet.
cdef struct LogState:
    pthread_mutex_t lock   # guards all below that does not say otherwise
    PumpState *pump
    void *owner            # the Log; borrowed, the Pump holds it until it is finished
    LogState *next_unused
    uint64_t job
    uint64_t segment_bytes
    uint64_t max_bytes     # of segments and indexes together; 0: no limit
    bint is_ring           # beyond it the oldest segment gives way; else what comes is dropped

    # Only the serving thread touches these. `serving` makes it one at a time.
    Run run                # the newest index record
    bint run_is_new        # no byte of it has been published yet
    uint64_t index_first   # the segment that records go to
    uint64_t index_bytes   # 0: we have not looked at its index yet
    uint64_t gap_position  # in that index, of the record of the open gap; 0: it has none
    uint64_t gap_stdout_bytes
    uint64_t segment_size  # of that segment
    uint64_t time_ns       # of the newest run, whatever became of it
    uint64_t drop_until_ns  # the disk was full a moment ago; monotonic
    bint was_limited       # and Python was told so
    bint was_enlarged[2]   # we asked for a larger pipe
    bint is_loud[2]        # and got it
    bint serving
    int pending            # streams whose turn came while the log was being served

    int pipes[2]           # our read ends; -1 once closed
    uint64_t end           # one more than the offset of the newest byte
    uint64_t kept_end      # [kept_end, end) is a gap that is still open, if anything
    uint64_t stream_bytes[2]
    uint64_t start         # all before it was dropped with its segments
    uint64_t stored_bytes     # put on disk, ever
    uint64_t forgotten_bytes  # how many of them were before `start`
    uint64_t disk_bytes    # the size of all files
    bint draining          # nobody may write any more: take what is in the pipes and finish
    uint64_t drain_left[2]  # NOT_MEASURED: no thread has looked since
    bint finished
    int error              # errno of a disk that refuses; 0: it takes bytes

    char *ring             # the hot tail: [ring_start, end), byte x in ring[x % RING_BYTES]
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

cdef void *work(void *argument) noexcept nogil:
    cdef Worker *worker = <Worker *> argument
    cdef PumpState *pump = worker.pump
    cdef epoll_event event
    cdef uint64_t count = 0
    cdef LogState *log
    cdef bint retrying
    cdef int ready
    while True:
        pthread_mutex_lock(&pump.lock)
        pump.turns += 1
        if pump.stopping or pump.waiting >= THREADS:
            worker.has_left = True
            pthread_mutex_unlock(&pump.lock)
            return NULL
        pump.waiting += 1
        retrying = pump.retrying != NULL
        pthread_mutex_unlock(&pump.lock)
        # One event at a time: what a slow disk delays is one pipe, not a batch of them.
        ready = epoll_wait(pump.epoll, &event, 1, RETRY_MILLISECONDS if retrying else -1)
        stop_waiting(pump)
        if retrying:
            kick_retrying(pump)
        if ready <= 0:
            continue
        if event.data.u64 != 0:
            serve_log(<LogState *> (event.data.u64 & ~<uint64_t> 1), 1 << (event.data.u64 & 1))
        elif read(pump.wake, &count, 8) == 8:
            log = pop_kicked(pump)
            if log != NULL:
                serve_log(log, 3)


cdef void stop_waiting(PumpState *pump) noexcept nogil:
    cdef uint64_t one = 1
    cdef bint was_last
    pthread_mutex_lock(&pump.lock)
    pump.waiting -= 1
    was_last = pump.waiting == 0 and not pump.is_relief_awake
    if was_last:
        pump.is_relief_awake = True
    pthread_mutex_unlock(&pump.lock)
    if was_last:
        write(pump.alarm, &one, 8)


cdef void *relieve(void *argument) noexcept nogil:
    """Adds a worker where all are stuck; once there are enough again, as many leave. Who writes to
    a pipe holds its lock while the kernel reads what is written from its memory: a job can make
    that last as long as it likes, and the worker waits that would read."""
    cdef PumpState *pump = <PumpState *> argument
    cdef pollfd alarm
    cdef uint64_t count = 0
    cdef uint64_t before = 0
    cdef uint64_t after = 0
    alarm.fd = pump.alarm
    alarm.events = POLLIN
    while True:
        read(pump.alarm, &count, 8)
        while are_all_busy(pump, &before):
            poll(&alarm, 1, STUCK_MILLISECONDS)
            if are_all_busy(pump, &after) and after == before:
                start_worker(pump)
        if is_stopping(pump):
            return NULL


cdef bint are_all_busy(PumpState *pump, uint64_t *turns) noexcept nogil:
    """Else the next one to find nobody waiting wakes the relief."""
    cdef bint busy
    pthread_mutex_lock(&pump.lock)
    busy = pump.waiting == 0 and not pump.stopping
    turns[0] = pump.turns
    pump.is_relief_awake = busy
    pthread_mutex_unlock(&pump.lock)
    return busy


cdef bint is_stopping(PumpState *pump) noexcept nogil:
    cdef bint stopping
    pthread_mutex_lock(&pump.lock)
    stopping = pump.stopping
    pthread_mutex_unlock(&pump.lock)
    return stopping


cdef int start_worker(PumpState *pump) noexcept nogil:
    """Returns an errno."""
    cdef Worker *worker = NULL
    cdef int i
    for i in range(MOST_THREADS):
        if not pump.workers[i].is_there or has_left(&pump.workers[i]):
            worker = &pump.workers[i]
            break
    if worker == NULL:
        return EAGAIN
    if worker.is_there:
        pthread_join(worker.thread, NULL)
    worker.pump = pump
    worker.has_left = False
    worker.is_there = False
    cdef int error = start_thread(&worker.thread, work, worker)
    worker.is_there = error == 0
    return error


cdef bint has_left(Worker *worker) noexcept nogil:
    cdef bint left
    pthread_mutex_lock(&worker.pump.lock)
    left = worker.has_left
    pthread_mutex_unlock(&worker.pump.lock)
    return left


cdef int start_thread(pthread_t *thread, void *(*run)(void *) noexcept nogil,
                      void *argument) noexcept nogil:
    """Returns an errno."""
    cdef sigset_t all_signals, before
    cdef pthread_attr_t attributes
    cdef int error
    # Signals are the event loop's: a thread that took one would only delay it.
    sigfillset(&all_signals)
    pthread_sigmask(SIG_SETMASK, &all_signals, &before)
    pthread_attr_init(&attributes)
    pthread_attr_setstacksize(&attributes, STACK_BYTES)
    error = pthread_create(thread, &attributes, run, argument)
    pthread_attr_destroy(&attributes)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return error


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
    cdef bint refused = False
    cdef bint has_eaten = False
    cdef int error = 0
    cdef int events
    cdef Files files
    files.first = 0
    files.segment = files.index = -1
    while left > 0:
        # Asking first keeps an index record from being written for nothing.
        waiting = bytes_waiting(pipe)
        if waiting >= DEFAULT_PIPE_BYTES and not log.was_enlarged[stream]:
            enlarge_pipe(log, stream)
        if draining:
            if log.drain_left[stream] == NOT_MEASURED:
                log.drain_left[stream] = waiting
            waiting = min(waiting, <int64_t> log.drain_left[stream])
        if waiting == 0:
            events = poll_pipe(pipe)
            over = draining or events == POLLHUP
            if over or has_eaten or not events & POLLIN:
                break
            # A byte has come since, or there is a buffer without any: Linux before 6.14 keeps one
            # for a write from what cannot be read, and would tell of it again and again.
            has_eaten = True
            waiting = DEFAULT_PIPE_BYTES
        moved = take_bytes(log, stream, min(waiting, left), &files, &error)
        if moved == -EAGAIN or moved == -EINTR:
            continue
        if moved < 0:
            error = <int> -moved
            refused = True
            break
        left -= moved
        if draining:
            log.drain_left[stream] -= moved
    if log.kept_end < log.end:
        record_gap(log, &files)
    close_files(&files)
    if error or left < TURN_BYTES:
        note_error(log, error)  # where no byte came, nothing is known of the disk
    if over:
        close_pipe(log, stream)
    elif refused:
        retry_later(log)
    elif not watch_pipe(log, stream, EPOLL_CTL_MOD):
        retry_later(log)


cdef int64_t take_bytes(LogState *log, int stream, int64_t length, Files *files,
                        int *error) noexcept nogil:
    """Moves bytes to the disk or, where the quota or a full disk says so, drops them. Returns
    how many, or -errno. error: why the disk had them dropped."""
    cdef uint64_t first = segment_of(log, log.end)
    cdef int64_t fitting, moved
    if log.drop_until_ns:
        # Not at every turn of a gap, or there would be more records than bytes.
        if monotonic_ns() < log.drop_until_ns:
            error[0] = error[0] or log.error
            return drop_bytes(log, stream, length)
        log.drop_until_ns = 0
    fitting = min(length, <int64_t> (first + log.segment_bytes - log.end))
    if log.max_bytes:
        fitting = make_room(log, first, fitting)
        if fitting == 0:
            note_limit(log)
            return drop_bytes(log, stream, length)
    moved = move_bytes(log, stream, fitting, first, files)
    if moved < 0 and is_full(<int> -moved) and log.pump.drops_when_full:
        error[0] = <int> -moved
        log.drop_until_ns = monotonic_ns() + RETRY_NS
        return drop_bytes(log, stream, length)
    return moved


cdef uint64_t segment_of(LogState *log, uint64_t offset) noexcept nogil:
    """The first offset of its segment."""
    return offset - offset % log.segment_bytes


cdef bint is_full(int error) noexcept nogil:
    return error == ENOSPC or error == EDQUOT or error == EFBIG


cdef int64_t move_bytes(LogState *log, int stream, int64_t length, uint64_t first,
                        Files *files) noexcept nogil:
    """Moves up to `length` bytes into one segment. Returns how many, or -errno."""
    cdef off_t position = log.end - first
    cdef ssize_t moved
    cdef int error
    error = open_files(log, first, O_RDWR | O_CREAT, files)
    if error == 0:
        error = write_intent(log, stream, files)
    if error:
        return -error
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
    # The clock may be set back; the order of times stays right.
    cdef uint64_t now = max(realtime_ns(), log.time_ns)
    cdef uint64_t slot = FINE_SLOT_NS
    cdef int error
    if log.index_first != files.first or log.index_bytes == 0:
        error = take_up_index(log, files)
        if error:
            return error
    # Time resolution is given up before the index outgrows what it describes.
    if log.index_bytes > (64 << 10) + (log.end - files.first) // 8:
        slot = COARSE_SLOT_NS
    if (log.kept_end == log.end and run_stream(&log.run) == stream + 1
            and now // slot == log.run.time_ns // slot):
        return 0
    return write_records(log, stream + 1, now, files)


cdef int take_up_index(LogState *log, Files *files) noexcept nogil:
    """Makes this segment the one that records go to. An earlier process may have begun it.
    Returns errno, or 0."""
    cdef struct_stat segment, index
    cdef Header header
    cdef Run last, gap
    cdef uint64_t index_bytes = 0
    cdef int error = 0
    last.place = last.time_ns = 0
    if fstat(files.segment, &segment) < 0 or fstat(files.index, &index) < 0:
        return errno
    if load_header(files.index, files.first, &header):
        index_bytes = whole_records(index.st_size)
        if index_bytes > HEADER_BYTES and pread(
                files.index, &last, RUN_BYTES, index_bytes - RUN_BYTES) != RUN_BYTES:
            return EIO
    if index_bytes != <uint64_t> index.st_size:  # with a piece of a record, or of the header
        if ftruncate(files.index, index_bytes) < 0:
            return errno
        count_disk_bytes(log, index_bytes - index.st_size)
    if index_bytes == 0:
        fill_header(log, files.first, &header)
        error = write_index(log, files.index, &header, HEADER_BYTES, 0, 0)
        if error:
            return error
        index_bytes = HEADER_BYTES
    log.index_first = files.first
    log.index_bytes = index_bytes
    log.segment_size = segment.st_size
    log.gap_position = find_last_gap(files.index, index_bytes, &gap)
    if run_offset(&gap) != log.kept_end:
        log.gap_position = 0
    log.run_is_new = index_bytes > HEADER_BYTES and run_offset(&last) == log.kept_end
    if run_stream(&last):
        log.time_ns = max(log.time_ns, last.time_ns)
    log.run.place = run_offset(&last)  # of no stream: the next bytes get a record in any case
    return 0


cdef uint64_t find_last_gap(int index, uint64_t index_bytes, Run *gap) noexcept nogil:
    """Where the record of the gap is with which an index ends; 0: it ends with none."""
    cdef Run records[2]  # of the gap, and of its end
    cdef size_t length = 2 * RUN_BYTES
    gap.place = gap.time_ns = 0
    if (index_bytes < HEADER_BYTES + length
            or pread(index, records, length, index_bytes - length) != <ssize_t> length
            or run_stream(&records[0]) or run_stream(&records[1])):
        return 0
    gap[0] = records[0]
    return index_bytes - length


cdef int write_index(LogState *log, int index, const void *data, size_t length,
                     uint64_t position, uint64_t size) noexcept nogil:
    """All of it or, as far as the size of the file goes, nothing. size: of the file so far.
    Returns errno, or 0."""
    cdef ssize_t written = pwrite(index, data, length, position)
    cdef int error
    if written != <ssize_t> length:
        # A short write sets no errno: the disk had room for a part of it.
        error = errno if written < 0 else ENOSPC
        ftruncate(index, size)
        return error
    count_disk_bytes(log, max(size, position + length) - size)
    return 0


cdef void fill_header(LogState *log, uint64_t first, Header *header) noexcept nogil:
    """Counts up to the first record, which may be that of a gap."""
    cdef uint64_t start = max(log.kept_end, first)
    memset(header, 0, sizeof(Header))
    memcpy(header.magic, INDEX_MAGIC, 8)
    header.first = first
    header.segment_bytes = log.segment_bytes
    header.stream_bytes[0] = log.stream_bytes[0] - gap_stdout_bytes(log, start)
    header.stream_bytes[1] = start - header.stream_bytes[0]
    header.stored_bytes = log.stored_bytes


cdef uint64_t gap_stdout_bytes(LogState *log, uint64_t start) noexcept nogil:
    """How many bytes of the open gap, from `start` on, count as stdout's."""
    return min(log.gap_stdout_bytes, log.end - start)


cdef int write_records(LogState *log, int stream, uint64_t time_ns, Files *files) noexcept nogil:
    """Says whose the bytes from `end` on are, and before that, where there is one, how large
    the gap is that ends there. stream: 0 where that gap goes on. Returns errno, or 0."""
    cdef Run records[2]
    cdef int count = 0
    cdef int error
    cdef uint64_t gap_start = max(log.kept_end, files.first)
    cdef uint64_t position = log.index_bytes
    if log.gap_position:
        position = log.gap_position  # the gap has grown
    elif log.run_is_new:
        position -= RUN_BYTES        # the last intent came to nothing: replace it
    if gap_start < log.end:
        records[0].place = gap_start
        records[0].time_ns = gap_stdout_bytes(log, gap_start)
        count = 1
    records[count].place = log.end | (<uint64_t> stream << STREAM_SHIFT)
    records[count].time_ns = time_ns
    count += 1
    error = write_index(log, files.index, records, count * RUN_BYTES, position, log.index_bytes)
    if error:
        return error
    log.run = records[count - 1]
    log.run_is_new = True
    log.gap_position = position if count == 2 else 0
    log.time_ns = max(log.time_ns, time_ns)
    log.index_bytes = position + count * RUN_BYTES
    return 0


cdef void publish(LogState *log, int stream, int64_t length, Files *files) noexcept nogil:
    """Makes bytes that are on disk visible, and hot where somebody reads. Not so many bytes that
    they would fill the ring: readers find them in the page cache, with one copy less."""
    cdef char *ring
    cdef uint64_t end = log.end + length
    cdef bint copied = False
    pthread_mutex_lock(&log.lock)
    ring = log.ring if length < RING_BYTES else NULL
    if ring != NULL and end - log.ring_start > RING_BYTES:
        log.ring_start = end - RING_BYTES  # what is about to be overwritten
    pthread_mutex_unlock(&log.lock)
    # Nobody frees or replaces the ring meanwhile: that is the serving thread's, and ours.
    if ring != NULL:
        copied = fill_ring(log, end, length, files)
    pthread_mutex_lock(&log.lock)
    if log.ring != NULL:
        if ring == NULL or not copied:
            restart_ring(log, end)  # it came in between, is passed over, or could not be read
        elif log.run_is_new:
            push_run(log, &log.run)
    log.run_is_new = False
    log.end = log.kept_end = end
    log.gap_position = log.gap_stdout_bytes = 0
    log.stream_bytes[stream] += length
    log.stored_bytes += length
    log.disk_bytes += end - files.first - log.segment_size
    log.segment_size = end - files.first
    if log.waited_for:
        log.waited_for = False
        tell(log, NEWS_ARRIVED)
    pthread_mutex_unlock(&log.lock)


cdef bint fill_ring(LogState *log, uint64_t end, uint64_t length, Files *files) noexcept nogil:
    """Reads the `length` bytes before `end` back from the segment into the ring."""
    cdef uint64_t offset = end - length
    cdef uint64_t place, part
    while offset < end:
        place = offset % RING_BYTES
        part = min(end - offset, RING_BYTES - place)
        if pread(files.segment, log.ring + place, part, offset - files.first) != <ssize_t> part:
            return False
        offset += part
    return True


cdef void count_disk_bytes(LogState *log, uint64_t more) noexcept nogil:
    pthread_mutex_lock(&log.lock)
    log.disk_bytes += more
    pthread_mutex_unlock(&log.lock)


# What is dropped

cdef int64_t drop_bytes(LogState *log, int stream, int64_t length) noexcept nogil:
    """Takes bytes out of the pipe; a gap gets their offsets. Nobody is told: readers learn of
    a gap when it is over. Returns how many, or -errno."""
    cdef ssize_t moved = splice(log.pipes[stream], NULL, log.pump.nowhere, NULL, length,
                                SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
    if moved < 0:
        return -errno
    if moved == 0:
        return -EAGAIN
    pthread_mutex_lock(&log.lock)
    log.end += moved
    log.stream_bytes[stream] += moved
    if stream == 0:
        log.gap_stdout_bytes += moved
    if log.ring != NULL:
        restart_ring(log, log.end)
    pthread_mutex_unlock(&log.lock)
    return moved


cdef void record_gap(LogState *log, Files *files) noexcept nogil:
    """The gap as it is now, for whoever comes after us. Where the disk has no room for it, or
    nothing of the log is on disk, only we know of it, and try again after the next bytes."""
    if open_files(log, log.index_first, O_RDWR, files):
        return
    if log.index_bytes == 0 and take_up_index(log, files):
        return
    write_records(log, 0, 0, files)


cdef int64_t make_room(LogState *log, uint64_t current, int64_t length) noexcept nogil:
    """How many of `length` bytes for the segment `current` the quota has room for."""
    cdef int64_t room
    if log.is_ring:
        while (log.disk_bytes + length + INDEX_ROOM_BYTES > log.max_bytes
                and drop_segment(log, current)):
            pass
        return length
    room = <int64_t> (log.max_bytes - log.disk_bytes) - INDEX_ROOM_BYTES
    return max(0, min(length, room))


cdef bint drop_segment(LogState *log, uint64_t current) noexcept nogil:
    """The oldest, unless it is `current`, or nobody can tell now what comes behind it."""
    cdef int directory = log.pump.directory
    cdef uint64_t first = segment_of(log, log.start)
    cdef uint64_t following = first + log.segment_bytes
    cdef uint64_t size
    cdef Header header
    cdef int error
    if first >= current:
        return False
    size = file_bytes(directory, log.job, first)
    error = read_header(directory, log.job, following, &header)
    if is_missing(error) and following < current:
        error = find_segment(directory, log.job, following, &following)
        if error == 0 and following <= current:
            error = read_header(directory, log.job, following, &header)
    if is_missing(error) or following > current:
        fill_header(log, current, &header)  # there is none: all so far is dropped
    elif error:
        return False
    # Readers are told first, and then find no file.
    pthread_mutex_lock(&log.lock)
    log.start = header.stream_bytes[0] + header.stream_bytes[1]
    log.forgotten_bytes = header.stored_bytes
    log.disk_bytes -= min(size, log.disk_bytes)
    pthread_mutex_unlock(&log.lock)
    # In this order: an index alone is nothing, a segment alone would be bytes of nobody.
    remove_file(log, first, b"log")
    remove_file(log, first, b"idx")
    return True


cdef void note_limit(LogState *log) noexcept nogil:
    if log.was_limited:
        return
    log.was_limited = True
    pthread_mutex_lock(&log.lock)
    tell(log, NEWS_LIMIT)
    pthread_mutex_unlock(&log.lock)


# Pipes and files

cdef int64_t bytes_waiting(int pipe) noexcept nogil:
    cdef int waiting = 0
    if ioctl(pipe, FIONREAD, &waiting) < 0:
        return 0
    return waiting


cdef bint is_hung_up(int pipe) noexcept nogil:
    """True once nobody can write any more and nothing is left to read."""
    return poll_pipe(pipe) == POLLHUP


cdef int poll_pipe(int pipe) noexcept nogil:
    """POLLIN: there is something to read. POLLHUP: nobody can write any more."""
    cdef pollfd asked
    asked.fd = pipe
    asked.events = POLLIN
    asked.revents = 0
    poll(&asked, 1, 0)
    return asked.revents & (POLLIN | POLLHUP)


cdef void enlarge_pipe(LogState *log, int stream) noexcept nogil:
    """A loud job's pipe gets 1 MiB, which doubles its throughput and more."""
    cdef PumpState *pump = log.pump
    cdef bint is_one_more
    log.was_enlarged[stream] = True  # asked once, though it may be refused
    pthread_mutex_lock(&pump.lock)
    is_one_more = pump.loud_pipes < LOUD_PIPES
    pump.loud_pipes += is_one_more
    pthread_mutex_unlock(&pump.lock)
    if not is_one_more:
        return
    # Without the lock: who writes to the pipe may have this wait.
    log.is_loud[stream] = fcntl(log.pipes[stream], F_SETPIPE_SZ, LOUD_PIPE_BYTES) >= 0
    if not log.is_loud[stream]:
        count_out_loud_pipe(pump)


cdef void count_out_loud_pipe(PumpState *pump) noexcept nogil:
    pthread_mutex_lock(&pump.lock)
    pump.loud_pipes -= 1
    pthread_mutex_unlock(&pump.lock)


cdef int open_files(LogState *log, uint64_t first, int flags, Files *files) noexcept nogil:
    """Opens the segment and the index that `first` names; they stay open for one turn only,
    so that a job that writes nothing costs no descriptor. Returns errno, or 0."""
    if files.index >= 0 and files.first == first:
        return 0
    close_files(files)
    files.first = first
    files.segment = open_file(log.pump.directory, log.job, first, b"log", flags)
    if files.segment < 0:
        return errno
    files.index = open_file(log.pump.directory, log.job, first, b"idx", flags)
    if files.index < 0:
        return errno
    return 0


cdef int open_file(int directory, uint64_t job, uint64_t first, const char *kind,
                   int flags) noexcept nogil:
    cdef char name[NAME_BYTES]
    name_file(name, job, first, kind)
    return openat(directory, name, flags | O_CLOEXEC, 0o600)


cdef void name_file(char *name, uint64_t job, uint64_t first, const char *kind) noexcept nogil:
    snprintf(name, NAME_BYTES, "%llu.%llu.%s",
             <unsigned long long> job, <unsigned long long> first, kind)


cdef uint64_t file_bytes(int directory, uint64_t job, uint64_t first) noexcept nogil:
    """Of a segment and its index; what does not exist has none."""
    return (file_size(directory, job, first, b"log")
            + file_size(directory, job, first, b"idx"))


cdef uint64_t file_size(int directory, uint64_t job, uint64_t first,
                        const char *kind) noexcept nogil:
    """Takes no descriptor: there may be none left."""
    cdef char name[NAME_BYTES]
    cdef struct_stat info
    name_file(name, job, first, kind)
    return info.st_size if fstatat(directory, name, &info, 0) == 0 else 0


cdef void remove_file(LogState *log, uint64_t first, const char *kind) noexcept nogil:
    cdef char name[NAME_BYTES]
    name_file(name, log.job, first, kind)
    unlinkat(log.pump.directory, name, 0)


cdef int find_segment(int directory, uint64_t job, uint64_t offset,
                      uint64_t *found) noexcept nogil:
    """The first of a job's segments that starts at `offset` or later; OFFSET_MASK: none does.
    Returns errno, or 0."""
    cdef uint64_t first
    cdef char prefix[NAME_BYTES]
    cdef char *rest = NULL
    cdef dirent *entry
    cdef DIR *folder = open_folder(directory)
    cdef size_t length = snprintf(prefix, NAME_BYTES, "%llu.", <unsigned long long> job)
    if folder == NULL:
        return errno
    found[0] = OFFSET_MASK
    while True:
        entry = readdir(folder)
        if entry == NULL:
            break
        if strncmp(entry.d_name, prefix, length) != 0:
            continue
        first = strtoull(entry.d_name + length, &rest, 10)
        if strcmp(rest, b".log") == 0 and offset <= first < found[0]:
            found[0] = first
    closedir(folder)
    return 0


cdef DIR *open_folder(int directory) noexcept nogil:
    """A descriptor of its own: the place in a folder belongs to its descriptor."""
    cdef int fd = openat(directory, b".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    cdef DIR *folder
    if fd < 0:
        return NULL
    folder = fdopendir(fd)
    if folder == NULL:
        close(fd)
    return folder


cdef int read_header(int directory, uint64_t job, uint64_t first,
                     Header *header) noexcept nogil:
    """Returns errno, or 0."""
    cdef int index = open_file(directory, job, first, b"idx", O_RDONLY)
    cdef bint found
    if index < 0:
        return errno
    found = load_header(index, first, header)
    close(index)
    return 0 if found else EBADMSG


cdef bint is_missing(int error) noexcept nogil:
    """Of `read_header`: there is none. Else it cannot be looked at, as without a descriptor."""
    return error == ENOENT or error == EBADMSG


cdef bint load_header(int index, uint64_t first, Header *header) noexcept nogil:
    """False where it has none: it was never written, or is no index of ours."""
    return (pread(index, header, HEADER_BYTES, 0) == HEADER_BYTES
            and memcmp(header.magic, INDEX_MAGIC, 8) == 0 and header.first == first
            and is_possible_header(header))


cdef bint is_possible_header(const Header *header) noexcept nogil:
    """There is no checksum; but what counts up to the first record ends in this segment."""
    cdef uint64_t start = header.stream_bytes[0] + header.stream_bytes[1]
    return (header.segment_bytes != 0 and header.first % header.segment_bytes == 0
            and header.segment_bytes < LARGEST_OFFSET and header.first < LARGEST_OFFSET
            and header.stream_bytes[0] <= start and header.stored_bytes <= start
            and header.first <= start <= header.first + header.segment_bytes)


cdef bint are_possible_runs(uint64_t from_offset, const Run *runs, size_t count) noexcept nogil:
    """Each of a stream that there is, and none before the one before it."""
    cdef uint64_t offset
    cdef size_t i
    for i in range(count):
        offset = run_offset(&runs[i])
        if offset < from_offset or offset >= LARGEST_OFFSET or run_stream(&runs[i]) > STREAMS:
            return False
        from_offset = offset
    return True


cdef void close_files(Files *files) noexcept nogil:
    if files.segment >= 0:
        close(files.segment)
    if files.index >= 0:
        close(files.index)
    files.segment = files.index = -1


cdef bint watch_pipe(LogState *log, int stream, int operation) noexcept nogil:
    """One event, then silence until the next call: so one thread at a time gets a pipe.
    operation: what it most likely takes. False where the kernel refuses: jobs of this user may have
    taken all watches that it may have (fs.epoll.max_user_watches)."""
    cdef epoll_event event
    cdef int other = EPOLL_CTL_ADD if operation == EPOLL_CTL_MOD else EPOLL_CTL_MOD
    event.events = EPOLLIN | EPOLLONESHOT
    event.data.u64 = <uint64_t> log | <uint64_t> stream
    if epoll_ctl(log.pump.epoll, operation, log.pipes[stream], &event) == 0:
        return True
    # It was watched already, or has not been yet.
    return (errno in (EEXIST, ENOENT)
            and epoll_ctl(log.pump.epoll, other, log.pipes[stream], &event) == 0)


cdef void close_pipe(LogState *log, int stream) noexcept nogil:
    cdef int pipe = log.pipes[stream]
    # Closing alone would not do: jobinit's duplicate keeps the registration alive.
    epoll_ctl(log.pump.epoll, EPOLL_CTL_DEL, pipe, NULL)
    pthread_mutex_lock(&log.lock)
    log.pipes[stream] = -1
    pthread_mutex_unlock(&log.lock)
    if log.is_loud[stream]:
        count_out_loud_pipe(log.pump)
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


cdef void kick(LogState *log) noexcept nogil:
    pthread_mutex_lock(&log.pump.lock)
    kick_locked(log)
    pthread_mutex_unlock(&log.pump.lock)


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

cdef void make_ring(LogState *log) noexcept nogil:
    """Nothing happens where memory or the budget is short: readers then read from disk."""
    cdef char *ring
    cdef Run *runs
    if not reserve(log.pump):
        return
    ring = <char *> malloc(RING_BYTES)
    runs = <Run *> malloc(RING_RUNS * sizeof(Run))
    if ring == NULL or runs == NULL:
        free(ring)
        free(runs)
        release(log.pump)
        return
    log.ring = ring
    log.runs = runs
    restart_ring(log, log.end)


cdef void free_ring(LogState *log) noexcept nogil:
    if log.ring == NULL:
        return
    free(log.ring)
    free(log.runs)
    release(log.pump)
    log.ring = NULL
    log.runs = NULL


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


cdef bint reserve(PumpState *pump) noexcept nogil:
    cdef bint fits
    pthread_mutex_lock(&pump.lock)
    fits = pump.ring_used + RING_BYTES <= pump.ring_budget
    if fits:
        pump.ring_used += RING_BYTES
    pthread_mutex_unlock(&pump.lock)
    return fits


cdef void release(PumpState *pump) noexcept nogil:
    pthread_mutex_lock(&pump.lock)
    pump.ring_used -= RING_BYTES
    pthread_mutex_unlock(&pump.lock)


# ── finished messages ───────────────────────────────────────────────────────────────────

# A DataChunk (proto/job_worker.proto), encoded by hand: payload, offset, next_offset, runs.
# The payload stands first, so that what a client of the old protocol reads is a prefix.
# Dropped bytes are told in a chunk of their own: offset, next_offset, lost_bytes.
cdef enum:
    TAG_PAYLOAD = 0x0A
    TAG_OFFSET = 0x10
    TAG_NEXT_OFFSET = 0x18
    TAG_RUN = 0x22
    TAG_LOST_BYTES = 0x28
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


cdef char *put_offsets(char *place, uint64_t offset, uint64_t next_offset) noexcept nogil:
    place[0] = TAG_OFFSET
    place = put_varint(place + 1, offset)
    place[0] = TAG_NEXT_OFFSET
    return put_varint(place + 1, next_offset)


cdef char *put_tail(char *place, const Span *span) noexcept nogil:
    cdef size_t i, length
    place = put_offsets(place, span.offset, span.limit)
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


cdef object lost_message(uint64_t offset, uint64_t limit):
    """(message, next offset): all from `offset` to `limit` was dropped."""
    cdef char message[NAME_BYTES]
    cdef char *place = put_offsets(message, limit, limit)
    place[0] = TAG_LOST_BYTES
    place = put_varint(place + 1, limit - offset)
    return PyBytes_FromStringAndSize(message, place - message), limit


cdef uint64_t cut(uint64_t offset, uint64_t end, uint64_t max_bytes) noexcept nogil:
    """Where a message from `offset` ends: at a multiple of its largest size, so that readers
    who catch up come to the same places, and share their messages from there on. At the end
    of what there is, with that."""
    if end - offset <= max_bytes:
        return end
    return (offset // max_bytes + 1) * max_bytes


cdef class Pump:
    """The native threads that drain all jobs' pipes to disk."""

    cdef PumpState state
    cdef dict logs  # job id -> Log, until it is finished: the threads know only addresses
    cdef bint closed

    def __cinit__(self, int directory, size_t ring_budget, bint drops_when_full=False):
        cdef epoll_event event
        self.logs = {}
        self.closed = True
        self.state.epoll = self.state.wake = self.state.bell = self.state.nowhere = -1
        self.state.alarm = -1
        self.state.directory = directory
        self.state.ring_budget = ring_budget
        self.state.drops_when_full = drops_when_full
        pthread_mutex_init(&self.state.lock, NULL)
        self.closed = False
        self.state.epoll = epoll_create1(EPOLL_CLOEXEC)
        self.state.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE)
        self.state.bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.state.nowhere = c_open(b"/dev/null", O_WRONLY | O_CLOEXEC)
        self.state.alarm = eventfd(0, EFD_CLOEXEC)
        if min(self.state.epoll, self.state.wake, self.state.bell, self.state.nowhere,
               self.state.alarm) < 0:
            raise_errno()
        event.events = EPOLLIN | EPOLLEXCLUSIVE
        event.data.u64 = 0
        if epoll_ctl(self.state.epoll, EPOLL_CTL_ADD, self.state.wake, &event) < 0:
            raise_errno()
        self.start_threads()

    cdef start_threads(self):
        cdef int error = 0
        for _ in range(THREADS):
            error = error or start_worker(&self.state)
        if not error:
            error = start_thread(&self.state.relief, relieve, &self.state)
            self.state.has_relief = error == 0
        if error:
            self.close()
            raise OSError(error, "cannot start the output threads")

    def __dealloc__(self):
        cdef LogState *log
        self.stop_threads()
        for descriptor in (self.state.epoll, self.state.wake, self.state.bell, self.state.nowhere,
                           self.state.alarm):
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

    def serving(self):
        cdef list found = []
        cdef LogState *state
        cdef bint serving
        for job, log in list(self.logs.items()):
            state = (<Log> log).state
            pthread_mutex_lock(&state.lock)
            serving = state.serving
            pthread_mutex_unlock(&state.lock)
            if serving:
                found.append(job)
        return found

    def close(self):
        self.stop_threads()
        for log in self.logs.values():
            (<Log> log).abandon()
        self.state.news = NULL  # nobody holds those logs any more
        self.logs.clear()

    cdef void stop_threads(self) noexcept:
        cdef uint64_t one = 1
        cdef uint64_t all_of_them = MOST_THREADS
        cdef int i
        if self.closed:
            return
        self.closed = True
        pthread_mutex_lock(&self.state.lock)
        self.state.stopping = True
        pthread_mutex_unlock(&self.state.lock)
        with nogil:
            write(self.state.alarm, &one, 8)
            if self.state.has_relief:
                pthread_join(self.state.relief, NULL)
            write(self.state.wake, &all_of_them, 8)
            for i in range(MOST_THREADS):
                if self.state.workers[i].is_there:
                    pthread_join(self.state.workers[i].thread, NULL)

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


# Its end gives back to the pump what it has of it: the collector must not take that away before.
@cython.no_gc_clear
cdef class Log:
    """One job's output, from the moment its pipes are ours until all of it is on disk."""

    cdef Pump pump
    cdef LogState *state
    cdef bint watched  # threads are told of what comes through the pipes

    def __cinit__(self, Pump pump, uint64_t job, int stdout, int stderr, *,
                  uint64_t segment_bytes=SEGMENT_BYTES, uint64_t max_bytes=0,
                  bint is_ring=False, Extent resumed=None, bint watched=True):
        if pump.closed:
            raise ValueError("the pump is closed")
        if job in pump.logs:
            raise ValueError(f"job {job} has a log already")
        if segment_bytes == 0:
            raise ValueError("a segment has bytes")
        if resumed and resumed.segment_bytes not in (0, segment_bytes):
            raise_damage(EBADMSG, f"{job}.{resumed.newest}")  # the size is one for life
        self.pump = pump
        self.state = pump.take_state()
        # In one step: a thread that holds an event for the log that lived here may come now.
        pthread_mutex_lock(&self.state.lock)
        self.reset_state(job, stdout, stderr)
        self.state.segment_bytes = segment_bytes
        self.state.max_bytes = max_bytes
        self.state.is_ring = is_ring
        if resumed is not None:
            resume(self.state, resumed)
        pthread_mutex_unlock(&self.state.lock)
        pump.logs[job] = self
        self.watched = False
        if watched:
            self.watch()

    def watch(self):
        cdef int stream
        if self.watched or self.state.finished:
            return
        self.watched = True
        pthread_mutex_lock(&self.state.lock)
        for stream in range(2):
            if self.state.pipes[stream] >= 0 and not watch_pipe(self.state, stream, EPOLL_CTL_ADD):
                kick(self.state)  # and tried again
        pthread_mutex_unlock(&self.state.lock)

    cdef void reset_state(self, uint64_t job, int stdout, int stderr) noexcept:
        cdef LogState *state = self.state
        cdef int stream
        state.owner = <void *> self
        state.job = job
        state.run.place = state.run.time_ns = 0
        state.run_is_new = False
        state.index_first = state.index_bytes = state.segment_size = 0
        state.gap_position = state.gap_stdout_bytes = 0
        state.time_ns = state.drop_until_ns = 0
        state.was_limited = False
        state.pending = 0
        state.end = state.kept_end = state.start = 0
        state.stored_bytes = state.forgotten_bytes = state.disk_bytes = 0
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

    def __dealloc__(self):
        if self.state == NULL:
            return
        pthread_mutex_lock(&self.state.lock)
        free_ring(self.state)
        pthread_mutex_unlock(&self.state.lock)
        self.state.next_unused = self.pump.state.unused
        self.pump.state.unused = self.state

    cdef void abandon(self) noexcept:
        """Where no thread is at it: closes the pipes, whatever is in them."""
        cdef int stream
        for stream in range(2):
            if self.state.pipes[stream] >= 0:
                close_pipe(self.state, stream)
        self.state.finished = True

    @property
    def job(self):
        return self.state.job

    @property
    def segment_bytes(self):
        return self.state.segment_bytes

    @property
    def end(self):
        pthread_mutex_lock(&self.state.lock)
        end = self.state.end
        pthread_mutex_unlock(&self.state.lock)
        return end

    @property
    def told_end(self):
        pthread_mutex_lock(&self.state.lock)
        end = told_end(self.state)
        pthread_mutex_unlock(&self.state.lock)
        return end

    @property
    def lost_bytes(self):
        cdef LogState *state = self.state
        pthread_mutex_lock(&state.lock)
        lost = state.end - (state.stored_bytes - state.forgotten_bytes)
        pthread_mutex_unlock(&state.lock)
        return lost

    @property
    def disk_bytes(self):
        pthread_mutex_lock(&self.state.lock)
        size = self.state.disk_bytes
        pthread_mutex_unlock(&self.state.lock)
        return size

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
        pthread_mutex_lock(&self.state.lock)
        finished = bool(self.state.finished)
        pthread_mutex_unlock(&self.state.lock)
        return finished

    @property
    def error(self):
        pthread_mutex_lock(&self.state.lock)
        error = self.state.error
        pthread_mutex_unlock(&self.state.lock)
        return error

    def drain(self):
        cdef LogState *state = self.state
        cdef int stream
        if not self.watched and self.is_over() and self.claim():
            # No thread knows of it, and none need be woken for nothing.
            self.abandon()
            del self.pump.logs[state.job]
            return
        self.watch()
        pthread_mutex_lock(&state.lock)
        if not state.draining and not state.finished:
            for stream in range(2):
                state.drain_left[stream] = NOT_MEASURED  # by a thread: see is_over
            state.draining = True
            kick(state)
        pthread_mutex_unlock(&state.lock)

    cdef bint claim(self) noexcept:
        """Keeps all threads away for good, unless one is at it or has told of it: see LogState."""
        cdef bint is_free
        pthread_mutex_lock(&self.state.lock)
        is_free = not (self.state.serving or self.state.finished or self.state.news_bits)
        if is_free:
            self.state.finished = True
        pthread_mutex_unlock(&self.state.lock)
        return is_free

    cdef bint is_over(self) noexcept:
        """Asks by poll alone: all else waits for the pipe's lock, and a
        writer has that while its memory is read, for as long as it likes."""
        cdef int stream
        for stream in range(2):
            if self.state.pipes[stream] >= 0 and not is_hung_up(self.state.pipes[stream]):
                return False
        return True

    def add_reader(self):
        cdef LogState *state = self.state
        pthread_mutex_lock(&state.lock)
        state.readers += 1
        if state.ring == NULL and not state.finished:
            make_ring(state)
        pthread_mutex_unlock(&state.lock)

    def remove_reader(self):
        cdef LogState *state = self.state
        pthread_mutex_lock(&state.lock)
        state.readers -= 1
        if state.readers == 0 and not state.serving:
            free_ring(state)  # else the serving thread does it
        pthread_mutex_unlock(&state.lock)

    def wait_from(self, uint64_t offset):
        cdef LogState *state = self.state
        cdef bint waits
        pthread_mutex_lock(&state.lock)
        waits = told_end(state) <= offset and not state.finished
        if waits:
            state.waited_for = True
        pthread_mutex_unlock(&state.lock)
        return waits

    def message(self, uint64_t offset, uint64_t max_bytes, int stream=0):
        cdef LogState *state = self.state
        cdef object found
        pthread_mutex_lock(&state.lock)
        try:
            found = ring_message(state, offset, max_bytes, stream)
            if found is None and offset < state.start:
                found = lost_message(offset, state.start)
        finally:
            pthread_mutex_unlock(&state.lock)
        return found


cdef void resume(LogState *log, Extent extent) noexcept:
    log.stream_bytes[0] = extent.stdout_bytes
    log.stream_bytes[1] = extent.stderr_bytes
    log.end = log.kept_end = extent.stdout_bytes + extent.stderr_bytes
    log.start = extent.start
    log.stored_bytes = extent.stored_bytes
    log.forgotten_bytes = extent.forgotten_bytes
    log.disk_bytes = extent.disk_bytes
    log.index_first = extent.newest
    reopen_gap(log)


cdef void reopen_gap(LogState *log) noexcept:
    """One that the log ends with goes on: the record of another would have no room in a quota
    that is used up."""
    cdef int index = open_file(log.pump.directory, log.job, log.index_first, b"idx", O_RDONLY)
    cdef struct_stat info
    cdef Run gap
    if index < 0:
        return
    if fstat(index, &info) == 0 and find_last_gap(index, whole_records(info.st_size), &gap):
        log.kept_end = run_offset(&gap)
        log.gap_stdout_bytes = gap.time_ns
    close(index)


cdef uint64_t whole_records(uint64_t index_bytes) noexcept nogil:
    """How much of an index that has a header is no piece of a record."""
    return index_bytes - (index_bytes - HEADER_BYTES) % RUN_BYTES


cdef uint64_t told_end(const LogState *log) noexcept nogil:
    """How far readers may go: not into a gap of which nobody knows yet how far it goes."""
    return log.end if log.finished else log.kept_end


cdef object ring_message(LogState *log, uint64_t offset, uint64_t max_bytes, int stream):
    """(message or None, next offset) from the ring; None where the ring does not have it."""
    cdef Run runs[RING_RUNS]
    cdef Span span
    cdef uint64_t first, i
    cdef char *place = NULL
    cdef size_t length
    if offset >= told_end(log):
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


cdef void copy_from_ring(LogState *log, char *target, uint64_t offset,
                         size_t length) noexcept nogil:
    cdef size_t place = offset % RING_BYTES
    cdef size_t part = min(length, RING_BYTES - place)
    memcpy(target, log.ring + place, part)
    memcpy(target + part, log.ring, length - part)


# ── history: messages from the segments on disk ─────────────────────────────────────────

# A file of a segment, or the same bytes where they are kept in some other way.
cdef struct Source:
    int fd            # -1: in memory
    bint cached_only  # reading never waits for the disk, but fails with EAGAIN
    const char *data
    uint64_t size     # at the time when it was opened


def read_message(int directory, uint64_t job, uint64_t end, uint64_t offset,
                 uint64_t max_bytes, int stream=0, uint64_t segment_bytes=SEGMENT_BYTES):
    cdef uint64_t first = offset - offset % segment_bytes
    cdef uint64_t following
    cdef int error
    if offset >= end:
        return None, offset
    try:
        return segment_message(directory, job, first, end, offset, max_bytes, stream,
                               segment_bytes, False)
    except OSError as problem:
        error = problem.errno
    if error != ENOENT:
        raise_damage(error, f"{job}.{first}")
    with nogil:
        error = find_segment(directory, job, first + segment_bytes, &following)
    if error:
        raise_damage(error, f"{job}.{first}")
    return lost_message(offset, min(end, following))  # its segment was dropped


def read_cached(int directory, uint64_t job, uint64_t end, uint64_t offset,
                uint64_t max_bytes, int stream=0, uint64_t segment_bytes=SEGMENT_BYTES):
    cdef uint64_t first = offset - offset % segment_bytes
    if offset >= end:
        return None, offset
    try:
        return segment_message(directory, job, first, end, offset, max_bytes, stream,
                               segment_bytes, True)
    except OSError:
        return None


cdef object segment_message(int directory, uint64_t job, uint64_t first, uint64_t end,
                            uint64_t offset, uint64_t max_bytes, int stream,
                            uint64_t segment_bytes, bint cached_only):
    """As `source_message`. Raises OSError, with ENOENT where the segment is not there."""
    cdef Source segment, index
    cdef int error
    segment.cached_only = index.cached_only = cached_only
    with nogil:
        error = open_sources(directory, job, first, &segment, &index)
    if error:
        raise OSError(error, "")
    try:
        return source_message(&segment, &index, first, min(end, first + segment_bytes), end,
                              offset, max_bytes, stream)
    finally:
        close(segment.fd)
        close(index.fd)


def read_packed(bytes segment, bytes index, uint64_t end, uint64_t offset, uint64_t max_bytes,
                int stream=0):
    cdef Source segment_source, index_source
    if offset >= end:
        return None, offset
    segment_source.fd = index_source.fd = -1
    segment_source.cached_only = index_source.cached_only = False
    segment_source.data = PyBytes_AS_STRING(segment)
    segment_source.size = len(segment)
    index_source.data = PyBytes_AS_STRING(index)
    index_source.size = len(index)
    return source_message(&segment_source, &index_source, 0, end, end, offset, max_bytes, stream)


cdef int open_sources(int directory, uint64_t job, uint64_t first, Source *segment,
                      Source *index) noexcept nogil:
    """Returns errno, or 0. The segment first: whatever it holds by then, the index tells of."""
    cdef int error = open_source(directory, job, first, b"log", segment)
    if error:
        return error
    error = open_source(directory, job, first, b"idx", index)
    if error:
        close(segment.fd)
    return error


cdef int open_source(int directory, uint64_t job, uint64_t first, const char *kind,
                     Source *source) noexcept nogil:
    cdef struct_stat info
    cdef char name[NAME_BYTES]
    cdef int error
    name_file(name, job, first, kind)
    source.data = NULL
    if source.cached_only:
        source.fd = open_cached(directory, name, O_RDONLY | O_CLOEXEC)
    else:
        source.fd = openat(directory, name, O_RDONLY | O_CLOEXEC)
    if source.fd < 0:
        return errno
    if fstat(source.fd, &info) < 0:
        error = errno
        close(source.fd)
        return error
    source.size = info.st_size
    return 0


cdef int read_source(const Source *source, void *place, size_t length,
                     uint64_t position) noexcept nogil:
    """Returns errno, or 0; EBADMSG where there is less."""
    if position + length > source.size:
        return EBADMSG
    if source.fd >= 0 and source.cached_only:
        if pread_cached(source.fd, place, length, position) != <ssize_t> length:
            return EAGAIN
        return 0
    if source.fd >= 0:
        return pread_all(source.fd, <char *> place, length, position)
    memcpy(place, source.data + position, length)
    return 0


cdef object source_message(const Source *segment, const Source *index, uint64_t first,
                           uint64_t limit, uint64_t end, uint64_t offset, uint64_t max_bytes,
                           int stream):
    """(message or None, next offset). limit: where the segment, or the log, ends."""
    cdef Run runs[MESSAGE_RUNS]
    cdef Span span
    cdef char *payload = NULL
    cdef bint is_there = first + segment.size > offset
    cdef int error
    span.offset = offset
    span.limit = limit
    span.only = stream
    span.runs = runs
    span.run_count = 0
    with nogil:
        error = load_runs(index, first, &span)
    if error and is_there:
        raise OSError(error, "")
    if trim_to_gap(&span, end) or not is_there:
        return lost_message(offset, span.limit)
    limit = min(span.limit, first + segment.size)
    span.limit = cut(offset, limit, max_bytes)
    if span_payload_bytes(&span) == 0:
        span.limit = limit
        return None, first_wanted(&span)
    message = new_message(&span, &payload)
    with nogil:
        error = load_payload(segment, first, &span, payload)
    if error:
        raise OSError(error, "")
    return message, span.limit


cdef uint64_t first_wanted(const Span *span) noexcept nogil:
    """Where the first byte is that was asked for; the end of the span where it has none."""
    cdef size_t i
    for i in range(span.run_count):
        if span_run_length(span, i):
            return max(span.offset, run_offset(&span.runs[i]))
    return span.limit


cdef bint trim_to_gap(Span *span, uint64_t end) noexcept nogil:
    """Shortens the span to what is all there, or all dropped. Returns whether it is dropped."""
    cdef size_t i
    if span.run_count == 0:
        return True
    if run_offset(&span.runs[0]) > span.offset:
        span.limit = min(span.limit, run_offset(&span.runs[0]))
        return True
    if run_stream(&span.runs[0]) == 0:
        # The gap may go on behind this segment.
        if span.run_count > 1:
            span.limit = min(end, run_offset(&span.runs[1]))
        return True
    for i in range(1, span.run_count):
        if run_stream(&span.runs[i]) == 0:
            span.limit = min(span.limit, run_offset(&span.runs[i]))
            break
    return False


cdef int load_runs(const Source *index, uint64_t first, Span *span) noexcept nogil:
    """Fills the span's runs from the index, and shortens the span to what they cover.
    Returns errno, or 0."""
    cdef Header header
    cdef uint64_t count, low, high, middle
    cdef Run run
    if index.size < HEADER_BYTES or read_source(index, &header, HEADER_BYTES, 0):
        return EBADMSG
    if memcmp(header.magic, INDEX_MAGIC, 8) != 0 or header.first != first:
        return EBADMSG
    count = (index.size - HEADER_BYTES) // RUN_BYTES
    low = 0
    high = count
    while high > low + 1:
        middle = (low + high) // 2
        if read_source(index, &run, RUN_BYTES, index_position(middle)):
            return EBADMSG
        if run_offset(&run) <= span.offset:
            low = middle
        else:
            high = middle
    count = min(count - low, MESSAGE_RUNS)
    if read_source(index, span.runs, count * RUN_BYTES, index_position(low)):
        return EBADMSG
    if not are_possible_runs(first, span.runs, count):
        return EBADMSG
    limit_to_runs(span, count)
    return 0


cdef off_t index_position(uint64_t number) noexcept nogil:
    return HEADER_BYTES + number * RUN_BYTES


cdef void limit_to_runs(Span *span, size_t loaded) noexcept nogil:
    """Where as many were loaded as there is room for, the last one is only good for saying
    where the one before it ends."""
    if loaded == MESSAGE_RUNS and run_offset(&span.runs[loaded - 1]) < span.limit:
        loaded -= 1
        span.limit = run_offset(&span.runs[loaded])
    span.run_count = loaded


cdef int load_payload(const Source *segment, uint64_t first, const Span *span,
                      char *place) noexcept nogil:
    cdef uint64_t offset
    cdef size_t i, length
    cdef int error = 0
    for i in range(span.run_count):
        length = span_run_length(span, i)
        offset = max(span.offset, run_offset(&span.runs[i]))
        if error == 0 and length:
            error = read_source(segment, place, length, offset - first)
        place += length
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


# ── how far a log goes, by its files ────────────────────────────────────────────────────

cdef class Extent:
    """How far a log goes that an earlier process wrote."""

    cdef readonly uint64_t segment_bytes
    cdef readonly uint64_t stdout_bytes
    cdef readonly uint64_t stderr_bytes
    cdef readonly uint64_t disk_bytes
    cdef uint64_t start
    cdef uint64_t stored_bytes
    cdef uint64_t forgotten_bytes
    cdef uint64_t newest  # first offset of the newest segment

    @property
    def end(self):
        return self.stdout_bytes + self.stderr_bytes

    @property
    def lost_bytes(self):
        return self.end - (self.stored_bytes - self.forgotten_bytes)


def read_extent(int directory, uint64_t job, firsts):
    cdef Extent extent = Extent()
    cdef Header header, newest
    cdef uint64_t first
    cdef bint is_oldest = True
    cdef int error
    for first in sorted(firsts):
        with nogil:
            extent.disk_bytes += file_bytes(directory, job, first)
            error = read_header(directory, job, first, &header)
        if error:
            if not is_missing(error) or file_size(directory, job, first, b"idx") >= HEADER_BYTES:
                raise_damage(error, f"{job}.{first}")
            continue  # begun, and no byte of it was written
        if is_oldest:
            extent.start = header.stream_bytes[0] + header.stream_bytes[1]
            extent.forgotten_bytes = header.stored_bytes
            is_oldest = False
        newest = header
    if is_oldest:
        return extent
    extent.newest = newest.first
    with nogil:
        error = count_runs(directory, job, &newest)
    if error:
        raise_damage(error, f"{job}.{newest.first}")
    extent.segment_bytes = newest.segment_bytes
    extent.stdout_bytes = newest.stream_bytes[0]
    extent.stderr_bytes = newest.stream_bytes[1]
    extent.stored_bytes = newest.stored_bytes
    return extent


cdef int count_runs(int directory, uint64_t job, Header *header) noexcept nogil:
    """Adds what the segment holds to what its header counts. Returns errno, or 0."""
    cdef Source segment, index
    cdef int error
    segment.cached_only = index.cached_only = False
    error = open_sources(directory, job, header.first, &segment, &index)
    if error:
        return error
    error = count_runs_from(&segment, &index, header)
    close(segment.fd)
    close(index.fd)
    return error


cdef int count_runs_from(const Source *segment, const Source *index,
                         Header *header) noexcept nogil:
    """A run reaches to the next one, the last to the end of the segment. After a loss of
    power the segment may be shorter than its index says: the rest is lost, and counted."""
    cdef Run runs[MESSAGE_RUNS]
    cdef Run run
    cdef uint64_t position = HEADER_BYTES
    cdef uint64_t end = header.first + segment.size
    cdef size_t count, i
    run.place = run.time_ns = 0
    if segment.size > header.segment_bytes:
        return EBADMSG
    while True:
        count = min(MESSAGE_RUNS, (index.size - position) // RUN_BYTES)
        if count == 0:
            break
        if read_source(index, runs, count * RUN_BYTES, position):
            return EBADMSG
        if position == HEADER_BYTES:
            run = runs[0]
            if run_offset(&run) != header.stream_bytes[0] + header.stream_bytes[1]:
                return EBADMSG
        if not are_possible_runs(run_offset(&run), runs, count):
            return EBADMSG
        for i in range(count):
            count_run(header, &run, run_offset(&runs[i]), end)
            run = runs[i]
        position += count * RUN_BYTES
    if position > HEADER_BYTES:
        count_run(header, &run, max(end, run_offset(&run)), end)
    return 0


cdef void count_run(Header *header, const Run *run, uint64_t limit,
                    uint64_t end) noexcept nogil:
    """One that reaches to `limit`, in a segment that holds bytes up to `end`."""
    cdef uint64_t offset = run_offset(run)
    cdef uint64_t length = limit - offset if limit > offset else 0
    cdef int stream = run_stream(run)
    if stream == 0:
        header.stream_bytes[0] += min(run.time_ns, length)
        header.stream_bytes[1] += length - min(run.time_ns, length)
        return
    header.stream_bytes[(stream - 1) & 1] += length
    if end > offset:
        header.stored_bytes += min(limit, end) - offset


cdef raise_errno():
    raise OSError(errno, "cannot set up the output threads")


cdef raise_damage(int error, str name):
    if error == EBADMSG:
        raise OSError(error, "shorter than, or different from, what was written", name)
    raise OSError(error, "cannot read the output of a job", name)


# Files and folders that the kernel makes up


def read_small(bytes path):
    cdef const char *name = path
    cdef char data[SMALL_FILE_BYTES]
    cdef ssize_t length = -1
    cdef int fd, error
    with nogil:
        fd = c_open(name, O_RDONLY | O_CLOEXEC)
        if fd >= 0:
            length = read(fd, data, SMALL_FILE_BYTES)
        error = errno
        if fd >= 0:
            close(fd)
    if length < 0:
        raise OSError(error, strerror(error).decode(), path.decode("utf-8", "surrogateescape"))
    return PyBytes_FromStringAndSize(data, length)


def remove_folders(list paths):
    cdef Py_ssize_t count = len(paths)
    cdef Py_ssize_t i
    cdef const char **names = <const char **> calloc(count + 1, sizeof(char *))
    cdef int *errors = <int *> calloc(count + 1, sizeof(int))
    try:
        if names is NULL or errors is NULL:
            raise MemoryError
        for i in range(count):
            names[i] = paths[i]
        with nogil:
            for i in range(count):
                errors[i] = errno if rmdir(names[i]) < 0 else 0
        return [errors[i] for i in range(count)]
    finally:
        free(names)
        free(errors)
