/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Requests to the disk, carried out by threads that never take the GIL. A request is described
 * beforehand, and its result is fetched later.
 *
 * Reasons for C:
 *   - A Python thread takes the GIL after each system call. With eight threads and the event loop
 *     on two processors, each hand-over of the GIL is a wake-up. A read of 70 us took 300 us.
 *   - The `cryptography` package makes a new context for each data unit, because it cannot change
 *     the tweak of a context. That takes 2 us a page with the GIL held. This file sets the tweak
 *     in an existing context (0.6 us, AES itself included).
 *
 *   Cipher   a key, and for each thread two contexts and memory to encrypt into
 *   Job      one request: buffers, their place on the disk, a cipher. A call carries it out.
 *   Queue    jobs for the threads that are in work(). A file descriptor becomes readable when a
 *            job has ended, and ended() returns the ended jobs.
 *
 * Invariants
 *   - A thread carries out a job without the GIL, so it touches no Python object. The job holds
 *     its buffers. References are counted only in submit() and ended().
 *   - A thread that holds a mutex makes no system call. It inherits the priority of the event
 *     loop's thread if that thread waits for the mutex.
 *   - The cipher is AES-256-XTS with the slot's number as tweak. A page is encrypted into memory of
 *     the thread, because readers of a page under way get it from its buffer. A page that was read
 *     is decrypted in place.
 *
 * Limits: a request has at most IOV_MAX pages. Threads in work() end with the process.
 */

#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <limits.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define KEY_BYTES 64
#define BLOCK 16
#define QUICK_NS 400000   /* in a slower read, the cost of a wake-up does not matter */
#define CROWDED_NS 600000 /* off the processor for this time: another task needs the processor */
#define SKIP_MAX 255      /* jobs */

static EVP_CIPHER *xts;

static void make_mutex(pthread_mutex_t *mutex, pthread_cond_t *condition)
{
	pthread_mutexattr_t attributes;

	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
	pthread_mutex_init(mutex, &attributes);
	pthread_mutexattr_destroy(&attributes);
	pthread_cond_init(condition, NULL);
}

/* --- Cipher --- */

struct lane {
	EVP_CIPHER_CTX *encrypting, *decrypting;
	Py_buffer memory;
	struct lane *next;
};

struct cipher {
	PyObject_HEAD
	pthread_mutex_t mutex;
	pthread_cond_t is_free;
	struct lane *free; /* lanes that no job uses */
	struct lane *lanes;
	Py_ssize_t count;
	Py_ssize_t size; /* bytes of each lane */
};

static EVP_CIPHER_CTX *new_context(const unsigned char *key, int encrypts)
{
	EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();

	if (context != NULL && EVP_CipherInit_ex(context, xts, NULL, key, NULL, encrypts) == 1)
		return context;
	EVP_CIPHER_CTX_free(context);
	PyErr_SetString(PyExc_ValueError, "libcrypto does not take the key");
	return NULL;
}

static int make_lane(struct cipher *self, PyObject *memory, const unsigned char *key)
{
	struct lane *lane = &self->lanes[self->count];

	if (PyObject_GetBuffer(memory, &lane->memory, PyBUF_WRITABLE) != 0)
		return -1;
	self->count++; /* from here on cipher_dealloc frees the lane */
	if (self->count == 1 || lane->memory.len < self->size)
		self->size = lane->memory.len;
	lane->encrypting = new_context(key, 1);
	lane->decrypting = lane->encrypting == NULL ? NULL : new_context(key, 0);
	lane->next = self->free;
	self->free = lane;
	return lane->decrypting == NULL ? -1 : 0;
}

static int make_lanes(struct cipher *self, PyObject *list, const Py_buffer *key)
{
	Py_ssize_t count = PySequence_Fast_GET_SIZE(list);

	/* XTS forbids equal halves. libcrypto refuses them too, except for decryption. */
	if (key->len != KEY_BYTES ||
	    memcmp(key->buf, (char *)key->buf + KEY_BYTES / 2, KEY_BYTES / 2) == 0) {
		PyErr_Format(PyExc_ValueError, "the key must be %d bytes with different halves",
			     KEY_BYTES);
		return -1;
	}
	if (count == 0) {
		PyErr_SetString(PyExc_ValueError, "a cipher needs memory for one thread at least");
		return -1;
	}
	self->lanes = PyMem_Calloc((size_t)count, sizeof(*self->lanes));
	if (self->lanes == NULL) {
		PyErr_NoMemory();
		return -1;
	}
	for (Py_ssize_t i = 0; i < count; i++)
		if (make_lane(self, PySequence_Fast_GET_ITEM(list, i), key->buf) != 0)
			return -1;
	return 0;
}

