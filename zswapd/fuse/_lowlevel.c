/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The hook: FALLOCATE, reads and writes without a coroutine, and a queue that is drained without
 * the event loop. pyfuse3 has none of these.
 *
 * This object is a Python extension and an interposer. It is loaded with RTLD_GLOBAL before
 * pyfuse3, so it comes first in the search order. pyfuse3's calls of fuse_session_new() and
 * fuse_session_receive_buf() therefore end here. dlsym(RTLD_NEXT) finds the functions of libfuse.
 * Until Python calls attach(), and for all other sessions, both functions only pass the call on.
 *
 *   fuse_session_new()
 *       copies the table of operations and replaces .read, .write, .fallocate and .init. It removes
 *       .write_buf: a process that may grow pipes (CAP_SYS_RESOURCE) would get written data as
 *       a pipe instead of memory.
 *   fuse_session_receive_buf()
 *       reads requests itself. Plain Python functions answer READ, WRITE and FALLOCATE of block
 *       inodes at once. The next request is taken without a turn of the event loop. If the queue is
 *       empty, it first fetches the next pages of a sequential reader (read_ahead()). Then it waits
 *       for a moment with the GIL released (poll_request(), nap()). All other requests go to
 *       pyfuse3. If there is no request, pyfuse3 gets -EINTR, "try again".
 *
 * Invariants
 *   - Requests are in `request`. Replies are made in `reply` or `ahead.data`. All are parts of
 *     a mapping that attach() makes and touches. libfuse allocates about 160 bytes a request from
 *     the heap, and Python an int or two. This path asks the kernel for no memory.
 *   - A write or discard that touches read-ahead data first invalidates that data. There is no
 *     read-ahead while a deferred request may still change a page. All changes of a block inode
 *     pass here, so a READ from read-ahead data gets the same data as from Python.
 *   - The written data of a request starts on a page boundary, because the headers before it fill
 *     the end of the page before. The kernel then copies whole pages, and the compressor reads
 *     aligned pages.
 *   - The memoryviews for Python point into this mapping, which lives as long as the process. A
 *     function that keeps a view or a slice sees other data later, but never freed memory. Views of
 *     whole pages are made once per length.
 *   - A session outlives its process. The request buffer may be shared memory. At any instruction
 *     it shows which request is in flight: `len` in the request's header is zero from before the
 *     read that fills it until the answer, and `active` has the number of the request. A successor
 *     answers the remaining requests (py_adopt()). The kernel resends them. Before Linux 6.9 it
 *     cannot, and the last request is taken from the buffer. The kernel refuses a second answer to
 *     a request with ENOENT. A repeated request changes nothing, because no other request is
 *     answered in between.
 *   - A block file changes only through the one handle that Python has admitted (fuse/writers.py).
 *     `writers` keeps it until Python voids it, so the check is one compare.
 *   - If the kernel cannot resend, the request in the buffer is the only copy and has a checksum
 *     (`check`). A request with a wrong checksum gets EIO. If the kernel can resend, the buffer is
 *     not used, and there is no checksum. Every takeover needs FUSE_INIT, which is stored twice, in
 *     two pages.
 *   - No Python exception leaves this file. It is counted and reported as unraisable, and the
 *     request gets EIO.
 *
 * Limits: one session per process, as in pyfuse3. Block inodes are below INODE_LIMIT. The GIL
 * guards all state but the request buffer, which belongs to the thread that runs the session.
 */

#define FUSE_USE_VERSION 31
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

/*
 * This file defines these two functions. The headers of libfuse 3.17 declare them too, in some
 * releases with a const and in some without it. So the declarations get other names here.
 */
#define fuse_session_new_versioned declared_session_new_versioned
#define _fuse_session_new_317 declared_session_new_317
#include <fuse_lowlevel.h>
#undef fuse_session_new_versioned
#undef _fuse_session_new_317

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <malloc.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

/* libfuse 3.17 made this name a macro around fuse_session_new_versioned(). */
#undef fuse_session_new

#define INODE_LIMIT 65536
/* Bytes. The table has 45 pointers in libfuse 3.14 and grows by one or two a year. */
#define OPERATIONS_MAX 1024
#define PENALTY_MAX 255   /* requests */
/*
 * This thread loses the processor for this time if another program uses up its time slice, which
 * is 0.7 ms at least. A kernel thread that passes on a request and the hypervisor take less. With
 * 200 us a virtual machine counted as crowded four times a second, and a random fault took 41 us
 * instead of 32. After a write the limit is 200 us: then the other program is the swapping program,
 * which should not share a processor with this thread.
 */
#define CROWDED_NS 600000
#define CROWDED_WRITES_NS 200000
#define CROWDED_MIN 1023  /* requests */
/* Requests. A crowded poll costs about 3 ms, which is less than 1 us for each of these. */
#define CROWDED_MAX 4095
/* Requests other than reads. The other program was usually the program that swaps out. */
#define CROWDED_WRITES 15
#define AHEAD_MAX (128u << 10) /* bytes; a swap-in at the highest vm.page-cluster that pays, 5 */
#define RESENT (1ull << 63) /* set in the number of a request that the kernel resends */
#define NOTIFY_RESEND 7     /* Linux 6.9; older headers do not have it */
#define INIT_MAX 1024       /* bytes kept of FUSE_INIT, which has 104 */
/*
 * A longer wait can be left to the event loop. The limit must not be shorter: a processor that
 * becomes idle twice within 0.5 ms, for a nap and then for the event loop, pulls a waiting program
 * from another processor. A program that swaps should stay where it is (docs/benchmarks.md).
 */
#define NAP_NS 2000000
#define SAMPLED 64      /* one in 64 requests is timed, because the clock takes about 30 ns */
#define LATENCIES 21    /* bounds of 1 us, 2 us, ... 0.52 s, and the rest */
#define DEFERRED (-EINPROGRESS) /* a result: the request is answered later, by reply() */
#define STALLED (-EALREADY)     /* a result: the request stays in the buffer until resume() */
#define STALL_NS 200000 /* of sleep between two turns of the event loop meanwhile */
#define WRITE_HEADERS (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))

struct libfuse_version; /* this file only passes it on */

typedef struct fuse_session *(*session_new_fn)(struct fuse_args *, const struct fuse_lowlevel_ops *,
					       size_t, void *);
typedef struct fuse_session *(*session_new_versioned_fn)(struct fuse_args *,
							 const struct fuse_lowlevel_ops *, size_t,
							 const struct libfuse_version *, void *);
typedef int (*receive_fn)(struct fuse_session *, struct fuse_buf *);

/*
 * The state that outlives the process: the first page of the memory given to attach().
 * zswapd/handover/state.py describes the same words to the supervisor. Both must agree.
 */
struct survivor {
	uint64_t requests;  /* requests taken off the queue: a sign of life */
	uint64_t active;    /* number of the request that is being answered, 0 in between */
	uint64_t opcode;    /* opcode of that request */
	uint64_t offset;    /* offset in that request if it is a READ, WRITE or FALLOCATE, else 0 */
	uint64_t poison;    /* number of the request to answer with EIO at once, 0 for none */
	uint64_t poisoned;  /* requests answered so */
	uint64_t init_size; /* bytes of the first FUSE_INIT, 0 until it was read */
	char init[INIT_MAX];
	/*
	 * Number of the request that `check` belongs to. It is 0 from before the read of the next
	 * request until that has its checksum.
	 */
	uint64_t noted;
	uint64_t check; /* digest of all bytes of the request; only if checks_requests */
};

/*
 * The second copy of FUSE_INIT, at the beginning of the second page, before the headers of the
 * request. An older program leaves zeros there.
 */
struct init_copy {
	uint64_t size, check; /* 0: there is no copy */
	char init[INIT_MAX];
};

/*
 * The success of polls, separately for reads, for changes and for requests that wait for the disk.
 * Between two writes the swapping program and kernel threads also run on this processor. A poll
 * then says nothing about the next read. Some disks answer within 50 us and others within 10 ms.
 */
enum { READS, CHANGES, DISK, PACES };

