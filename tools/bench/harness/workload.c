/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The workload of scripts/bench, scripts/demo and the real-swap tests. This process owns N MiB of
 * realistic page data in a memory cgroup that is too small for it, and checks every byte that
 * comes back from swap.
 *
 * It is in C so that it adds no cost to the measurement. Its own memory is 2 MiB, and locked. It
 * takes well under a microsecond to make or to compare a page. It joins the cgroup before it
 * allocates, ends itself after a time limit, and dies with its parent.
 *
 * Page data is a function of (seed, index, generation), so the check needs no copy of it. A page is
 * one of five kinds, drawn by weight: running text, records with pointers and counters, sparse
 * integer tables, same-filled (never zero, because the kernel swaps no zero pages), and random
 * bytes that no codec shrinks. Pages of the first three kinds start with magic, index and
 * generation, so a wrong page can be identified. 512-byte pieces from a bank follow. No two pages
 * are equal. lz4 compresses the mix to about 0.385 of its size. With --poor all pages are random
 * bytes.
 *
 * Each phase prints one JSON line on stdout. With --step it then waits for a line on stdin, so the
 * harness reads its counters between two phases, not during one.
 *
 * Exit codes: 0 all bytes verified, 1 a page differed, 2 could not run.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

enum kind { TEXT, RECORDS, SPARSE, SAME_FILLED, RANDOM };
enum {
    PIECE = 512,           /* bytes; every page size is a multiple */
    PIECES = 512,          /* per kind in the bank: 768 KiB in all */
    WORDS = 512,           /* vocabulary of the text pages */
    MISMATCHES_SHOWN = 10,
    PROGRESS_NS = 200000000,
    VMSTAT_BYTES = 32768,
};
#define MAGIC UINT64_C(0x4741505741535a01)

static struct {
    size_t page_size, pages, warm, faults, rewrites;
    uint64_t seed;
    const char *cgroup, *phases;
    unsigned time_limit, same;
    int cpu;
    bool step, progress, poor;
} opt = {
    .pages = 0,
    .seed = 1,
    .cpu = -1,
    .phases = "fill,settle,seq,random,rewrite,verify",
    .time_limit = 600,
    .same = 5,
};

static unsigned char *region, *scratch, *generations;
static unsigned char bank[3][PIECES][PIECE];
static uint32_t *order, *latencies;
static uint64_t mismatches;
static int vmstat_fd = -1;

static void die(const char *format, ...)
{
    int error = errno;
    va_list args;

    va_start(args, format);
    fprintf(stderr, "workload: ");
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "%s%s\n", error ? ": " : "", error ? strerror(error) : "");
    exit(2);
}

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

/* splitmix64: one multiply-xor chain per number, so random that no codec shrinks the bytes */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* ---- page data ------------------------------------------------------------------------------ */

static void make_text(unsigned char *piece, char words[WORDS][16], uint64_t *state)
{
    size_t used = 0;

    while (used < PIECE) {
        uint64_t r = next_random(state);
        /* the product of two uniform numbers favours small ones, as word frequencies do */
        const char *word = words[((r & 511) * ((r >> 10) & 511)) >> 9];
        size_t length = strlen(word);

        if (length > PIECE - used)
            length = PIECE - used;
        memcpy(piece + used, word, length);
        used += length;
        if (used < PIECE)
            piece[used++] = (r >> 20) % 12 == 0 ? '\n' : ' ';
    }
}

static void make_records(unsigned char *piece, uint64_t *state)
{
    for (size_t at = 0; at < PIECE; at += 64) {
        uint64_t r = next_random(state), s = next_random(state);
        uint64_t record[8] = {
            UINT64_C(0x000055d4c0a81000) + (r & 15) * 0x40,             /* type */
            UINT64_C(0x00007f3a10000000) + ((r >> 4) & 0xfffff) * 64,   /* next */
            ((r >> 24) & 1) ? UINT64_C(0x00007f3a10000000) + ((r >> 25) & 0xfff) * 64
                            : 0,                                        /* owner */
            ((r >> 44) & 3) + 1,                                        /* references */
            (s & 0x3f) | (UINT64_C(1) << (32 + ((s >> 8) & 3))),        /* length, flags */
            UINT64_C(1700000000) + ((s >> 16) & 0xff),                  /* time */
            0,
            ((s >> 40) & 7) == 0 ? (s >> 32) & 0xffffff : 0,
        };
        memcpy(piece + at, record, sizeof record);
    }
}

