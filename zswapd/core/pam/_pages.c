/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * LZ4 pages in one call each way: a page into a scratch buffer, from there into an object behind
 * its header, and back. zpages.py is the reference. It defines the header and the order of the
 * writes. Each of the two reads what the other has written. zpages.py alone handles the rare cases
 * (other codecs, raw pages).
 *
 * Why C: for each page, the library's Python module makes a heap buffer, a bytes object and a copy
 * of it. Slices, header fields and checksum are about twenty objects more. In C, a store takes
 * a tenth less time and a load a third less (docs/benchmarks.md).
 *
 * Invariants
 * - An object becomes live as in zpages.py: data, then the header behind the live word, then the
 *   live word by one 64-bit store. Each is visible before the next. An armed crash point is reached
 *   between the same two writes.
 * - Nothing beyond the arena is touched, whatever a damaged header says. Lengths are checked before
 *   they are used.
 * - No call asks for memory. The scratch buffer and LZ4's table are allocated and touched with the
 *   Packer.
 *
 * Limits: one thread at a time, with the GIL held. Each call checks the arena's view, since closing
 * an arena releases the view even while this object holds it.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <lz4.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "_digest.h"

/* Codec numbers in headers (zswapd/core/compress/base.py). */
#define SAME_FILLED 0
#define RAW 1
#define LZ4_CODEC 2

/* Results of unpack() and weigh() that are not a codec or a length. */
#define NOT_THE_PAGE (-1)
#define WRONG_CHECKSUM (-2)
#define NO_LZ4_BLOCK (-3)
#define NO_PAGE (-4)

/* The header of zswapd/core/pam/base.py. */
struct zheader {
	uint32_t check;
	uint32_t generation;
	uint64_t oid;
	uint32_t index;
	uint16_t length;
	uint8_t codec;
	uint8_t pool;
};

#define HEADER_BYTES sizeof(struct zheader)
/* A page's client, from its oid (zswapd/core/pam/base.py). */
#define CLIENT_SHIFT 8
#define CLIENT_MASK 31
#define COVERED 8 /* the checksum covers the bytes behind the live word */
#define DEAD_CHECK 0x5DEAD5A3U /* `check` of a free object: core/allocators/base.py */

_Static_assert(sizeof(struct zheader) == 24, "the header has no gaps");

typedef struct {
	PyObject_HEAD
	PyObject *memory;  /* a memoryview of the arena */
	size_t page;       /* bytes of a page */
	int capacity;      /* bytes of scratch */
	int length;        /* bytes that pack() has left in scratch; 0 before its first call */
	int codec;
	char *scratch;
	LZ4_stream_t stream; /* includes the hash table, 16 KiB */
	PyObject *reach;   /* crashpoints.reach */
	long points[4];    /* STORE_DATA, STORE_HEADER, STORE_CHECKED, STORE_ALIVE */
} Packer;

static digest_function digest = digest_plain;

static uint32_t checksum(const char *object, size_t length, uint32_t generation)
{
	uint32_t sum =
	    (uint32_t)digest(object + COVERED, HEADER_BYTES - COVERED + length, generation);

	return sum != 0 ? sum : 1; /* 0 means no checksum */
}

/*
 * Return the address of an object with `length` bytes of data; NULL if it is not inside the arena.
 */
static char *object_at(const Packer *self, uint64_t handle, size_t length)
{
	const Py_buffer *arena = PyMemoryView_GET_BUFFER(self->memory);
	uint64_t end = handle + HEADER_BYTES + length;

	if (((PyMemoryViewObject *)self->memory)->flags & _Py_MEMORYVIEW_RELEASED)
		return NULL;
	return end >= handle && end <= (uint64_t)arena->len && handle % 8 == 0
		   ? (char *)arena->buf + handle
		   : NULL;
}

