/*
 * The process that setup/probe.sh checkpoints to find out whether a CRIU works
 * on this kernel. It has what a plain job of Dormouse has and what broken CRIUs
 * trip over: a listening TCP socket and an established TCP connection.
 *
 * usage: probe PORT WORD
 *
 * It brings up the loopback device (it is started in a network namespace of its
 * own), listens on 127.0.0.1:PORT, connects to itself, goes to the background
 * and prints its pid. Every caller of the port is sent "WORD N", where N counts
 * the callers; both travel through the connection to itself first, so an answer
 * proves that memory, the listening socket and the connection are all alive.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static void loopback_up(void)
{
	struct ifreq ifr = {.ifr_name = "lo"};
	int s = socket(AF_INET, SOCK_DGRAM, 0);

	if (s < 0 || ioctl(s, SIOCGIFFLAGS, &ifr) < 0)
		err(1, "read the flags of lo");
	ifr.ifr_flags |= IFF_UP;
	if (ioctl(s, SIOCSIFFLAGS, &ifr) < 0)
		err(1, "bring lo up");
	close(s);
}

int main(int argc, char **argv)
{
	struct sockaddr_in addr = {.sin_family = AF_INET};
	int one = 1, listener, out, in, null, count = 0;
	char word[64], line[128];
	pid_t pid;

	if (argc != 3)
		errx(2, "usage: probe PORT WORD");
	addr.sin_port = htons(atoi(argv[1]));
	addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	snprintf(word, sizeof word, "%s", argv[2]);

	/* What the callers left open is not ours to save. */
	close_range(3, ~0U, 0);
	loopback_up();
	listener = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&addr, sizeof addr) < 0 || listen(listener, 8) < 0)
		err(1, "listen on port %s", argv[1]);
	out = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(out, (struct sockaddr *)&addr, sizeof addr) < 0)
		err(1, "connect to port %s", argv[1]);
	in = accept(listener, NULL, NULL);
	if (in < 0)
		err(1, "accept");

	pid = fork();
	if (pid < 0)
		err(1, "fork");
	if (pid > 0) {
		printf("%d\n", pid);
		return 0;
	}

	setsid();
	signal(SIGPIPE, SIG_IGN);
	null = open("/dev/null", O_RDWR);
	dup2(null, 0);
	dup2(null, 1);
	dup2(null, 2);
	if (null > 2)
		close(null);

	for (;;) {
		int caller = accept(listener, NULL, NULL);
		int n;

		if (caller < 0)
			continue;
		n = snprintf(line, sizeof line, "%s %d\n", word, ++count);
		if (write(out, line, n) != n || recv(in, line, n, MSG_WAITALL) != n)
			return 1;
		if (write(caller, line, n) != n)
			return 1;
		close(caller);
	}
}
