/* Kernel objects that CRIU 4.2 cannot carry: each must be named before the job is frozen. */
#include "matrix.h"
#include <linux/bpf.h>
#include <linux/if_alg.h>
#include <linux/io_uring.h>
#include <linux/perf_event.h>
#include <linux/userfaultfd.h>
#include <linux/vm_sockets.h>

#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447
#endif

static int fd;
static char *memory;

static void available(int got, const char *what)
{
	if (got < 0)
		unavailable(what);
	fd = got;
}

static void alive(void) { expect(fcntl(fd, F_GETFD) >= 0, "the descriptor"); }

static void io_uring_setup(void)
{
	struct io_uring_params params = { 0 };

	available(syscall(SYS_io_uring_setup, 8, &params), "io_uring_setup");
}
static void io_uring_check(void) { alive(); }
REFUSED(io_uring)

static void memfd_secret_setup(void)
{
	available(syscall(SYS_memfd_secret, 0), "memfd_secret");
	must(ftruncate(fd, 4096), "ftruncate");
	memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(memory == MAP_FAILED ? -1 : 0, "mmap");
	fill(memory, 4096, 1);
}
static void memfd_secret_check(void) { expect(same(memory, 4096, 1), "secret memory"); }
REFUSED(memfd_secret)

static void userfaultfd_setup(void) { available(syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY), "userfaultfd"); }
static void userfaultfd_check(void) { alive(); }
REFUSED(userfaultfd)

static void perf_event_setup(void)
{
	struct perf_event_attr attr = { .type = PERF_TYPE_SOFTWARE, .size = sizeof attr, .config = PERF_COUNT_SW_TASK_CLOCK, .exclude_kernel = 1 };

	available(syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0), "perf_event_open");
}
static void perf_event_check(void) { alive(); }
ROW(perf_event, "refused", "PERFMON,SYS_ADMIN")

static void bpf_map_setup(void)
{
	union bpf_attr attr = { .map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 8, .max_entries = 4 };

	available(syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr), "BPF_MAP_CREATE");
}
static void bpf_map_check(void) { alive(); }
ROW(bpf_map, "refused", "BPF,SYS_ADMIN")

static void vsock_setup(void) { available(socket(AF_VSOCK, SOCK_STREAM, 0), "AF_VSOCK"); }
static void vsock_check(void) { alive(); }
REFUSED(vsock)

static void alg_setup(void)
{
	struct sockaddr_alg address = { .salg_family = AF_ALG, .salg_type = "hash", .salg_name = "sha256" };

	available(socket(AF_ALG, SOCK_SEQPACKET, 0), "AF_ALG");
	if (bind(fd, (void *)&address, sizeof address) < 0)
		unavailable("bind AF_ALG");
}
static void alg_check(void) { alive(); }
REFUSED(alg)
