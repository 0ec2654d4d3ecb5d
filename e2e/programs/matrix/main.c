#include "matrix.h"
#include <setjmp.h>
#include <stdarg.h>
#include <sys/prctl.h>

struct row *rows;
const char *row_arg;
long tick;

static jmp_buf again;
static int spare; /* times that the present check may still fail */

void broken(const char *format, ...)
{
	va_list args;

	if (spare-- > 0)
		longjmp(again, 1);
	va_start(args, format);
	printf("BROKEN: ");
	vprintf(format, args);
	printf("\n");
	fflush(stdout);
	va_end(args);
	_exit(1);
}

void unavailable(const char *what)
{
	printf("unavailable: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	_exit(77);
}

long must(long result, const char *what)
{
	if (result < 0) {
		printf("set-up failed: %s: %s\n", what, strerror(errno));
		fflush(stdout);
		_exit(3);
	}
	return result;
}

void expect(int condition, const char *what)
{
	if (!condition)
		broken("%s (errno: %s)", what, strerror(errno));
}

void fill(void *memory, size_t size, unsigned seed)
{
	unsigned char *at = memory;
	uint32_t x = seed * 2654435761u + 1;

	for (size_t i = 0; i < size; i++) {
		x ^= x << 13;
		x ^= x >> 17;
		x ^= x << 5;
		at[i] = x;
	}
}

int same(const void *memory, size_t size, unsigned seed)
{
	unsigned char *want = malloc(size);
	int equal;

	fill(want, size, seed);
	equal = memcmp(memory, want, size) == 0;
	free(want);
	return equal;
}

pid_t child(void (*body)(void))
{
	pid_t pid = must(fork(), "fork");

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (body)
		body();
	for (;;)
		pause();
}

int ask(int (*test)(void))
{
	int status;
	pid_t pid = must(fork(), "fork");

	if (!pid)
		_exit(test() ? 0 : 1);
	must(waitpid(pid, &status, 0), "waitpid");
	return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int readable(int fd)
{
	struct pollfd wait = { .fd = fd, .events = POLLIN };
	int n;

	while ((n = poll(&wait, 1, 5000)) < 0 && errno == EINTR)
		; /* captured while it waited */
	return n == 1 && (wait.revents & POLLIN);
}

int in_file(const char *name, const char *text)
{
	int fd = must(open(name, O_RDWR | O_CREAT | O_TRUNC, 0644), name);

	must(write(fd, text, strlen(text)), "write");
	return fd;
}

int holds(int fd, const char *text)
{
	char got[4096];
	ssize_t n = pread(fd, got, sizeof got, 0);

	return n == (ssize_t)strlen(text) && memcmp(got, text, n) == 0;
}

static int list(void)
{
	for (struct row *r = rows; r; r = r->next)
		printf("%s %s %s\n", r->name, r->fate, *r->caps ? r->caps : "-");
	return 0;
}

int main(int argc, char **argv)
{
	struct row *r;

	if (argc == 2 && strcmp(argv[1], "list") == 0)
		return list();
	if (argc < 3) {
		fprintf(stderr, "usage: matrix NAME DIR [ARG] | matrix list\n");
		return 2;
	}
	for (r = rows; r && strcmp(r->name, argv[1]); r = r->next)
		;
	if (!r) {
		fprintf(stderr, "matrix: no row %s\n", argv[1]);
		return 2;
	}
	row_arg = argc > 3 ? argv[3] : NULL;
	mkdir(argv[2], 0755);
	must(chdir(argv[2]), argv[2]);
	setvbuf(stdout, NULL, _IOLBF, 0);
	r->setup();
	printf("ready\n");
	for (tick = 1;; tick++) {
		struct timespec left = { .tv_nsec = 50 * 1000 * 1000 };

		spare = r->lossy;
		(void)setjmp(again);
		r->check();
		printf("ok %ld\n", tick);
		while (nanosleep(&left, &left) && errno == EINTR)
			;
	}
}