struct pace {
	unsigned skip;           /* requests to serve before the next poll */
	/* penalty: `skip` after the last poll in vain; crowd: `skip` after the next crowded poll */
	unsigned penalty, crowd;
};

static struct {
	PyObject *read, *write, *fallocate; /* NULL unless attached */
	PyObject *interrupt;                /* called for FUSE_INTERRUPT; NULL for none */
	/* Returns 0 if a handle may change a file, else -errno; NULL: every handle may */
	PyObject *admit;
	/* Called when disk_fd is readable; NULL without a disk */
	PyObject *on_disk_ready;
	int disk_fd;                        /* -1 without a disk */
	uint64_t handed_over;               /* number of the last request that pyfuse3 got */
	uint32_t handed_over_pid;           /* thread that waits for its answer */
	/* The session with the operations of this file; NULL until it is made */
	struct fuse_session *session;
	int fd;                             /* of that session, -1 until the first receive */
	struct fuse_lowlevel_ops original;  /* pyfuse3's table of operations */
	/* Bitmap of the inodes that the Python functions serve */
	uint64_t blocks[INODE_LIMIT / 64];
	size_t page, max_io;                /* bytes */
	Py_buffer shared; /* memory of survivor and request; empty if that is private */
	struct survivor *survivor;
	struct init_copy *init_copy;
	bool checks_requests;    /* a successor may need the request that is in the buffer */
	/* The buffer holds a request that a predecessor has read and not answered */
	bool is_left_over;
	/* It holds a write that waits for memory, until resume(). No other request is taken */
	bool is_stalled;
	char *request; /* its headers; behind those of a WRITE, page-aligned, the data */
	char *reply;   /* max_io bytes */
	PyObject **write_views, **read_views; /* by number of pages, 0 … max_io / page */
	uint64_t poll_ns, budget_ns;
	uint64_t quiet_since;   /* end of the last request served here */
	struct pace paces[PACES], *pace; /* `pace` is that of the last request */
	unsigned max_background;
	/* Bytes of free memory below which this thread is a real-time task, 0 for never */
	uint64_t scarce_bytes;
	bool is_first;           /* this thread is a real-time task now */
	unsigned deferred;      /* requests that wait for reply() */
} hook = {.fd = -1, .disk_fd = -1, .pace = hook.paces};

/*
 * The handle that was admitted last, by block inode; 0 for none. The array is not in `hook`, which
 * forget_all() clears as a whole: so only the pages in use are ever touched.
 */
static uint64_t writers[INODE_LIMIT];

/* The read-ahead data for the next READ of a sequential reader, and the detection of one. */
static struct {
	char *data;       /* AHEAD_MAX bytes, or max_io where that is less */
	PyObject **views; /* of the data, by number of pages */
	size_t most;      /* bytes of `data` */
	fuse_ino_t ino;   /* inode and offset of the data */
	off_t off;
	size_t size;      /* bytes; 0: there is no data */
	fuse_ino_t last_ino; /* the last READ that was answered */
	off_t last_end;
	size_t last_size;
	/* The last READ began where the one before it ended, and no read-ahead followed */
	bool wanted;
} ahead;

static struct {
	uint64_t read, write, fallocate;   /* requests of block inodes */
	uint64_t read_bytes, write_bytes;  /* answered without an error */
	uint64_t other;                    /* requests handed to pyfuse3 */
	uint64_t drained;                  /* requests that cost no turn of the event loop */
	uint64_t receives;                 /* calls of fuse_session_receive_buf() by pyfuse3 */
	/* Polls; those that found a request or an answer of the disk; their time */
	uint64_t polls, poll_hits, poll_ns;
	/* Polls that ended because another program took the processor */
	uint64_t crowded_polls;
	/* Naps; those that ended with a request or an answer of the disk */
	uint64_t naps, nap_hits;
	uint64_t budget_ends;              /* batches cut short to let the event loop run */
	uint64_t aheads, ahead_hits;       /* reads ahead; those that a READ has taken */
	uint64_t errors;                   /* requests answered with an errno */
	/* Exceptions and impossible results of Python functions */
	uint64_t exceptions;
	/* Replies that the kernel did not take, e.g. to an interrupted request */
	uint64_t reply_errors;
	uint64_t scarcities;               /* times that free memory fell below scarce_bytes */
	uint64_t deferred;                 /* requests that were answered later */
	/* Requests that a predecessor had read before */
	uint64_t resent;
	uint64_t max_write, max_background; /* as negotiated with the kernel, 0 before */
} stats;

/*
 * The times of the sampled requests, from the queue to the end of the answer, by powers of two of
 * a microsecond.
 */
struct latency {
	uint64_t counts[LATENCIES];
	uint64_t ns; /* sum of the times */
};

static struct {
	unsigned left; /* requests to pass before the next is timed */
	struct latency read, write;
} sample = {.left = SAMPLED};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* 0.5 us a page of 4 KiB while other programs use the processor caches; a store is about 10 us. */
static uint64_t digest(const char *data, size_t length)
{
	return XXH3_64bits(data, length);
}

static bool is_block(uint64_t ino)
{
	return ino < INODE_LIMIT && (hook.blocks[ino / 64] >> (ino % 64) & 1);
}

/*
 * --- the operations
 * ------------------------------------------------------------------------------------------------
 */

static void note_reply(int res)
{
	if (res != 0)
		stats.reply_errors++;
}

static void reply_error(fuse_req_t req, int error)
{
	stats.errors++;
	note_reply(fuse_reply_err(req, error));
}

/* Answer a request with the errno -n. If n is DEFERRED, count it; reply() will answer it. */
static void reply_later_or_error(fuse_req_t req, long n)
{
	if (n != DEFERRED) {
		reply_error(req, (int)-n);
		return;
	}
	stats.deferred++;
	hook.deferred++;
	fuse_reply_none(req); /* frees it, sends nothing */
}

/*
 * Call a Python function and return its int, if that is -4095 to `most`. For an exception or any
 * other result, return -EIO.
 */
static long call(PyObject *function, PyObject **args, size_t count, long most)
{
	PyObject *result = PyObject_Vectorcall(function, args, count, NULL);
	long value = -EIO;

	if (result != NULL) {
		value = PyLong_AsLong(result);
		Py_DECREF(result);
		if (!PyErr_Occurred() && value <= most && value > -4096)
			return value;
		if (!PyErr_Occurred())
			PyErr_Format(PyExc_SystemError,
				     "%R returned %ld, which is neither a length nor an errno",
				     function, value);
	}
	stats.exceptions++;
	PyErr_WriteUnraisable(function);
	return -EIO;
}

/*
 * Return a view of the first `size` bytes at `home`: the kept view of this length, or a new view if
 * the length is not whole pages.
 */
static PyObject *borrow_view(PyObject **kept, char *home, size_t size, int flags)
{
	if (size % hook.page == 0)
		return Py_NewRef(kept[size / hook.page]);
	return PyMemoryView_FromMemory(home, (Py_ssize_t)size, flags);
}

/* Call read(ino, offset, view) or write(ino, offset, view). Return a length or -errno. */
static long call_with_view(PyObject *function, fuse_ino_t ino, off_t off, PyObject *view,
			   size_t size)
{
	PyObject *args[3] = {PyLong_FromUnsignedLong(ino), PyLong_FromLongLong(off), view};
	long n = -ENOMEM;

	if (args[0] != NULL && args[1] != NULL)
		n = call(function, args, 3, (long)size);
	else
		PyErr_Clear();
	Py_XDECREF(args[0]);
	Py_XDECREF(args[1]);
	return n;
}

/* Return 0 if a handle may change a block file, else -errno. */
static long admit(fuse_ino_t ino, const struct fuse_file_info *fi)
{
	uint64_t handle = fi != NULL ? fi->fh : 0;
	PyObject *args[2];
	long error = -ENOMEM;

	if (hook.admit == NULL || writers[ino] == handle)
		return 0;
	args[0] = PyLong_FromUnsignedLong(ino);
	args[1] = PyLong_FromUnsignedLongLong(handle);
	if (args[0] != NULL && args[1] != NULL)
		error = call(hook.admit, args, 2, 0);
	else
		PyErr_Clear();
	Py_XDECREF(args[0]);
	Py_XDECREF(args[1]);
	if (error == 0)
		writers[ino] = handle;
	return error;
}

