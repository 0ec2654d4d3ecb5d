package agent

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"dormouse/agent/criu"
	"dormouse/agent/network"
	"dormouse/api/agentpb"
)

// streams is a job of two tasks with a connection of each kind between them. Told
// once, they connect and fill the queues of both directions, while nobody reads, and
// say so when nothing gets through any more; told again, they tell of their sockets.
// Told the next two times, they do both again. Then they go on to send, close their
// direction and read to the end. Every 16 bytes of a stream are its name and their
// number, so that none can be lost, repeated or exchanged unnoticed.
const streams = `
use strict;
use IO::Socket::INET;
use IO::Select;
use Socket;
$| = 1;
my $told = 0;
$SIG{USR1} = sub { $told++ };
$SIG{PIPE} = 'IGNORE';
sub await { select undef, undef, undef, 0.02 while $told < $_[0] }

# Socket options by name: level and number.
my %option = (
	rcvbuf => [1, 8], sndbuf => [1, 7], keepalive => [1, 9], oobinline => [1, 10], priority => [1, 12], rcvlowat => [1, 18], buf_lock => [1, 72],
	nodelay => [6, 1], maxseg => [6, 2], cork => [6, 3], keepidle => [6, 4], keepintvl => [6, 5], keepcnt => [6, 6],
	user_timeout => [6, 18], tos => [0, 1], ttl => [0, 2],
);
my %kind = (
	plain => {},
	tuned => {nodelay => 1, keepalive => 1, keepidle => 33, keepintvl => 7, keepcnt => 5, user_timeout => 54321},
	corked => {cork => 1, oobinline => 1},
	small => {rcvbuf => 6000, sndbuf => 7000},
	large => {rcvbuf => 200000, sndbuf => 190000, nodelay => 1},
	marked => {priority => 4, tos => 16, ttl => 33},
);
my @kinds = sort keys %kind;
my (%listener, %c);
sub tune {
	my ($s, $kind) = @_;
	while (my ($name, $value) = each %{$kind{$kind}}) {
		setsockopt $s, $option{$name}[0], $option{$name}[1], pack('i', $value) or die "$name: $!";
	}
}
sub report {
	my ($when, $kind, $s) = @_;
	my %have;
	$have{$_} = unpack 'i', getsockopt($s, $option{$_}[0], $option{$_}[1]) for keys %option;
	my $info = getsockopt $s, 6, 11; # struct tcp_info of linux/tcp.h
	@have{qw(state options wscale)} = (unpack 'C8', $info)[0, 5, 6];
	@have{qw(snd_mss pmtu)} = (unpack 'L*', substr $info, 8)[2, 13];
	@have{qw(snd_wnd rcv_wnd)} = unpack 'LL', substr $info, 228, 8;
	$have{clock} = unpack 'L', getsockopt($s, 6, 24); # TCP_TIMESTAMP
	my $in = pack('i', 0);
	ioctl $s, 0x541B, $in or die $!;
	@have{qw(inq outq)} = (unpack('i', $in), outq($s));
	print join(' ', $when, $kind, map { "$_=$have{$_}" } sort keys %have), "\n";
}
sub outq {
	my $out = pack('i', 0);
	ioctl $_[0], 0x5411, $out or die $!;
	return unpack('i', $out);
}
# still waits until nothing has got through to the other for half a second.
sub still {
	my ($before, $rounds) = ('', 0);
	while ($rounds < 25) {
		my $now = join ' ', map { outq($c{$_}) } @kinds;
		$rounds = $now eq $before ? $rounds + 1 : 0;
		$before = $now;
		select undef, undef, undef, 0.02;
	}
}
sub piece {
	my ($name, $from, $length) = @_;
	my $first = int($from / 16);
	my $blocks = join '', map { sprintf "%7s%08x\n", $name, $_ } $first .. int(($from + $length - 1) / 16);
	return substr $blocks, $from - 16 * $first, $length;
}

my ($me, $other) = $ENV{DORMOUSE_TASK} == 0 ? (0, 1) : (1, 0);
if ($me) {
	for my $i (0 .. $#kinds) {
		socket my $s, AF_INET, SOCK_STREAM, 0 or die $!;
		tune($s, $kinds[$i]);
		bind $s, pack_sockaddr_in(5000 + $i, INADDR_ANY) or die $!;
		listen $s, 1 or die $!;
		$listener{$kinds[$i]} = $s;
	}
}
print "ready\n";
await(1);
for my $i (0 .. $#kinds) {
	my $kind = $kinds[$i];
	my $s;
	if ($me) {
		accept $s, $listener{$kind} or die $!;
	} else {
		my $to = pack_sockaddr_in(5000 + $i, inet_aton('task-1'));
		socket $s, AF_INET, SOCK_STREAM, 0 or die $!;
		tune($s, $kind);
		connect $s, $to or die "connect: $!";
	}
	$c{$kind} = $s;
	$s->blocking(0);
}
my (%sent, %got);
my $quiet = 0;
while ($quiet < 25) {
	$quiet++;
	for my $kind (@kinds) {
		$sent{$kind} += 0;
		my $n = syswrite $c{$kind}, piece("$me$kind", $sent{$kind}, 30000);
		if ($n) { $sent{$kind} += $n; $quiet = 0 }
	}
	select undef, undef, undef, 0.02;
}
still();
print "quiet\n";
await(2);
report('before', $_, $c{$_}) for @kinds;
print "full $_ $sent{$_}\n" for @kinds;
print "waiting\n";
await(3);
still();
print "still\n";
await(4);
report('after', $_, $c{$_}) for @kinds;
print "compared\n";
await(5);
my %target = map { $_ => $sent{$_} + 100003 } @kinds;
my %open = map { $_ => 1 } @kinds;
while (%open || grep { $sent{$_} < $target{$_} } @kinds) {
	my $reading = IO::Select->new(map { $c{$_} } keys %open);
	my $writing = IO::Select->new(map { $c{$_} } grep { $sent{$_} < $target{$_} } @kinds);
	IO::Select->select($reading, $writing, undef, 1);
	for my $kind (@kinds) {
		if ($sent{$kind} < $target{$kind}) {
			my $length = $target{$kind} - $sent{$kind};
			my $n = syswrite $c{$kind}, piece("$me$kind", $sent{$kind}, $length < 30000 ? $length : 30000);
			$sent{$kind} += $n if $n;
			die "send on $kind: $!" if !defined $n && !$!{EAGAIN};
			shutdown $c{$kind}, 1 if $sent{$kind} == $target{$kind};
		}
		next unless $open{$kind};
		my $n = sysread $c{$kind}, my $data, 1 << 16;
		die "receive on $kind: $!" if !defined $n && !$!{EAGAIN};
		next unless defined $n;
		$got{$kind} += $n;
		delete $open{$kind} unless $n;
		die "wrong bytes of $kind before $got{$kind}" if $n && $data ne piece("$other$kind", $got{$kind} - $n, $n);
	}
}
print "sent $_ $sent{$_}\n", "got $_ $got{$_}\n" for @kinds;
print "done\n";
sleep 1000;
`