static PyObject *cipher_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	struct cipher *self;
	PyObject *given, *list;
	Py_buffer key;
	int failed = -1;

	(void)kwargs;
	if (!PyArg_ParseTuple(args, "y*O:Cipher", &key, &given))
		return NULL;
	self = (struct cipher *)type->tp_alloc(type, 0);
	if (self != NULL) {
		make_mutex(&self->mutex, &self->is_free);
		list = PySequence_Fast(given, "lanes must be a sequence");
		if (list != NULL)
			failed = make_lanes(self, list, &key);
		Py_XDECREF(list);
	}
	PyBuffer_Release(&key);
	if (failed != 0)
		Py_CLEAR(self);
	return (PyObject *)self;
}

static void cipher_dealloc(PyObject *object)
{
	struct cipher *self = (struct cipher *)object;

	for (Py_ssize_t i = 0; i < self->count; i++) {
		EVP_CIPHER_CTX_free(self->lanes[i].encrypting);
		EVP_CIPHER_CTX_free(self->lanes[i].decrypting);
		PyBuffer_Release(&self->lanes[i].memory);
	}
	PyMem_Free(self->lanes);
	pthread_cond_destroy(&self->is_free);
	pthread_mutex_destroy(&self->mutex);
	Py_TYPE(object)->tp_free(object);
}

static struct lane *take_lane(struct cipher *self)
{
	struct lane *lane;

	pthread_mutex_lock(&self->mutex);
	while (self->free == NULL)
		pthread_cond_wait(&self->is_free, &self->mutex);
	lane = self->free;
	self->free = lane->next;
	pthread_mutex_unlock(&self->mutex);
	return lane;
}

static void put_lane(struct cipher *self, struct lane *lane)
{
	pthread_mutex_lock(&self->mutex);
	lane->next = self->free;
	self->free = lane;
	pthread_cond_signal(&self->is_free);
	pthread_mutex_unlock(&self->mutex);
}

static PyTypeObject cipher_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "zswapd.core.backing._disk.Cipher",
    .tp_doc = PyDoc_STR("Cipher(key, lanes)"),
    .tp_basicsize = sizeof(struct cipher),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = cipher_new,
    .tp_dealloc = cipher_dealloc,
};

/* --- Job --- */

struct job {
	PyObject_HEAD
	struct cipher *cipher; /* NULL: no encryption */
	PyObject *done;        /* set while the job is in a queue */
	struct job *next;
	uint64_t slot; /* of the first page */
	off_t offset;
	Py_ssize_t count;
	size_t size; /* bytes of a page */
	Py_buffer *pages;
	struct iovec *parts;
	int fd, error;
	bool writes;
};

/* Encrypt or decrypt the pages into `out`, one after another, or in place. Return 0 or an errno. */
static int transform(const struct job *job, EVP_CIPHER_CTX *context, unsigned char *out)
{
	for (Py_ssize_t i = 0; i < job->count; i++) {
		unsigned char *page = job->pages[i].buf,
			      *to = out != NULL ? out + (size_t)i * job->size : page;
		unsigned char tweak[BLOCK] = {0};
		int length = 0;

		for (int byte = 0; byte < 8; byte++)
			tweak[byte] = (unsigned char)((job->slot + (uint64_t)i) >> 8 * byte);
		if (EVP_CipherInit_ex(context, NULL, NULL, NULL, tweak, -1) != 1 ||
		    EVP_CipherUpdate(context, to, &length, page, (int)job->size) != 1 ||
		    length != (int)job->size)
			return EIO;
	}
	return 0;
}

/* Move the pages at `parts`, in as many system calls as needed. Return 0 or an errno. */
static int move(const struct job *job, const struct iovec *parts)
{
	Py_ssize_t done = 0;

	while (done < job->count) {
		off_t at = job->offset + (off_t)done * (off_t)job->size;
		int left = (int)(job->count - done);
		ssize_t moved = job->writes ? pwritev(job->fd, parts + done, left, at)
					    : preadv(job->fd, parts + done, left, at);

		if (moved < 0 && errno == EINTR)
			continue;
		if (moved < 0)
			return errno;
		/*
		 * A transfer that ended within a page is repeated from the beginning of that page,
		 * because direct I/O cannot begin within a page.
		 */
		if ((size_t)moved < job->size)
			return EIO;
		done += moved / (ssize_t)job->size;
	}
	return 0;
}

