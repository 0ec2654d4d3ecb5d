/* Opens one kind of kernel object, says so and waits: objects KIND. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/if_alg.h>
#include <linux/io_uring.h>
#include <linux/perf_event.h>
#include <linux/userfaultfd.h>
#include <linux/vm_sockets.h>
#include <mqueue.h>
#include <net/ethernet.h>
#include <netinet/in.h>
#include <linux/netlink.h>
#include <pty.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

static int must(int fd, const char *what)
{
	if (fd < 0) {
		dprintf(1, "ERROR %s: %s\n", what, strerror(errno));
		for (;;)
			pause();
	}
	return fd;
}

/* A child in a namespace of its own. */
static void nested(int flag, const char *what)
{
	int done[2];
	char c;

	must(pipe(done), "pipe");
	if (!fork()) {
		must(unshare(flag), what);
		if (flag == CLONE_NEWPID && !fork())
			for (;;)
				pause();
		must(write(done[1], "", 1), "write");
		for (;;)
			pause();
	}
	must(read(done[0], &c, 1), "read");
}

static void ping(void)
{
	must(write(must(open("/proc/sys/net/ipv4/ping_group_range", O_WRONLY), "ping_group_range"), "0 0", 3), "write");
	must(socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP), "ping");
}

static void traced(void)
{
	pid_t child = fork();

	if (!child)
		for (;;)
			pause();
	must(ptrace(PTRACE_SEIZE, child, 0, 0), "ptrace");
}

static void device(const char *path, int major, int minor)
{
	must(mknod(path, S_IFCHR | 0600, makedev(major, minor)), "mknod");
	must(open(path, O_RDONLY | O_NONBLOCK), path);
}

static int tcp_listener(int protocol)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int s = must(socket(AF_INET, SOCK_STREAM, protocol), "socket");

	must(bind(s, (struct sockaddr *)&a, sizeof(a)), "bind");
	must(listen(s, 1), "listen");
	return s;
}

/* A connection that is never accepted. */
static void tcp_connect(const char *ip, int port);

static void backlog(void)
{
	struct sockaddr_in a;
	socklen_t n = sizeof(a);

	must(getsockname(tcp_listener(0), (struct sockaddr *)&a, &n), "getsockname");
	tcp_connect("127.0.0.1", ntohs(a.sin_port));
}

/* A periodic timer of which many expiries are unread at any time. */
static void timer(void)
{
	struct itimerspec every = { { 0, 5000000 }, { 0, 5000000 } };
	int fd = must(timerfd_create(CLOCK_MONOTONIC, 0), "timerfd");
	uint64_t n;

	must(timerfd_settime(fd, 0, &every, NULL), "timerfd_settime");
	for (;;) {
		usleep(50000);
		must(read(fd, &n, sizeof(n)), "read");
		dprintf(1, "tick\n");
	}
}

/* Contents of the private /tmp and of the volume at /mnt, told again and again. */
static void files(void)
{
	char buf[64] = "";
	int fd = must(open("/tmp/big", O_RDWR | O_CREAT, 0600), "open");

	for (int i = 0; i < 4096; i++)
		must(write(fd, memset((char[4096]){ 0 }, 'a' + i % 26, 4096), 4096), "write");
	dprintf(1, "ready\n");
	for (unsigned char c;; usleep(5000)) {
		must(pread(fd, &c, 1, 4095 * 4096), "pread");
		int v = must(open("/mnt/name", O_RDONLY), "/mnt/name");
		memset(buf, 0, sizeof(buf));
		must(read(v, buf, sizeof(buf) - 1), "read");
		close(v);
		dprintf(1, "%c %s\n", c, buf);
	}
}

/* A connection to an address of another machine, or what looks like one. */
static void tcp_connect(const char *ip, int port)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = inet_addr(ip) };

	must(connect(must(socket(AF_INET, SOCK_STREAM, 0), "socket"), (struct sockaddr *)&a, sizeof(a)), "connect");
}

static void unix_connect(const char *path, int type)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };

	strncpy(a.sun_path, path, sizeof(a.sun_path) - 1);
	must(connect(must(socket(AF_UNIX, type, 0), "socket"), (struct sockaddr *)&a, sizeof(a)), path);
}

