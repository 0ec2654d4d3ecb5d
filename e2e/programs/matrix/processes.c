/* Processes in unusual states, threads, scheduling, nested namespaces. */
#include "matrix.h"
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/rseq.h>

static pid_t other;
static int to_child[2], from_child[2];

/* served starts a child that runs enter once and from then on answers each question with test's result. */
static void (*enter)(void);
static int (*test)(void);

static void serve(void)
{
	char byte;

	enter();
	byte = 'r';
	must(write(from_child[1], &byte, 1), "write");
	while (read(to_child[0], &byte, 1) == 1) {
		byte = test() ? 'y' : 'n';
		must(write(from_child[1], &byte, 1), "write");
	}
	_exit(0);
}

static void served(void (*enter_)(void), int (*test_)(void))
{
	char byte;

	enter = enter_;
	test = test_;
	must(pipe(to_child), "pipe");
	must(pipe(from_child), "pipe");
	other = child(serve);
	close(from_child[1]); /* so that the child's failure is seen as the end of the pipe */
	if (read(from_child[0], &byte, 1) != 1) {
		int status;

		waitpid(other, &status, 0);
		_exit(WEXITSTATUS(status));
	}
}

static int answers(void)
{
	char byte = '?';

	return write(to_child[1], &byte, 1) == 1 && readable(from_child[0]) && read(from_child[0], &byte, 1) == 1 && byte == 'y';
}

static void zombie_setup(void)
{
	siginfo_t info;

	other = must(fork(), "fork");
	if (!other)
		_exit(42);
	must(waitid(P_PID, other, &info, WEXITED | WNOWAIT), "waitid");
}

static void zombie_check(void)
{
	siginfo_t info = { 0 };

	expect(waitid(P_PID, other, &info, WEXITED | WNOWAIT | WNOHANG) == 0 && info.si_pid == other && info.si_status == 42, "the zombie and its exit status");
}
CARRIED(zombie)

static char state_of(pid_t pid)
{
	char path[64], text[256] = "", *end;
	int fd;

	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	fd = open(path, O_RDONLY);
	if (fd < 0 || read(fd, text, sizeof text - 1) <= 0)
		return 0;
	close(fd);
	end = strrchr(text, ')');
	return end ? end[2] : 0;
}

static void stopped_setup(void)
{
	siginfo_t info;

	other = child(NULL);
	kill(other, SIGSTOP);
	must(waitid(P_PID, other, &info, WSTOPPED), "waitid");
}

static void stopped_check(void)
{
	char state;

	/* A restore lets this one go on a moment before the other has stopped. */
	for (int n = 0; (state = state_of(other)) != 'T' && n < 5000; n++)
		usleep(1000);
	if (state != 'T')
		broken("the stopped process is in state %c", state);
}
CARRIED(stopped)

enum { THREADS = 50 };
static volatile long progress[THREADS];
static __thread long mine;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static long rounds;

static void *thread(void *argument)
{
	long number = (long)argument, seen = 0;

	for (mine = number;; mine += THREADS) {
		if (mine % THREADS != number)
			broken("thread %ld lost its own storage", number);
		pthread_mutex_lock(&mutex);
		while (rounds == seen)
			pthread_cond_wait(&turn, &mutex);
		seen = rounds;
		progress[number] = seen;
		pthread_mutex_unlock(&mutex);
	}
	return NULL;
}

static void threads_setup(void)
{
	for (long i = 0; i < THREADS; i++) {
		pthread_t id;

		must(-pthread_create(&id, NULL, thread, (void *)i), "pthread_create");
	}
}

static void threads_check(void)
{
	struct timespec step = { .tv_nsec = 1000000 };

	pthread_mutex_lock(&mutex);
	rounds++;
	pthread_cond_broadcast(&turn);
	pthread_mutex_unlock(&mutex);
	for (int i = 0; i < THREADS; i++) {
		for (int waits = 0; progress[i] != rounds; waits++) {
			if (waits == 5000)
				broken("thread %d stands still", i);
			nanosleep(&step, NULL);
		}
	}
}
CARRIED(threads)