/* Like object_at(), but with IndexError if the object is not inside the arena. */
static char *own_object(const Packer *self, PyObject *handle, size_t length)
{
	unsigned long long number = PyLong_AsUnsignedLongLong(handle);
	char *object;

	if (number == (unsigned long long)-1 && PyErr_Occurred())
		return NULL;
	object = object_at(self, number, length);
	if (object == NULL)
		PyErr_Format(PyExc_IndexError, "there is no object of %zu bytes at %#llx", length,
			     number);
	return object;
}

/* Return whether the data of an object, with the length in its header, ends inside the arena. */
static bool fits(const Packer *self, const char *object, size_t length)
{
	const Py_buffer *arena = PyMemoryView_GET_BUFFER(self->memory);

	return length <= (size_t)((char *)arena->buf + arena->len - object) - HEADER_BYTES;
}

static bool is_whole(const char *object, const struct zheader *header)
{
	/* A page stored while checksums were off has a checksum of its header alone, 16 bytes. */
	return (header->codec > RAW && header->check == checksum(object, 0, header->generation)) ||
	       header->check == checksum(object, header->length, header->generation);
}

static bool is_same_filled(const char *page, size_t size)
{
	uint64_t first, middle, last;

	memcpy(&first, page, 8);
	memcpy(&middle, page + size / 2, 8);
	memcpy(&last, page + size - 8, 8);
	/* The page equals itself moved by one word, so all words equal the first. */
	return first == middle && first == last && memcmp(page, page + 8, size - 8) == 0;
}

static PyObject *packer_pack(Packer *self, PyObject *page)
{
	Py_buffer view;

	if (PyObject_GetBuffer(page, &view, PyBUF_SIMPLE) != 0)
		return NULL;
	if ((size_t)view.len != self->page) {
		PyBuffer_Release(&view);
		return PyErr_Format(PyExc_ValueError, "%zd bytes are no page of %zu", view.len,
				    self->page);
	}
	if (is_same_filled(view.buf, self->page)) {
		memcpy(self->scratch, view.buf, 8);
		self->codec = SAME_FILLED;
		self->length = 8;
	} else {
		self->codec = LZ4_CODEC;
		/*
		 * LZ4_compress_fast_continue(), as in the library's Python module. For one page it
		 * is a tenth faster than LZ4_compress_default(), which has a larger table of
		 * shorter hashes. LZ4_initStream() clears 16 KiB. A fast reset of the stream would
		 * avoid that, but takes twice the time.
		 */
		LZ4_initStream(&self->stream, sizeof(self->stream));
		self->length = LZ4_compress_fast_continue(&self->stream, view.buf, self->scratch,
							  (int)self->page, self->capacity, 1);
	}
	PyBuffer_Release(&view);
	if (self->length <= 0)
		return PyErr_Format(PyExc_SystemError,
				    "LZ4 has not compressed a page into %d bytes", self->capacity);
	return PyLong_FromLong((long)self->length << 8 | self->codec);
}

/* Call crashpoints.reach if a test has armed this crash point. The process dies or it raises. */
static int reach(const Packer *self, int place, long armed)
{
	PyObject *point, *result;

	if (armed == 0 || armed != self->points[place])
		return 0;
	point = PyLong_FromLong(armed);
	result = point != NULL ? PyObject_CallOneArg(self->reach, point) : NULL;
	Py_XDECREF(point);
	Py_XDECREF(result);
	return result != NULL ? 0 : -1;
}