static void note_read(fuse_ino_t ino, off_t off, size_t size)
{
	ahead.wanted = size <= ahead.most && ino == ahead.last_ino && off == ahead.last_end;
	ahead.last_ino = ino;
	ahead.last_end = off + (off_t)size;
	ahead.last_size = size;
}

/* Invalidate the read-ahead data if a change touches it. */
static void forget_ahead(fuse_ino_t ino, off_t off, off_t length)
{
	if (ino == ahead.ino && off < ahead.off + (off_t)ahead.size && ahead.off < off + length)
		ahead.size = 0;
}

/*
 * A deferred write or discard has already invalidated the data that it touches, but does its work
 * later. Data read ahead in between would become stale.
 */
static bool may_read_ahead(void)
{
	return ahead.wanted && hook.deferred == 0;
}

/*
 * Fetch the pages after the last READ while its reader works on that data. Eight pages take as long
 * to decompress as a processor takes to wake up. Sequential swap-in becomes 1.5 times as fast
 * (docs/benchmarks.md). An error and the end of the file are left to the READ that may come.
 */
static void read_ahead(void)
{
	PyObject *view;

	ahead.wanted = false;
	ahead.size = 0;
	view = borrow_view(ahead.views, ahead.data, ahead.last_size, PyBUF_WRITE);
	if (view == NULL) {
		PyErr_Clear();
		return;
	}
	stats.aheads++;
	if (call_with_view(hook.read, ahead.last_ino, ahead.last_end, view, ahead.last_size) ==
	    (long)ahead.last_size) {
		ahead.ino = ahead.last_ino;
		ahead.off = ahead.last_end;
		ahead.size = ahead.last_size;
	}
	Py_DECREF(view);
}

static void hook_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
		      struct fuse_file_info *fi)
{
	PyObject *view;
	long n;

	if (!is_block(ino)) {
		if (hook.original.read != NULL)
			hook.original.read(req, ino, size, off, fi);
		else
			fuse_reply_err(req, ENOSYS);
		return;
	}
	stats.read++;
	if (size > hook.max_io) { /* the kernel got this limit at the mount */
		reply_error(req, EINVAL);
		return;
	}
	if (size == ahead.size && off == ahead.off && ino == ahead.ino) {
		stats.ahead_hits++;
		stats.read_bytes += size;
		ahead.size = 0;
		note_reply(fuse_reply_buf(req, ahead.data, size));
		note_read(ino, off, size);
		return;
	}
	view = borrow_view(hook.read_views, hook.reply, size, PyBUF_WRITE);
	if (view == NULL) {
		PyErr_Clear();
		reply_error(req, ENOMEM);
		return;
	}
	n = call_with_view(hook.read, ino, off, view, size);
	Py_DECREF(view);
	if (n < 0) {
		reply_later_or_error(req, n);
		return;
	}
	stats.read_bytes += (uint64_t)n;
	note_reply(fuse_reply_buf(req, hook.reply, (size_t)n));
	note_read(ino, off, size);
}

static void hook_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t off,
                       struct fuse_file_info *fi)
{
	char *home = hook.request + WRITE_HEADERS;
	PyObject *view;
	long n;

	if (!is_block(ino)) {
		if (hook.original.write != NULL)
			hook.original.write(req, ino, data, size, off, fi);
		else
			fuse_reply_err(req, ENOSYS);
		return;
	}
	stats.write++;
	n = admit(ino, fi);
	if (n < 0) {
		reply_error(req, (int)-n);
		return;
	}
	forget_ahead(ino, off, (off_t)size);
	if (size > hook.max_io) {
		reply_error(req, EINVAL);
		return;
	}
	if (data != home) /* libfuse has received it, into memory that does not last */
		memcpy(home, data, size);
	view = borrow_view(hook.write_views, home, size, PyBUF_READ);
	if (view == NULL) {
		PyErr_Clear();
		reply_error(req, ENOMEM);
		return;
	}
	n = call_with_view(hook.write, ino, off, view, size);
	Py_DECREF(view);
	if (n == STALLED) {
		stats.write--;
		hook.is_stalled = true;
		fuse_reply_none(req);
		return;
	}
	if (n < 0) {
		reply_later_or_error(req, n);
		return;
	}
	stats.write_bytes += (uint64_t)n;
	note_reply(fuse_reply_write(req, (size_t)n));
}

static void hook_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
                           struct fuse_file_info *fi)
{
	PyObject *args[4];
	long n;

	if (!is_block(ino)) {
		fuse_reply_err(req, EOPNOTSUPP);
		return;
	}
	stats.fallocate++;
	n = admit(ino, fi);
	if (n < 0) {
		reply_error(req, (int)-n);
		return;
	}
	n = -ENOMEM;
	forget_ahead(ino, offset, length);
	args[0] = PyLong_FromUnsignedLong(ino);
	args[1] = PyLong_FromLong(mode);
	args[2] = PyLong_FromLongLong(offset);
	args[3] = PyLong_FromLongLong(length);
	if (args[0] != NULL && args[1] != NULL && args[2] != NULL && args[3] != NULL)
		n = call(hook.fallocate, args, 4, 0);
	else
		PyErr_Clear();
	for (int i = 0; i < 4; i++)
		Py_XDECREF(args[i]);
	if (n < 0)
		reply_later_or_error(req, n);
	else
		note_reply(fuse_reply_err(req, 0));
}

/*
 * Direct I/O of the loop driver is asynchronous, so the kernel counts it as background requests. By
 * default it sends 12 of these at a time.
 */
static void hook_init(void *userdata, struct fuse_conn_info *conn)
{
	if (hook.original.init != NULL)
		hook.original.init(userdata, conn);
	if (conn->max_write > hook.max_io)
		conn->max_write = (unsigned)hook.max_io;
	/*
	 * Reads of cached files must not be background requests: reads of a slow or hanging file
	 * would take the places that the loop driver needs for swap. So a process that reads ahead
	 * waits for its requests one after the other.
	 */
	conn->want &= ~(unsigned)FUSE_CAP_ASYNC_READ;
	conn->max_background = hook.max_background;
	conn->congestion_threshold = hook.max_background - hook.max_background / 4;
	stats.max_write = conn->max_write;
	stats.max_background = conn->max_background;
}

/*
 * --- interposed: fuse_session_new
 * ----------------------------------------------------------------------------------------
 */

static bool attached(void)
{
	return hook.read != NULL;
}

/* Return the table to register: a changed copy for pyfuse3's session, else the given table. */
static const struct fuse_lowlevel_ops *patched(const struct fuse_lowlevel_ops *op, size_t *op_size)
{
	static union {
		struct fuse_lowlevel_ops ops;
		char bytes[OPERATIONS_MAX];
	} table;

	if (!attached() || hook.session != NULL || *op_size > sizeof(table))
		return op;
	memset(&table, 0, sizeof(table));
	memcpy(&table, op, *op_size);
	hook.original = table.ops;
	table.ops.init = hook_init;
	table.ops.read = hook_read;
	table.ops.write = hook_write;
	table.ops.write_buf = NULL;
	table.ops.fallocate = hook_fallocate;
	if (*op_size < sizeof(table.ops))
		*op_size = sizeof(table.ops);
	return &table.ops;
}

static struct fuse_session *remember(struct fuse_session *session, bool is_ours)
{
	if (is_ours)
		hook.session = session;
	return session;
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
				      size_t op_size, void *userdata);
struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
				      size_t op_size, void *userdata)
{
	session_new_fn real = (session_new_fn)dlsym(RTLD_NEXT, "fuse_session_new");
	const struct fuse_lowlevel_ops *ours = patched(op, &op_size);

	return real == NULL ? NULL : remember(real(args, ours, op_size, userdata), ours != op);
}