static void enter_mnt(void)
{
	must(unshare(CLONE_NEWNS), "unshare");
	must(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "make mounts private");
	must(mkdir("inner", 0755), "mkdir");
	must(mount("inner", "inner", "tmpfs", 0, NULL), "mount a tmpfs");
	close(in_file("inner/file", "inner"));
}

static int see_mnt(void)
{
	int fd = open("inner/file", O_RDONLY), ok = holds(fd, "inner");

	close(fd);
	return ok;
}

static void nested_mnt_setup(void) { served(enter_mnt, see_mnt); }
static void nested_mnt_check(void)
{
	expect(answers(), "the mount in the nested namespace");
	expect(access("inner/file", F_OK) < 0, "the nested mount is seen outside of its namespace");
}
ROW(nested_mnt, "carried", "SYS_ADMIN")

static int inner_listener;
static struct sockaddr_in inner_address = { .sin_family = AF_INET };

static void enter_net(void)
{
	struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	socklen_t size = sizeof inner_address;

	must(unshare(CLONE_NEWNET), "unshare");
	inner_listener = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
	must(ioctl(inner_listener, SIOCSIFFLAGS, &lo), "bring lo up");
	inner_address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	must(bind(inner_listener, (void *)&inner_address, size), "bind");
	must(listen(inner_listener, 4), "listen");
	must(getsockname(inner_listener, (void *)&inner_address, &size), "getsockname");
}

static int see_net(void)
{
	int client = socket(AF_INET, SOCK_STREAM, 0), server, ok;

	ok = connect(client, (void *)&inner_address, sizeof inner_address) == 0;
	server = ok ? accept(inner_listener, NULL, NULL) : -1;
	close(client);
	close(server);
	return ok && server >= 0;
}

static void nested_net_setup(void) { served(enter_net, see_net); }
static void nested_net_check(void) { expect(answers(), "the nested network namespace"); }
ROW(nested_net, "carried", "SYS_ADMIN,NET_ADMIN")

static void enter_chroot(void)
{
	must(mkdir("jail", 0755), "mkdir");
	close(in_file("jail/file", "jailed"));
	must(chroot("jail"), "chroot");
	must(chdir("/"), "chdir");
}

static int see_chroot(void)
{
	int fd = open("/file", O_RDONLY), ok = holds(fd, "jailed");

	close(fd);
	return ok && access("/etc", F_OK) < 0;
}

static void chroot_setup(void) { served(enter_chroot, see_chroot); }
static void chroot_check(void) { expect(answers(), "the root directory of the chroot"); }
CARRIED(chroot)

/* Further nested namespaces, which CRIU cannot carry. */
static int stay(void) { return 1; }
static void enter_flags(int flags) { must(unshare(flags), "unshare"); }

static void enter_user(void)
{
	if (unshare(CLONE_NEWUSER) < 0)
		unavailable("user namespace");
}
static void nested_user_setup(void) { served(enter_user, stay); }
static void nested_user_check(void) { expect(answers(), "the nested namespace"); }
REFUSED(nested_user)

static void enter_uts(void) { enter_flags(CLONE_NEWUTS); }
static void nested_uts_setup(void) { served(enter_uts, stay); }
static void nested_uts_check(void) { expect(answers(), "the nested namespace"); }
ROW(nested_uts, "refused", "SYS_ADMIN")

static void enter_ipc(void) { enter_flags(CLONE_NEWIPC); }
static void nested_ipc_setup(void) { served(enter_ipc, stay); }
static void nested_ipc_check(void) { expect(answers(), "the nested namespace"); }
ROW(nested_ipc, "refused", "SYS_ADMIN")

