/* Unix sockets, pipes, terminals and shared memory: what processes of one machine talk through. */
#include "matrix.h"
#include <mqueue.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <termios.h>

static int ends[2], id;
static int listener, client, server;
static struct sockaddr_un address = { .sun_family = AF_UNIX };

static const int kinds[] = { SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET };
static int pairs[3][2];

/* Each kind of pair has two messages under way that nobody reads. */
static void unix_pair_setup(void)
{
	for (int i = 0; i < 3; i++) {
		must(socketpair(AF_UNIX, kinds[i], 0, pairs[i]), "socketpair");
		must(send(pairs[i][0], "first", 5, 0), "send");
		must(send(pairs[i][0], "second", 6, 0), "send");
	}
}

static void unix_pair_check(void)
{
	char got[32];

	for (int i = 0; i < 3; i++) {
		ssize_t n = recv(pairs[i][1], got, sizeof got, MSG_PEEK | MSG_DONTWAIT);

		expect(n == (i ? 5 : 11) && memcmp(got, "firstsecond", n) == 0, "message under way in a socket pair");
		expect(send(pairs[i][1], "back", 4, MSG_NOSIGNAL) == 4, "send on a socket pair");
		expect(recv(pairs[i][0], got, sizeof got, 0) == 4 && memcmp(got, "back", 4) == 0, "receive on a socket pair");
	}
}
CARRIED(unix_pair)

static void bound(const char *path)
{
	listener = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
	strcpy(address.sun_path, path);
	must(bind(listener, (void *)&address, sizeof address), "bind");
	must(listen(listener, 8), "listen");
}

static int connected(void)
{
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	expect(connect(fd, (void *)&address, sizeof address) == 0, "connect to a unix socket");
	return fd;
}

static void exchange(int from, int to)
{
	char got[8];

	expect(send(from, "hello", 5, MSG_NOSIGNAL) == 5, "send on a unix socket");
	expect(readable(to) && recv(to, got, sizeof got, 0) == 5 && memcmp(got, "hello", 5) == 0, "receive on a unix socket");
}

static void unix_named_setup(void)
{
	bound("named.sock");
	client = connected();
	server = must(accept(listener, NULL, NULL), "accept");
}

static void unix_named_check(void)
{
	int fresh = connected(), accepted = -1;

	expect(readable(listener) && (accepted = accept(listener, NULL, NULL)) >= 0, "accept on a named unix socket");
	exchange(fresh, accepted);
	exchange(client, server);
	exchange(server, client);
	close(fresh);
	close(accepted);
}
CARRIED(unix_named)

static void unix_abstract_setup(void)
{
	listener = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
	memcpy(address.sun_path, "\0matrix", 7);
	must(bind(listener, (void *)&address, sizeof address), "bind");
	must(listen(listener, 8), "listen");
	client = connected();
	server = must(accept(listener, NULL, NULL), "accept");
}
static void unix_abstract_check(void) { unix_named_check(); }
CARRIED(unix_abstract)

/* A descriptor that was sent but not received is held by nobody but the socket. */
static void pass(int fd)
{
	char byte = 'f', control[CMSG_SPACE(sizeof fd)] = { 0 };
	struct iovec part = { &byte, 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);

	*head = (struct cmsghdr){ CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS };
	memcpy(CMSG_DATA(head), &fd, sizeof fd);
	expect(sendmsg(client, &message, 0) == 1, "send a descriptor");
	close(fd);
}

static int passed(void)
{
	char byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec part = { &byte, 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	struct cmsghdr *head;
	int fd;

	expect(recvmsg(server, &message, MSG_DONTWAIT) == 1, "receive a descriptor");
	head = CMSG_FIRSTHDR(&message);
	expect(head && head->cmsg_type == SCM_RIGHTS, "the descriptor in flight");
	memcpy(&fd, CMSG_DATA(head), sizeof fd);
	return fd;
}

static void unix_scm_setup(void)
{
	int pair[2];

	must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "socketpair");
	client = pair[0];
	server = pair[1];
	must(pipe(ends), "pipe");
	pass(ends[1]);
}

static void unix_scm_check(void)
{
	int fd = passed();
	char got[8];

	expect(write(fd, "scm", 3) == 3 && read(ends[0], got, 8) == 3, "the pipe behind the descriptor in flight");
	pass(fd);
}
CARRIED(unix_scm)

/* Connections to a socket outside of the job: ARG is its path. */
static void unix_outside_setup(void)
{
	strncpy(address.sun_path, row_arg, sizeof address.sun_path - 1);
	client = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
	must(connect(client, (void *)&address, sizeof address), "connect to the outside");
}
static void unix_outside_check(void) { expect(send(client, "x", 1, MSG_NOSIGNAL) == 1, "the connection to the outside"); }
REFUSED(unix_outside)

static void unix_outside_dgram_setup(void)
{
	strncpy(address.sun_path, row_arg, sizeof address.sun_path - 1);
	client = must(socket(AF_UNIX, SOCK_DGRAM, 0), "socket");
	must(connect(client, (void *)&address, sizeof address), "connect to the outside");
}
static void unix_outside_dgram_check(void) { expect(send(client, "x", 1, MSG_NOSIGNAL | MSG_DONTWAIT) == 1 || errno == EAGAIN, "the socket outside"); }
REFUSED(unix_outside_dgram)