static void unix_pair_in_two_processes(void)
{
	int s[2];

	must(socketpair(AF_UNIX, SOCK_STREAM, 0, s), "socketpair");
	if (!fork()) {
		close(s[0]);
		for (;;)
			pause();
	}
	close(s[1]);
}

static void deleted_file(off_t size)
{
	int fd = must(open("/tmp/gone", O_RDWR | O_CREAT, 0600), "open");

	must(ftruncate(fd, size), "ftruncate");
	must(unlink("/tmp/gone"), "unlink");
}

static void bpf_map(void)
{
	union bpf_attr a = { .map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1 };

	must(syscall(SYS_bpf, BPF_MAP_CREATE, &a, sizeof(a)), "bpf");
}

static void uring(int keep)
{
	struct io_uring_params p = { 0 };
	int fd = must(syscall(SYS_io_uring_setup, 8, &p), "io_uring_setup");

	if (mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING) == MAP_FAILED)
		must(-1, "mmap");
	if (!keep)
		close(fd);
}

static void perf(void)
{
	struct perf_event_attr a = { .type = PERF_TYPE_SOFTWARE, .size = sizeof(a), .config = PERF_COUNT_SW_CPU_CLOCK };

	must(syscall(SYS_perf_event_open, &a, 0, -1, -1, 0), "perf_event_open");
}

static void secret(void)
{
	int fd = must(syscall(SYS_memfd_secret, 0), "memfd_secret");

	must(ftruncate(fd, 4096), "ftruncate");
	if (mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED)
		must(-1, "mmap");
	close(fd);
}

static void noted(int signal) { (void)signal; }

/* Has an event of a watch to read, reads it at SIGUSR1 and says so. */
static void unread(int inotify)
{
	const char *dir = "/tmp/watched";
	struct fanotify_event_metadata *event;
	char events[4096];
	int fd;

	signal(SIGUSR1, noted);
	must(mkdir(dir, 0700), dir);
	if (inotify) {
		fd = must(inotify_init1(0), "inotify");
		must(inotify_add_watch(fd, dir, IN_CREATE), dir);
	} else {
		fd = must(fanotify_init(FAN_CLASS_NOTIF, O_RDONLY), "fanotify");
		must(fanotify_mark(fd, FAN_MARK_ADD, FAN_OPEN | FAN_EVENT_ON_CHILD, AT_FDCWD, dir), dir);
	}
	close(must(open("/tmp/watched/seen", O_RDWR | O_CREAT, 0600), "seen"));
	dprintf(1, "ready\n");
	pause();
	must(read(fd, events, sizeof(events)), "read");
	event = (struct fanotify_event_metadata *)events;
	if (!inotify)
		close(event->fd);
	dprintf(1, "has read\n");
}

/* Many kinds that can be captured, all at once. */
static void plain(void)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t n = sizeof(a);
	sigset_t set;
	int l, master, slave, p[2];

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	must(epoll_create1(0), "epoll");
	must(eventfd(1, 0), "eventfd");
	must(inotify_init1(0), "inotify");
	must(signalfd(-1, &set, 0), "signalfd");
	must(timerfd_create(CLOCK_MONOTONIC, 0), "timerfd");
	must(memfd_create("x", 0), "memfd");
	must(syscall(SYS_pidfd_open, getpid(), 0), "pidfd");
	must(socket(AF_PACKET, SOCK_DGRAM, htons(ETH_P_ALL)), "packet");
	must(socket(AF_INET, SOCK_RAW, IPPROTO_ICMP), "raw");
	must(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), "netlink");
	must(socket(AF_INET6, SOCK_DGRAM, 0), "udp6");
	must(socket(AF_INET, SOCK_STREAM, 0), "unconnected tcp");
	must(pipe(p), "pipe");
	must(open("/dev/null", O_RDWR), "/dev/null");
	must(open("/proc/self/maps", O_RDONLY), "/proc/self/maps");
	must(open("/proc/self/fd", O_RDONLY), "/proc/self/fd");
	deleted_file(100);
	unix_pair_in_two_processes();
	l = tcp_listener(0);
	must(getsockname(l, (struct sockaddr *)&a, &n), "getsockname");
	tcp_connect("127.0.0.1", ntohs(a.sin_port));
	must(accept(l, NULL, NULL), "accept");
	if (!openpty(&master, &slave, NULL, NULL, NULL))
		must(write(master, "x", 1), "pty");
}