static PyObject *packer_commit(Packer *self, PyObject *const *args, Py_ssize_t count)
{
	struct zheader header = {0};
	uint32_t generation;
	uint64_t life;
	bool is_checked;
	long armed;
	char *object;

	if (count != 7) {
		PyErr_SetString(PyExc_TypeError,
				"commit(handle, pool, oid, index, generation, checksum, armed)");
		return NULL;
	}
	if (self->length == 0) {
		PyErr_SetString(PyExc_ValueError,
				"there is no page to commit: pack() comes before");
		return NULL;
	}
	header.pool = (uint8_t)PyLong_AsUnsignedLong(args[1]);
	header.oid = PyLong_AsUnsignedLongLong(args[2]);
	header.index = (uint32_t)PyLong_AsUnsignedLong(args[3]);
	header.length = (uint16_t)self->length;
	header.codec = (uint8_t)self->codec;
	generation = (uint32_t)PyLong_AsUnsignedLong(args[4]);
	is_checked = args[5] == Py_True;
	armed = PyLong_AsLong(args[6]);
	if (PyErr_Occurred())
		return NULL;
	object = own_object(self, args[0], (size_t)self->length);
	if (object == NULL)
		return NULL;
	memcpy(object + HEADER_BYTES, self->scratch, (size_t)self->length);
	if (reach(self, 0, armed) != 0)
		return NULL;
	memcpy(object + COVERED, (char *)&header + COVERED, HEADER_BYTES - COVERED);
	if (reach(self, 1, armed) != 0)
		return NULL;
	header.check = checksum(object, is_checked || self->codec <= RAW ? (size_t)self->length : 0,
				generation);
	header.generation = generation;
	memcpy(&life, &header, COVERED);
	if (reach(self, 2, armed) != 0)
		return NULL;
	__atomic_store_n((uint64_t *)object, life, __ATOMIC_RELEASE);
	if (reach(self, 3, armed) != 0)
		return NULL;
	Py_RETURN_NONE;
}

/*
 * Write the page of a whole object into `out` if the codec is LZ4 or same-filled. Return the codec,
 * or NO_LZ4_BLOCK.
 */
static long unpack(const Packer *self, const char *object, const struct zheader *header, char *out)
{
	const char *data = object + HEADER_BYTES;
	int size = (int)self->page;

	if (header->codec == LZ4_CODEC)
		return LZ4_decompress_safe(data, out, header->length, size) == size ? LZ4_CODEC
										    : NO_LZ4_BLOCK;
	if (header->codec == SAME_FILLED)
		for (int at = 0; at < size; at += 8)
			memcpy(out + at, data, 8);
	return header->codec;
}

static PyObject *packer_unpack(Packer *self, PyObject *const *args, Py_ssize_t count)
{
	struct zheader header;
	unsigned long long oid;
	unsigned long index;
	Py_buffer out;
	char *object;
	long result;

	if (count != 4) {
		PyErr_SetString(PyExc_TypeError, "unpack(handle, oid, index, out)");
		return NULL;
	}
	object = own_object(self, args[0], 8);
	if (object == NULL)
		return NULL;
	oid = PyLong_AsUnsignedLongLong(args[1]);
	index = PyLong_AsUnsignedLong(args[2]);
	if (PyErr_Occurred() || PyObject_GetBuffer(args[3], &out, PyBUF_WRITABLE) != 0)
		return NULL;
	memcpy(&header, object, HEADER_BYTES);
	if ((size_t)out.len != self->page) {
		PyErr_Format(PyExc_ValueError, "%zd bytes have no place for a page of %zu", out.len,
			     self->page);
		PyBuffer_Release(&out);
		return NULL;
	}
	if (header.oid != oid || header.index != index || header.generation == 0)
		result = NOT_THE_PAGE;
	else if (!fits(self, object, header.length) || !is_whole(object, &header))
		result = WRONG_CHECKSUM;
	else
		result = unpack(self, object, &header, out.buf);
	PyBuffer_Release(&out);
	return PyLong_FromLong(result);
}

static PyObject *packer_weigh(Packer *self, PyObject *handle)
{
	struct zheader header;
	char *object = own_object(self, handle, 8);

	if (object == NULL)
		return NULL;
	memcpy(&header, object, HEADER_BYTES);
	if (header.generation == 0 && (header.check == 0 || header.check == DEAD_CHECK))
		return PyLong_FromLong(NO_PAGE);
	if (!fits(self, object, header.length) || !is_whole(object, &header))
		return PyLong_FromLong(WRONG_CHECKSUM);
	return PyLong_FromLong((long)(header.oid >> CLIENT_SHIFT & CLIENT_MASK) << 24 |
			       (long)header.length << 8 | header.codec);
}

