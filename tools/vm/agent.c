/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The agent in the virtual machine: it runs commands for the host and returns their output, over
 * one virtio-serial port.
 *
 * It has to answer when the machine has no memory left, because the tests ask whether the machine
 * answers. So it is a small static program that locks its memory and allocates nothing after its
 * start. A command that it runs needs memory from the kernel like any other program, and the tests
 * measure its time.
 *
 * The protocol, in lines and counted bytes. From the host:
 *     ping ID\n                  the agent itself answers, at once
 *     run ID LENGTH\n<bytes>     /bin/sh -c <bytes>, with stdin from /dev/null, stdout and stderr
 *                                joined, in a process group of its own
 *     kill ID\n                  SIGKILL to the process group of a run
 * To the host:
 *     pong ID 0\n                the answer to a ping
 *     out ID LENGTH\n<bytes>     output of a run
 *     end ID STATUS\n            the exit code of a run, or minus the signal that ended it; the
 *                                last message about this ID
 *
 * Limits: RUNS commands at a time (one more ends with 127), commands of up to COMMAND_BYTES. If the
 * host closes the port, the agent kills all runs. It ends only when the port is gone.
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
    int out;      /* -1: all output was read */
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
 * The child runs this between vfork and exec. It uses the agent's memory, so only exec needs more.
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
    /* The OOM killer spares the agent only, not the commands that it runs. */
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

/* Handles one message of the input. Returns its length, or 0 if it is incomplete. */
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
    if (got == 0) { /* the host has closed the other end */
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
    sigprocmask(SIG_BLOCK, &child, NULL); /* SIGCHLD arrives in ppoll only */

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
