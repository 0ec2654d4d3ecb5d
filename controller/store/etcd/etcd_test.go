package etcd_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"dormouse/controller/store"
	"dormouse/controller/store/etcd"
	"dormouse/controller/store/etcd/etcdtest"
	"dormouse/controller/store/storetest"
)

// place is a range of keys that no other test uses.
type place etcd.Options

func (p place) Open(t *testing.T) store.Store {
	t.Helper()
	return p.open(t)
}

func (p place) open(t *testing.T) *etcd.Store {
	t.Helper()
	s, err := etcd.Open(t.Context(), etcd.Options(p))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

var places atomic.Int64

func newPlace(server *etcdtest.Server) place {
	return place{Endpoints: []string{server.URL}, Prefix: fmt.Sprintf("/test-%d/", places.Add(1))}
}

func TestConformance(t *testing.T) {
	server := etcdtest.Start(t)
	storetest.Run(t, func(*testing.T) storetest.Opener { return newPlace(server) })
}