static struct fuse_session *new_versioned(const char *name, struct fuse_args *args,
					  const struct fuse_lowlevel_ops *op, size_t op_size,
					  const struct libfuse_version *version, void *userdata)
{
	session_new_versioned_fn real = (session_new_versioned_fn)dlsym(RTLD_NEXT, name);
	const struct fuse_lowlevel_ops *ours = patched(op, &op_size);

	return real == NULL ? NULL
			    : remember(real(args, ours, op_size, version, userdata), ours != op);
}

/* With the headers of libfuse 3.17.1 and later, fuse_session_new() compiles to this function. */
struct fuse_session *fuse_session_new_versioned(struct fuse_args *args,
						const struct fuse_lowlevel_ops *op, size_t op_size,
						const struct libfuse_version *version,
						void *userdata);
struct fuse_session *fuse_session_new_versioned(struct fuse_args *args,
						const struct fuse_lowlevel_ops *op, size_t op_size,
						const struct libfuse_version *version,
						void *userdata)
{
	return new_versioned("fuse_session_new_versioned", args, op, op_size, version, userdata);
}

/* With the headers of libfuse 3.17.0, it compiles to this one. */
struct fuse_session *_fuse_session_new_317(struct fuse_args *args,
					   const struct fuse_lowlevel_ops *op, size_t op_size,
					   const struct libfuse_version *version, void *userdata);
struct fuse_session *_fuse_session_new_317(struct fuse_args *args,
					   const struct fuse_lowlevel_ops *op, size_t op_size,
					   const struct libfuse_version *version, void *userdata)
{
	return new_versioned("_fuse_session_new_317", args, op, op_size, version, userdata);
}

/*
 * --- interposed: fuse_session_receive_buf
 * --------------------------------------------------------------------------------
 */

static struct fuse_in_header *header(void)
{
	return (struct fuse_in_header *)hook.request;
}

/*
 * Mark the buffer as empty. `noted` is cleared first. If this process dies between the two stores,
 * its successor answers the request once more, which changes nothing. In the other order, the
 * successor would take an answered request for a damaged one.
 */
static void forget_request(void)
{
	__atomic_store_n(&hook.survivor->noted, 0, __ATOMIC_RELEASE);
	__atomic_store_n(&header()->len, 0, __ATOMIC_RELEASE);
}

/*
 * Read one request without blocking. Return its length, 0 if the session has ended, -EAGAIN if
 * there is no request, or another -errno.
 */
static ssize_t read_request(struct fuse_session *se)
{
	for (;;) {
		ssize_t n;

		forget_request();
		n = read(hook.fd, hook.request, WRITE_HEADERS + hook.max_io);
		int error = errno;

		if (fuse_session_exited(se))
			return 0;
		if (n >= (ssize_t)sizeof(struct fuse_in_header))
			return n;
		if (n >= 0)
			return -EIO;
		if (error == ENODEV) { /* unmounted, or the connection was aborted */
			fuse_session_exit(se);
			return 0;
		}
		/* ENOENT: the request was interrupted during the copy; read the next */
		if (error != ENOENT)
			return -error;
	}
}

/*
 * Take the results of requests to the disk. Requests that wait for them are answered here, without
 * a turn of the event loop.
 */
static void hear_disk(void)
{
	PyObject *result = PyObject_CallNoArgs(hook.on_disk_ready);

	/* The client would wait for ever. The successor of this process answers the request. */
	if (result == NULL) {
		PyErr_WriteUnraisable(hook.on_disk_ready);
		abort();
	}
	Py_DECREF(result);
	hook.quiet_since = now_ns();
	if (hook.deferred > 0)
		return;
	/* The client was usually a reader, and its next request comes soon. */
	hook.pace = &hook.paces[READS];
	hook.pace->skip -= hook.pace->skip > 0;
}

/*
 * Return whether the disk has answered. A request may wait for that, or read-ahead data has come
 * that must be ready before the reader's next request.
 */
static bool disk_has_answered(void)
{
	struct pollfd disk = {.fd = hook.disk_fd, .events = POLLIN};

	return hook.disk_fd != -1 && poll(&disk, 1, 0) > 0;
}

/*
 * Poll for the next request, or for the disk if a request waits for it, without the GIL. The poll
 * ends poll_us after the last request. To wake a sleeping processor costs several times the time of
 * a request. A program that faults pages in sends its next request within about 10 us. A page from
 * a disk that takes 50 us reaches its reader after 112 us instead of 162 us.
 *
 * `is_heard` is set if the disk has answered and hear_disk() was called.
 *
 * Each further poll in vain doubles the number of requests that are served without a poll. The
 * first poll that succeeds resets that number. So requests to a busy device are answered at once,
 * and rare requests cost almost nothing. A poll that occupies the reader's processor is in vain
 * too, because the reader cannot send its next request.
 *
 * If another program wants the processor, the poll is wrong: it spends the time slice that the next
 * request needs, and the other program then runs for a whole time slice, about 3 ms. A sleeping
 * thread runs soon after it wakes. Therefore the next 1023 requests after a crowded poll are served
 * without a poll, then 2047, then 4095. Each poll that succeeds takes one off that number. After
 * a write it is only 15 requests, because the other program was usually the swapping program.
 */
static ssize_t poll_request(struct fuse_session *se, uint64_t deadline, bool *is_heard)
{
	uint64_t start = now_ns(), now = start, end = hook.quiet_since + hook.poll_ns;
	struct pace *pace = hook.pace;
	uint64_t crowded_ns = pace == &hook.paces[CHANGES] ? CROWDED_WRITES_NS : CROWDED_NS;
	ssize_t n = -EAGAIN;
	PyThreadState *thread;
	bool is_crowded = false, has_answer = false;

	if (end > deadline)
		end = deadline;
	/* A real-time thread that polls would keep the loop driver's thread from running. */
	if (now >= end || pace->skip > 0 || hook.is_first)
		return -EAGAIN;
	thread = PyEval_SaveThread();
	while (n == -EAGAIN && !has_answer && now < end && !is_crowded) {
		uint64_t before = now;

		/*
		 * On a machine with two processors, a thread of the disk, the kernel's thread of
		 * the loop device or kswapd may have to run on this one.
		 */
		sched_yield();
		n = read_request(se);
		has_answer = n == -EAGAIN && disk_has_answered();
		now = now_ns();
		is_crowded = now - before > crowded_ns;
	}
	PyEval_RestoreThread(thread);
	stats.polls++;
	stats.poll_ns += now - start;
	stats.poll_hits += n != -EAGAIN || has_answer;
	if (is_crowded) {
		stats.crowded_polls++;
		pace->skip = pace->crowd;
		if (pace == &hook.paces[READS] && pace->crowd < CROWDED_MAX)
			pace->crowd = 2 * pace->crowd + 1;
	} else if (n != -EAGAIN || has_answer) {
		pace->penalty = 0;
		pace->crowd -= pace->crowd > CROWDED_MIN;
	} else if (end == deadline) {
		stats.budget_ends++;
	} else {
		pace->penalty = pace->penalty < PENALTY_MAX ? 2 * pace->penalty + 1 : PENALTY_MAX;
		pace->skip = pace->penalty;
	}
	*is_heard = has_answer;
	if (has_answer)
		hear_disk();
	return n;
}

/*
 * Sleep until the next request or an answer of the disk. The sleep ends NAP_NS after the last
 * request. It replaces a turn of the event loop when polling is off or in vain. A turn costs more
 * than the wake-up: a 4 KiB read through a loop device takes 46 us with a nap, otherwise above 60.
 */