static void make_sparse(unsigned char *piece, uint64_t *state)
{
    memset(piece, 0, PIECE);
    for (int n = 0; n < 12; n++) {
        uint64_t r = next_random(state);
        uint32_t value = (uint32_t)((r >> 8) & 0x3ff);

        memcpy(piece + (r & 127) * 4, &value, sizeof value);
    }
}

static void make_bank(void)
{
    static const char *const syllables[16] = {"re", "con", "ta", "mi", "page", "ser", "lo", "ing",
                                              "er", "de", "swap", "un", "st", "ver", "a", "ion"};
    char words[WORDS][16];
    uint64_t state = opt.seed ^ UINT64_C(0x62616e6b);

    for (size_t w = 0; w < WORDS; w++) {
        uint64_t r = next_random(&state);

        words[w][0] = 0;
        for (unsigned n = 1 + (unsigned)(r % 3); n > 0; n--, r >>= 4)
            strcat(words[w], syllables[(r >> 8) & 15]);
    }
    for (size_t n = 0; n < PIECES; n++) {
        make_text(bank[TEXT][n], words, &state);
        make_records(bank[RECORDS][n], &state);
        make_sparse(bank[SPARSE][n], &state);
    }
}

static enum kind kind_of(uint64_t r)
{
    unsigned percent = (unsigned)((r >> 32) % 100);

    if (opt.poor)
        return RANDOM;
    if (percent < opt.same)
        return SAME_FILLED;
    percent = (unsigned)((r >> 40) % 95);
    return percent < 24 ? TEXT : percent < 66 ? RECORDS : percent < 90 ? SPARSE : RANDOM;
}

static void make_page(unsigned char *out, size_t index, unsigned generation)
{
    uint64_t state = opt.seed * UINT64_C(0xd6e8feb86659fd93) +
                     index * UINT64_C(0xa0761d6478bd642f) + generation;
    uint64_t first = next_random(&state), *words = (uint64_t *)(void *)out;
    enum kind kind = kind_of(first);

    if (kind == SAME_FILLED || kind == RANDOM) {
        for (size_t n = 0; n < opt.page_size / sizeof *words; n++)
            words[n] = kind == RANDOM ? next_random(&state) : first | 1;
        return;
    }
    for (size_t at = 0; at < opt.page_size; at += PIECE) {
        memcpy(out + at, bank[kind][next_random(&state) % PIECES], PIECE);
    }
    words[0] = MAGIC;
    words[1] = index;
    words[2] = generation;
    words[3] = opt.seed;
}

static void check_page(size_t index)
{
    const unsigned char *page = region + index * opt.page_size;
    size_t at = 0;

    make_page(scratch, index, generations[index]);
    if (memcmp(page, scratch, opt.page_size) == 0)
        return;
    while (page[at] == scratch[at])
        at++;
    if (mismatches++ < MISMATCHES_SHOWN) {
        uint64_t head[3];

        memcpy(head, page, sizeof head);
        fprintf(stderr,
                "workload: page %zu generation %u differs from byte %zu on; its head is %016" PRIx64
                " %" PRIu64 " %" PRIu64 "\n",
                index, generations[index], at, head[0], head[1], head[2]);
    }
}

/* ---- counters ------------------------------------------------------------------------------- */

struct counters {
    uint64_t ns, pswpin, pswpout;
    long major, minor;
};

static uint64_t vmstat_value(const char *text, const char *name)
{
    const char *found = strstr(text, name);

    return found ? strtoull(found + strlen(name), NULL, 10) : 0;
}

static struct counters read_counters(void)
{
    static char text[VMSTAT_BYTES];
    struct rusage usage;
    ssize_t length = pread(vmstat_fd, text, sizeof text - 1, 0);
    struct counters c = {0};

    if (length < 0)
        die("/proc/vmstat");
    text[length] = 0;
    getrusage(RUSAGE_SELF, &usage);
    c.pswpin = vmstat_value(text, "\npswpin ");
    c.pswpout = vmstat_value(text, "\npswpout ");
    c.major = usage.ru_majflt;
    c.minor = usage.ru_minflt;
    c.ns = now_ns();
    return c;
}

static void report(const char *phase, size_t pages, const struct counters *before, const char *more)
{
    struct counters after = read_counters();

    printf("{\"phase\":\"%s\",\"pages\":%zu,\"seconds\":%.6f,\"pswpin\":%" PRIu64
           ",\"pswpout\":%" PRIu64 ",\"major_faults\":%ld,\"minor_faults\":%ld"
           ",\"mismatches\":%" PRIu64 "%s}\n",
           phase, pages, (double)(after.ns - before->ns) / 1e9, after.pswpin - before->pswpin,
           after.pswpout - before->pswpout, after.major - before->major,
           after.minor - before->minor, mismatches, more);
    fflush(stdout);
}