// told are the words of a task's lines "WHEN KIND WORD...".
func told(log, when string) map[string]string {
	lines := map[string]string{}
	for line := range strings.Lines(log) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), when+" "); ok {
			kind, words, _ := strings.Cut(rest, " ")
			lines[kind] = words
		}
	}
	return lines
}

// values are those of "NAME=VALUE NAME=VALUE ...".
func values(t *testing.T, words string) map[string]int {
	t.Helper()
	m := map[string]int{}
	for word := range strings.FieldsSeq(words) {
		name, text, _ := strings.Cut(word, "=")
		value, err := strconv.Atoi(text)
		must(t, err)
		m[name] = value
	}
	return m
}

// sniffer reads all packets of a network namespace's devices, also of those that come
// later (packet(7)).
type sniffer struct {
	fd      int
	name    string
	stopped chan struct{}
	reader  sync.WaitGroup
	packets int      // of IPv4, seen
	tcp     int      // segments of these
	resets  []string // of these
}

func sniff(t *testing.T, netns *os.File, name string) *sniffer {
	t.Helper()
	const everything = uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00) // network byte order
	s := &sniffer{name: name, stopped: make(chan struct{})}
	must(t, inNamespace(netns, func() (err error) {
		s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(everything))
		return err
	}))
	must(t, unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
	must(t, unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}))
	s.reader.Go(s.read)
	t.Cleanup(s.stop)
	return s
}

func (s *sniffer) read() {
	packet := make([]byte, 1<<16)
	for {
		n, from, err := unix.Recvfrom(s.fd, packet, unix.MSG_TRUNC)
		if err == nil {
			s.look(packet[:min(n, len(packet))], from)
			continue
		}
		select { // nothing is there any more
		case <-s.stopped:
			return
		default:
		}
	}
}

