package controller

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func startDaemon(t *testing.T, config Config) *Daemon {
	t.Helper()
	d, err := Start(t.Context(), config, Env{Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeDaemon(t, d) })
	return d
}

func closeDaemon(t *testing.T, d *Daemon) {
	t.Helper()
	if err := d.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

func localConfig(t *testing.T) Config {
	return Config{Listen: "127.0.0.1:0", State: t.TempDir(), Clouds: []CloudConfig{{Name: "metal", Driver: driverStatic}}}
}

// health asks a daemon how it is, over dial.
func health(t *testing.T, d *Daemon, dial func(context.Context, string, string) (net.Conn, error)) int {
	t.Helper()
	ca, err := os.ReadFile(d.CAPath())
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "dormouse"}, DialContext: dial}}
	defer client.CloseIdleConnections()
	response, err := client.Get(d.URL() + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	return response.StatusCode
}

func TestDaemonServesOnTCPAndUnixSocket(t *testing.T) {
	d := startDaemon(t, localConfig(t))
	if status := health(t, d, nil); status != http.StatusOK {
		t.Errorf("over TCP: %d", status)
	}
	unix := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.socket())
	}
	if status := health(t, d, unix); status != http.StatusOK {
		t.Errorf("over the socket: %d", status)
	}
	for _, file := range []string{d.TokenPath(), d.JoinTokenPath(), d.socket(), filepath.Join(d.config.State, "pki", "ca.key"), filepath.Join(d.config.State, "pki", "manifest.key")} {
		info, err := os.Stat(file)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: want mode 600, got %v, %v", file, info.Mode(), err)
		}
	}
}

func TestDaemonKeepsItsSecretsOverRestarts(t *testing.T) {
	config := localConfig(t)
	first, err := Start(t.Context(), config, Env{})
	if err != nil {
		t.Fatal(err)
	}
	token, key := first.Token(), first.keys.ManifestKey()
	closeDaemon(t, first)
	if _, err := os.Stat(filepath.Join(config.State, "controller.sock")); err == nil {
		t.Error("the socket is left behind")
	}
	second := startDaemon(t, config)
	if second.Token() != token || !second.keys.ManifestKey().Equal(key) {
		t.Error("the second start has other secrets")
	}
}

func TestDaemonRefusesAStateInUse(t *testing.T) {
	config := localConfig(t)
	startDaemon(t, config)
	refusedStart(t, config, "another controller runs with the state directory "+config.State)
}

func TestDaemonRefusesAPortInUseUnlessAnyWillDo(t *testing.T) {
	first := startDaemon(t, localConfig(t))
	config := localConfig(t)
	config.Listen = strings.TrimPrefix(first.URL(), "https://")
	refusedStart(t, config, "the address "+config.Listen+" is in use")
	config.AnyPort = true
	if second := startDaemon(t, config); second.URL() == first.URL() {
		t.Error("two daemons have one address")
	}
}

func TestDaemonRefusesACorruptStore(t *testing.T) {
	config := localConfig(t)
	file := filepath.Join(config.State, "controller.db")
	if err := os.WriteFile(file, []byte(strings.Repeat("garbage", 5000)), 0o600); err != nil {
		t.Fatal(err)
	}
	refusedStart(t, config, "the store "+file+" is damaged")
}

func refusedStart(t *testing.T, config Config, want string) {
	t.Helper()
	d, err := Start(t.Context(), config, Env{})
	if err == nil {
		closeDaemon(t, d)
		t.Fatalf("started; want a refusal with %q", want)
	}
	if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
		t.Errorf("want one sentence with %q, got %q", want, err)
	}
}

func TestReadConfig(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"good", "state: /x\nlease: 20s\nclouds:\n- {name: east, driver: local, config: {nodes: 2, cpus: 1.5}}\n", ""},
		{"unknown field", "state: /x\nport: 3\n", "field port not found"},
		{"no state", "listen: :1\n", "state is missing"},
		{"unknown driver", "state: /x\nclouds: [{name: a, driver: vax}]\n", `there is no driver "vax": known are local, static`},
		{"unknown backend", "state: /x\nrepository: {backend: tape}\n", `there is no repository backend "tape"`},
		{"twice", "state: /x\nclouds: [{name: a, driver: static}, {name: a, driver: static}]\n", "there are two clouds named"},
		{"unknown tunnel", "state: /x\nclouds: [{name: a, driver: static, tunnel: string}]\n", `there is no tunnel "string": known are auto, wireguard, vxlan`},
		{"no nodes", "state: /x\nclouds: [{name: a, driver: local, config: {nodes: 0}}]\n", "nodes must be greater than 0, got 0"},
		{"checkpoints", "state: /x\nclouds: [{name: a, driver: static, concurrent_checkpoints: -1}]\n", "concurrent_checkpoints must be greater than 0, got -1"},
		{"bandwidth", "state: /x\nclouds: [{name: a, driver: static, upload_bytes_per_second: -5}]\n", "upload_bytes_per_second must be greater than 0, got -5"},
		{"auto", "state: /x\nauto: {shortest: 2h, longest: 1h}\n", "not from 2h0m0s to 1h0m0s"},
		{"short round", "state: /x\nmonitor: {round: 10ms}\n", "monitor.round is from 1s to 1h, got 10ms"},
		{"short lease", "state: /x\nlease: 1s\n", "at least three heartbeats"},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "controller.yaml")
			if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			config, err := ReadConfig(file)
			if c.want == "" {
				if err != nil || config.Lease != 20*time.Second || config.Clouds[0].Local.CPUs != 1.5 || config.Repository.Path != "/x/repository" {
					t.Fatalf("%+v, %v", config, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("want one sentence with %q, got %v", c.want, err)
			}
		})
	}
}
