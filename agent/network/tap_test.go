package network

import "golang.org/x/sys/unix"

// tap opens a packet(7) socket on the underlay, and returns what reads all that
// it has seen so far.
func (f *fabric) tap() func() []byte {
	f.t.Helper()
	underlay, err := f.links.links.LinkByName("underlay")
	if err != nil {
		f.t.Fatal(err)
	}
	if err := f.links.links.SetPromiscOn(underlay); err != nil {
		f.t.Fatal(err)
	}
	const everything = uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00) // network byte order
	var fd int
	err = within(f.ns, func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(everything))
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: everything, Ifindex: underlay.Attrs().Index})
	})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { unix.Close(fd) })
	return func() []byte {
		var all []byte
		packet := make([]byte, 1<<16)
		for {
			n, err := unix.Read(fd, packet)
			if err != nil || n <= 0 {
				return all
			}
			all = append(all, packet[:n]...)
		}
	}
}