int main(int argc, char **argv)
{
	const char *kind = argc > 1 ? argv[1] : "";
	struct mq_attr mq = { .mq_maxmsg = 1, .mq_msgsize = 1 };

#define KIND(name) else if (!strcmp(kind, name))
	if (!strcmp(kind, "plain"))
		plain();
	KIND("io_uring") uring(1);
	KIND("io_uring-mapped") uring(0);
	KIND("userfaultfd") must(syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY), "userfaultfd");
	KIND("perf") perf();
	KIND("bpf") bpf_map();
	KIND("secretmem") secret();
	KIND("device") device("/tmp/kmsg", 1, 11);
	KIND("vsock") must(socket(AF_VSOCK, SOCK_STREAM, 0), "vsock");
	KIND("alg") must(socket(AF_ALG, SOCK_SEQPACKET, 0), "alg");
	KIND("mptcp") tcp_listener(IPPROTO_MPTCP);
	KIND("ping") ping();
	KIND("mqueue") must(mq_open("/queue", O_RDWR | O_CREAT, 0600, &mq), "mq_open");
	KIND("userns") nested(CLONE_NEWUSER, "unshare");
	KIND("pidns") nested(CLONE_NEWPID, "unshare");
	KIND("utsns") nested(CLONE_NEWUTS, "unshare");
	KIND("ipcns") nested(CLONE_NEWIPC, "unshare");
	KIND("traced") traced();
	KIND("procself") must(open("/proc/self", O_RDONLY | O_DIRECTORY), "open");
	KIND("deleted") deleted_file((off_t)2 << 30);
	KIND("inotify") must(inotify_add_watch(must(inotify_init1(0), "inotify"), argv[2], IN_ALL_EVENTS), argv[2]);
	KIND("fanotify") must(fanotify_mark(must(fanotify_init(FAN_CLASS_NOTIF, O_RDONLY), "fanotify"), FAN_MARK_ADD, FAN_OPEN, AT_FDCWD, argv[2]), argv[2]);
	KIND("flock") must(flock(must(open(argv[2], O_RDWR | O_CREAT, 0600), argv[2]), LOCK_EX), "flock");
	KIND("posix-lock") must(lockf(must(open(argv[2], O_RDWR | O_CREAT, 0600), argv[2]), F_LOCK, 10), "lockf");
	KIND("mntns") nested(CLONE_NEWNS, "unshare");
	KIND("open") must(open(argv[2], O_RDWR | O_CREAT, 0600), argv[2]);
	KIND("unlinked") { must(open(argv[2], O_RDWR | O_CREAT, 0600), argv[2]); must(unlink(argv[2]), "unlink"); }
	KIND("linked") { must(open(argv[2], O_RDWR | O_CREAT, 0600), argv[2]); must(link(argv[2], argv[3]), "link"); must(unlink(argv[2]), "unlink"); }
	KIND("cwd") { must(mkdir(argv[2], 0700), "mkdir"); must(chdir(argv[2]), "chdir"); must(rmdir(argv[2]), "rmdir"); }
	KIND("landlock") {
		uint64_t handled[1] = { 1 };
		must(syscall(SYS_landlock_create_ruleset, handled, sizeof(handled), 0), "landlock");
	}
	KIND("inotify-unread") unread(1);
	KIND("fanotify-unread") unread(0);
	KIND("timer") timer();
	KIND("backlog") backlog();
	KIND("files") files();
	KIND("unix") unix_connect(argv[2], SOCK_STREAM);
	KIND("unix-dgram") unix_connect(argv[2], SOCK_DGRAM);
	else must(-1, "no such kind");
	dprintf(1, "ready\n");
	for (;;)
		pause();
}