static void enter_pid(void)
{
	enter_flags(CLONE_NEWPID);
	child(NULL); /* the first process of the new namespace */
}
static void nested_pid_setup(void) { served(enter_pid, stay); }
static void nested_pid_check(void) { expect(answers(), "the nested namespace"); }
ROW(nested_pid, "refused", "SYS_ADMIN")

static void seccomp_setup(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpriority, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOTNAM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof code / sizeof *code, code };

	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
	must(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "seccomp");
}

static void seccomp_check(void)
{
	expect(syscall(SYS_getpriority, 0, 0) < 0 && errno == ENOTNAM, "the system-call filter is gone");
}
CARRIED(seccomp)

static void sched_fifo_setup(void)
{
	struct sched_param param = { .sched_priority = 7 };

	if (sched_setscheduler(0, SCHED_FIFO, &param) < 0)
		unavailable("SCHED_FIFO");
}

static void sched_fifo_check(void)
{
	struct sched_param param = { 0 };

	expect(sched_getscheduler(0) == SCHED_FIFO && sched_getparam(0, &param) == 0 && param.sched_priority == 7, "real-time scheduling");
}
ROW(sched_fifo, "carried", "SYS_NICE")

static int last_cpu(void)
{
	cpu_set_t set;
	int last = -1;

	must(sched_getaffinity(0, sizeof set, &set), "sched_getaffinity");
	for (int i = 0; i < CPU_SETSIZE; i++)
		if (CPU_ISSET(i, &set))
			last = i;
	return last;
}

static cpu_set_t pinned;

static void affinity_setup(void)
{
	CPU_ZERO(&pinned);
	CPU_SET(last_cpu(), &pinned);
	must(sched_setaffinity(0, sizeof pinned, &pinned), "sched_setaffinity");
}

static void affinity_check(void)
{
	cpu_set_t now;

	sched_getaffinity(0, sizeof now, &now);
	expect(CPU_EQUAL(&now, &pinned), "the processor the process was pinned to");
}
CARRIED(affinity)

/* The C library's restartable sequences: the kernel keeps writing the processor's number where it was told to. */
static struct rseq *area(void) { return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset); }

static void rseq_setup(void)
{
	if (!__rseq_size)
		unavailable("the C library has no rseq");
}

static void rseq_check(void)
{
	unsigned before, kernel;

	do {
		before = *(volatile unsigned *)&area()->cpu_id;
		must(syscall(SYS_getcpu, &kernel, NULL, NULL), "getcpu");
	} while (before != *(volatile unsigned *)&area()->cpu_id);
	if (before != kernel)
		broken("rseq says processor %d, the kernel %u", (int)before, kernel);
}
CARRIED(rseq)

/* A daemon: its own session, its parent gone. */
static volatile long *counter;

static void daemon_setup(void)
{
	counter = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	other = must(fork(), "fork");
	if (!other) {
		struct timespec step = { .tv_nsec = 5000000 };

		setsid();
		if (fork())
			_exit(0);
		setsid();
		prctl(PR_SET_NAME, "daemon");
		for (counter[1] = getpid(); getppid() > 0; ++*counter)
			nanosleep(&step, NULL);
	}
	must(waitpid(other, NULL, 0), "waitpid");
	while (!*counter)
		sched_yield();
}

static void daemon_check(void)
{
	long before = *counter;
	struct timespec step = { .tv_nsec = 5000000 };

	for (int i = 0; i < 1000 && *counter == before; i++)
		nanosleep(&step, NULL);
	expect(*counter > before, "the daemon stands still");
	expect(getsid(counter[1]) == counter[1], "the daemon's session");
}
CARRIED(daemon)

/* A traced process belongs to its tracer; CRIU cannot be a second one. */
static void ptraced_setup(void)
{
	other = child(NULL);
	must(ptrace(PTRACE_SEIZE, other, 0, 0), "PTRACE_SEIZE");
}
static void ptraced_check(void) { expect(state_of(other) != 0, "the traced process"); }
REFUSED(ptraced)