static int write_encrypted(struct job *job, struct lane *lane)
{
	int error = transform(job, lane->encrypting, lane->memory.buf);

	for (Py_ssize_t i = 0; i < job->count; i++)
		job->parts[i].iov_base = (char *)lane->memory.buf + (size_t)i * job->size;
	return error != 0 ? error : move(job, job->parts);
}

/* Carry out a job without the GIL. Return 0 or an errno. */
static int run(struct job *job)
{
	struct lane *lane;
	int error;

	if (job->cipher == NULL)
		return move(job, job->parts);
	if (job->writes) {
		lane = take_lane(job->cipher);
		error = write_encrypted(job, lane);
		put_lane(job->cipher, lane);
		return error;
	}
	error = move(job, job->parts);
	if (error != 0)
		return error;
	lane = take_lane(job->cipher);
	error = transform(job, lane->decrypting, NULL);
	put_lane(job->cipher, lane);
	return error;
}

static int hold_pages(struct job *self, PyObject *list)
{
	Py_ssize_t count = PySequence_Fast_GET_SIZE(list);

	if (count == 0 || count > IOV_MAX) {
		PyErr_Format(PyExc_ValueError, "a request has 1 to %d pages", IOV_MAX);
		return -1;
	}
	self->pages = PyMem_Calloc((size_t)count, sizeof(*self->pages));
	self->parts = PyMem_Calloc((size_t)count, sizeof(*self->parts));
	if (self->pages == NULL || self->parts == NULL) {
		PyErr_NoMemory();
		return -1;
	}
	while (self->count < count) {
		Py_buffer *page = &self->pages[self->count];

		if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(list, self->count), page,
				       self->writes ? PyBUF_SIMPLE : PyBUF_WRITABLE) != 0)
			return -1;
		self->parts[self->count].iov_base = page->buf;
		self->parts[self->count++].iov_len = (size_t)page->len;
		if (page->len != self->pages[0].len || page->len < BLOCK || page->len > INT_MAX) {
			PyErr_SetString(PyExc_ValueError,
					"pages must be of one length, 16 bytes at least");
			return -1;
		}
	}
	self->size = (size_t)self->pages[0].len;
	if (self->cipher != NULL && (size_t)count * self->size > (size_t)self->cipher->size) {
		PyErr_SetString(PyExc_ValueError,
				"the cipher has no room for the pages of this request");
		return -1;
	}
	return 0;
}

static PyObject *job_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"fd", "writes", "offset", "pages", "slot", "cipher", NULL};
	PyObject *given, *cipher = Py_None, *list;
	unsigned long long slot = 0;
	long long offset;
	int fd, writes, failed = -1;
	struct job *self;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ipLO|KO:Job", names, &fd, &writes, &offset,
					 &given, &slot, &cipher))
		return NULL;
	if (cipher != Py_None && !Py_IS_TYPE(cipher, &cipher_type)) {
		PyErr_SetString(PyExc_TypeError, "cipher must be a Cipher or None");
		return NULL;
	}
	self = (struct job *)type->tp_alloc(type, 0);
	if (self == NULL)
		return NULL;
	self->fd = fd;
	self->writes = writes;
	self->offset = offset;
	self->slot = slot;
	self->cipher = cipher == Py_None ? NULL : (struct cipher *)Py_NewRef(cipher);
	list = PySequence_Fast(given, "pages must be a sequence");
	if (list != NULL)
		failed = hold_pages(self, list);
	Py_XDECREF(list);
	if (failed != 0)
		Py_CLEAR(self);
	return (PyObject *)self;
}

static void job_dealloc(PyObject *object)
{
	struct job *self = (struct job *)object;

	while (self->count > 0)
		PyBuffer_Release(&self->pages[--self->count]);
	PyMem_Free(self->pages);
	PyMem_Free(self->parts);
	Py_XDECREF(self->cipher);
	Py_XDECREF(self->done);
	Py_TYPE(object)->tp_free(object);
}

