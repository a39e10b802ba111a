/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * AES-256-XTS of many pages with libcrypto, in one call.
 *
 * Why in C: the `cryptography` package makes a new context for each data unit, since it cannot give one another tweak. With the GIL
 * held that takes 2 us a page, in which no page is served; here the tweak is set in an existing context (0.6 us with AES itself), and
 * the event loop goes on meanwhile.
 *
 * The GIL is released for long runs only: to get it back may take as long as the event loop does not let go of it.
 *
 * Limits: a context is for one thread at a time, which its owner sees to.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <limits.h>
#include <openssl/evp.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define KEY_BYTES 64
#define BLOCK 16
#define SHORT_RUN 16384 /* bytes that take some microseconds */
#define CAPSULE "zswapd.backing._xts.context"

static EVP_CIPHER *xts;

/* Transform the pages, whose length is that of the first: false if libcrypto failed. */
static bool transform(EVP_CIPHER_CTX *context, uint64_t number, const Py_buffer *pages, Py_ssize_t count, unsigned char *out)
{
	unsigned char tweak[BLOCK] = {0};
	int length = (int)pages[0].len, done;

	for (Py_ssize_t i = 0; i < count; i++, number++) {
		unsigned char *to = out != NULL ? out + i * length : pages[i].buf;

		for (int byte = 0; byte < 8; byte++)
			tweak[byte] = (unsigned char)(number >> 8 * byte);
		if (EVP_CipherInit_ex(context, NULL, NULL, NULL, tweak, -1) != 1 ||
		    EVP_CipherUpdate(context, to, &done, pages[i].buf, length) != 1 || done != length)
			return false;
	}
	return true;
}

static void free_context(PyObject *capsule)
{
	EVP_CIPHER_CTX_free(PyCapsule_GetPointer(capsule, CAPSULE));
}

static PyObject *py_context(PyObject *self, PyObject *args)
{
	EVP_CIPHER_CTX *context;
	PyObject *capsule;
	Py_buffer key;
	int encrypts;

	(void)self;
	if (!PyArg_ParseTuple(args, "y*p:context", &key, &encrypts))
		return NULL;
	/* Equal halves are no XTS key; libcrypto refuses them too, but for decryption. */
	if (key.len != KEY_BYTES || memcmp(key.buf, (char *)key.buf + KEY_BYTES / 2, KEY_BYTES / 2) == 0) {
		PyBuffer_Release(&key);
		PyErr_Format(PyExc_ValueError, "the key must be %d bytes with different halves", KEY_BYTES);
		return NULL;
	}
	context = EVP_CIPHER_CTX_new();
	if (context == NULL || EVP_CipherInit_ex(context, xts, NULL, key.buf, NULL, encrypts) != 1) {
		EVP_CIPHER_CTX_free(context);
		PyBuffer_Release(&key);
		PyErr_SetString(PyExc_ValueError, "libcrypto does not take the key");
		return NULL;
	}
	PyBuffer_Release(&key);
	capsule = PyCapsule_New(context, CAPSULE, free_context);
	if (capsule == NULL)
		EVP_CIPHER_CTX_free(context);
	return capsule;
}

/* Get the pages' memory, writable if they are transformed in place; the number that was got, less than `count` with an exception. */
static Py_ssize_t get_pages(PyObject *sequence, Py_buffer *pages, Py_ssize_t count, int flags)
{
	for (Py_ssize_t i = 0; i < count; i++) {
		if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(sequence, i), &pages[i], flags) != 0)
			return i;
		if (pages[i].len != pages[0].len || pages[i].len < BLOCK || pages[i].len > INT_MAX) {
			PyErr_SetString(PyExc_ValueError, "pages must be of one length, a block at least");
			return i + 1;
		}
	}
	return count;
}

/* Transform `count` pages of a list; an exception is set unless all went well. */
static void transform_list(EVP_CIPHER_CTX *context, uint64_t first, PyObject *list, Py_ssize_t count, Py_buffer *out)
{
	Py_buffer *pages = PyMem_New(Py_buffer, (size_t)count);
	Py_ssize_t got;
	bool is_done;

	if (pages == NULL) {
		PyErr_NoMemory();
		return;
	}
	got = get_pages(list, pages, count, out->buf == NULL ? PyBUF_WRITABLE : PyBUF_SIMPLE);
	if (!PyErr_Occurred() && out->buf != NULL && out->len < count * pages[0].len)
		PyErr_SetString(PyExc_ValueError, "there is no room for so many pages");
	if (!PyErr_Occurred()) {
		PyThreadState *thread = count * pages[0].len > SHORT_RUN ? PyEval_SaveThread() : NULL;

		is_done = transform(context, first, pages, count, out->buf);
		if (thread != NULL)
			PyEval_RestoreThread(thread);
		if (!is_done) {
			errno = EIO;
			PyErr_SetFromErrno(PyExc_OSError);
		}
	}
	while (got > 0)
		PyBuffer_Release(&pages[--got]);
	PyMem_Free(pages);
}

static PyObject *py_transform(PyObject *self, PyObject *args)
{
	PyObject *capsule, *given, *into = Py_None, *list;
	unsigned long long first;
	EVP_CIPHER_CTX *context;
	Py_buffer out = {0};

	(void)self;
	if (!PyArg_ParseTuple(args, "OKO|O:transform", &capsule, &first, &given, &into))
		return NULL;
	context = PyCapsule_GetPointer(capsule, CAPSULE);
	if (context == NULL || (into != Py_None && PyObject_GetBuffer(into, &out, PyBUF_WRITABLE) != 0))
		return NULL;
	list = PySequence_Fast(given, "pages must be a sequence");
	if (list != NULL && PySequence_Fast_GET_SIZE(list) > 0)
		transform_list(context, first, list, PySequence_Fast_GET_SIZE(list), &out);
	Py_XDECREF(list);
	if (into != Py_None)
		PyBuffer_Release(&out);
	if (PyErr_Occurred())
		return NULL;
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"context", py_context, METH_VARARGS, PyDoc_STR("context(key, encrypts) -> context")},
    {"transform", py_transform, METH_VARARGS, PyDoc_STR("transform(context, first, pages, out=None)")},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "zswapd.backing._xts",
    .m_doc = PyDoc_STR("AES-256-XTS of many pages in one call."),
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__xts(void)
{
	if (xts == NULL)
		xts = EVP_CIPHER_fetch(NULL, "AES-256-XTS", NULL);
	if (xts == NULL) {
		PyErr_SetString(PyExc_ImportError, "libcrypto has no AES-256-XTS");
		return NULL;
	}
	return PyModule_Create(&module);
}
