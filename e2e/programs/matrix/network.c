/* Sockets of the internet, netlink and packet families. All talk over the loopback device. */
#include "matrix.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <netinet/tcp.h>

static int listener, client, server;
static struct sockaddr_in loopback = { .sin_family = AF_INET };
static struct sockaddr_in6 loopback6 = { .sin6_family = AF_INET6 };

/* listening binds a socket of the given protocol to a free port and puts its address into loopback. */
static int listening(int protocol, int backlog)
{
	socklen_t size = sizeof loopback;
	int fd = socket(AF_INET, SOCK_STREAM, protocol);

	if (fd < 0)
		unavailable("socket");
	loopback.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	loopback.sin_port = 0;
	must(bind(fd, (void *)&loopback, sizeof loopback), "bind");
	must(listen(fd, backlog), "listen");
	must(getsockname(fd, (void *)&loopback, &size), "getsockname");
	return fd;
}

static int connected(void)
{
	int fd = must(socket(AF_INET, SOCK_STREAM, 0), "socket");

	must(connect(fd, (void *)&loopback, sizeof loopback), "connect");
	return fd;
}

static void connection(void)
{
	listener = listening(0, 16);
	client = connected();
	server = must(accept(listener, NULL, NULL), "accept");
}

/* passes sends a few bytes one way and tells whether they came out at the other end. */
static int passes(int from, int to)
{
	char sent[16], got[16] = "";
	int n = snprintf(sent, sizeof sent, "t%ld", tick);

	if (send(from, sent, n, MSG_NOSIGNAL) != n || !readable(to))
		return 0;
	return recv(to, got, sizeof got, 0) == n && memcmp(sent, got, n) == 0;
}

static void tcp_setup(void) { connection(); }
static void tcp_check(void)
{
	expect(passes(client, server), "connection, there");
	expect(passes(server, client), "connection, back");
}
CARRIED(tcp)

static void tcp_listen_setup(void) { listener = listening(0, 16); }
static void tcp_listen_check(void)
{
	client = socket(AF_INET, SOCK_STREAM, 0);
	expect(connect(client, (void *)&loopback, sizeof loopback) == 0, "connect to the listener");
	expect(readable(listener), "listener does not become readable");
	server = accept(listener, NULL, NULL);
	expect(server >= 0 && passes(client, server), "a new connection");
	close(client);
	close(server);
}
CARRIED(tcp_listen)

static void tcp6_setup(void)
{
	socklen_t size = sizeof loopback6;

	listener = socket(AF_INET6, SOCK_STREAM, 0);
	if (listener < 0)
		unavailable("socket AF_INET6");
	loopback6.sin6_addr = in6addr_loopback;
	if (bind(listener, (void *)&loopback6, size) < 0)
		unavailable("bind to ::1");
	must(listen(listener, 16), "listen");
	must(getsockname(listener, (void *)&loopback6, &size), "getsockname");
	client = must(socket(AF_INET6, SOCK_STREAM, 0), "socket");
	must(connect(client, (void *)&loopback6, size), "connect");
	server = must(accept(listener, NULL, NULL), "accept");
}
static void tcp6_check(void) { tcp_check(); }
CARRIED(tcp6)

/* Bytes that arrived but were not read yet belong to the connection. */
static char bulk[100000];

static void tcp_unread_setup(void)
{
	connection();
	fill(bulk, sizeof bulk, 9);
	must(send(client, bulk, sizeof bulk, 0), "send");
}

static void tcp_unread_check(void)
{
	static char got[sizeof bulk];
	ssize_t n = recv(server, got, sizeof got, MSG_PEEK | MSG_WAITALL);

	if (n != sizeof bulk)
		broken("of %zu unread bytes %zd are left", sizeof bulk, n);
	expect(same(got, sizeof got, 9), "unread bytes");
	expect(passes(server, client), "connection, back");
}
CARRIED(tcp_unread)

static void tcp_halfclosed_setup(void)
{
	char byte;

	connection();
	must(shutdown(client, SHUT_WR), "shutdown");
	must(recv(server, &byte, 1, 0) == 0 ? 0 : -1, "end of the stream");
}

static void tcp_halfclosed_check(void)
{
	char byte;

	expect(recv(server, &byte, 1, MSG_DONTWAIT) == 0, "the closed direction");
	expect(passes(server, client), "the open direction");
}
CARRIED(tcp_halfclosed)

/* A listener that ignores what comes from near keeps the client waiting for an answer. CRIU does not carry that option
 * of the listener, so that after a restore the connection may come about. */
static void tcp_synsent_setup(void)
{
	int far = 255;

	listener = listening(0, 16);
	must(setsockopt(listener, IPPROTO_IP, IP_MINTTL, &far, sizeof far), "IP_MINTTL");
	client = must(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), "socket");
	server = -1;
	if (connect(client, (void *)&loopback, sizeof loopback) == 0 || errno != EINPROGRESS)
		must(-1, "connect");
}

static void tcp_synsent_check(void)
{
	struct tcp_info info;
	socklen_t size = sizeof info;
	struct pollfd waiting = { .fd = listener, .events = POLLIN };

	expect(getsockopt(client, SOL_TCP, TCP_INFO, &info, &size) == 0, "TCP_INFO");
	if (server < 0 && poll(&waiting, 1, 0) == 1)
		server = accept(listener, NULL, NULL);
	expect(info.tcpi_state == TCP_SYN_SENT || info.tcpi_state == TCP_ESTABLISHED, "the socket neither waits to be connected nor is");
	if (server >= 0)
		expect(passes(client, server), "the connection that came about");
}
CARRIED(tcp_synsent)