static PyObject *job_call(PyObject *object, PyObject *args, PyObject *kwargs)
{
	int error;

	(void)args;
	(void)kwargs;
	Py_BEGIN_ALLOW_THREADS
	error = run((struct job *)object);
	Py_END_ALLOW_THREADS
	if (error == 0)
		Py_RETURN_NONE;
	errno = error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static PyTypeObject job_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "zswapd.core.backing._disk.Job",
    .tp_doc = PyDoc_STR("Job(fd, writes, offset, pages, slot=0, cipher=None)"),
    .tp_basicsize = sizeof(struct job),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = job_new,
    .tp_dealloc = job_dealloc,
    .tp_call = job_call,
};

/* --- Queue --- */

struct list {
	struct job *first, **last; /* `last` is where the next job is linked */
};

struct queue {
	PyObject_HEAD
	pthread_mutex_t mutex;
	pthread_cond_t has_jobs;
	struct list waiting, ended;
	int fd;
	/* A spinning thread takes the waiting jobs before it sleeps or does anything else. */
	bool has_spinner;
	unsigned skip;    /* jobs until the next spin */
	unsigned penalty; /* value of `skip` after the next spin in vain */
	unsigned long long spin_ns; /* longest spin */
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void append(struct list *list, struct job *job)
{
	job->next = NULL;
	*list->last = job;
	list->last = &job->next;
}

static struct job *take_first(struct list *list)
{
	struct job *job = list->first;

	list->first = job->next;
	if (list->first == NULL)
		list->last = &list->first;
	return job;
}

static PyObject *queue_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	struct queue *self = (struct queue *)type->tp_alloc(type, 0);

