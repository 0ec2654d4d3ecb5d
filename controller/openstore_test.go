package controller

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"dormouse/controller/store"
	"dormouse/controller/store/etcd"
	"dormouse/controller/store/etcd/etcdtest"
)

// secured is an etcd that asks for certificates, and then for users as well.
type secured struct {
	t         *testing.T
	server    *etcdtest.Server
	authority *etcdtest.Authority
	good      StoreConfig
}

func newSecured(t *testing.T) *secured {
	t.Helper()
	s := &secured{t: t, authority: etcdtest.NewAuthority(t)}
	s.server = etcdtest.StartTLS(t, s.authority)
	s.good = StoreConfig{Backend: storeEtcd, Endpoints: []string{s.server.URL}, CA: s.authority.CA, SecretFile: "unused"}
	s.good.Cert, s.good.Key = s.authority.Issue(t, "controller")
	return s
}

// open opens the store as a controller with that configuration does.
func (s *secured) open(t *testing.T, c StoreConfig) (store.Store, error) {
	config := Config{State: t.TempDir(), Listen: "127.0.0.1:0", Name: "c", Store: c}
	if err := config.complete(); err != nil {
		return nil, err
	}
	return OpenStore(t.Context(), config, slog.New(slog.DiscardHandler))
}

// leadsAndFollows uses all that a controller needs of etcd.
func (s *secured) leadsAndFollows(c StoreConfig) {
	s.t.Helper()
	opened, err := s.open(s.t, c)
	if err != nil {
		s.t.Fatal(err)
	}
	defer opened.Close()
	shared := opened.(*etcd.Store)
	term, err := shared.Campaign(s.t.Context(), etcd.Candidate{Name: "c", URL: "https://c"})
	if err != nil {
		s.t.Fatal(err)
	}
	defer term.Close()
	if err := term.Update(s.t.Context(), func(tx store.Tx) error { return tx.Put(store.Jobs, "j", []byte("1")) }); err != nil {
		s.t.Fatal(err)
	}
	err = etcd.Following{Store: shared}.View(s.t.Context(), func(tx store.Tx) error {
		_, err := tx.Get(store.Jobs, "j")
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// refuses checks that a configuration is refused by one sentence with the words.
func (s *secured) refuses(what string, change func(*StoreConfig), words ...string) {
	c := s.good
	change(&c)
	s.t.Run(what, func(t *testing.T) {
		t.Parallel() // some take as long as a store may be away
		opened, err := s.open(t, c)
		if err == nil {
			opened.Close()
			t.Fatal("it was opened")
		}
		for _, word := range words {
			if text := err.Error(); !strings.Contains(text, word) || strings.Contains(text, "\n") || len(text) > 400 {
				t.Errorf("want one sentence with %q, got %q", word, text)
			}
		}
	})
}

func TestEtcdWithCertificates(t *testing.T) {
	s := newSecured(t)
	s.leadsAndFollows(s.good)
	other := etcdtest.NewAuthority(t)
	s.refuses("another authority", func(c *StoreConfig) { c.CA = other.CA }, s.server.URL, "unknown authority", "correct store.ca")
	s.refuses("no authority", func(c *StoreConfig) { c.CA = "" }, s.server.URL, "unknown authority", "correct store.ca")
	s.refuses("no certificate", func(c *StoreConfig) { c.Cert, c.Key = "", "" }, s.server.URL, "certificate", "store.cert")
	s.refuses("a certificate of another authority", func(c *StoreConfig) { c.Cert, c.Key = other.Issue(t, "stranger") }, s.server.URL, "certificate", "store.cert")
	s.refuses("an authority that is none", func(c *StoreConfig) { c.CA = c.Key }, s.good.Key, "holds no PEM certificate", "store.ca")
	s.refuses("no such file", func(c *StoreConfig) { c.CA = "/nowhere/ca.pem" }, "/nowhere/ca.pem", "no such file")
	s.refuses("a certificate without its key", func(c *StoreConfig) { c.Key = "" }, "go together")
	s.refuses("an address without TLS", func(c *StoreConfig) { c.Endpoints = []string{strings.Replace(s.server.URL, "https", "http", 1)} }, "store.ca", "https")
	s.refuses("addresses with and without TLS", func(c *StoreConfig) { c.Endpoints = append([]string{"http://127.0.0.1:1"}, c.Endpoints...) }, "http://127.0.0.1:1", "https")
}

func TestEtcdWithUsers(t *testing.T) {
	s := newSecured(t)
	file := func(password string) string {
		name := filepath.Join(t.TempDir(), "password")
		if err := os.WriteFile(name, []byte(password+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	s.asksForUsers()
	s.refuses("no user", func(*StoreConfig) {}, s.server.URL, "asks for a user", "store.user")
	s.good.User, s.good.PasswordFile = "dormouse", file("right")
	s.leadsAndFollows(s.good)
	s.refuses("a wrong password", func(c *StoreConfig) { c.PasswordFile = file("wrong") }, `refuses user "dormouse"`, "store.password_file")
	s.refuses("another prefix", func(c *StoreConfig) { c.Prefix = "/other/" }, "/other/", "grant")
	s.refuses("no password", func(c *StoreConfig) { c.PasswordFile = "" }, "store.password_file is missing")
}

// asksForUsers has etcd ask for users, of which dormouse may use the prefix.
func (s *secured) asksForUsers() {
	s.t.Helper()
	client, ctx := s.server.Client(s.t), s.t.Context()
	steps := []func() error{
		func() error { _, err := client.RoleAdd(ctx, "root"); return err },
		func() error { _, err := client.UserAdd(ctx, "root", "all"); return err },
		func() error { _, err := client.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := client.RoleAdd(ctx, "dormouse"); return err },
		func() error {
			_, err := client.RoleGrantPermission(ctx, "dormouse", etcd.DefaultPrefix, clientv3.GetPrefixRangeEnd(etcd.DefaultPrefix), clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := client.UserAdd(ctx, "dormouse", "right"); return err },
		func() error { _, err := client.UserGrantRole(ctx, "dormouse", "dormouse"); return err },
		func() error { _, err := client.AuthEnable(ctx); return err },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			s.t.Fatal(err)
		}
	}
}
