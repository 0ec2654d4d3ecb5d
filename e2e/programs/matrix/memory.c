/* Kinds of memory, and clocks. */
#include "matrix.h"
#include <sys/resource.h>
#include <sys/time.h>

static char *memory;

static void thp_setup(void)
{
	char *raw = mmap(NULL, 16 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	memory = (char *)(((uintptr_t)raw + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
	must(madvise(memory, 8 << 20, MADV_HUGEPAGE), "MADV_HUGEPAGE");
	fill(memory, 8 << 20, 11);
}
static void thp_check(void) { expect(same(memory, 8 << 20, 11), "huge pages' content"); }
CARRIED(thp)

static void mlock_setup(void)
{
	memory = mmap(NULL, 64 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mlock(memory, 64 << 10) < 0)
		unavailable("mlock");
	fill(memory, 64 << 10, 12);
}

static long locked_kib(void)
{
	char line[256];
	long kib = -1;
	FILE *status = fopen("/proc/self/status", "r");

	while (status && fgets(line, sizeof line, status))
		sscanf(line, "VmLck: %ld", &kib);
	if (status)
		fclose(status);
	return kib;
}

static void mlock_check(void)
{
	expect(locked_kib() == 64, "the memory is no longer locked");
	expect(same(memory, 64 << 10, 12), "locked memory's content");
}
CARRIED(mlock)

static void private_file_setup(void)
{
	int fd = in_file("mapped", "");

	must(ftruncate(fd, 64 << 10), "ftruncate");
	memory = mmap(NULL, 64 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	close(fd);
	fill(memory + 4096, 4096, 13); /* one page is the process's own copy */
	must(mprotect(memory + 8192, 4096, PROT_NONE), "mprotect");
}

static void private_file_check(void)
{
	static const char zeros[4096];

	expect(same(memory + 4096, 4096, 13), "a changed page of a private mapping");
	expect(memcmp(memory, zeros, 4096) == 0, "an unchanged page of a private mapping");
}
CARRIED(private_file)

static void limits_setup(void)
{
	struct rlimit files = { 123, 456 };

	must(setrlimit(RLIMIT_NOFILE, &files), "setrlimit");
	must(setpriority(PRIO_PROCESS, 0, 5), "setpriority");
}

static void limits_check(void)
{
	struct rlimit files;

	expect(getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur == 123 && files.rlim_max == 456, "the limit of open files");
	expect(getpriority(PRIO_PROCESS, 0) == 5, "the nice value");
}
CARRIED(limits)

static volatile sig_atomic_t alarms, virtual_alarms, timer_signals;

static void count_alarm(int signal)
{
	if (signal == SIGALRM)
		alarms++;
	else if (signal == SIGVTALRM)
		virtual_alarms++;
	else
		timer_signals++;
}

static int goes_on(volatile sig_atomic_t *count)
{
	sig_atomic_t before = *count;
	struct timespec end, now;

	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += 5;
	do /* busy, because the virtual timer counts only the process's own time */
		clock_gettime(CLOCK_MONOTONIC, &now);
	while (*count == before && now.tv_sec < end.tv_sec);
	return *count != before;
}

static void itimer_setup(void)
{
	struct itimerval every = { { 0, 10000 }, { 0, 10000 } };

	signal(SIGALRM, count_alarm);
	signal(SIGVTALRM, count_alarm);
	must(setitimer(ITIMER_REAL, &every, NULL), "setitimer");
	must(setitimer(ITIMER_VIRTUAL, &every, NULL), "setitimer");
}

static void itimer_check(void)
{
	expect(goes_on(&alarms), "the real interval timer");
	expect(goes_on(&virtual_alarms), "the virtual interval timer");
}
CARRIED(itimer)

static timer_t timer;

static void posix_timer_setup(void)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1 };
	struct itimerspec every = { { 0, 10000000 }, { 0, 10000000 } };

	signal(SIGRTMIN + 1, count_alarm);
	must(timer_create(CLOCK_MONOTONIC, &event, &timer), "timer_create");
	must(timer_settime(timer, 0, &every, NULL), "timer_settime");
}

static void posix_timer_check(void)
{
	struct itimerspec left;

	expect(timer_gettime(timer, &left) == 0 && left.it_interval.tv_nsec == 10000000, "the posix timer's interval");
	expect(goes_on(&timer_signals), "the posix timer");
}
CARRIED(posix_timer)

/* The clocks that only go forward must not show how long the job slept. ARG is the longest jump in seconds. */
static double last[2];

static double seconds(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

static void monotonic_setup(void)
{
	last[0] = seconds(CLOCK_MONOTONIC);
	last[1] = seconds(CLOCK_BOOTTIME);
}

static void monotonic_check(void)
{
	double limit = row_arg ? atof(row_arg) : 10;
	double now[2] = { seconds(CLOCK_MONOTONIC), seconds(CLOCK_BOOTTIME) };

	for (int i = 0; i < 2; i++) {
		if (now[i] < last[i] || now[i] > last[i] + limit)
			broken("%s jumped by %.3f s", i ? "CLOCK_BOOTTIME" : "CLOCK_MONOTONIC", now[i] - last[i]);
		last[i] = now[i];
	}
}
CARRIED(monotonic)