	(void)args;
	(void)kwargs;
	if (self == NULL)
		return NULL;
	make_mutex(&self->mutex, &self->has_jobs);
	self->waiting.last = &self->waiting.first;
	self->ended.last = &self->ended.first;
	self->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (self->fd == -1) {
		Py_DECREF(self);
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return (PyObject *)self;
}

static void queue_dealloc(PyObject *object)
{
	struct queue *self = (struct queue *)object;

	while (self->waiting.first != NULL)
		Py_DECREF(take_first(&self->waiting));
	while (self->ended.first != NULL)
		Py_DECREF(take_first(&self->ended));
	if (self->fd != -1)
		close(self->fd);
	pthread_cond_destroy(&self->has_jobs);
	pthread_mutex_destroy(&self->mutex);
	Py_TYPE(object)->tp_free(object);
}

static PyObject *queue_submit(PyObject *object, PyObject *args)
{
	struct queue *self = (struct queue *)object;
	struct job *job;
	PyObject *done;
	bool is_taken;

	if (!PyArg_ParseTuple(args, "O!O:submit", &job_type, &job, &done))
		return NULL;
	if (job->done != NULL) {
		PyErr_SetString(PyExc_ValueError, "the job is in a queue already");
		return NULL;
	}
	job->done = Py_NewRef(done);
	Py_INCREF(job);
	pthread_mutex_lock(&self->mutex);
	is_taken = self->has_spinner && self->waiting.first == NULL;
	append(&self->waiting, job);
	pthread_mutex_unlock(&self->mutex);
	/* Not under the mutex: the woken thread would wait for it at once. */
	if (!is_taken)
		pthread_cond_signal(&self->has_jobs);
	Py_RETURN_NONE;
}

/*
 * Spin for the next job after a quick read. Waking a thread on an idle processor takes 15 to 30 us,
 * half of the time that a quick disk takes. The caller holds the mutex, and the spin releases it
 * meanwhile. One thread spins at a time. A spin in vain, or one delayed by other tasks, doubles the
 * number of jobs until the next spin. Measured: the reader has a page after 102 us, and after
 * 119 us without the spin.
 */
static void spin(struct queue *self)
{
	uint64_t start, now;
	bool is_crowded = false;

	if (self->has_spinner || self->waiting.first != NULL || self->spin_ns == 0)
		return;
	if (self->skip > 0) {
		self->skip--;
		return;
	}
	self->has_spinner = true;
	pthread_mutex_unlock(&self->mutex);
	start = now = now_ns();
	while (__atomic_load_n(&self->waiting.first, __ATOMIC_RELAXED) == NULL &&
	       now - start < self->spin_ns && !is_crowded) {
		uint64_t before = now;

		sched_yield(); /* the reader of the page may have to run on this processor */
		now = now_ns();
		is_crowded = now - before > CROWDED_NS;
	}
	pthread_mutex_lock(&self->mutex);
	self->has_spinner = false;
	if (self->waiting.first != NULL && !is_crowded) {
		self->penalty = 0;
		return;
	}
	self->skip = self->penalty; /* 0 after the first: the event loop may only have been busy */
	self->penalty = self->penalty < SKIP_MAX ? 2 * self->penalty + 1 : SKIP_MAX;
}

static void work(struct queue *self)
{
	static const uint64_t one = 1;

	pthread_mutex_lock(&self->mutex);
	for (;;) {
		struct job *job;
		bool is_first, is_quick;
		uint64_t start;

		while (self->waiting.first == NULL)
			pthread_cond_wait(&self->has_jobs, &self->mutex);
		job = take_first(&self->waiting);
		pthread_mutex_unlock(&self->mutex);
		start = now_ns();
		job->error = run(job);
		is_quick = !job->writes && now_ns() - start < QUICK_NS;
		pthread_mutex_lock(&self->mutex);
		is_first = self->ended.first == NULL;
		append(&self->ended, job);
		pthread_mutex_unlock(&self->mutex);
		/*
		 * If ended() took the job meanwhile, the wake-up is in vain. The counter cannot
		 * overflow, so write(2) cannot fail.
		 */
		if (is_first && write(self->fd, &one, sizeof(one)) == -1)
			abort();
		pthread_mutex_lock(&self->mutex);
		if (is_quick)
			spin(self);
	}
}

static PyObject *queue_work(PyObject *object, PyObject *unused)
{
	(void)unused;
	Py_BEGIN_ALLOW_THREADS
	work((struct queue *)object);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyObject *queue_ended(PyObject *object, PyObject *unused)
{
	struct queue *self = (struct queue *)object;
	PyObject *result = PyList_New(0);
	uint64_t count;
	struct list ended;

	(void)unused;
	if (result == NULL)
		return NULL;
	if (read(self->fd, &count, sizeof(count)) == -1)
		count = 0; /* no thread has written yet */
	pthread_mutex_lock(&self->mutex);
	ended = self->ended;
	self->ended.first = NULL;
	self->ended.last = &self->ended.first;
	pthread_mutex_unlock(&self->mutex);
	while (ended.first != NULL) {
		struct job *job = ended.first;
		PyObject *done = job->done, *item;

		ended.first = job->next;
		job->done = NULL;
		item = Py_BuildValue("(Ni)", done, job->error);
		Py_DECREF(job);
		if (item == NULL || PyList_Append(result, item) != 0)
			Py_CLEAR(result); /* no memory: the process ends */
		Py_XDECREF(item);
		if (result == NULL)
			return NULL;
	}
	return result;
}

static PyMethodDef queue_methods[] = {
    {"submit", queue_submit, METH_VARARGS, PyDoc_STR("submit(job, done)")},
    {"work", queue_work, METH_NOARGS, PyDoc_STR("work()")},
    {"ended", queue_ended, METH_NOARGS, PyDoc_STR("ended() -> list[tuple[done, errno]]")},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef queue_members[] = {
    {"fd", T_INT, offsetof(struct queue, fd), READONLY, PyDoc_STR("readable when a job has ended")},
    {"spin_ns", T_ULONGLONG, offsetof(struct queue, spin_ns), 0,
     PyDoc_STR("how long to wait busily after a quick read; 0 for never")},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject queue_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "zswapd.core.backing._disk.Queue",
    .tp_doc = PyDoc_STR("Queue()"),
    .tp_basicsize = sizeof(struct queue),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = queue_new,
    .tp_dealloc = queue_dealloc,
    .tp_methods = queue_methods,
    .tp_members = queue_members,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "zswapd.core.backing._disk",
    .m_doc = PyDoc_STR(
	"Requests to the disk, encryption included, from threads that never take the GIL."),
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__disk(void)
{
	PyObject *made = PyModule_Create(&module);

	if (xts == NULL)
		xts = EVP_CIPHER_fetch(NULL, "AES-256-XTS", NULL);
	if (xts == NULL)
		PyErr_SetString(PyExc_ImportError, "libcrypto has no AES-256-XTS");
	if (made == NULL || xts == NULL || PyModule_AddType(made, &cipher_type) != 0 ||
	    PyModule_AddType(made, &job_type) != 0 || PyModule_AddType(made, &queue_type) != 0) {
		Py_XDECREF(made);
		return NULL;
	}
	return made;
}
