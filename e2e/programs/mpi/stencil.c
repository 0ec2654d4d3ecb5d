/* stencil SIDE STEPS EVERY PACE_MS [STOP]
 *
 * A torus of SIDE x SIDE cells, divided by rows among the MPI processes. In each step every process exchanges its
 * border rows with both neighbours while it computes the inside; every EVERY steps, and at the end, process 0 prints
 * a checksum that all add up. All arithmetic is that of integers modulo 2^64, so the lines depend on SIDE and the
 * number of steps only: not on the number of processes, on MPI, or on anything that happened in between.
 *
 * When the file STOP exists where process 0 runs, all end at the next checksum. SIDE is a multiple of the processes.
 * With STENCIL_TIME in the environment process 0 says on standard error how many seconds all steps took. */
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { UP = 1, DOWN = 2 };

static int rank, ranks, side, rows;

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

/* One row of the next generation, from it and its neighbours. */
static void advance(uint64_t *next, const uint64_t *above, const uint64_t *row, const uint64_t *below)
{
	for (int x = 0; x < side; x++) {
		uint64_t sum = above[x] + below[x] + row[x ? x - 1 : side - 1] + row[x + 1 < side ? x + 1 : 0];

		next[x] = (sum >> 2) + 3 * row[x] + (sum ^ row[x]) % 1021;
	}
}

static uint64_t checksum(const uint64_t *cells)
{
	uint64_t mine = 0, all;

	for (long i = 0; i < (long)rows * side; i++)
		mine += mix(cells[i] + mix((uint64_t)rank * rows * side + i));
	MPI_Allreduce(&mine, &all, 1, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD);
	return all;
}

/* Cells are kept with one row of each neighbour around them: rows + 2 in all. */
static void step(uint64_t *next, uint64_t *now)
{
	int up = (rank + ranks - 1) % ranks, down = (rank + 1) % ranks;
	uint64_t *first = now + side, *last = now + (long)rows * side;
	MPI_Request open[4];
	MPI_Status status[4];

	MPI_Irecv(now, side, MPI_UINT64_T, up, DOWN, MPI_COMM_WORLD, &open[0]);
	MPI_Irecv(last + side, side, MPI_UINT64_T, down, UP, MPI_COMM_WORLD, &open[1]);
	MPI_Isend(first, side, MPI_UINT64_T, up, UP, MPI_COMM_WORLD, &open[2]);
	MPI_Isend(last, side, MPI_UINT64_T, down, DOWN, MPI_COMM_WORLD, &open[3]);
	for (int y = 2; y < rows; y++)
		advance(next + (long)y * side, now + (long)(y - 1) * side, now + (long)y * side, now + (long)(y + 1) * side);
	MPI_Waitall(4, open, status);
	advance(next + side, now, first, first + side);
	if (rows > 1)
		advance(next + (long)rows * side, last - side, last, last + side);
}

int main(int argc, char **argv)
{
	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &ranks);
	if (argc < 5 || atoi(argv[1]) % ranks) {
		fprintf(stderr, "usage: stencil SIDE STEPS EVERY PACE_MS [STOP], SIDE a multiple of the processes\n");
		MPI_Abort(MPI_COMM_WORLD, 2);
	}
	side = atoi(argv[1]);
	rows = side / ranks;
	int steps = atoi(argv[2]), every = atoi(argv[3]), pace = atoi(argv[4]), stop = 0;
	size_t size = (size_t)(rows + 2) * side * sizeof(uint64_t);
	uint64_t *now = calloc(1, size), *next = calloc(1, size);

	if (!now || !next)
		MPI_Abort(MPI_COMM_WORLD, 1);
	for (long i = 0; i < (long)rows * side; i++)
		now[side + i] = mix((uint64_t)rank * rows * side + i + 1) % 1000003;
	MPI_Barrier(MPI_COMM_WORLD);
	double begin = MPI_Wtime();

	for (int n = 1; n <= steps && !stop; n++) {
		step(next, now);
		uint64_t *old = now;
		now = next;
		next = old;
		if (n % every == 0 || n == steps) {
			uint64_t sum = checksum(now + side);

			stop = argc > 5 && !access(argv[5], F_OK);
			MPI_Bcast(&stop, 1, MPI_INT, 0, MPI_COMM_WORLD);
			if (rank == 0) {
				printf("step %d %016llx\n", n, (unsigned long long)sum);
				fflush(stdout);
			}
		}
		if (pace)
			usleep(pace * 1000);
	}
	if (rank == 0 && getenv("STENCIL_TIME"))
		fprintf(stderr, "%.6f\n", MPI_Wtime() - begin);
	if (rank == 0) {
		printf("end\n");
		fflush(stdout);
	}
	free(now);
	free(next);
	MPI_Finalize();
	return 0;
}