// look takes an IPv4 packet apart: RFC 791, RFC 9293.
func (s *sniffer) look(p []byte, from unix.Sockaddr) {
	if len(p) < 20 || p[0]>>4 != 4 {
		return
	}
	s.packets++
	if p[9] != unix.IPPROTO_TCP {
		return
	}
	header := int(p[0]&15) * 4
	if len(p) < header+20 {
		return
	}
	segment := p[header:]
	s.tcp++
	const rst = 4
	if segment[13]&rst == 0 {
		return
	}
	device := 0
	if link, ok := from.(*unix.SockaddrLinklayer); ok {
		device = link.Ifindex
	}
	s.resets = append(s.resets, fmt.Sprintf("device %d: %d.%d.%d.%d:%d to %d.%d.%d.%d:%d", device,
		p[12], p[13], p[14], p[15], binary.BigEndian.Uint16(segment), p[16], p[17], p[18], p[19], binary.BigEndian.Uint16(segment[2:])))
}

func (s *sniffer) stop() {
	select {
	case <-s.stopped:
		return
	default:
	}
	close(s.stopped)
	s.reader.Wait()
}

// expectNoResets ends the sniffer and judges what it saw.
func (s *sniffer) expectNoResets(t *testing.T) {
	t.Helper()
	s.stop()
	stats, err := unix.GetsockoptTpacketStats(s.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	must(t, err)
	must(t, unix.Close(s.fd))
	if s.packets == 0 || stats.Drops > 0 {
		t.Errorf("%s: %d packets were seen and %d missed: that proves nothing", s.name, s.packets, stats.Drops)
	}
	if len(s.resets) > 0 {
		t.Errorf("%s: of %d segments %d were resets: %q", s.name, s.tcp, len(s.resets), s.resets[:min(len(s.resets), 10)])
	}
	t.Logf("%s: %d packets, of these %d segments of TCP, of these %d resets", s.name, s.packets, s.tcp, len(s.resets))
}

// sniffRouters listens to the routers of the job's network in this run: all that
// its tasks send or get on their veths, and what goes through the tunnel.
func (p *pair) sniffRouters() (list []*sniffer) {
	p.t.Helper()
	for _, n := range p.nodes {
		key := network.Key{Job: "j-pair", Run: p.run}
		pids, err := criu.CgroupPIDs(filepath.Join(cgroup2(), "dormouse-"+filepath.Base(n.c.dir), n.name, "networks", key.String()))
		must(p.t, err)
		if len(pids) == 0 {
			p.t.Fatalf("nobody holds the network of run %d on %s", p.run, n.name)
		}
		router, err := network.OfProcess(pids[0])
		must(p.t, err)
		defer router.Close()
		list = append(list, sniff(p.t, router, fmt.Sprintf("router of run %d on %s", p.run, n.name)))
	}
	return list
}

// tell sends the signal that both tasks wait for.
func (p *pair) tell() {
	p.t.Helper()
	p.both(func(int) any { return &agentpb.SignalTask{Signal: int32(syscall.SIGUSR1)} })
}

func (p *pair) awaitBoth(what string) {
	p.t.Helper()
	for task := range addresses {
		p.awaitLog(p.node(task), p.ref(task), what, says(what))
	}
}

// TestConnectionsComeBackAsTheyWereAndNoResetIsSent takes a checkpoint after which
// the job goes on, and one after which it is destroyed cut off, with all queues full,
// as a suspension does. The kernel answers the end of such sockets with resets; and
// data for sockets that are not there yet as well.
func TestConnectionsComeBackAsTheyWereAndNoResetIsSent(t *testing.T) {
	for _, c := range []struct {
		name    string
		options bool
		sysctls map[string]string // of the tasks' first namespaces: the connections are to keep what came of them
	}{
		{"timestamps, window scaling, selective acknowledgements", true, nil},
		{"none of them", false, map[string]string{"tcp_timestamps": "0", "tcp_window_scaling": "0", "tcp_sack": "0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, "vxlan", "/usr/bin/perl", "-e", streams)
			p.start()
			p.awaitBoth("ready")
			p.inTasks(func(_ int, netns *os.File) {
				for name, value := range c.sysctls {
					must(t, inNamespace(netns, func() error { return os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0) }))
				}
			})
			p.tell()
			p.awaitBoth("quiet")
			p.tell()
			p.awaitBoth("waiting")

			sniffers := p.sniffRouters()
			p.inTasks(func(task int, netns *os.File) {
				sniffers = append(sniffers, sniff(t, netns, fmt.Sprintf("task %d", task)))
			})
			p.greet()
			p.capture("c-goes-on")
			p.goOn("c-goes-on")
			p.store("c-goes-on")
			p.capture("c-ends")
			p.store("c-ends")
			p.destroy()
			p.run++
			p.at[0], p.at[1] = p.at[1], p.at[0]
			p.connect()
			sniffers = append(sniffers, p.sniffRouters()...)
			p.both(func(task int) any { return p.restoreCommand("c-ends", task) })
			p.open("c-ends")
			p.release("c-ends")
			p.tell()
			p.awaitBoth("still")
			p.tell()
			p.awaitBoth("compared")
			p.tell()
			p.awaitBoth("done")
			for _, s := range sniffers {
				s.expectNoResets(t)
			}

			logs := [2]string{p.log(0), p.log(1)}
			for task := range logs {
				compareStreams(t, logs[task], logs[1-task])
				compareSockets(t, logs[task])
			}
			compareQueues(t, logs)
			if got := values(t, told(logs[0], "before")["plain"]); (got["wscale"] != 0) != c.options || (got["options"] != 0) != c.options {
				t.Errorf("the connections were made with options=%d wscale=%d, which is not what is to be tested", got["options"], got["wscale"])
			}
		})
	}
}

