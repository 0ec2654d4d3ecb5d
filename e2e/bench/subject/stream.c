/* stream receive PORT SECONDS | stream send HOST PORT
 *
 * How fast one TCP connection is. The receiver takes what comes on one connection and prints the bytes per second of
 * SECONDS seconds, after one second in which the connection finds its pace. The sender sends until the receiver has
 * had enough; it waits for a receiver that is not there yet. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netdb.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 20];

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int receive(int port, double seconds)
{
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
	int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), from;
	double began, begin = 0, end;
	long long bytes = 0;
	ssize_t n;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 1) || (from = accept(listener, NULL, NULL)) < 0) {
		perror("stream receive");
		return 1;
	}
	began = now();
	do {
		if ((n = read(from, buffer, sizeof buffer)) <= 0) {
			fprintf(stderr, "the sender has ended\n");
			return 1;
		}
		end = now();
		if (begin)
			bytes += n;
		else if (end > began + 1)
			begin = end;
	} while (!begin || end < begin + seconds);
	printf("%.0f\n", bytes / (end - begin));
	return 0;
}

static int connected(const char *host, const char *port)
{
	struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *to;
	int fd;

	for (;;) {
		if (!getaddrinfo(host, port, &hints, &to)) {
			fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
			if (!connect(fd, to->ai_addr, to->ai_addrlen))
				return fd;
			close(fd);
			freeaddrinfo(to);
		}
		usleep(20000);
	}
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "receive"))
		return receive(atoi(argv[2]), atof(argv[3]));
	if (argc != 4 || strcmp(argv[1], "send")) {
		fprintf(stderr, "usage: stream receive PORT SECONDS | stream send HOST PORT\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	for (int fd = connected(argv[2], argv[3]); write(fd, buffer, sizeof buffer) > 0;)
		;
	return 0;
}
