/* memory MIB THREADS STEPS PACE_MS
 *
 * Half of MIB MiB is random, half was written as zeros. Each thread owns one slice and, step after step, checks a part
 * of it against what the seed says, writes a new stretch, and passes a digest on; the main thread prints one line per
 * step. At the end everything is checked once more. The output depends on the arguments only, never on time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

struct slice {
	uint64_t *words;
	size_t count;      /* of words; the first half of them is random */
	uint64_t *shadow;  /* how often each page was rewritten: what a page must hold follows from it */
	uint64_t digest;
	int number;
};

static struct slice *slices;
static long threads, steps;
static pthread_barrier_t begin, end;

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

/* word returns what the i-th word of a slice must hold. */
static uint64_t word(const struct slice *s, size_t i)
{
	size_t page = i / (PAGE / 8);

	if (i >= s->count / 2 && !s->shadow[page])
		return 0;
	return mix(mix(i + ((uint64_t)s->number << 40)) + s->shadow[page]);
}

static void write_page(struct slice *s, size_t page)
{
	for (size_t i = page * (PAGE / 8); i < (page + 1) * (PAGE / 8); i++)
		s->words[i] = word(s, i);
}

static uint64_t check_page(struct slice *s, size_t page)
{
	uint64_t digest = 0;

	for (size_t i = page * (PAGE / 8); i < (page + 1) * (PAGE / 8); i++) {
		if (s->words[i] != word(s, i)) {
			printf("BROKEN: slice %d word %zu is %llx\n", s->number, i, (unsigned long long)s->words[i]);
			fflush(stdout);
			_exit(1);
		}
		digest = mix(digest ^ s->words[i]);
	}
	return digest;
}

static size_t pages(const struct slice *s) { return s->count / (PAGE / 8); }

/* work checks 16 pages of the slice and rewrites two, chosen by the step. */
static void work(struct slice *s, long step)
{
	uint64_t choice = mix(step * 1000003 + s->number);

	for (int i = 0; i < 16; i++)
		s->digest = mix(s->digest ^ check_page(s, (choice + i * 7919) % pages(s)));
	for (int i = 0; i < 2; i++) {
		size_t page = mix(choice + i) % pages(s);

		s->shadow[page]++;
		write_page(s, page);
	}
}

static void *run(void *argument)
{
	struct slice *s = argument;

	for (size_t page = 0; page < pages(s); page++)
		write_page(s, page);
	pthread_barrier_wait(&end);
	for (long step = 1; step <= steps; step++) {
		pthread_barrier_wait(&begin);
		work(s, step);
		pthread_barrier_wait(&end);
	}
	pthread_barrier_wait(&begin);
	for (size_t page = 0; page < pages(s); page++)
		s->digest = mix(s->digest ^ check_page(s, page));
	return NULL;
}

static void *anonymous(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED) {
		perror("mmap");
		exit(3);
	}
	return memory;
}

static uint64_t all(void)
{
	uint64_t digest = 0;

	for (long i = 0; i < threads; i++)
		digest = mix(digest ^ slices[i].digest);
	return digest;
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: memory MIB THREADS STEPS PACE_MS\n");
		return 2;
	}
	size_t words = ((size_t)atol(argv[1]) << 20) / 8;
	long pace = atol(argv[4]);
	const char *stop = getenv("STOP_FILE");
	struct timespec pause = { pace / 1000, pace % 1000 * 1000000 };

	threads = atol(argv[2]);
	steps = atol(argv[3]);
	setvbuf(stdout, NULL, _IOLBF, 0);
	slices = calloc(threads, sizeof *slices);
	pthread_barrier_init(&begin, NULL, threads + 1);
	pthread_barrier_init(&end, NULL, threads + 1);
	for (long i = 0; i < threads; i++) {
		slices[i].count = words / threads / (PAGE / 8) * (PAGE / 8);
		slices[i].number = i;
		slices[i].words = anonymous(slices[i].count * 8);
		slices[i].shadow = anonymous(pages(&slices[i]) * 8);
	}
	pthread_t *ids = calloc(threads, sizeof *ids);

	for (long i = 0; i < threads; i++)
		pthread_create(&ids[i], NULL, run, &slices[i]);
	pthread_barrier_wait(&end);
	for (long step = 1; step <= steps; step++) {
		pthread_barrier_wait(&begin);
		if (stop && !access(stop, F_OK))
			steps = step; /* the threads read it after the barrier */
		pthread_barrier_wait(&end);
		printf("step %ld %016llx\n", step, (unsigned long long)all());
		nanosleep(&pause, NULL);
	}
	pthread_barrier_wait(&begin); /* the last line is out: now everything is checked */
	for (long i = 0; i < threads; i++)
		pthread_join(ids[i], NULL);
	printf("verified %016llx\n", (unsigned long long)all());
	return 0;
}
