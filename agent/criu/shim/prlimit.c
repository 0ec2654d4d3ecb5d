/*
 * Loaded into CRIU (LD_PRELOAD) where root lacks CAP_SYS_RESOURCE.
 *
 * CRIU reads the resource limits of each process it dumps with prlimit64(2),
 * which the kernel refuses for another user's process without that capability
 * (prlimit(2), EPERM). The same figures stand in /proc/PID/limits, which root
 * may read. Setting limits is passed on unchanged.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/types.h>

/* The kernel's struct, whatever the C library's is. */
struct limit64 {
	unsigned long long cur, max;
};

/* Names of the limits in /proc/PID/limits, by number (asm-generic/resource.h). */
static const char *const names[] = {
	"Max cpu time", "Max file size", "Max data size", "Max stack size",
	"Max core file size", "Max resident set", "Max processes", "Max open files",
	"Max locked memory", "Max address space", "Max file locks", "Max pending signals",
	"Max msgqueue size", "Max nice priority", "Max realtime priority", "Max realtime timeout",
};

static unsigned long long number(const char *text)
{
	return strncmp(text, "unlimited", 9) ? strtoull(text, NULL, 10) : ~0ULL;
}

static int read_limit(pid_t pid, unsigned int resource, struct limit64 *out)
{
	char path[64], line[256], cur[32], max[32];
	int found = -1;
	FILE *f;

	if (resource >= sizeof(names) / sizeof(names[0]))
		return -1;
	snprintf(path, sizeof(path), "/proc/%d/limits", (int)pid);
	f = fopen(path, "re");
	if (!f)
		return -1;
	while (found && fgets(line, sizeof(line), f)) {
		size_t n = strlen(names[resource]);

		if (!strncmp(line, names[resource], n) && line[n] == ' ' &&
		    sscanf(line + n, "%31s %31s", cur, max) == 2) {
			out->cur = number(cur);
			out->max = number(max);
			found = 0;
		}
	}
	fclose(f);
	return found;
}

/* After a refused call: the answer from /proc, or the refusal itself. */
static long instead(pid_t pid, unsigned int resource, const void *set, void *get)
{
	int saved = errno;

	if (saved == EPERM && !set && get && !read_limit(pid, resource, get))
		return 0;
	errno = saved;
	return -1;
}

long syscall(long nr, ...)
{
	static long (*next)(long, ...);
	long a[6], ret;
	va_list ap;
	int i;

	va_start(ap, nr);
	for (i = 0; i < 6; i++)
		a[i] = va_arg(ap, long);
	va_end(ap);
	if (!next)
		next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	ret = next(nr, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (ret < 0 && nr == SYS_prlimit64)
		return instead(a[0], a[1], (void *)a[2], (void *)a[3]);
	return ret;
}

int prlimit64(pid_t pid, enum __rlimit_resource resource, const struct rlimit64 *set, struct rlimit64 *get)
{
	return syscall(SYS_prlimit64, (long)pid, (long)resource, set, get);
}

int prlimit(pid_t pid, enum __rlimit_resource resource, const struct rlimit *set, struct rlimit *get)
{
	return syscall(SYS_prlimit64, (long)pid, (long)resource, set, get);
}