static bool nap(uint64_t deadline)
{
	uint64_t now = now_ns(), end = hook.quiet_since + NAP_NS;
	struct pollfd waits[] = {{.fd = hook.fd, .events = POLLIN},
				 {.fd = hook.disk_fd, .events = POLLIN}};
	struct timespec timeout = {0, 0};
	PyThreadState *thread;
	bool is_ready;

	if (end > deadline)
		end = deadline;
	if (now >= end)
		return false;
	timeout.tv_nsec = (long)(end - now); /* below a second, as NAP_NS is */
	thread = PyEval_SaveThread();
	/* A signal ends the nap too, because Python has to see it. */
	is_ready = ppoll(waits, 2, &timeout, NULL) > 0;
	PyEval_RestoreThread(thread);
	stats.naps++;
	stats.nap_hits += is_ready;
	if (is_ready && waits[1].revents != 0)
		hear_disk();
	return is_ready;
}

/* Note the request in flight, so that the supervisor can blame it for the death of this process. */
static void note_active(size_t length)
{
	const struct fuse_in_header *in = header();
	struct survivor *survivor = hook.survivor;

	survivor->requests++;
	survivor->opcode = in->opcode;
	survivor->offset = 0;
	if (in->opcode == FUSE_READ && length >= sizeof(*in) + sizeof(struct fuse_read_in))
		survivor->offset = ((const struct fuse_read_in *)(in + 1))->offset;
	else if (in->opcode == FUSE_WRITE && length >= WRITE_HEADERS)
		survivor->offset = ((const struct fuse_write_in *)(in + 1))->offset;
	else if (in->opcode == FUSE_FALLOCATE &&
		 length >= sizeof(*in) + sizeof(struct fuse_fallocate_in))
		survivor->offset = ((const struct fuse_fallocate_in *)(in + 1))->offset;
	if (hook.checks_requests) {
		survivor->check = digest(hook.request, length);
		__atomic_store_n(&survivor->noted, in->unique, __ATOMIC_RELEASE);
	}
	stats.resent += (in->unique & RESENT) != 0;
	survivor->active = in->unique & ~RESENT;
}

static void note_answered(void)
{
	forget_request();
	hook.survivor->active = 0;
}

/* Note that a request was answered, or that it waits in the buffer, which kills no process. */
static void end_request(void)
{
	if (hook.is_stalled)
		hook.survivor->active = 0;
	else
		note_answered();
}

/* If the request is the one that has killed several workers, answer it with EIO at once. */
static bool answer_poison(void)
{
	const struct fuse_in_header *in = header();
	struct fuse_out_header out = {.len = sizeof(out), .error = -EIO, .unique = in->unique};

	if (hook.survivor->poison == 0 || hook.survivor->poison != (in->unique & ~RESENT))
		return false;
	if (write(hook.fd, &out, sizeof(out)) != (ssize_t)sizeof(out))
		stats.reply_errors++;
	stats.errors++;
	hook.survivor->poisoned++;
	hook.survivor->poison = 0;
	forget_request();
	return true;
}

/*
 * Return whether the Python functions answer this request. A request that is shorter than what the
 * operation reads is not served here.
 */
static bool served_here(const struct fuse_in_header *in, size_t length)
{
	const struct fuse_write_in *write = (const void *)(in + 1);

	if (!is_block(in->nodeid))
		return false;
	switch (in->opcode) {
	case FUSE_READ:
		return length >= sizeof(*in) + sizeof(struct fuse_read_in);
	case FUSE_WRITE:
		return length >= WRITE_HEADERS && length - WRITE_HEADERS >= write->size;
	case FUSE_FALLOCATE:
		return length >= sizeof(*in) + sizeof(struct fuse_fallocate_in);
	default:
		return false;
	}
}

/*
 * Copy the request into pyfuse3's buffer. pyfuse3 frees the buffer, so it is from malloc(). It
 * grows only to the length of a request.
 */
static int hand_over(struct fuse_buf *buf, const char *request, size_t length)
{
	if (malloc_usable_size(buf->mem) < length) {
		void *mem = realloc(buf->mem, length);

		if (mem == NULL)
			return -ENOMEM;
		buf->mem = mem;
	}
	memcpy(buf->mem, request, length);
	buf->size = length;
	buf->flags = 0;
	hook.handed_over = ((const struct fuse_in_header *)request)->unique & ~RESENT;
	hook.handed_over_pid = ((const struct fuse_in_header *)request)->pid;
	stats.other++;
	return (int)length;
}

/*
 * Tell Python the number of a request whose process was interrupted. libfuse gets the
 * FUSE_INTERRUPT as well.
 */
static void note_interrupt(size_t length)
{
	const struct fuse_in_header *in = header();
	PyObject *result;

	if (in->opcode != FUSE_INTERRUPT || hook.interrupt == NULL ||
	    length < sizeof(*in) + sizeof(struct fuse_interrupt_in))
		return;
	result = PyObject_CallFunction(
	    hook.interrupt, "K",
	    (unsigned long long)(((const struct fuse_interrupt_in *)(in + 1))->unique & ~RESENT));
	if (result == NULL)
		PyErr_WriteUnraisable(hook.interrupt);
	Py_XDECREF(result);
}

static void copy_init(size_t length)
{
	struct init_copy *copy = hook.init_copy;

	copy->size = length;
	memcpy(copy->init, hook.survivor->init, length);
	__atomic_store_n(&copy->check, digest(copy->init, length), __ATOMIC_RELEASE);
}

/*
 * Repair a damaged copy of FUSE_INIT from the other copy. Return false if both are damaged. An
 * older program has made only one copy, without a checksum; that copy is trusted.
 */
static bool mend_init(void)
{
	struct survivor *survivor = hook.survivor;
	struct init_copy *copy = hook.init_copy;
	uint64_t length = survivor->init_size;

	if (length > 0 && length <= INIT_MAX &&
	    (copy->check == 0 || copy->check == digest(survivor->init, length))) {
		copy_init(length);
		return true;
	}
	if (copy->size == 0 || copy->size > INIT_MAX ||
	    copy->check != digest(copy->init, copy->size))
		return length == 0 && copy->check == 0; /* no FUSE_INIT was read yet */
	memcpy(survivor->init, copy->init, copy->size);
	survivor->init_size = copy->size;
	return true;
}

/*
 * Keep the kernel's first request for the successors. The libfuse of each of them takes no other
 * request before this one.
 */
static void keep_init(size_t length)
{
	struct survivor *survivor = hook.survivor;

	if (header()->opcode != FUSE_INIT || length > INIT_MAX)
		return;
	memcpy(survivor->init, hook.request, length);
	copy_init(length);
	__atomic_store_n(&survivor->init_size, length, __ATOMIC_RELEASE);
}

/* A time that equals a bound belongs to the bucket below the bound. */
static void note_latency(uint32_t opcode, uint64_t ns)
{
	struct latency *latency = opcode == FUSE_READ ? &sample.read : &sample.write;
	uint64_t whole_us = ns > 0 ? (ns - 1) / 1000 : 0;
	unsigned bucket = whole_us > 0 ? 64 - (unsigned)__builtin_clzll(whole_us) : 0;

	if (opcode != FUSE_READ && opcode != FUSE_WRITE)
		return;
	latency->counts[bucket < LATENCIES ? bucket : LATENCIES - 1]++;
	latency->ns += ns;
}

/*
 * The queue has requests, so the event loop calls again at once. Its other tasks must run, and the
 * thread that refills the reserve needs the GIL between two runs of frames.
 */
static void rest(void)
{
	struct timespec time = {.tv_nsec = STALL_NS};
	PyThreadState *thread = PyEval_SaveThread();

	nanosleep(&time, NULL);
	PyEval_RestoreThread(thread);
}

