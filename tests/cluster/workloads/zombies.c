/* Leaves zombies behind, in every way a tenant's container does.
 *
 * One static program, so that a container image needs nothing else and the tests know to the last
 * process what stands in /proc. The first process makes `--parents` parents (0: it is the parent
 * itself, as a container's PID 1 often is); between them they make `--zombies` children that die
 * and are never waited for. When every one of them is a zombie it prints "ready" and creates the
 * file given by --ready-file, then everything stays as it is until somebody acts.
 *
 *   --zombies N              zombies in all, spread evenly over the parents
 *   --parents M              processes in the middle (0: the first process is the parent)
 *   --first reap|never       the first process waits for its children and exits on TERM, as an
 *                            init does; or never waits and has no handler, as `sleep` does
 *   --term die|ignore        what the parents do on TERM
 *   --chld never|handler     "handler": the parents reap on SIGCHLD, but were too late for these
 *   --leaders K              children whose first thread has ended while another one lives: they
 *                            look like zombies in /proc and are not dead
 *   --live K                 children that simply live on
 *   --name HEX               comm of the children (bytes in hex, 15 at most)
 *   --orphans N              instead of all this: leave N children behind and exit; they die once
 *                            they were given to somebody else, which may or may not reap them
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { COMM_BYTES = 15 };

static struct {
    int zombies, parents, leaders, live, orphans;
    int reap, ignore_term, chld_handler;
    char name[COMM_BYTES + 1];
    const char *ready_file;
} opt = {.reap = 1};

static void fail(const char *what)
{
    fprintf(stderr, "zombies: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void usage(const char *what)
{
    fprintf(stderr, "zombies: %s\n", what);
    exit(2);
}

static void stay(void)
{
    for (;;)
        pause();
}

static pid_t child(void)
{
    pid_t pid = fork();
    if (pid < 0)
        fail("fork");
    if (pid == 0) {
        signal(SIGTERM, SIG_DFL);
        signal(SIGCHLD, SIG_DFL);
        if (opt.name[0])
            prctl(PR_SET_NAME, opt.name);
    }
    return pid;
}

static void *live_thread(void *arg)
{
    (void)arg;
    stay();
    return NULL;
}

/* Ends the calling thread alone: pthread_exit from main would run exit handlers at the end. */
static void end_leader(void)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, live_thread, NULL) != 0)
        fail("pthread_create");
    syscall(SYS_exit, 0);
}

static void reap_all(int signal_number)
{
    (void)signal_number;
    int saved = errno;
    while (waitpid(-1, NULL, WNOHANG) > 0)
        ;
    errno = saved;
}

static void on_term(int signal_number)
{
    (void)signal_number;
    _exit(0);
}

/* Makes a parent's children, and returns once the ones meant to die are zombies. */
static void make_children(int zombies, int leaders, int live)
{
    pid_t *dead = calloc(zombies > 0 ? zombies : 1, sizeof *dead);
    if (!dead)
        fail("calloc");
    for (int i = 0; i < leaders; i++)
        if (child() == 0)
            end_leader();
    for (int i = 0; i < live; i++)
        if (child() == 0)
            stay();
    for (int i = 0; i < zombies; i++)
        if ((dead[i] = child()) == 0)
            _exit(0);
    for (int i = 0; i < zombies; i++) {
        siginfo_t info;
        while (waitid(P_PID, dead[i], &info, WEXITED | WNOWAIT) != 0)
            if (errno != EINTR)
                fail("waitid");
    }
    free(dead);
}

static void be_parent(int zombies, int leaders, int live)
{
    if (opt.ignore_term)
        signal(SIGTERM, SIG_IGN);
    make_children(zombies, leaders, live);
    if (opt.chld_handler) {
        struct sigaction action = {.sa_handler = reap_all, .sa_flags = SA_RESTART};
        sigaction(SIGCHLD, &action, NULL);
    }
}

static void leave_orphans(void)
{
    pid_t parent = getpid();
    for (int i = 0; i < opt.orphans; i++)
        if (child() == 0) {
            while (getppid() == parent)
                usleep(10 * 1000);
            _exit(0);
        }
}