static void progress(const char *phase, size_t done, size_t total)
{
    static uint64_t last;
    uint64_t now;

    if (!opt.progress || done % 64 != 0)
        return;
    now = now_ns();
    if (now - last < PROGRESS_NS)
        return;
    last = now;
    printf("{\"progress\":\"%s\",\"done\":%zu,\"total\":%zu}\n", phase, done, total);
    fflush(stdout);
}

/* ---- phases --------------------------------------------------------------------------------- */

/*
 * The first `warm` pages only fill the free memory. The clock starts after them, when every further
 * page pushes another page out.
 */
static void phase_fill(void)
{
    struct counters before = read_counters();

    for (size_t n = 0; n < opt.pages; n++) {
        if (n == opt.warm)
            before = read_counters();
        make_page(region + n * opt.page_size, n, 0);
        progress("fill", n, opt.pages);
    }
    report("fill", opt.pages - opt.warm, &before, "");
}

/* Writes `value` into a file of the cgroup. Ignores a missing file and an incomplete reclaim. */
static void cgroup_write(const char *file, const char *value)
{
    char path[4096];
    int fd;

    snprintf(path, sizeof path, "%s/%s", opt.cgroup, file);
    fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    if (write(fd, value, strlen(value)) < 0)
        errno = 0; /* memory.reclaim: EAGAIN if it reclaims too little; locked pages always stay */
    close(fd);
}

static size_t resident_pages(void)
{
    static unsigned char vector[4096];
    size_t resident = 0;

    for (size_t first = 0; first < opt.pages; first += sizeof vector) {
        size_t count = opt.pages - first < sizeof vector ? opt.pages - first : sizeof vector;

        if (mincore(region + first * opt.page_size, count * opt.page_size, vector) != 0)
            die("mincore");
        for (size_t n = 0; n < count; n++)
            resident += vector[n] & 1;
    }
    return resident;
}

/*
 * Swaps all pages out, so that each fault of the next phase reads from swap. MADV_PAGEOUT writes
 * the pages, but leaves a page with an asynchronous write in the swap cache. Reclaim of the whole
 * cgroup drops these pages.
 */
static void phase_settle(void)
{
    struct counters before = read_counters();
    char more[64], amount[32];

    if (madvise(region, opt.pages * opt.page_size, MADV_PAGEOUT) != 0)
        errno = 0; /* Linux < 5.4: the reclaim below swaps all pages out */
    snprintf(amount, sizeof amount, "%zu", opt.pages * opt.page_size);
    for (int attempt = 0; opt.cgroup && attempt < 3 && resident_pages() > 0; attempt++) {
        cgroup_write("memory.force_empty", "0");
        cgroup_write("memory.reclaim", amount);
    }
    snprintf(more, sizeof more, ",\"resident\":%zu", resident_pages());
    report("settle", opt.pages, &before, more);
}

static void check_all(const char *name)
{
    struct counters before = read_counters();

    for (size_t n = 0; n < opt.pages; n++) {
        check_page(n);
        progress(name, n, opt.pages);
    }
    report(name, opt.pages, &before, "");
}

static void shuffle(uint64_t salt, size_t wanted)
{
    uint64_t state = opt.seed ^ salt;

    for (size_t n = 0; n < opt.pages; n++)
        order[n] = (uint32_t)n;
    for (size_t n = 0; n < wanted; n++) {
        size_t other = n + next_random(&state) % (opt.pages - n);
        uint32_t swapped = order[n];

        order[n] = order[other];
        order[other] = swapped;
    }
}

static int by_value(const void *left, const void *right)
{
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;

    return (a > b) - (a < b);
}

static long major_faults(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_majflt;
}

/* The number of timed faults and the sum of their times; `latencies` has each time. */
static size_t timed;
static uint64_t timed_ns;

/*
 * Touches a page. Only a touch that faults the page in counts. The phases before have filled the
 * memory, so some of the pages are resident, and each other page has to push one out.
 */
static void timed_touch(size_t index, bool write)
{
    volatile unsigned char *page = region + index * opt.page_size;
    long major = major_faults();
    uint64_t start = now_ns(), taken;

    if (write)
        *page = *page;
    else
        (void)*page;
    taken = now_ns() - start;
    if (major_faults() != major) {
        timed_ns += taken;
        latencies[timed++] = taken > UINT32_MAX ? UINT32_MAX : (uint32_t)taken;
    }
}