static int udp(struct sockaddr_in *address)
{
	socklen_t size = sizeof *address;
	int fd = must(socket(AF_INET, SOCK_DGRAM, 0), "socket");

	*address = loopback;
	address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	address->sin_port = 0;
	must(bind(fd, (void *)address, size), "bind");
	must(getsockname(fd, (void *)address, &size), "getsockname");
	return fd;
}

static struct sockaddr_in a_address, b_address;

static void udp_setup(void)
{
	server = udp(&a_address);
	client = udp(&b_address);
	must(connect(client, (void *)&a_address, sizeof a_address), "connect");
	must(connect(server, (void *)&b_address, sizeof b_address), "connect");
}
static void udp_check(void) { tcp_check(); }
LOSSY(udp, "")

/* UDP may lose: what must survive is the socket; a queued datagram is either still whole or gone. */
static void udp_queued_setup(void)
{
	udp_setup();
	must(send(client, "queued", 6, 0), "send");
}

static void udp_queued_check(void)
{
	char got[16];
	ssize_t n = recv(server, got, sizeof got, MSG_PEEK | MSG_DONTWAIT);

	expect((n == 6 && memcmp(got, "queued", 6) == 0) || (n < 0 && errno == EAGAIN), "queued datagram");
	expect(passes(server, client), "datagrams, back");
}
CARRIED(udp_queued)

static void icmp_setup(void)
{
	client = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
	if (client < 0)
		unavailable("raw socket");
}

static uint16_t checksum(const uint16_t *words, int n)
{
	uint32_t sum = 0;

	while (n--)
		sum += *words++;
	sum = (sum >> 16) + (sum & 0xffff);
	return ~(sum + (sum >> 16));
}

static void icmp_check(void)
{
	struct icmphdr echo = { .type = ICMP_ECHO, .un.echo = { .id = htons(77), .sequence = htons(tick & 0x7fff) } };
	struct { struct iphdr ip; struct icmphdr icmp; } packet;

	loopback.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	echo.checksum = checksum((void *)&echo, sizeof echo / 2);
	expect(sendto(client, &echo, sizeof echo, 0, (void *)&loopback, sizeof loopback) == sizeof echo, "send an echo request");
	do
		expect(readable(client) && recv(client, &packet, sizeof packet, 0) > 0, "echo reply");
	while (packet.icmp.type != ICMP_ECHOREPLY || packet.icmp.un.echo.sequence != echo.un.echo.sequence);
}
LOSSY(icmp, "")

static void packet_setup(void)
{
	struct sockaddr_ll address = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP), .sll_ifindex = if_nametoindex("lo") };

	udp_setup();
	listener = socket(AF_PACKET, SOCK_DGRAM, 0);
	if (listener < 0)
		unavailable("packet socket");
	must(bind(listener, (void *)&address, sizeof address), "bind");
}

static void packet_check(void)
{
	char frame[2048];

	udp_check();
	expect(readable(listener), "packet socket is silent");
	while (recv(listener, frame, sizeof frame, MSG_DONTWAIT) > 0)
		;
}
LOSSY(packet, "")

static void netlink_setup(void)
{
	client = must(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), "netlink socket");
}

static void netlink_check(void)
{
	struct { struct nlmsghdr head; struct ifinfomsg info; } ask = {
		{ sizeof ask, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, tick, 0 }, { .ifi_family = AF_UNSPEC } };
	char answer[32768] __attribute__((aligned(8)));
	struct nlmsghdr *head = (void *)answer;
	int links = 0;

	expect(send(client, &ask, sizeof ask, 0) == sizeof ask, "ask netlink");
	do {
		expect(readable(client), "netlink is silent");
		ssize_t n = recv(client, answer, sizeof answer, 0);

		for (head = (void *)answer; NLMSG_OK(head, n) && head->nlmsg_type != NLMSG_DONE; head = NLMSG_NEXT(head, n))
			links += head->nlmsg_type == RTM_NEWLINK;
	} while (head->nlmsg_type != NLMSG_DONE);
	expect(links > 0, "netlink names no device");
}
CARRIED(netlink)

/* CRIU cannot carry a multipath listener; where the sandbox's network has no multipath the program falls back. */
static void mptcp_setup(void) { listener = listening(IPPROTO_MPTCP, 16); }
static void mptcp_check(void) { tcp_listen_check(); }
REFUSED(mptcp)

/* A connection that is established but not accepted, for ever. */
static void backlog_setup(void)
{
	listener = listening(0, 16);
	client = connected();
}
static void backlog_check(void) { expect(readable(listener), "the waiting connection"); }
REFUSED(backlog)

/* The same for short: now and then a connection waits to be accepted, so that another try helps. */
static void backlog_short_setup(void) { listener = listening(0, 16); }
static void backlog_short_check(void)
{
	struct timespec while_waiting = { .tv_nsec = 15 * 1000 * 1000 };

	client = connected();
	nanosleep(&while_waiting, NULL);
	expect(readable(listener), "the waiting connection");
	server = accept(listener, NULL, NULL);
	expect(server >= 0 && passes(client, server), "the accepted connection");
	close(client);
	close(server);
}
CARRIED(backlog_short)
