/* Descriptors that are not files: events, timers, watches. */
#include "matrix.h"
#include <linux/landlock.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

static int fd, fd2;

/* A watch must still report what happens in the same directory. */
static void inotify_setup(void)
{
	must(mkdir("watched", 0755), "mkdir");
	fd = must(inotify_init1(IN_NONBLOCK), "inotify_init1");
	must(inotify_add_watch(fd, "watched", IN_CREATE | IN_DELETE), "inotify_add_watch");
}

static void inotify_check(void)
{
	char buffer[4096] __attribute__((aligned(8)));
	struct inotify_event *event = (void *)buffer;

	close(open("watched/t", O_CREAT | O_WRONLY, 0644));
	expect(readable(fd), "inotify watch is silent");
	expect(read(fd, buffer, sizeof buffer) > 0 && (event->mask & IN_CREATE) && !strcmp(event->name, "t"), "inotify event of a creation");
	unlink("watched/t");
	expect(readable(fd) && read(fd, buffer, sizeof buffer) > 0 && (event->mask & IN_DELETE), "inotify event of a removal");
}
CARRIED(inotify)

/* The same on a tmpfs, whose file handles do not depend on the root's kind. */
static void inotify_tmpfs_setup(void)
{
	must(mkdir("/tmp/in", 0755), "mkdir");
	must(chdir("/tmp/in"), "chdir");
	inotify_setup();
}
static void inotify_tmpfs_check(void) { inotify_check(); }
CARRIED(inotify_tmpfs)

static void fanotify_setup(void)
{
	close(in_file("marked", "x"));
	fd = fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK, O_RDONLY);
	if (fd < 0)
		unavailable("fanotify_init");
	must(fanotify_mark(fd, FAN_MARK_ADD, FAN_OPEN, AT_FDCWD, "marked"), "fanotify_mark");
}

static void fanotify_check(void)
{
	struct fanotify_event_metadata event[8];

	close(open("marked", O_RDONLY));
	expect(readable(fd), "fanotify mark is silent");
	expect(read(fd, event, sizeof event) > 0 && (event->mask & FAN_OPEN) && event->pid == getpid(), "fanotify event");
	close(event->fd);
}
ROW(fanotify, "carried", "SYS_ADMIN")

static void signalfd_setup(void)
{
	sigset_t set;
	union sigval value = { .sival_int = 42 };

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGRTMIN);
	sigprocmask(SIG_BLOCK, &set, NULL);
	sigdelset(&set, SIGRTMIN);
	fd = must(signalfd(-1, &set, 0), "signalfd");
	must(sigqueue(getpid(), SIGRTMIN, value), "sigqueue"); /* stays pending */
}

static void signalfd_check(void)
{
	struct signalfd_siginfo info;
	sigset_t pending;

	kill(getpid(), SIGUSR1);
	expect(readable(fd) && read(fd, &info, sizeof info) == sizeof info && info.ssi_signo == SIGUSR1, "signalfd");
	sigpending(&pending);
	expect(sigismember(&pending, SIGRTMIN) == 1, "a pending signal is lost");
}
CARRIED(signalfd)

static void timerfd_setup(void)
{
	struct itimerspec every = { { 0, 10000000 }, { 0, 10000000 } };

	fd = must(timerfd_create(CLOCK_MONOTONIC, 0), "timerfd_create");
	must(timerfd_settime(fd, 0, &every, NULL), "timerfd_settime");
}

static void timerfd_check(void)
{
	uint64_t expired = 0;

	expect(readable(fd) && read(fd, &expired, 8) == 8 && expired > 0, "timerfd does not expire");
}
CARRIED(timerfd)

static void eventfd_setup(void)
{
	fd = must(eventfd(7, EFD_NONBLOCK), "eventfd");
}

static void eventfd_check(void)
{
	uint64_t value = 0;

	expect(read(fd, &value, 8) == 8 && value == 7, "eventfd's value");
	must(write(fd, &value, 8), "write");
}
CARRIED(eventfd)