static void report_timed(const char *phase, const struct counters *before)
{
    char more[256] = "";

    if (timed > 0) {
        qsort(latencies, timed, sizeof *latencies, by_value);
        snprintf(more, sizeof more,
                 ",\"us_mean\":%.3f,\"us_p50\":%.3f,\"us_p99\":%.3f,\"us_p999\":%.3f",
                 (double)timed_ns / 1e3 / (double)timed, latencies[timed / 2] / 1e3,
                 latencies[timed * 99 / 100] / 1e3, latencies[timed * 999 / 1000] / 1e3);
    }
    report(phase, opt.faults, before, more);
}

/*
 * Touches `faults` different pages in random order. The time is that of the touch, without the
 * check of the page.
 */
static void phase_random(void)
{
    struct counters before;

    shuffle(UINT64_C(0x72616e64), opt.faults);
    timed = 0, timed_ns = 0;
    before = read_counters();
    for (size_t n = 0; n < opt.faults; n++) {
        timed_touch(order[n], false);
        check_page(order[n]);
        progress("random", n, opt.faults);
    }
    report_timed("random", &before);
}

/*
 * Works like a program with more data than memory: it touches random pages, sometimes the same page
 * again, and changes three in ten. So every fault pushes a page out, and a third of these pages
 * have to be stored anew. Reads and changes are both timed.
 */
static void phase_mixed(void)
{
    uint64_t state = opt.seed ^ UINT64_C(0x6d697865);
    struct counters before;

    timed = 0, timed_ns = 0;
    before = read_counters();
    for (size_t n = 0; n < opt.faults; n++) {
        uint64_t r = next_random(&state);
        size_t index = (r >> 8) % opt.pages;
        bool write = (r & 255) % 10 < 3;

        timed_touch(index, write);
        check_page(index);
        if (write) {
            generations[index]++;
            make_page(region + index * opt.page_size, index, generations[index]);
        }
        progress("mixed", n, opt.faults);
    }
    report_timed("mixed", &before);
}

static void phase_rewrite(void)
{
    struct counters before;

    shuffle(UINT64_C(0x72657772), opt.rewrites);
    before = read_counters();
    for (size_t n = 0; n < opt.rewrites; n++) {
        size_t index = order[n];

        check_page(index);
        generations[index]++;
        make_page(region + index * opt.page_size, index, generations[index]);
        progress("rewrite", n, 2 * opt.rewrites);
    }
    for (size_t n = 0; n < opt.rewrites; n++) {
        check_page(order[n]);
        progress("rewrite", opt.rewrites + n, 2 * opt.rewrites);
    }
    report("rewrite", opt.rewrites, &before, "");
}

/*
 * Makes all pages in one buffer. The time is the part of the fill and of the checks without swap.
 */
static void phase_generate(void)
{
    struct counters before = read_counters();

    for (size_t n = 0; n < opt.pages; n++)
        make_page(scratch, n, 0);
    report("generate", opt.pages, &before, "");
}

/* Writes all pages to stdout instead of JSON, to test the mix with any compressor. */
static void phase_dump(void)
{
    for (size_t n = 0; n < opt.pages; n++) {
        make_page(scratch, n, 0);
        if (fwrite(scratch, opt.page_size, 1, stdout) != 1)
            die("stdout");
    }
    fflush(stdout);
}

static void run_phase(const char *name)
{
    char line[16];

    if (!strcmp(name, "fill"))
        phase_fill();
    else if (!strcmp(name, "settle"))
        phase_settle();
    else if (!strcmp(name, "seq") || !strcmp(name, "verify"))
        check_all(name);
    else if (!strcmp(name, "random"))
        phase_random();
    else if (!strcmp(name, "mixed"))
        phase_mixed();
    else if (!strcmp(name, "rewrite"))
        phase_rewrite();
    else if (!strcmp(name, "generate"))
        phase_generate();
    else if (!strcmp(name, "dump"))
        phase_dump();
    else
        die("unknown phase '%s'", name);
    if (opt.step && !fgets(line, sizeof line, stdin))
        exit(2); /* the harness is gone */
}

/* ---- start ---------------------------------------------------------------------------------- */