static int drain(struct fuse_session *se, struct fuse_buf *buf)
{
	uint64_t start = now_ns(), begin = 0;
	uint64_t served = 0;

	if (hook.is_stalled) {
		rest();
		return -EINTR;
	}

	for (;;) {
		struct fuse_buf request = {.mem = hook.request};
		uint32_t opcode;
		ssize_t n = hook.is_left_over ? (ssize_t)header()->len : read_request(se);
		bool is_heard = false;

		hook.is_left_over = false;
		if (n == -EAGAIN && may_read_ahead()) {
			read_ahead();
			hook.quiet_since = now_ns();
			n = read_request(se);
		}
		if (n == -EAGAIN)
			n = poll_request(se, start + hook.budget_ns, &is_heard);
		if (n == -EAGAIN && (is_heard || nap(start + hook.budget_ns)))
			continue;
		if (n == -EAGAIN)
			return -EINTR;
		if (n <= 0)
			return (int)n;
		if (answer_poison())
			continue;
		note_active((size_t)n);
		if (!served_here(header(), (size_t)n)) {
			keep_init((size_t)n);
			note_interrupt((size_t)n);
			n = hand_over(buf, hook.request, (size_t)n);
			/*
			 * A coroutine answers it some time later, so `active` stays until the next
			 * request.
			 */
			return (int)n;
		}
		request.size = (size_t)n;
		opcode = header()->opcode;
		if (--sample.left == 0)
			begin = now_ns();
		fuse_session_process_buf(se, &request);
		end_request();
		if (hook.is_stalled) {
			sample.left += sample.left == 0; /* the next request is timed instead */
			return -EINTR;
		}
		stats.drained += served++ > 0;
		hook.pace = &hook.paces[hook.deferred > 0     ? DISK
					: opcode == FUSE_READ ? READS
							      : CHANGES];
		hook.pace->skip -= hook.pace->skip > 0;
		hook.quiet_since = now_ns();
		if (sample.left == 0) {
			sample.left = SAMPLED;
			note_latency(opcode, hook.quiet_since - begin);
		}
		if (hook.quiet_since - start >= hook.budget_ns) {
			/* The next drain() begins with a request, too late to be ahead of it. */
			if (may_read_ahead())
				read_ahead();
			stats.budget_ends++;
			return -EINTR;
		}
	}
}

/*
 * The page path takes no memory from the kernel. But tasks of the event loop may take some, for
 * example to accept a connection or to write a log line. Below the zones' min watermark such
 * allocations wait for memory that only swap-out can free. This thread would wait too, and no
 * thread would serve the swap. A real-time task may allocate down to half of that watermark. This
 * thread is therefore real-time while memory is scarce. It is not always real-time, because
 * a real-time task drives the swapping program from its processor.
 */
static void check_memory(void)
{
	struct sched_param priority = {0};
	struct sysinfo now;
	bool is_scarce;

	if (hook.scarce_bytes == 0 || sysinfo(&now) != 0)
		return;
	is_scarce = (uint64_t)now.freeram * now.mem_unit < hook.scarce_bytes;
	if (is_scarce == hook.is_first)
		return;
	priority.sched_priority = is_scarce;
	if (sched_setscheduler(0, is_scarce ? SCHED_RR : SCHED_OTHER, &priority) != 0)
		return;
	hook.is_first = is_scarce;
	stats.scarcities += is_scarce;
}

/* Remember the session's descriptor, and make it non-blocking. */
static bool find_descriptor(struct fuse_session *se)
{
	hook.fd = fuse_session_fd(se);
	return fcntl(hook.fd, F_SETFL, fcntl(hook.fd, F_GETFL) | O_NONBLOCK) != -1;
}

int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
	PyGILState_STATE gil;
	int n;

	if (!attached() || se != hook.session) {
		receive_fn real = (receive_fn)dlsym(RTLD_NEXT, "fuse_session_receive_buf");

		return real == NULL ? -ENOSYS : real(se, buf);
	}
	if (hook.fd == -1 && !find_descriptor(se))
		return -errno;
	/* pyfuse3 calls with the GIL held, so this is free. A later release may call without it. */
	gil = PyGILState_Ensure();
	stats.receives++;
	n = drain(se, buf);
	check_memory();
	PyGILState_Release(gil);
	return n;
}

/*
 * --- Python
 * ------------------------------------------------------------------------------------------------
 */

static void free_views(PyObject **views, size_t most)
{
	if (views == NULL)
		return;
	for (size_t i = 0; i <= most / hook.page; i++)
		Py_XDECREF(views[i]);
	PyMem_Free(views);
}

static PyObject **make_views(char *home, size_t most, int flags)
{
	size_t count = most / hook.page + 1;
	PyObject **views = PyMem_Calloc(count, sizeof(*views));

	if (views == NULL) {
		PyErr_NoMemory();
		return NULL;
	}
	for (size_t i = 0; i < count; i++) {
		views[i] = PyMemoryView_FromMemory(home, (Py_ssize_t)(i * hook.page), flags);
		if (views[i] == NULL) {
			free_views(views, most);
			return NULL;
		}
	}
	return views;
}

/*
 * The next attach() uses the mapping again. It is never unmapped, since any Python object may hold
 * a view of it. `given` is the shared memory for survivor and request, or NULL for private memory.
 */
static int make_buffers(char *given)
{
	static char *mapping;
	static size_t mapping_size;
	size_t shared_size = 2 * hook.page + hook.max_io;
	size_t size = shared_size + hook.max_io + ahead.most;
	char *shared;

	if (size > mapping_size) {
		void *larger = mmap(NULL, size, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

		if (larger == MAP_FAILED) {
			PyErr_SetFromErrno(PyExc_OSError);
			return -1;
		}
		mapping = larger;
		mapping_size = size;
		/* It has page contents. If this fails, there is no core dump (protections.py) */
		(void)madvise(mapping, size, MADV_DONTDUMP);
	}
	shared = given != NULL ? given : mapping;
	/*
	 * Every page is touched now, because MAP_POPULATE does nothing under mlockall(MCL_ONFAULT).
	 * Otherwise the kernel would allocate a page when it copies a request here, while reclaim
	 * waits for this process.
	 */
	memset(mapping, 0, size);
	if (given != NULL)
		for (size_t at = 0; at < shared_size; at += hook.page)
			*(volatile char *)(given + at) = given[at];
	hook.survivor = (struct survivor *)shared;
	hook.init_copy = (struct init_copy *)(shared + hook.page);
	hook.request = shared + 2 * hook.page - WRITE_HEADERS;
	hook.reply = mapping + shared_size;
	hook.write_views = make_views(hook.request + WRITE_HEADERS, hook.max_io, PyBUF_READ);
	hook.read_views = make_views(hook.reply, hook.max_io, PyBUF_WRITE);
	ahead.data = hook.reply + hook.max_io;
	ahead.views = make_views(ahead.data, ahead.most, PyBUF_WRITE);
	return hook.write_views != NULL && hook.read_views != NULL && ahead.views != NULL ? 0 : -1;
}

static void forget_all(void)
{
	free_views(hook.write_views, hook.max_io);
	free_views(hook.read_views, hook.max_io);
	free_views(ahead.views, ahead.most);
	Py_CLEAR(hook.read);
	Py_CLEAR(hook.write);
	Py_CLEAR(hook.fallocate);
	Py_CLEAR(hook.interrupt);
	Py_CLEAR(hook.admit);
	Py_CLEAR(hook.on_disk_ready);
	if (hook.shared.obj != NULL)
		PyBuffer_Release(&hook.shared);
	for (size_t ino = 0; ino < INODE_LIMIT; ino++)
		if (hook.blocks[ino / 64] >> (ino % 64) & 1)
			writers[ino] = 0;
	memset(&hook, 0, sizeof(hook));
	memset(&ahead, 0, sizeof(ahead));
	hook.fd = -1;
	hook.disk_fd = -1;
	hook.pace = hook.paces;
}

PyDoc_STRVAR(attach_doc, "attach(read, write, fallocate, *, poll_us, budget_us, max_io, "
			 "max_background, shared=None, interrupt=None, "
			 "admit=None, checks_requests=False)");

/*
 * Return the address of the shared memory for survivor and request. Return NULL with an exception
 * if it is too small or does not begin on a page.
 */
static char *shared_memory(PyObject *shared)
{
	size_t wanted = 2 * hook.page + hook.max_io;
	char *given = NULL;

	if (PyObject_GetBuffer(shared, &hook.shared, PyBUF_WRITABLE) != 0)
		return NULL;
	given = hook.shared.buf;
	if ((size_t)hook.shared.len < wanted || (uintptr_t)given % hook.page != 0) {
		PyErr_Format(PyExc_ValueError, "shared must be %zu bytes that begin on a page",
			     wanted);
		return NULL;
	}
	return given;
}

static PyObject *py_attach(PyObject *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"read",	     "write",  "fallocate",	  "poll_us",
				"budget_us", "max_io", "max_background",  "shared",
				"interrupt", "admit",  "checks_requests", NULL};
	PyObject *read_function, *write_function, *fallocate_function, *shared = Py_None,
								       *interrupt = Py_None;
	PyObject *admit_function = Py_None;
	char *given = NULL;
	unsigned poll_us = 0, budget_us = 0, max_io = 0, max_background = 0;
	int checks_requests = 0;
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	(void)self;
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|$IIIIOOOp:attach", names,
					 &read_function, &write_function, &fallocate_function,
					 &poll_us, &budget_us, &max_io, &max_background, &shared,
					 &interrupt, &admit_function, &checks_requests))
		return NULL;
	if (attached()) {
		PyErr_SetString(PyExc_RuntimeError, "already attached: one session per process");
		return NULL;
	}
	if (max_io == 0 || max_io % page != 0 || max_io > 64u << 20) {
		PyErr_SetString(PyExc_ValueError,
				"max_io must be a multiple of the page, at most 64 MiB");
		return NULL;
	}
	if (max_background == 0 || max_background > 65535) {
		PyErr_SetString(PyExc_ValueError, "max_background must be 1 to 65535");
		return NULL;
	}
	hook.page = page;
	hook.max_io = max_io;
	ahead.most = max_io < AHEAD_MAX ? max_io : AHEAD_MAX;
	hook.poll_ns = poll_us * 1000ull;
	hook.budget_ns = budget_us * 1000ull;
	hook.max_background = max_background;
	hook.checks_requests = checks_requests;
	hook.paces[READS].crowd = CROWDED_MIN;
	hook.paces[CHANGES].crowd = hook.paces[DISK].crowd = CROWDED_WRITES;
	if (shared != Py_None)
		given = shared_memory(shared);
	if ((shared != Py_None && given == NULL) || make_buffers(given) != 0) {
		forget_all();
		return NULL;
	}
	hook.read = Py_NewRef(read_function);
	hook.write = Py_NewRef(write_function);
	hook.fallocate = Py_NewRef(fallocate_function);
	hook.interrupt = interrupt == Py_None ? NULL : Py_NewRef(interrupt);
	hook.admit = admit_function == Py_None ? NULL : Py_NewRef(admit_function);
	memset(&stats, 0, sizeof(stats));
	memset(&sample, 0, sizeof(sample));
	sample.left = SAMPLED;
	Py_RETURN_NONE;
}