static void epoll_setup(void)
{
	int ends[2];
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = 0x123456789abcdefULL };

	must(pipe(ends), "pipe");
	fd2 = ends[1];
	fd = must(epoll_create1(0), "epoll_create1");
	must(epoll_ctl(fd, EPOLL_CTL_ADD, ends[0], &event), "epoll_ctl");
	event.data.u64 = ends[0];
	must(epoll_ctl(fd, EPOLL_CTL_ADD, dup(ends[0]), &event), "epoll_ctl of a duplicate");
}

static void epoll_check(void)
{
	struct epoll_event events[4] = { 0 };
	char byte = 'e';
	int n;

	must(write(fd2, &byte, 1), "write");
	while ((n = epoll_wait(fd, events, 4, 5000)) < 0 && errno == EINTR)
		; /* captured while it waited */
	expect(n == 2, "epoll reports both descriptors");
	expect(events[0].data.u64 == 0x123456789abcdefULL || events[1].data.u64 == 0x123456789abcdefULL, "epoll's data");
	n = events[0].data.u64 == 0x123456789abcdefULL ? events[1].data.u64 : events[0].data.u64;
	expect(read(n, &byte, 1) == 1, "the pipe behind the epoll");
}
CARRIED(epoll)

static char *shared;

static void memfd_setup(void)
{
	fd = must(memfd_create("matrix", MFD_ALLOW_SEALING), "memfd_create");
	must(ftruncate(fd, 1 << 20), "ftruncate");
	shared = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(shared == MAP_FAILED ? -1 : 0, "mmap");
	fill(shared, 1 << 20, 5);
}

static void memfd_check(void)
{
	char byte;

	expect(same(shared, 1 << 20, 5), "memfd's content");
	shared[77] ^= 1;
	expect(pread(fd, &byte, 1, 77) == 1 && byte == shared[77], "mapping and descriptor are one memfd");
	shared[77] ^= 1;
}
CARRIED(memfd)

static const int seals = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;

static void memfd_sealed_setup(void)
{
	fd = must(memfd_create("sealed", MFD_ALLOW_SEALING), "memfd_create");
	must(write(fd, "content", 7), "write");
	must(fcntl(fd, F_ADD_SEALS, seals), "F_ADD_SEALS");
}

static void memfd_sealed_check(void)
{
	expect(holds(fd, "content"), "sealed memfd's content");
	expect(fcntl(fd, F_GET_SEALS) == seals, "seals");
	expect(pwrite(fd, "x", 1, 0) < 0 && errno == EPERM, "a sealed memfd can be written");
}
CARRIED(memfd_sealed)

static pid_t other;

static void pidfd_setup(void)
{
	other = child(NULL);
	fd = must(syscall(SYS_pidfd_open, other, 0), "pidfd_open");
}

static void pidfd_check(void)
{
	struct pollfd wait = { .fd = fd, .events = POLLIN };

	expect(syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0) == 0, "pidfd names no living process");
	expect(poll(&wait, 1, 0) == 0, "pidfd says the process has ended");
}
CARRIED(pidfd)

static void opath_setup(void)
{
	close(in_file("target", "through a path"));
	fd = must(open("target", O_PATH), "open O_PATH");
}

static void opath_check(void)
{
	char link[64], byte;
	int real;

	expect(read(fd, &byte, 1) < 0 && errno == EBADF, "an O_PATH descriptor can be read");
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	real = open(link, O_RDONLY);
	expect(real >= 0 && holds(real, "through a path"), "the file behind an O_PATH descriptor");
	close(real);
}
CARRIED(opath)

static void landlock_setup(void)
{
	struct landlock_ruleset_attr attr = { .handled_access_fs = LANDLOCK_ACCESS_FS_WRITE_FILE };

	fd = syscall(SYS_landlock_create_ruleset, &attr, sizeof attr, 0);
	if (fd < 0)
		unavailable("landlock_create_ruleset");
	fd2 = must(open(".", O_PATH), "open");
}

static void landlock_check(void)
{
	struct landlock_path_beneath_attr beneath = { .allowed_access = LANDLOCK_ACCESS_FS_WRITE_FILE, .parent_fd = fd2 };

	expect(syscall(SYS_landlock_add_rule, fd, LANDLOCK_RULE_PATH_BENEATH, &beneath, 0) == 0, "landlock ruleset");
}
REFUSED(landlock)
