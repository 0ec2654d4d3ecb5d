/* ring STEPS EVERY PACE_MS [STOP]
 *
 * Messages of 1 MiB go round a ring of MPI processes, several on every link at any time, also while the processes
 * sleep. Each process checks every word of what arrives, turns it into what it sends on, and keeps a digest of it
 * all; every EVERY messages process 0 prints its digest. At the end all digests are added up. The lines depend on the
 * number of processes and messages only. A word that is not what it should be ends the program with status 3.
 *
 * When the file STOP exists where process 0 runs, all end after the next line. */
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { WORDS = (1 << 20) / 8, DEPTH = 3 };

static int rank, ranks;
static uint64_t in[DEPTH][WORDS], out[DEPTH][WORDS];
static MPI_Request coming[DEPTH], going[DEPTH];

/* Message n that process `from` sends: word i is base + i * odd. */
static uint64_t base(int from, long n) { return ((uint64_t)from << 48) ^ (uint64_t)n * 0x9e3779b97f4a7c15ULL; }

static void send(long n)
{
	uint64_t first = base(rank, n);

	for (int i = 0; i < WORDS; i++)
		out[n % DEPTH][i] = first + (uint64_t)i * 0xd1b54a32d192ed03ULL;
	MPI_Isend(out[n % DEPTH], WORDS, MPI_UINT64_T, (rank + 1) % ranks, 0, MPI_COMM_WORLD, &going[n % DEPTH]);
}

static void receive(long n)
{
	MPI_Irecv(in[n % DEPTH], WORDS, MPI_UINT64_T, (rank + ranks - 1) % ranks, 0, MPI_COMM_WORLD, &coming[n % DEPTH]);
}

static uint64_t check(long n)
{
	int from = (rank + ranks - 1) % ranks;
	uint64_t digest = 0, first = base(from, n);

	for (int i = 0; i < WORDS; i++) {
		uint64_t word = in[n % DEPTH][i], expected = first + (uint64_t)i * 0xd1b54a32d192ed03ULL;

		if (word != expected) {
			fprintf(stderr, "message %ld from %d to %d: word %d is %016llx, expected %016llx\n", n, from, rank, i,
				(unsigned long long)word, (unsigned long long)expected);
			MPI_Abort(MPI_COMM_WORLD, 3);
		}
		digest = ((digest << 5 | digest >> 59) ^ word) * 1099511628211ULL;
	}
	return digest;
}

int main(int argc, char **argv)
{
	uint64_t digest = 0, all;
	int stop = 0;
	long n = 0;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &ranks);
	if (argc < 4) {
		fprintf(stderr, "usage: ring STEPS EVERY PACE_MS [STOP]\n");
		MPI_Abort(MPI_COMM_WORLD, 2);
	}
	long steps = atol(argv[1]), every = atol(argv[2]);
	int pace = atoi(argv[3]);

	for (int i = 0; i < DEPTH; i++) {
		receive(i);
		send(i);
	}
	for (n = 0; n < steps && !stop; n++) {
		MPI_Wait(&coming[n % DEPTH], MPI_STATUS_IGNORE);
		digest = (digest ^ check(n)) * 1099511628211ULL;
		MPI_Wait(&going[n % DEPTH], MPI_STATUS_IGNORE);
		receive(n + DEPTH);
		send(n + DEPTH);
		if ((n + 1) % every == 0) {
			stop = argc > 4 && !access(argv[4], F_OK);
			MPI_Bcast(&stop, 1, MPI_INT, 0, MPI_COMM_WORLD);
			if (rank == 0) {
				printf("message %ld %016llx\n", n + 1, (unsigned long long)digest);
				fflush(stdout);
			}
		}
		usleep(pace * 1000);
	}
	for (int i = 0; i < DEPTH; i++, n++) {
		MPI_Wait(&coming[n % DEPTH], MPI_STATUS_IGNORE);
		MPI_Wait(&going[n % DEPTH], MPI_STATUS_IGNORE);
		digest = (digest ^ check(n)) * 1099511628211ULL;
	}
	MPI_Allreduce(&digest, &all, 1, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD);
	if (rank == 0) {
		printf("end %016llx\n", (unsigned long long)all);
		fflush(stdout);
	}
	MPI_Finalize();
	return 0;
}