/* Return whether an object of `room` bytes has the header of a page and a right checksum. */
static bool is_page(const Packer *self, const char *object, const struct zheader *header,
		    size_t room)
{
	return header->generation != 0 && header->length != 0 &&
	       HEADER_BYTES + header->length <= room &&
	       (header->codec > RAW || header->length == 8) && fits(self, object, header->length) &&
	       is_whole(object, header);
}

static PyObject *tuple_of(const uint64_t *numbers, Py_ssize_t count)
{
	PyObject *tuple = PyTuple_New(count);

	for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
		PyObject *number = PyLong_FromUnsignedLongLong(numbers[i]);

		if (number == NULL)
			Py_CLEAR(tuple);
		else
			PyTuple_SET_ITEM(tuple, i, number);
	}
	return tuple;
}

/*
 * Append the contents of one object's header, unless the object is dead. Return -1 with an
 * exception on failure.
 */
static int survey_object(const Packer *self, PyObject *found, uint64_t handle, size_t room)
{
	const char *object = object_at(self, handle, 8);
	struct zheader header;
	PyObject *page;
	int result;

	if (object == NULL) {
		PyErr_Format(PyExc_IndexError, "there is no object at %#llx",
			     (unsigned long long)handle);
		return -1;
	}
	memcpy(&header, object, HEADER_BYTES);
	if (header.generation == 0 && header.check == DEAD_CHECK)
		return 0;
	if (!is_page(self, object, &header, room))
		memset(&header, 0, HEADER_BYTES);
	page = tuple_of((const uint64_t[]){handle, header.generation, header.oid, header.index,
					   header.length, header.codec, header.pool},
			7);
	result = page != NULL ? PyList_Append(found, page) : -1;
	Py_XDECREF(page);
	return result;
}

static PyObject *packer_survey(Packer *self, PyObject *const *args, Py_ssize_t count)
{
	unsigned long long handle, size, objects;
	PyObject *found;

	if (count != 3) {
		PyErr_SetString(PyExc_TypeError, "survey(handle, size, count)");
		return NULL;
	}
	handle = PyLong_AsUnsignedLongLong(args[0]);
	size = PyLong_AsUnsignedLongLong(args[1]);
	objects = PyLong_AsUnsignedLongLong(args[2]);
	found = PyErr_Occurred() == NULL ? PyList_New(0) : NULL;
	for (; found != NULL && objects > 0; objects--, handle += size)
		if (survey_object(self, found, handle, size) != 0)
			Py_CLEAR(found);
	return found;
}

