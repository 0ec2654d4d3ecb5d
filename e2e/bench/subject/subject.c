/* subject MIB RANDOM_PERCENT TICKS DIRTY
 *
 * The program that is checkpointed. It fills MIB MiB, the first RANDOM_PERCENT per cent with random bytes and the rest
 * with written zeros, and then appends the time (CLOCK_REALTIME, ns) to the file TICKS every half millisecond, so
 * that the longest gap is the pause as an application feels it. When the file DIRTY holds "P", P per mille of the
 * random pages, scattered, are rewritten; then DIRTY is removed. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

static uint64_t state = 88172645463325252ULL;

static uint64_t next(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static void fill(uint64_t *page)
{
	for (int i = 0; i < PAGE / 8; i++)
		page[i] = next();
}

static void rewrite(char *memory, long pages, const char *dirty)
{
	char text[32] = "";
	int fd = open(dirty, O_RDONLY | O_CLOEXEC);
	long count;

	if (fd < 0)
		return;
	if (read(fd, text, sizeof(text) - 1) <= 0) {
		close(fd);
		return;
	}
	close(fd);
	count = pages * atol(text) / 1000;
	/* a stride that is prime to the number of pages visits each at most once */
	for (long i = 0, at = next() % pages; i < count; i++, at = (at + 7919) % pages)
		fill((uint64_t *)(memory + at * PAGE));
	unlink(dirty);
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	long size = atol(argv[1]) << 20, pages = size / PAGE, random = pages * atol(argv[2]) / 100;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int ticks = open(argv[3], O_WRONLY | O_CREAT | O_APPEND, 0644);

	if (memory == MAP_FAILED || ticks < 0)
		return 1;
	memset(memory, 0, size);
	for (long i = 0; i < random; i++)
		fill((uint64_t *)(memory + i * PAGE));
	for (unsigned long n = 0;; n++) {
		struct timespec now, half = { 0, 500000 };
		char line[32];

		clock_gettime(CLOCK_REALTIME, &now);
		int len = snprintf(line, sizeof(line), "%lld\n", (long long)now.tv_sec * 1000000000 + now.tv_nsec);
		if (write(ticks, line, len) != len)
			return 1;
		if (n % 64 == 0)
			rewrite(memory, random, argv[4]);
		nanosleep(&half, NULL);
	}
}
