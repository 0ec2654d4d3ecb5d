/* Programs for the tests: job MODE [UID [MEBIBYTES]]. Each writes lines to its
 * standard output and never ends by itself unless something is wrong. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what)
{
	dprintf(1, "ERROR %s: %s\n", what, strerror(errno));
	_exit(1);
}

static void pause_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };

	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

static void counter(void)
{
	for (unsigned long i = 0;; i++) {
		dprintf(1, "%lu\n", i);
		pause_ms(5);
	}
}

/* Resident memory, so that a dump takes a while. */
static void fill(size_t mib)
{
	size_t n = mib << 20;
	unsigned char *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		fail("mmap");
	for (size_t i = 0; i < n; i += 64)
		p[i] = i >> 6;
}

static void full(ssize_t (*op)(int, void *, size_t), int fd, void *buf, size_t n, const char *what)
{
	for (size_t done = 0; done < n;) {
		ssize_t r = op(fd, (char *)buf + done, n - done);

		if (r <= 0)
			fail(what);
		done += r;
	}
}

static ssize_t send_some(int fd, void *buf, size_t n)
{
	return send(fd, buf, n, MSG_NOSIGNAL);
}

static ssize_t receive_some(int fd, void *buf, size_t n)
{
	return recv(fd, buf, n, 0);
}

/* Two processes with a numbered stream between them, in both directions. */
static void tcp(void)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof(a);
	int one = 1, l = socket(AF_INET, SOCK_STREAM, 0), s;
	uint64_t block[512];

	setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(l, (struct sockaddr *)&a, sizeof(a)) || listen(l, 1) || getsockname(l, (struct sockaddr *)&a, &len))
		fail("listen");
	if (!fork()) {
		s = socket(AF_INET, SOCK_STREAM, 0);
		if (connect(s, (struct sockaddr *)&a, sizeof(a)))
			fail("connect");
		for (;;) { /* the echo */
			full(receive_some, s, block, sizeof(block), "child recv");
			full(send_some, s, block, sizeof(block), "child send");
		}
	}
	s = accept(l, NULL, NULL);
	if (s < 0)
		fail("accept");
	for (uint64_t n = 0;; n++) {
		for (int i = 0; i < 512; i++)
			block[i] = n * 512 + i;
		full(send_some, s, block, sizeof(block), "parent send");
		full(receive_some, s, block, sizeof(block), "parent recv");
		for (int i = 0; i < 512; i++)
			if (block[i] != n * 512 + i) {
				dprintf(1, "ERROR block %lu differs\n", n);
				_exit(1);
			}
		if (n % 64 == 0)
			dprintf(1, "%lu\n", n);
	}
}

static void *pin(void *arg)
{
	cpu_set_t set;
	int cpu = *(int *)arg;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		fail("sched_setaffinity");
	for (;;) {
		if (sched_getaffinity(0, sizeof(set), &set))
			fail("sched_getaffinity");
		dprintf(1, "thread %d has %d cpus, cpu %d: %d, runs on %d\n", cpu, CPU_COUNT(&set), cpu, CPU_ISSET(cpu, &set), sched_getcpu());
		pause_ms(5);
	}
	return NULL;
}

static void affinity(void)
{
	static int cpus[] = { 0, 1 };
	pthread_t t;

	for (int i = 0; i < 2; i++)
		pthread_create(&t, NULL, pin, &cpus[i]);
	for (;;) {
		cpu_set_t set;

		sched_getaffinity(0, sizeof(set), &set);
		dprintf(1, "main has %d cpus\n", CPU_COUNT(&set));
		pause_ms(5);
	}
}

static void monotonic(void)
{
	struct timespec t;

	for (;;) {
		clock_gettime(CLOCK_MONOTONIC, &t);
		dprintf(1, "%ld\n", t.tv_sec * 1000 + t.tv_nsec / 1000000);
		pause_ms(5);
	}
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";

	if (argc > 2 && atoi(argv[2]) && (setgid(atoi(argv[2])) || setuid(atoi(argv[2]))))
		fail("setuid");
	if (argc > 3)
		fill(atoi(argv[3]));
	if (!strcmp(mode, "counter"))
		counter();
	if (!strcmp(mode, "tcp"))
		tcp();
	if (!strcmp(mode, "affinity"))
		affinity();
	if (!strcmp(mode, "monotonic"))
		monotonic();
	errno = EINVAL;
	fail(mode);
}