// greet sends one datagram from one task to the other, past everything that listens:
// connections whose windows are closed may say nothing for seconds.
func (p *pair) greet() {
	p.t.Helper()
	p.inTasks(func(task int, netns *os.File) {
		must(p.t, inNamespace(netns, func() error {
			c, err := net.Dial("udp4", net.JoinHostPort(addresses[1-task], "9"))
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("hello"))
			return err
		}))
	})
}

// inTasks does something in the network namespace of each task.
func (p *pair) inTasks(do func(task int, netns *os.File)) {
	p.t.Helper()
	for task, state := range p.started {
		netns, err := network.OfProcess(int(state.GetPid()))
		must(p.t, err)
		do(task, netns)
		must(p.t, netns.Close())
	}
}

// compareStreams expects that all that one task has sent has come to the other. That
// the bytes are the right ones the receiver has seen to.
func compareStreams(t *testing.T, from, to string) {
	t.Helper()
	sent, got := told(from, "sent"), told(to, "got")
	if len(sent) == 0 || !maps.Equal(sent, got) {
		t.Errorf("sent were %v bytes, %v came", sent, got)
	}
}

// compareSockets expects that no socket knows of its restore, but for what the
// documentation names.
func compareSockets(t *testing.T, log string) {
	t.Helper()
	before, after := told(log, "before"), told(log, "after")
	if len(before) == 0 || len(before) != len(after) {
		t.Fatalf("%d sockets were told of before and %d after", len(before), len(after))
	}
	for _, kind := range slices.Sorted(maps.Keys(before)) {
		was, is := values(t, before[kind]), values(t, after[kind])
		for name := range was {
			if !asBefore(name, was, is) {
				t.Errorf("%s: %s was %d and is %d", kind, name, was[name], is[name])
			}
		}
	}
}

func asBefore(name string, was, is map[string]int) bool {
	const timestamps, scaled = 1, 4 // TCPI_OPT_TIMESTAMPS, TCPI_OPT_WSCALE
	const sndbufLocked = 1          // SOCK_SNDBUF_LOCK
	switch name {
	case "clock": // in ms; it goes on, modulo 2^32, and does not jump
		passed := uint32(is[name]) - uint32(was[name])
		return passed > 0 && passed < 10*60*1000
	case "inq", "outq": // see compareQueues
		return true
	case "user_timeout":
		return is[name] == 0
	case "snd_wnd", "rcv_wnd": // of what is free: the restored queue is packed more tightly
		return is[name] >= was[name]
	case "sndbuf":
		return is[name] == was[name] || was["buf_lock"]&sndbufLocked == 0 && is[name] > was[name]
	case "options": // no scale has become a scale of 1
		return is[name] == was[name]|scaled
	case "snd_mss", "maxseg": // room for a timestamp is left in any case
		return is[name] == was[name] || was["options"]&timestamps == 0 && is[name] == was[name]-12
	}
	return is[name] == was[name]
}

// compareQueues expects both queues of every stream full before and after, with
// the same bytes: in the sender's until they are acknowledged, and in the receiver's.
// What is on its way is in both.
func compareQueues(t *testing.T, logs [2]string) {
	t.Helper()
	for task := range logs {
		for kind, words := range told(logs[task], "full") {
			sent, err := strconv.Atoi(words)
			must(t, err)
			for _, when := range []string{"before", "after"} {
				out := values(t, told(logs[task], when)[kind])["outq"]
				in := values(t, told(logs[1-task], when)[kind])["inq"]
				if out == 0 || in == 0 || out+in < sent || out+in > sent+out {
					t.Errorf("%s, %s: of %d bytes %d are in the sender's queue and %d in the receiver's", kind, when, sent, out, in)
				}
			}
		}
	}
}