static PyObject *py_detach(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	forget_all();
	Py_RETURN_NONE;
}

/*
 * Answer a request with EIO by its number, which may be a wrong one. The kernel knows which
 * requests wait and takes no other answer, so only those that it takes are failed requests.
 */
static void refuse(uint64_t unique)
{
	struct fuse_out_header out = {.len = sizeof(out), .error = -EIO, .unique = unique};

	if (write(hook.fd, &out, sizeof(out)) == (ssize_t)sizeof(out))
		stats.errors++;
	else
		stats.reply_errors++;
}

/*
 * Return the length of the request in the buffer, 0 for none. A request that has changed since it
 * was read is answered with EIO, because there is no other copy of it.
 */
static size_t left_length(void)
{
	size_t length = header()->len;
	uint64_t noted = hook.survivor->noted;
	bool is_possible =
	    length >= sizeof(struct fuse_in_header) && length <= WRITE_HEADERS + hook.max_io;

	/* It is empty, or its reader died before the checksum, or was an older program. */
	if (noted == 0)
		return is_possible ? length : 0;
	if (is_possible && noted == header()->unique &&
	    hook.survivor->check == digest(hook.request, length))
		return length;
	refuse(noted);
	if (is_possible && noted != header()->unique)
		refuse(header()->unique);
	forget_request();
	return 0;
}

PyDoc_STRVAR(adopt_doc, "adopt(*, resend=True) -> bool");

/*
 * Give libfuse FUSE_INIT again; the kernel refuses this second answer. Then ask the kernel to
 * resend the requests that the predecessor has read and not answered. Return True if the kernel
 * cannot, or is not asked to, and the buffer has the only copy of a request. The next drain()
 * answers it.
 */
static PyObject *py_adopt(PyObject *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"resend", NULL};
	int is_asked = 1;
	struct fuse_out_header resend = {
	    .len = sizeof(resend), .error = NOTIFY_RESEND, .unique = 0};
	char init[INIT_MAX];
	struct fuse_buf request = {.mem = init};
	size_t length;

	(void)self;
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$p:adopt", names, &is_asked))
		return NULL;
	if (hook.session == NULL || !find_descriptor(hook.session)) {
		PyErr_SetString(PyExc_RuntimeError, "there is no session to adopt");
		return NULL;
	}
	length = header()->len;
	/* A header with an impossible length is torn or foreign. */
	if (length < sizeof(struct fuse_in_header) || length > WRITE_HEADERS + hook.max_io)
		length = 0;
	if (!mend_init()) {
		PyErr_SetString(
		    PyExc_RuntimeError,
		    "what the kernel said at first (FUSE_INIT) is damaged in both places");
		return NULL;
	}
	if (hook.survivor->init_size == 0 && length > 0)
		keep_init(length); /* the predecessor died before it could */
	if (length > 0 && header()->opcode == FUSE_INIT)
		forget_request();
	request.size = hook.survivor->init_size;
	if (request.size > 0 && request.size <= INIT_MAX) {
		memcpy(init, hook.survivor->init, request.size);
		fuse_session_process_buf(hook.session, &request);
	}
	if (is_asked && write(hook.fd, &resend, sizeof(resend)) == (ssize_t)sizeof(resend)) {
		forget_request();
		Py_RETURN_FALSE;
	}
	length = left_length();
	stats.resent += length > 0;
	hook.is_left_over = length > 0;
	return PyBool_FromLong(length > 0);
}

static PyObject *py_unique(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	return PyLong_FromUnsignedLongLong(
	    hook.request != NULL && header()->len != 0 ? header()->unique : 0);
}

/*
 * A direct reader names its lock owner (FUSE_READ_LOCKOWNER, fuse_send_read() in the kernel), and
 * accepts a part of the data. The page cache, which reads for a private mapping, does not name it,
 * and takes a short answer for the end of the file (fuse_short_read()).
 */
static PyObject *py_takes_part(PyObject *self, PyObject *unused)
{
	const struct fuse_read_in *in;

	(void)self;
	(void)unused;
	if (hook.request == NULL || header()->len == 0 || header()->opcode != FUSE_READ)
		Py_RETURN_FALSE;
	in = (const struct fuse_read_in *)(header() + 1);
	return PyBool_FromLong((in->read_flags & FUSE_READ_LOCKOWNER) != 0);
}

PyDoc_STRVAR(reply_doc, "reply(unique, error, payload)");

static PyObject *py_reply(PyObject *self, PyObject *args)
{
	struct fuse_out_header out;
	unsigned long long unique;
	int error;
	Py_buffer payload;
	struct iovec parts[2] = {{&out, sizeof(out)}, {NULL, 0}};

	(void)self;
	if (!PyArg_ParseTuple(args, "Kiy*:reply", &unique, &error, &payload))
		return NULL;
	out.len = (uint32_t)(sizeof(out) + (size_t)payload.len);
	out.error = -error;
	out.unique = unique;
	parts[1].iov_base = payload.buf;
	parts[1].iov_len = (size_t)payload.len;
	if (writev(hook.fd, parts, payload.len > 0 ? 2 : 1) == (ssize_t)out.len)
		stats.errors += error != 0;
	else
		stats.reply_errors++;
	hook.deferred -= hook.deferred > 0;
	PyBuffer_Release(&payload);
	Py_RETURN_NONE;
}

/*
 * Serve the stalled write. It may stall again. It was counted, and given its digest, when it came:
 * once a millisecond, that would cost more than the write.
 */
