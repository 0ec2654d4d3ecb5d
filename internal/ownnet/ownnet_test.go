package ownnet

import (
	"fmt"
	"net"
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if err := EnterIfRoot(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func TestNothingButLoopbackIsThere(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root: it makes a network namespace")
		}
		t.Skip("needs root: it makes a network namespace")
	}
	devices, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, device := range devices {
		if device.Flags&net.FlagLoopback == 0 && device.Flags&net.FlagUp != 0 {
			t.Errorf("the device %s is here and up", device.Name)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("the loopback device is not up: %v", err)
	}
	defer listener.Close()
	connection, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatalf("the loopback device is not up: %v", err)
	}
	connection.Close()
	if os.Getenv(entered) != "" {
		t.Errorf("children find %s in their environment, and would stay where they are", entered)
	}
}
