/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The agent in the virtual machine: runs commands for the host and says what they said, over one
 * virtio-serial port.
 *
 * It has to answer when the box has no memory left, since "the box answers" is what the tests ask.
 * So it is a static program of some tens of KiB that locks all it has and allocates nothing after
 * its start. What it cannot promise is the program it is asked to run: that one needs memory from
 * the kernel like any other, and how long it takes is the measurement.
 *
 * The protocol, in lines and counted bytes. From the host:
 *     ping ID\n                      answered at once, by the agent itself
 *     run ID LENGTH\n<bytes>         /bin/sh -c <bytes>, stdin from /dev/null, stdout and stderr joined, a process group of its own
 *     kill ID\n                      SIGKILL to the process group of a run
 * To the host:
 *     pong ID\n out ID LENGTH\n<bytes>         something that a run has written end ID STATUS\n
 *     its exit code, or minus the signal that ended it; the last word about this ID
 *
 * Limits: RUNS commands at a time (one more ends with 127), commands of up to COMMAND_BYTES. If the
 * host closes the port, all runs are killed. Ends only when the port is gone.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { RUNS = 16, COMMAND_BYTES = 65536, OUTPUT_BYTES = 16384, HEAD_BYTES = 64 };

struct run {
    unsigned long id;
    pid_t pid;    /* 0: this entry is free */
    int out;      /* -1: everything was read */
    bool reaped;
    int status;
};

static struct run runs[RUNS];
static char input[HEAD_BYTES + COMMAND_BYTES + 1];
static size_t filled;
static int port;
static char output[OUTPUT_BYTES];

static void die(const char *what)
{
    fprintf(stderr, "agent: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void write_all(const char *data, size_t length)
{
    while (length > 0) {
        ssize_t done = write(port, data, length);

        if (done < 0 && errno != EINTR && errno != EAGAIN)
            die("write");
        if (done > 0) {
            data += done;
            length -= (size_t)done;
        }
    }
}

static void say(const char *word, unsigned long id, long number)
{
    char line[HEAD_BYTES];

    write_all(line, (size_t)snprintf(line, sizeof line, "%s %lu %ld\n", word, id, number));
}

static struct run *find(unsigned long id)
{
    for (int n = 0; n < RUNS; n++)
        if (runs[n].pid && runs[n].id == id)
            return &runs[n];
    return NULL;
}

/*
 * Between vfork and exec: no memory of its own yet, so nothing to be short of but what exec itself
 * takes.
 */
static void become(const char *command, int out)
{
    sigset_t none;
    int null = open("/dev/null", O_RDWR);

    setsid();
    dup2(null, 0);
    dup2(out, 1);
    dup2(out, 2);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    /* The agent is nobody's victim; what it runs is as anything else on the box. */
    int adj = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (adj >= 0 && write(adj, "0", 1) < 0)
        errno = 0;
    execl("/bin/sh", "sh", "-c", command, (char *)NULL);
    _exit(127);
}

static void start(unsigned long id, const char *command)
{
    struct run *run = NULL;
    int ends[2];

    for (int n = 0; n < RUNS && !run; n++)
        if (!runs[n].pid)
            run = &runs[n];
    if (!run || pipe2(ends, O_CLOEXEC) != 0) {
        say("end", id, 127);
        return;
    }
    pid_t pid = vfork();
    if (pid == 0)
        become(command, ends[1]);
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        say("end", id, 127);
        return;
    }
    *run = (struct run){.id = id, .pid = pid, .out = ends[0]};
}

/* Takes one message off the input; returns its length, 0 if it is not complete yet. */
static size_t take_message(void)
{
    char *newline = memchr(input, '\n', filled);
    unsigned long id = 0, length = 0;
    struct run *run;

    if (!newline) {
        if (filled >= HEAD_BYTES)
            die("a message without an end");
        return 0;
    }
    size_t head = (size_t)(newline + 1 - input);
    if (sscanf(input, "run %lu %lu\n", &id, &length) == 2) {
        if (length > COMMAND_BYTES)
            die("a command that is too long");
        if (filled < head + length)
            return 0;
        char kept = input[head + length];
        input[head + length] = 0;
        start(id, input + head);
        input[head + length] = kept;
        return head + length;
    }
    if (sscanf(input, "ping %lu\n", &id) == 1)
        say("pong", id, 0);
    else if (sscanf(input, "kill %lu\n", &id) == 1 && (run = find(id)))
        kill(-run->pid, SIGKILL);
    return head;
}

static void take_input(void)
{
    ssize_t got = read(port, input + filled, sizeof input - 1 - filled);

    if (got < 0 && errno != EINTR && errno != EAGAIN)
        die("read");
    if (got == 0) { /* nobody has the other end open */
        for (int n = 0; n < RUNS; n++)
            if (runs[n].pid)
                kill(-runs[n].pid, SIGKILL);
        filled = 0;
        usleep(100000);
        return;
    }
    filled += got > 0 ? (size_t)got : 0;
    for (size_t used; (used = take_message()) > 0;) {
        filled -= used;
        memmove(input, input + used, filled);
    }
}

static void pass_output(struct run *run)
{
    ssize_t got = read(run->out, output, sizeof output);

    if (got > 0) {
        say("out", run->id, got);
        write_all(output, (size_t)got);
    } else if (got == 0 || (errno != EINTR && errno != EAGAIN)) {
        close(run->out);
        run->out = -1;
    }
}

static void reap(void)
{
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (int n = 0; n < RUNS; n++)
            if (runs[n].pid == pid && !runs[n].reaped) {
                runs[n].reaped = true;
                runs[n].status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
            }
}

static void nothing(int signal)
{
    (void)signal;
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_handler = nothing};
    sigset_t child, none;

    port = open(argc > 1 ? argv[1] : "/dev/virtio-ports/zvm", O_RDWR | O_CLOEXEC);
    if (port < 0)
        die("port");
    if (mlockall(MCL_CURRENT | MCL_FUTURE) != 0)
        die("mlockall");
    sigaction(SIGCHLD, &action, NULL);
    sigemptyset(&none);
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL); /* so that it arrives in ppoll only */

    for (;;) {
        struct pollfd polled[RUNS + 1] = {{.fd = port, .events = POLLIN}};

        for (int n = 0; n < RUNS; n++)
            polled[n + 1] = (struct pollfd){.fd = runs[n].pid ? runs[n].out : -1, .events = POLLIN};
        if (ppoll(polled, RUNS + 1, NULL, &none) < 0 && errno != EINTR)
            die("ppoll");
        reap();
        for (int n = 0; n < RUNS; n++)
            if (polled[n + 1].fd >= 0 && polled[n + 1].revents)
                pass_output(&runs[n]);
        for (int n = 0; n < RUNS; n++)
            if (runs[n].pid && runs[n].reaped && runs[n].out < 0) {
                say("end", runs[n].id, runs[n].status);
                runs[n].pid = 0;
            }
        if (polled[0].revents)
            take_input();
    }
}
