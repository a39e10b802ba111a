/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One call populates a range of the arena in short pieces, with a pause after each, without the
 * GIL. Another call punches many ranges.
 *
 * Why pieces: zeroing 8 MiB takes milliseconds. On a machine with busy processors, a program that
 * swaps waits while the refilling thread runs. The page path gets no more requests, and its
 * processor becomes idle and pulls that program over. The program counts as cache-cold after half a
 * millisecond without a processor (sched_migration_cost). Once it has run on two processors, every
 * dirty page that it swaps out causes an interrupt (TLB flush) to the second one. Between virtual
 * processors that halves the rate of swap-out. A piece takes a tenth of a millisecond.
 *
 * Why without the GIL: if this thread took the GIL between two pieces, the page path would have to
 * wait until this thread gets a processor. And this thread would wait a millisecond for each of
 * a thousand single frames, while the page path evicts more.
 *
 * Before each piece the call reads the system's free memory, and stops below the floor. Otherwise
 * this thread would take, page by page, the memory that other tasks wait for. Those tasks must run
 * before this daemon gets another request (supervisor/ballast.py).
 *
 * A caller that is in no hurry asks for an idle task. For LEISURE_NS the thread then is one
 * (SCHED_IDLE), so that no program waits for it. After that it is an ordinary task again. Another
 * thread may make it one earlier, since an idle task may get no processor to notice the time. The
 * thread is an idle task only here, without the GIL: a holder of the GIL must not wait for an idle
 * processor.
 *
 * Limits: Linux. Before 5.14 there is no MADV_POPULATE_WRITE. Then the file has its pages, but the
 * first touch of each page is a fault.
 */

#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <time.h>

/*
 * 50 ms. A job of 8 MiB takes milliseconds on an idle machine. As an idle task on a machine with
 * busy processors, it would take seconds.
 */
#define LEISURE_NS 50000000ll

/*
 * Allocate the file's pages of one piece, then map them. Return 0 or an errno. The file's pages
 * come first, since that needs no lock of the address space.
 */
static int populate_piece(int fd, char *address, off_t offset, size_t length, int advice)
{
	while (fallocate(fd, 0, offset, (off_t)length) != 0)
		if (errno != EINTR)
			return errno;
	while (madvise(address, length, advice) != 0) {
		if (errno == EINVAL)
			return 0;
		if (errno != EINTR)
			return errno;
	}
	return 0;
}

static bool is_above(uint64_t floor)
{
	struct sysinfo now;

	return floor == 0 || sysinfo(&now) != 0 || (uint64_t)now.freeram * now.mem_unit >= floor;
}

/* Populate a range in pieces. `done` is the number of bytes that are certainly populated. */
static int populate(int fd, char *base, off_t offset, size_t length, int advice, size_t piece,
		    struct timespec pause, uint64_t floor, size_t *done)
{
	int error = 0;

	for (*done = 0; *done < length; *done += piece) {
		if (*done > 0)
			nanosleep(&pause, NULL); /* a signal ends it early, which is harmless */
		if (piece > length - *done)
			piece = length - *done;
		error = is_above(floor) ? populate_piece(fd, base + offset + *done,
							 offset + (off_t)*done, piece, advice)
					: EAGAIN;
		if (error != 0)
			break;
	}
	return error;
}

/* Like populate(), but as an idle task for LEISURE_NS. */
static int populate_at_leisure(int fd, char *base, off_t offset, size_t length, int advice,
			       size_t piece, struct timespec pause, uint64_t floor, size_t *done)
{
	int policy = sched_getscheduler(0), error = 0;
	struct sched_param own, idle = {0};
	struct timespec start, now;
	size_t part;
	bool is_idle = policy >= 0 && sched_getparam(0, &own) == 0 &&
		       sched_setscheduler(0, SCHED_IDLE, &idle) == 0;

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (*done = 0; *done < length && error == 0; *done += part) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (is_idle &&
		    (now.tv_sec - start.tv_sec) * 1000000000ll + now.tv_nsec - start.tv_nsec >
			LEISURE_NS) {
			sched_setscheduler(0, policy, &own);
			is_idle = false;
		}
		if (*done > 0)
			nanosleep(&pause, NULL);
		part = piece < length - *done ? piece : length - *done;
		error = populate(fd, base, offset + (off_t)*done, part, advice, piece, pause, floor,
				 &part);
	}
	if (is_idle)
		sched_setscheduler(0, policy, &own);
	return error;
}

static PyObject *py_populate(PyObject *self, PyObject *args)
{
	unsigned long long base, offset, length, piece, floor;
	size_t done;
	struct timespec pause = {0, 0};
	unsigned pause_us;
	int fd, advice, is_idle, error;

	(void)self;
	if (!PyArg_ParseTuple(args, "iKKKiKIKp:populate", &fd, &base, &offset, &length, &advice,
			      &piece, &pause_us, &floor, &is_idle))
		return NULL;
	if (piece == 0 || pause_us >= 1000000) {
		PyErr_SetString(PyExc_ValueError,
				"a piece has at least one byte, a pause is shorter than a second");
		return NULL;
	}
	pause.tv_nsec = (long)pause_us * 1000;
	Py_BEGIN_ALLOW_THREADS error = (is_idle ? populate_at_leisure : populate)(
	    fd, (char *)(uintptr_t)base, (off_t)offset, (size_t)length, advice, (size_t)piece,
	    pause, floor, &done);
	Py_END_ALLOW_THREADS
	return Py_BuildValue("in", error, (Py_ssize_t)done);
}

/* Punch ranges (offset and length in turn) until one fails. Return the number punched. */
static Py_ssize_t punch(int fd, const int64_t *ranges, Py_ssize_t count)
{
	Py_ssize_t done;

	for (done = 0; done < count; done++) {
		while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, ranges[2 * done],
				 ranges[2 * done + 1]) != 0)
			if (errno != EINTR)
				return done;
	}
	return done;
}

static PyObject *py_punch(PyObject *self, PyObject *args)
{
	Py_buffer ranges;
	Py_ssize_t done;
	int fd;

	(void)self;
	if (!PyArg_ParseTuple(args, "iy*:punch", &fd, &ranges))
		return NULL;
	if (ranges.len % (Py_ssize_t)(2 * sizeof(int64_t)) != 0) {
		PyBuffer_Release(&ranges);
		PyErr_SetString(PyExc_ValueError, "a range is an offset and a length");
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	done = punch(fd, ranges.buf, ranges.len / (Py_ssize_t)(2 * sizeof(int64_t)));
	Py_END_ALLOW_THREADS
	PyBuffer_Release(&ranges);
	return PyLong_FromSsize_t(done);
}

static PyMethodDef methods[] = {
    {"punch", py_punch, METH_VARARGS, PyDoc_STR("punch(fd, ranges) -> how many were punched")},
    {"populate", py_populate, METH_VARARGS,
     PyDoc_STR(
	 "populate(fd, base, offset, length, advice, piece, pause_us, floor) -> (errno, bytes)")},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "zswapd.core.allocators._populate",
    .m_doc = PyDoc_STR(
	"Populates a range of the arena in short pieces, and punches many, without the GIL."),
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__populate(void)
{
	return PyModuleDef_Init(&module);
}