static void packer_dealloc(Packer *self)
{
	PyMem_Free(self->scratch);
	Py_XDECREF(self->memory);
	Py_XDECREF(self->reach);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static int find_points(Packer *self)
{
	static const char *const names[] = {"STORE_DATA", "STORE_HEADER", "STORE_CHECKED",
					    "STORE_ALIVE"};
	PyObject *module = PyImport_ImportModule("zswapd.core.crashpoints");

	self->reach = module != NULL ? PyObject_GetAttrString(module, "reach") : NULL;
	for (int i = 0; self->reach != NULL && i < 4; i++) {
		PyObject *number = PyObject_GetAttrString(module, names[i]);

		self->points[i] = number != NULL ? PyLong_AsLong(number) : -1;
		Py_XDECREF(number);
		if (PyErr_Occurred())
			break;
	}
	Py_XDECREF(module);
	return PyErr_Occurred() != NULL ? -1 : 0;
}

static PyObject *packer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"memory", "page_size", NULL};
	PyObject *memory;
	unsigned page;
	Packer *self;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!I:Packer", names, &PyMemoryView_Type,
					 &memory, &page))
		return NULL;
	if (page < 4096 || page > 65536 || (page & (page - 1)) != 0)
		return PyErr_Format(PyExc_ValueError, "%u is no page size", page);
	if (PyMemoryView_GET_BUFFER(memory)->readonly ||
	    PyMemoryView_GET_BUFFER(memory)->itemsize != 1)
		return PyErr_Format(PyExc_ValueError,
				    "the arena's view is to be of bytes that can be written");
	self = (Packer *)type->tp_alloc(type, 0);
	if (self == NULL)
		return NULL;
	self->page = page;
	memset(&self->stream, 0xff, sizeof(self->stream)); /* touch its memory */
	self->capacity = LZ4_compressBound((int)page);
	self->scratch = PyMem_Calloc(1, (size_t)self->capacity);
	if (self->scratch == NULL) {
		PyErr_NoMemory();
	} else {
		memset(self->scratch, 0xff, (size_t)self->capacity);
		self->memory = Py_NewRef(memory);
		if (find_points(self) == 0)
			return (PyObject *)self;
	}
	Py_DECREF(self);
	return NULL;
}

static PyMethodDef packer_methods[] = {
    {"pack", (PyCFunction)packer_pack, METH_O, PyDoc_STR("pack(page) -> int")},
    {"commit", (PyCFunction)(void (*)(void))packer_commit, METH_FASTCALL,
     PyDoc_STR("commit(handle, pool, oid, index, generation, checksum, armed)")},
    {"unpack", (PyCFunction)(void (*)(void))packer_unpack, METH_FASTCALL,
     PyDoc_STR("unpack(handle, oid, index, out) -> int")},
    {"weigh", (PyCFunction)packer_weigh, METH_O, PyDoc_STR("weigh(handle) -> int")},
    {"survey", (PyCFunction)(void (*)(void))packer_survey, METH_FASTCALL,
     PyDoc_STR("survey(handle, size, count) -> list")},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject packer_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "zswapd.core.pam._pages.Packer",
    .tp_doc = PyDoc_STR("Packer(memory, page_size)"),
    .tp_basicsize = sizeof(Packer),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = packer_new,
    .tp_dealloc = (destructor)packer_dealloc,
    .tp_methods = packer_methods,
};

static PyObject *pages_digests(PyObject *unused, PyObject *args)
{
	unsigned long long seed;
	PyObject *result;
	Py_buffer data;

	(void)unused;
	if (!PyArg_ParseTuple(args, "y*K", &data, &seed))
		return NULL;
	result = Py_BuildValue("(KK)",
			       (unsigned long long)digest_plain(data.buf, (size_t)data.len, seed),
			       (unsigned long long)digest(data.buf, (size_t)data.len, seed));
	PyBuffer_Release(&data);
	return result;
}

static PyMethodDef functions[] = {
    {"digests", pages_digests, METH_VARARGS, PyDoc_STR("digests(data, seed) -> tuple of int")},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "zswapd.core.pam._pages",
    .m_doc = PyDoc_STR("LZ4 pages behind their headers."),
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__pages(void)
{
	PyObject *made = PyModule_Create(&module);

#ifdef __x86_64__
	if (digest_avx2 != NULL && __builtin_cpu_supports("avx2"))
		digest = digest_avx2;
#endif
	if (made == NULL || PyModule_AddType(made, &packer_type) != 0 ||
	    PyModule_AddIntMacro(made, NOT_THE_PAGE) != 0 ||
	    PyModule_AddIntMacro(made, WRONG_CHECKSUM) != 0 ||
	    PyModule_AddIntMacro(made, NO_LZ4_BLOCK) != 0 ||
	    PyModule_AddIntMacro(made, NO_PAGE) != 0)
		Py_CLEAR(made);
	return made;
}