static void parse(int argc, char **argv)
{
    static const struct option options[] = {
        {"mib", required_argument, NULL, 'm'},     {"seed", required_argument, NULL, 's'},
        {"cgroup", required_argument, NULL, 'c'},  {"faults", required_argument, NULL, 'f'},
        {"rewrites", required_argument, NULL, 'r'}, {"phases", required_argument, NULL, 'p'},
        {"time-limit", required_argument, NULL, 't'}, {"step", no_argument, NULL, 'S'},
        {"progress", no_argument, NULL, 'P'},      {"warm-mib", required_argument, NULL, 'w'},
        {"cpu", required_argument, NULL, 'C'},     {"same", required_argument, NULL, 'e'},
        {"poor", no_argument, NULL, 'R'},
        {NULL, 0, NULL, 0},
    };
    int c;
    size_t mib = 0, warm = 0;

    opt.page_size = (size_t)sysconf(_SC_PAGESIZE);
    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (c) {
        case 'm': mib = strtoul(optarg, NULL, 10); break;
        case 'w': warm = strtoul(optarg, NULL, 10); break;
        case 's': opt.seed = strtoull(optarg, NULL, 10); break;
        case 'c': opt.cgroup = optarg; break;
        case 'f': opt.faults = strtoul(optarg, NULL, 10); break;
        case 'r': opt.rewrites = strtoul(optarg, NULL, 10); break;
        case 'p': opt.phases = optarg; break;
        case 't': opt.time_limit = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'C': opt.cpu = (int)strtol(optarg, NULL, 10); break;
        case 'e': opt.same = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'S': opt.step = true; break;
        case 'P': opt.progress = true; break;
        case 'R': opt.poor = true; break;
        default: exit(2);
        }
    }
    opt.pages = (mib << 20) / opt.page_size;
    if (opt.pages == 0)
        die("--mib is missing: how much data to hold, e.g. --mib 512");
    opt.warm = warm < mib ? (warm << 20) / opt.page_size : 0;
    if (opt.faults == 0)
        opt.faults = opt.pages / 4;
    if (opt.rewrites == 0)
        opt.rewrites = opt.pages / 8;
    if (opt.faults > opt.pages || opt.rewrites > opt.pages)
        die("--faults and --rewrites are at most the number of pages, %zu", opt.pages);
}

static void *allocate(size_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (at == MAP_FAILED)
        die("mmap of %zu bytes", size);
    return at;
}

/*
 * Starts again with an address space that was used on one processor only. Before the kernel writes
 * a dirty page out, it flushes the TLBs of all processors that ever used the address space, even of
 * one that the process only started on. Between virtual processors this interrupt costs more than
 * the store of the page (half of a fill, measured). So chance would decide the figures of every
 * contender. stay_on() and join_cgroup() may move the process, so each ends with an exec, which
 * makes a new address space.
 */
static void begin_anew(char **argv)
{
    execv("/proc/self/exe", argv);
    die("exec");
}

static void stay_on(int cpu, char **argv)
{
    cpu_set_t set, now;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&set, &now))
        return;
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        die("processor %d", cpu);
    begin_anew(argv);
}

/*
 * The join waits for an RCU grace period. The process goes on where that period ends, which is on
 * the other processor every second time.
 */
static void join_cgroup(char **argv)
{
    char path[4096];
    int member;
    FILE *file;

    snprintf(path, sizeof path, "%s/cgroup.procs", opt.cgroup);
    file = fopen(path, "r");
    while (file && fscanf(file, "%d", &member) == 1) {
        if (member == getpid()) {
            fclose(file);
            return;
        }
    }
    if (file)
        fclose(file);
    file = fopen(path, "w");
    if (!file || fprintf(file, "%d\n", getpid()) < 0 || fclose(file) != 0)
        die("%s", path);
    begin_anew(argv);
}

int main(int argc, char **argv)
{
    static char output[1 << 16];
    static char phases[1 << 16];

    errno = 0;
    parse(argc, argv);
    setvbuf(stdout, output, _IOFBF, sizeof output);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_NAME, "workload"); /* the second exec leaves "exe" */
    if (opt.cpu >= 0)
        stay_on(opt.cpu, argv);
    if (opt.cgroup)
        join_cgroup(argv);
    alarm(opt.time_limit); /* the default action of SIGALRM ends the process, swapped out or not */
    vmstat_fd = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
    if (vmstat_fd < 0)
        die("/proc/vmstat");
    scratch = allocate(opt.page_size);
    generations = allocate(opt.pages);
    order = allocate(opt.pages * sizeof *order);
    latencies = allocate(opt.faults * sizeof *latencies);
    make_bank();
    if (mlockall(MCL_CURRENT) != 0)
        errno = 0; /* without the privilege, the program's own 2 MiB are swapped too */
    region = allocate(opt.pages * opt.page_size);
    if (madvise(region, opt.pages * opt.page_size, MADV_NOHUGEPAGE) != 0)
        errno = 0; /* a kernel without huge pages */

    snprintf(phases, sizeof phases, "%s", opt.phases);
    for (char *rest = phases, *name; (name = strsep(&rest, ",")) != NULL;)
        run_phase(name);
    return mismatches ? 1 : 0;
}