static void pty_setup(void)
{
	struct winsize size = { 33, 111, 0, 0 };
	struct termios mode;

	client = must(posix_openpt(O_RDWR | O_NOCTTY), "posix_openpt");
	must(grantpt(client), "grantpt");
	must(unlockpt(client), "unlockpt");
	server = must(open(ptsname(client), O_RDWR | O_NOCTTY), "open the terminal's slave");
	must(tcgetattr(server, &mode), "tcgetattr");
	mode.c_lflag &= ~(ECHO | ICANON);
	must(tcsetattr(server, TCSANOW, &mode), "tcsetattr");
	must(ioctl(client, TIOCSWINSZ, &size), "TIOCSWINSZ");
}

static void pty_check(void)
{
	struct winsize size;
	struct termios mode;
	char got[16];

	expect(ioctl(server, TIOCGWINSZ, &size) == 0 && size.ws_row == 33 && size.ws_col == 111, "the terminal's size");
	expect(tcgetattr(server, &mode) == 0 && !(mode.c_lflag & (ECHO | ICANON)), "the terminal's mode");
	expect(write(client, "key", 3) == 3 && readable(server) && read(server, got, 16) == 3, "terminal input");
	expect(write(server, "out", 3) == 3 && readable(client) && read(client, got, 16) == 3, "terminal output");
}
CARRIED(pty)

static void fifo_setup(void)
{
	must(mkfifo("fifo", 0600), "mkfifo");
	ends[0] = must(open("fifo", O_RDWR), "open the fifo");
	must(write(ends[0], "kept", 4), "write");
}

static void fifo_check(void)
{
	char got[8];

	expect(readable(ends[0]) && read(ends[0], got, 8) == 4 && memcmp(got, "kept", 4) == 0, "the fifo's content");
	must(write(ends[0], "kept", 4), "write");
}
CARRIED(fifo)

static char bulk[100000];

static void pipe_setup(void)
{
	must(pipe(ends), "pipe");
	must(fcntl(ends[0], F_SETPIPE_SZ, 1 << 17), "F_SETPIPE_SZ");
	fill(bulk, sizeof bulk, 3);
	must(write(ends[1], bulk, sizeof bulk), "write");
}

static void pipe_check(void)
{
	static char got[sizeof bulk];

	expect(fcntl(ends[0], F_GETPIPE_SZ) == 1 << 17, "the pipe's size");
	expect(read(ends[0], got, sizeof got) == sizeof got && same(got, sizeof got, 3), "the pipe's content");
	must(write(ends[1], got, sizeof got), "write");
}
CARRIED(pipe)

static volatile long *counter;

static void count(void)
{
	struct timespec step = { .tv_nsec = 1000000 };

	for (;;) {
		++*counter;
		nanosleep(&step, NULL);
	}
}

/* advances waits until another process has counted on. */
static int advances(void)
{
	long before = *counter;
	struct timespec step = { .tv_nsec = 2000000 };

	for (int i = 0; i < 2000 && *counter == before; i++)
		nanosleep(&step, NULL);
	return *counter > before;
}

static void shared_anon_setup(void)
{
	counter = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	fill((char *)counter + 4096, 4096, 4);
	child(count);
}

static void shared_anon_check(void)
{
	expect(same((char *)counter + 4096, 4096, 4), "shared memory");
	expect(advances(), "memory is no longer shared with the child");
}
CARRIED(shared_anon)

static void sysv_shm_setup(void)
{
	id = must(shmget(0x5353, 1 << 20, IPC_CREAT | IPC_EXCL | 0600), "shmget");
	counter = shmat(id, NULL, 0);
	must(counter == (void *)-1 ? -1 : 0, "shmat");
	fill((char *)counter + 4096, 4096, 4);
	child(count);
}

static void sysv_shm_check(void)
{
	struct shmid_ds state;

	shared_anon_check();
	expect(shmget(0x5353, 0, 0) == id && shmctl(id, IPC_STAT, &state) == 0 && state.shm_nattch == 2, "the segment's id and attachments");
}
CARRIED(sysv_shm)

static void sysv_sem_setup(void)
{
	id = must(semget(0x5454, 2, IPC_CREAT | IPC_EXCL | 0600), "semget");
	must(semctl(id, 1, SETVAL, 5), "SETVAL");
}

static void sysv_sem_check(void)
{
	struct sembuf down = { 1, -1, 0 }, up = { 1, 1, 0 };

	expect(semget(0x5454, 0, 0) == id && semctl(id, 1, GETVAL) == 5, "the semaphore's value");
	expect(semop(id, &down, 1) == 0 && semop(id, &up, 1) == 0, "semop");
}
CARRIED(sysv_sem)

struct letter { long type; char text[8]; };

static void sysv_msg_setup(void)
{
	struct letter letter = { 7, "queued" };

	id = must(msgget(0x5555, IPC_CREAT | IPC_EXCL | 0600), "msgget");
	must(msgsnd(id, &letter, sizeof letter.text, 0), "msgsnd");
}

static void sysv_msg_check(void)
{
	struct letter letter;

	expect(msgget(0x5555, 0) == id, "the queue's id");
	expect(msgrcv(id, &letter, sizeof letter.text, 7, IPC_NOWAIT) == sizeof letter.text && !strcmp(letter.text, "queued"), "the queued message");
	must(msgsnd(id, &letter, sizeof letter.text, 0), "msgsnd");
}
CARRIED(sysv_msg)

static void mqueue_setup(void)
{
	struct mq_attr attr = { .mq_maxmsg = 4, .mq_msgsize = 16 };

	id = mq_open("/matrix", O_CREAT | O_RDWR | O_NONBLOCK, 0600, &attr);
	if (id < 0)
		unavailable("mq_open");
	must(mq_send(id, "post", 4, 0), "mq_send");
}

static void mqueue_check(void)
{
	char got[16];

	expect(mq_receive(id, got, sizeof got, NULL) == 4, "the posted message");
	mq_send(id, "post", 4, 0);
}
REFUSED(mqueue)