static int share(int total, int index)
{
    return total / opt.parents + (index < total % opt.parents);
}

static void make_parents(void)
{
    int ready[2];
    if (pipe2(ready, O_CLOEXEC) != 0)
        fail("pipe");
    for (int i = 0; i < opt.parents; i++) {
        pid_t pid = fork();
        if (pid < 0)
            fail("fork");
        if (pid == 0) {
            close(ready[0]);
            signal(SIGTERM, SIG_DFL);
            be_parent(share(opt.zombies, i), share(opt.leaders, i), share(opt.live, i));
            if (write(ready[1], "r", 1) != 1)
                fail("write");
            close(ready[1]);
            stay();
        }
    }
    close(ready[1]);
    for (int done = 0; done < opt.parents;) {
        char byte;
        ssize_t got = read(ready[0], &byte, 1);
        if (got == 0)
            usage("a parent died before its zombies were ready");
        if (got == 1)
            done++;
        else if (errno != EINTR)
            fail("read");
    }
    close(ready[0]);
}

static void read_name(const char *hex)
{
    size_t length = strlen(hex);
    if (length % 2 || length / 2 > COMM_BYTES)
        usage("--name takes at most 15 bytes in hex");
    for (size_t i = 0; i < length / 2; i++) {
        unsigned byte;
        if (sscanf(hex + 2 * i, "%2x", &byte) != 1 || byte == 0)
            usage("--name takes bytes other than 0 in hex");
        opt.name[i] = (char)byte;
    }
}

static int one_of(const char *value, const char *no, const char *yes)
{
    if (strcmp(value, yes) != 0 && strcmp(value, no) != 0)
        usage("an option has a value that it does not know");
    return strcmp(value, yes) == 0;
}

static int number(const char *value)
{
    char *end;
    long got = strtol(value, &end, 10);
    if (*end || end == value || got < 0 || got > 1000000)
        usage("a number is expected");
    return (int)got;
}

static void read_options(int argc, char **argv)
{
    static const struct option known[] = {
        {"zombies", 1, 0, 'z'}, {"parents", 1, 0, 'p'}, {"first", 1, 0, 'f'},
        {"term", 1, 0, 't'},    {"chld", 1, 0, 'c'},    {"leaders", 1, 0, 'l'},
        {"live", 1, 0, 'v'},    {"name", 1, 0, 'n'},    {"orphans", 1, 0, 'o'},
        {"ready-file", 1, 0, 'r'}, {0, 0, 0, 0}};
    for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;)
        switch (c) {
        case 'z': opt.zombies = number(optarg); break;
        case 'p': opt.parents = number(optarg); break;
        case 'l': opt.leaders = number(optarg); break;
        case 'v': opt.live = number(optarg); break;
        case 'o': opt.orphans = number(optarg); break;
        case 'f': opt.reap = one_of(optarg, "never", "reap"); break;
        case 't': opt.ignore_term = one_of(optarg, "die", "ignore"); break;
        case 'c': opt.chld_handler = one_of(optarg, "never", "handler"); break;
        case 'n': read_name(optarg); break;
        case 'r': opt.ready_file = optarg; break;
        default: usage("unknown option; see the head of zombies.c");
        }
    if (optind != argc)
        usage("only options are taken");
}

/* Also reaps what it is given later, after a time without any child: hence the blocked signal. */
static void reap_for_ever(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    for (int got;;) {
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        sigwait(&set, &got);
    }
}

static void tell_ready(void)
{
    printf("ready\n");
    fflush(stdout);
    if (opt.ready_file) {
        int fd = open(opt.ready_file, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
        if (fd < 0)
            fail(opt.ready_file);
        close(fd);
    }
}

int main(int argc, char **argv)
{
    read_options(argc, argv);
    if (opt.orphans) {
        leave_orphans();
        return 0;
    }
    if (opt.reap && opt.parents)
        signal(SIGTERM, on_term);
    if (opt.parents)
        make_parents();
    else
        be_parent(opt.zombies, opt.leaders, opt.live);
    tell_ready();
    if (opt.reap && opt.parents)
        reap_for_ever();
    stay();
}