static PyObject *py_resume(PyObject *self, PyObject *unused)
{
	struct fuse_buf request = {.mem = hook.request};

	(void)self;
	(void)unused;
	if (!hook.is_stalled)
		Py_RETURN_NONE;
	hook.is_stalled = false;
	request.size = header()->len;
	hook.survivor->active = header()->unique & ~RESENT;
	fuse_session_process_buf(hook.session, &request);
	end_request();
	hook.quiet_since = now_ns();
	Py_RETURN_NONE;
}

static PyObject *py_set_poll_us(PyObject *self, PyObject *number)
{
	unsigned long poll_us = PyLong_AsUnsignedLong(number);

	(void)self;
	if (poll_us == (unsigned long)-1 && PyErr_Occurred())
		return NULL;
	hook.poll_ns = poll_us * 1000ull;
	Py_RETURN_NONE;
}

static PyObject *py_on_disk_ready(PyObject *self, PyObject *args)
{
	PyObject *function;
	int fd;

	(void)self;
	if (!PyArg_ParseTuple(args, "iO:on_disk_ready", &fd, &function))
		return NULL;
	hook.disk_fd = fd;
	Py_XSETREF(hook.on_disk_ready, Py_NewRef(function));
	Py_RETURN_NONE;
}

static PyObject *py_set_scarce(PyObject *self, PyObject *number)
{
	unsigned long long bytes = PyLong_AsUnsignedLongLong(number);

	(void)self;
	if (bytes == (unsigned long long)-1 && PyErr_Occurred())
		return NULL;
	if (hook.scarce_bytes == 0)
		hook.is_first = sched_getscheduler(0) == SCHED_RR;
	hook.scarce_bytes = bytes;
	check_memory();
	Py_RETURN_NONE;
}

static PyObject *py_mind_memory(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	check_memory();
	Py_RETURN_NONE;
}

static PyObject *py_hooked(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	return PyBool_FromLong(hook.session != NULL);
}

static PyObject *py_current(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	return Py_BuildValue("(KI)", (unsigned long long)hook.handed_over,
			     (unsigned)hook.handed_over_pid);
}

static PyObject *py_add_inode(PyObject *self, PyObject *number)
{
	unsigned long ino = PyLong_AsUnsignedLong(number);

	(void)self;
	if (ino == (unsigned long)-1 && PyErr_Occurred())
		return NULL;
	if (ino >= INODE_LIMIT)
		return PyErr_Format(PyExc_ValueError, "inode %lu: block inodes are below %d", ino,
				    INODE_LIMIT);
	hook.blocks[ino / 64] |= (uint64_t)1 << (ino % 64);
	*(volatile uint64_t *)&writers[ino] = 0; /* touch the page of this entry now */
	Py_RETURN_NONE;
}

/* Python has changed the file or its writer, so read-ahead data and admitted handle are void. */
static PyObject *py_forget_writer(PyObject *self, PyObject *number)
{
	unsigned long ino = PyLong_AsUnsignedLong(number);

	(void)self;
	if (ino == (unsigned long)-1 && PyErr_Occurred())
		return NULL;
	ahead.size = 0;
	if (ino < INODE_LIMIT)
		writers[ino] = 0;
	Py_RETURN_NONE;
}

static PyObject *py_remove_inode(PyObject *self, PyObject *number)
{
	unsigned long ino = PyLong_AsUnsignedLong(number);

	(void)self;
	if (ino == (unsigned long)-1 && PyErr_Occurred())
		return NULL;
	ahead.size = 0;
	ahead.wanted = false;
	if (ino < INODE_LIMIT)
		hook.blocks[ino / 64] &= ~((uint64_t)1 << (ino % 64));
	Py_RETURN_NONE;
}

static PyObject *py_statistics(PyObject *self, PyObject *unused)
{
	(void)self;
	(void)unused;
	/* One sK for each counter */
	return Py_BuildValue(
	    "{sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK sK}", "read",
	    stats.read, "write", stats.write, "fallocate", stats.fallocate, "read_bytes",
	    stats.read_bytes, "write_bytes", stats.write_bytes, "other", stats.other, "drained",
	    stats.drained, "receives", stats.receives, "polls", stats.polls, "poll_hits",
	    stats.poll_hits, "poll_ns", stats.poll_ns, "crowded_polls", stats.crowded_polls, "naps",
	    stats.naps, "nap_hits", stats.nap_hits, "budget_ends", stats.budget_ends, "scarcities",
	    stats.scarcities, "resent", stats.resent, "aheads", stats.aheads, "ahead_hits",
	    stats.ahead_hits, "deferred", stats.deferred, "errors", stats.errors, "exceptions",
	    stats.exceptions, "reply_errors", stats.reply_errors, "max_write", stats.max_write,
	    "max_background", stats.max_background);
}

static PyObject *latency_tuple(const struct latency *latency)
{
	PyObject *counts = PyTuple_New(LATENCIES);

	for (int i = 0; counts != NULL && i < LATENCIES; i++) {
		PyObject *count = PyLong_FromUnsignedLongLong(latency->counts[i]);

		if (count == NULL)
			Py_CLEAR(counts);
		else
			PyTuple_SET_ITEM(counts, i, count);
	}
	return counts == NULL ? NULL : Py_BuildValue("(NK)", counts, latency->ns);
}

PyDoc_STRVAR(latencies_doc, "latencies() -> (read, write), each (counts, ns); counts by bounds of "
			    "1, 2, 4, ... us, the last without one");

static PyObject *py_latencies(PyObject *self, PyObject *unused)
{
	PyObject *read = latency_tuple(&sample.read), *write = latency_tuple(&sample.write);

	(void)self;
	(void)unused;
	if (read == NULL || write == NULL) {
		Py_XDECREF(read);
		Py_XDECREF(write);
		return NULL;
	}
	return Py_BuildValue("(NN)", read, write);
}

static PyMethodDef methods[] = {
    {"attach", (PyCFunction)(void (*)(void))py_attach, METH_VARARGS | METH_KEYWORDS, attach_doc},
    {"detach", py_detach, METH_NOARGS, PyDoc_STR("detach()")},
    {"adopt", (PyCFunction)(void (*)(void))py_adopt, METH_VARARGS | METH_KEYWORDS, adopt_doc},
    {"unique", py_unique, METH_NOARGS, PyDoc_STR("unique() -> int")},
    {"takes_part", py_takes_part, METH_NOARGS, PyDoc_STR("takes_part() -> bool")},
    {"reply", py_reply, METH_VARARGS, reply_doc},
    {"on_disk_ready", py_on_disk_ready, METH_VARARGS, PyDoc_STR("on_disk_ready(fd, function)")},
    {"resume", py_resume, METH_NOARGS, PyDoc_STR("resume()")},
    {"set_poll_us", py_set_poll_us, METH_O, PyDoc_STR("set_poll_us(poll_us)")},
    {"current", py_current, METH_NOARGS, PyDoc_STR("current() -> (number, thread)")},
    {"set_scarce", py_set_scarce, METH_O, PyDoc_STR("set_scarce(free_bytes)")},
    {"check_memory", py_mind_memory, METH_NOARGS, PyDoc_STR("check_memory()")},
    {"hooked", py_hooked, METH_NOARGS, PyDoc_STR("hooked() -> bool")},
    {"add_inode", py_add_inode, METH_O, PyDoc_STR("add_inode(inode)")},
    {"forget_writer", py_forget_writer, METH_O, PyDoc_STR("forget_writer(inode)")},
    {"remove_inode", py_remove_inode, METH_O, PyDoc_STR("remove_inode(inode)")},
    {"statistics", py_statistics, METH_NOARGS, PyDoc_STR("statistics() -> dict[str, int]")},
    {"latencies", py_latencies, METH_NOARGS, latencies_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "zswapd.fuse._lowlevel",
    .m_doc = PyDoc_STR(
	"What pyfuse3 lacks: FALLOCATE, and requests answered without a turn of the event loop."),
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__lowlevel(void)
{
	return PyModule_Create(&module);
}
