/* Passes a token round all ranks, and sums their numbers, as often as argv[1]
   says; argv[2] is a pause between rounds, in ms. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int rank, size, length, rounds = argc > 1 ? atoi(argv[1]) : 1;
	int pause = argc > 2 ? atoi(argv[2]) : 0;
	char name[MPI_MAX_PROCESSOR_NAME] = "", *names;
	long sum = 0;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &size);
	MPI_Get_processor_name(name, &length);
	names = calloc(size, sizeof name);
	MPI_Gather(name, sizeof name, MPI_CHAR, names, sizeof name, MPI_CHAR, 0, MPI_COMM_WORLD);
	if (rank == 0) {
		printf("%d ranks on", size);
		for (int i = 0; i < size; i++)
			printf(" %s", names + i * sizeof name);
		printf("\n");
		fflush(stdout);
	}
	for (int round = 0; round < rounds; round++) {
		static char token[1 << 16];
		long mine = rank, all;
		MPI_Status status;

		memset(token, round, sizeof token);
		if (size > 1)
			MPI_Sendrecv_replace(token, sizeof token, MPI_CHAR, (rank + 1) % size, 0,
					     (rank + size - 1) % size, 0, MPI_COMM_WORLD, &status);
		if (token[sizeof token - 1] != (char)round)
			MPI_Abort(MPI_COMM_WORLD, 1);
		MPI_Allreduce(&mine, &all, 1, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
		sum += all;
		if (rank == 0 && pause) {
			printf("round %d\n", round);
			fflush(stdout);
		}
		usleep(pause * 1000);
	}
	if (rank == 0)
		printf("sum %ld\n", sum);
	MPI_Finalize();
	return 0;
}
