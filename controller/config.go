package controller

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"dormouse/api"
	"dormouse/controller/interval"
	"dormouse/controller/pki"
	"dormouse/drivers"
	"dormouse/internal/lazyregexp"
)

// Config is what `dormouse controller --config F` reads, and what `dormouse up`
// makes of its flags.
type Config struct {
	// Listen is HOST:PORT; 127.0.0.1:7117 unless given.
	Listen string `yaml:"listen"`
	// AnyPort lets the listener fall back to a free port when Listen is taken.
	AnyPort bool `yaml:"-"`
	// Names are further names and addresses that the server certificate is for.
	Names []string `yaml:"names"`
	// State is the directory of everything the controller keeps, but what is in etcd.
	State string `yaml:"state"`
	// Name of this controller among several; the host's unless given. Advertise is
	// the URL by which the others and agents reach it; https://LISTEN unless given.
	Name       string           `yaml:"name"`
	Advertise  string           `yaml:"advertise"`
	Store      StoreConfig      `yaml:"store"`
	Repository RepositoryConfig `yaml:"repository"`
	Clouds     []CloudConfig    `yaml:"clouds"`
	// Lease and Heartbeat of the agents; 30 s and 1 s unless given.
	Lease time.Duration `yaml:"lease"`
	// Access limits what tokens may do.
	Access    AccessConfig  `yaml:"access"`
	Heartbeat time.Duration `yaml:"heartbeat"`
	// AgentCertificates is how long an agent's certificate is good for; 720 h
	// unless given. Agents renew theirs at two thirds of it.
	AgentCertificates time.Duration `yaml:"agent_certificates"`
	// Auto bounds the interval of the checkpoint policy auto; 30 s and 6 h unless
	// given.
	Auto AutoConfig `yaml:"auto"`
	// OnStarvation is what is done with a job that is kept from working, where its
	// own policy does not say: suspend unless given; or migrate, notify, ignore.
	OnStarvation string `yaml:"on_starvation"`
	// Monitor tunes the monitoring tree, and what is done about starving jobs.
	Monitor MonitorConfig `yaml:"monitor"`
}

// MonitorConfig tunes the monitor.
type MonitorConfig struct {
	// Round is how often nodes report, 5 s unless given, and Arity how many others
	// report through one, 8.
	Round time.Duration `yaml:"round"`
	Arity int           `yaml:"arity"`
	// Gap is how long a job that was moved for starvation is left alone, at first;
	// 10 min unless given. AtOnce is how many jobs of a cloud are moved for it at
	// once; 2.
	Gap    time.Duration `yaml:"gap"`
	AtOnce int           `yaml:"at_once"`
}

func (m *MonitorConfig) check() error {
	switch {
	case m.Round != 0 && (m.Round < time.Second || m.Round > time.Hour):
		return fmt.Errorf("monitor.round is from 1s to 1h, got %s", m.Round)
	case m.Arity < 0 || m.Arity > 1000:
		return fmt.Errorf("monitor.arity is from 1 to 1000, got %d", m.Arity)
	case m.Gap < 0 || m.AtOnce < 0:
		return errors.New("monitor.gap and monitor.at_once must be more than 0")
	}
	return nil
}

// AutoConfig bounds the interval of the checkpoint policy auto.
type AutoConfig struct {
	Shortest time.Duration `yaml:"shortest"`
	Longest  time.Duration `yaml:"longest"`
}

// StoreConfig says where jobs, operations and all other records are kept.
type StoreConfig struct {
	// Backend is bolt, a file in the state directory, unless it is etcd.
	Backend string `yaml:"backend"`
	// The rest is for etcd. Endpoints are the members' URLs, all http or all https;
	// Prefix begins all keys, /dormouse/ unless given.
	Endpoints []string `yaml:"endpoints"`
	Prefix    string   `yaml:"prefix"`
	// CA, Cert and Key are files: whom to believe, and what to show.
	CA   string `yaml:"ca"`
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	// User, and the file with its password, where etcd asks for them.
	User         string `yaml:"user"`
	PasswordFile string `yaml:"password_file"`
	// SecretFile holds a secret that all controllers on one store have in common:
	// their keys are encrypted with it.
	SecretFile string `yaml:"secret_file"`
}

// The stores.
const (
	storeBolt = "bolt"
	storeEtcd = "etcd"
)

// RepositoryConfig names the repository of checkpoints.
type RepositoryConfig struct {
	Backend string `yaml:"backend" json:"backend"` // local
	Path    string `yaml:"path" json:"path"`       // STATE/repository unless given
}

// AccessConfig limits what tokens may do.
type AccessConfig struct {
	// Paths of the nodes that the volumes and roots of users' jobs may be below;
	// {user} stands for the user's name. None: users have no volumes.
	Paths []string `yaml:"paths"`
	// Priority is the highest that users may ask for; 100 unless given.
	Priority int `yaml:"priority"`
	// Rate is how many requests a token may make a second, and Burst how many at
	// once; 200 and twice the rate unless given. The local admin's are not counted.
	Rate  float64 `yaml:"rate"`
	Burst float64 `yaml:"burst"`
	// AuditKeep is how many entries of the audit log are kept; 100,000 unless given.
	AuditKeep int `yaml:"audit_keep"`
}

func (a *AccessConfig) complete() {
	if a.Priority == 0 {
		a.Priority = 100
	}
	if a.Rate == 0 {
		a.Rate = 200
	}
	if a.Burst == 0 {
		a.Burst = 2 * a.Rate
	}
	if a.AuditKeep == 0 {
		a.AuditKeep = 100_000
	}
}

func (a *AccessConfig) check() error {
	for _, path := range a.Paths {
		if !filepath.IsAbs(path) || filepath.Clean(path) == "/" {
			return fmt.Errorf("access.paths must be absolute and below /, got %q", path)
		}
	}
	if a.Priority < 0 || a.Rate < 0 || a.Burst < 0 || a.AuditKeep < 0 {
		return errors.New("the numbers of access must be 0 or greater")
	}
	return nil
}

// CloudConfig is one cloud: a driver and its configuration.
type CloudConfig struct {
	Name   string `yaml:"name"`
	Driver string `yaml:"driver"` // local or static
	// Tunnel carries the networks of jobs between the cloud's nodes: wireguard,
	// encrypted, which is also what auto and nothing mean; or vxlan, in the clear,
	// where the operator trusts the network between the nodes.
	Tunnel string `yaml:"tunnel"`
	// ConcurrentCheckpoints is how many checkpoints the cloud makes at once before
	// automatic ones wait; as many as it has nodes unless given.
	ConcurrentCheckpoints int `yaml:"concurrent_checkpoints"`
	// UploadBytesPerSecond is what all nodes of the cloud together may send to
	// the repository; no limit unless given.
	UploadBytesPerSecond int64 `yaml:"upload_bytes_per_second"`
	// Local configures the driver of that name.
	Local *LocalCloud `yaml:"config"`
}

// The tunnels.
const (
	TunnelAuto      = "auto"
	TunnelWireGuard = "wireguard"
	TunnelVXLAN     = "vxlan"
)

// LocalCloud is a cloud of virtual nodes on this machine.
type LocalCloud struct {
	Nodes int `yaml:"nodes"`
	// MaxNodes is how many there may be while jobs wait for room, as many as Nodes
	// unless given; the further ones are given back when nothing was on them for
	// IdleFor, 5 minutes unless given.
	MaxNodes int           `yaml:"max_nodes"`
	IdleFor  time.Duration `yaml:"idle_for"`
	// CPUs and MemBytes are each node's capacity; the whole machine's unless given.
	CPUs     float64 `yaml:"cpus"`
	MemBytes int64   `yaml:"mem_bytes"`
}

// The drivers.
const (
	driverLocal  = "local"
	driverStatic = "static" // no driver: agents join by themselves
)

var cloudName = lazyregexp.New(`^[a-z][a-z0-9-]{0,31}$`)

// ReadConfig reads a configuration file. Fields it does not know are refused.
func ReadConfig(file string) (Config, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return Config{}, fmt.Errorf("read the configuration: %w", err)
	}
	var c Config
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.KnownFields(true)
	if err := decoder.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return Config{}, fmt.Errorf("the configuration %s: %s", file, strings.ReplaceAll(err.Error(), "\n", " "))
	}
	if err := c.complete(); err != nil {
		return Config{}, fmt.Errorf("the configuration %s: %w", file, err)
	}
	return c, nil
}

// complete fills in what was left out and checks the rest.
func (c *Config) complete() error {
	if c.Listen == "" {
		c.Listen = "127.0.0.1:7117"
	}
	if c.State == "" {
		return errors.New("state is missing: name the directory for what the controller keeps")
	}
	var err error
	if c.State, err = filepath.Abs(c.State); err != nil {
		return err
	}
	if c.Repository.Backend == "" {
		c.Repository.Backend = "local"
	}
	if c.Repository.Backend != "local" {
		return fmt.Errorf("there is no repository backend %q: known is local", c.Repository.Backend)
	}
	if c.Repository.Path == "" {
		c.Repository.Path = filepath.Join(c.State, "repository")
	}
	if c.Repository.Path, err = filepath.Abs(c.Repository.Path); err != nil {
		return err
	}
	if err := c.checkStore(); err != nil {
		return err
	}
	setDefault(&c.Heartbeat, time.Second)
	setDefault(&c.Lease, 30*time.Second)
	if c.Lease < 3*c.Heartbeat {
		return fmt.Errorf("the lease (%s) must be at least three heartbeats (%s)", c.Lease, c.Heartbeat)
	}
	setDefault(&c.AgentCertificates, pki.AgentLife)
	if c.AgentCertificates < pki.LeastAgentLife || c.AgentCertificates > pki.MostAgentLife {
		return fmt.Errorf("agent_certificates must be from %s to %s, got %s", pki.LeastAgentLife, pki.MostAgentLife, c.AgentCertificates)
	}
	setDefault(&c.Auto.Shortest, interval.Usual.Min)
	setDefault(&c.Auto.Longest, interval.Usual.Max)
	if c.Auto.Shortest < interval.Shortest || c.Auto.Longest < c.Auto.Shortest {
		return fmt.Errorf("auto: the interval is from shortest to longest, and at least %s, not from %s to %s", interval.Shortest, c.Auto.Shortest, c.Auto.Longest)
	}
	if c.OnStarvation == "" {
		c.OnStarvation = api.StarvationSuspend
	}
	if !slices.Contains(api.StarvationPolicies(), c.OnStarvation) {
		return fmt.Errorf("on_starvation is one of %s, got %q", strings.Join(api.StarvationPolicies(), ", "), c.OnStarvation)
	}
	if err := c.Access.check(); err != nil {
		return err
	}
	if err := c.Monitor.check(); err != nil {
		return err
	}
	seen := make(map[string]bool)
	for i := range c.Clouds {
		if err := c.Clouds[i].check(); err != nil {
			return err
		}
		if seen[c.Clouds[i].Name] {
			return fmt.Errorf("there are two clouds named %q", c.Clouds[i].Name)
		}
		seen[c.Clouds[i].Name] = true
	}
	return nil
}

func (c *Config) checkStore() error {
	if c.Store.Backend == "" {
		c.Store.Backend = storeBolt
	}
	switch c.Store.Backend {
	case storeBolt:
		if len(c.Store.Endpoints) > 0 {
			return errors.New("store.endpoints are for etcd: set store.backend to etcd")
		}
		return c.checkAdvertise()
	case storeEtcd:
	default:
		return fmt.Errorf("there is no store backend %q: known are bolt, etcd", c.Store.Backend)
	}
	if len(c.Store.Endpoints) == 0 {
		return errors.New("store.endpoints are missing: name the etcd members, as in [\"https://10.0.0.1:2379\"]")
	}
	for _, endpoint := range c.Store.Endpoints {
		if u, err := url.Parse(endpoint); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return fmt.Errorf("store.endpoints: %q is no URL such as https://10.0.0.1:2379", endpoint)
		}
		if strings.HasPrefix(endpoint, "https://") != strings.HasPrefix(c.Store.Endpoints[0], "https://") {
			return fmt.Errorf("store.endpoints: %s and %s differ: either all are https or none is", c.Store.Endpoints[0], endpoint)
		}
	}
	switch {
	case c.Store.SecretFile == "":
		return errors.New("store.secret_file is missing: name a file with a secret, the same for every controller; `head -c 32 /dev/urandom | base64` prints one")
	case c.Store.CA+c.Store.Cert+c.Store.Key != "" && !strings.HasPrefix(c.Store.Endpoints[0], "https://"):
		return fmt.Errorf("store.ca, store.cert and store.key are for https, and %s is not: correct store.endpoints", c.Store.Endpoints[0])
	case (c.Store.Cert == "") != (c.Store.Key == ""):
		return errors.New("store.cert and store.key go together: give both or neither")
	case c.Store.User != "" && c.Store.PasswordFile == "":
		return errors.New("store.password_file is missing: store.user has a password")
	}
	for _, cloud := range c.Clouds {
		if cloud.Driver == driverLocal {
			return fmt.Errorf("cloud %s: virtual nodes belong to one machine, and several controllers may share an etcd: use driver static, or store.backend bolt", cloud.Name)
		}
	}
	if c.Name == "" {
		name, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("find out the host name (%w): set name", err)
		}
		c.Name = name
	}
	if host, _, err := net.SplitHostPort(c.Listen); c.Advertise == "" && err == nil {
		if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
			return fmt.Errorf("advertise is missing: %s names no address by which the other controllers reach this one", c.Listen)
		}
	}
	return c.checkAdvertise()
}

func (c *Config) checkAdvertise() error {
	if c.Advertise == "" {
		return nil
	}
	u, err := url.Parse(c.Advertise)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" {
		return fmt.Errorf("advertise must be a URL such as https://controller-1.example:7117, got %q", c.Advertise)
	}
	c.Advertise = strings.TrimRight(c.Advertise, "/")
	c.Names = append(c.Names, u.Hostname())
	return nil
}

func (c *CloudConfig) check() error {
	if !cloudName.MatchString(c.Name) {
		return fmt.Errorf("a cloud's name must be small letters, digits and dashes, got %q", c.Name)
	}
	switch c.Tunnel {
	case "", TunnelAuto, TunnelWireGuard:
		c.Tunnel = TunnelWireGuard
	case TunnelVXLAN:
	default:
		return fmt.Errorf("cloud %s: there is no tunnel %q: known are auto, wireguard, vxlan", c.Name, c.Tunnel)
	}
	switch {
	case c.ConcurrentCheckpoints < 0:
		return fmt.Errorf("cloud %s: concurrent_checkpoints must be greater than 0, got %d", c.Name, c.ConcurrentCheckpoints)
	case c.UploadBytesPerSecond < 0:
		return fmt.Errorf("cloud %s: upload_bytes_per_second must be greater than 0, got %d", c.Name, c.UploadBytesPerSecond)
	}
	switch c.Driver {
	case driverStatic:
		return nil
	case driverLocal:
	default:
		return fmt.Errorf("cloud %s: there is no driver %q: known are local, static", c.Name, c.Driver)
	}
	if c.Local == nil {
		c.Local = &LocalCloud{Nodes: 1}
	}
	switch l := c.Local; {
	case l.Nodes < 1:
		return fmt.Errorf("cloud %s: nodes must be greater than 0, got %d", c.Name, l.Nodes)
	case l.MaxNodes != 0 && l.MaxNodes < l.Nodes:
		return fmt.Errorf("cloud %s: max_nodes must be no less than nodes, which is %d, got %d", c.Name, l.Nodes, l.MaxNodes)
	case l.IdleFor < 0:
		return fmt.Errorf("cloud %s: idle_for must be greater than 0, got %s", c.Name, l.IdleFor)
	case l.CPUs < 0:
		return fmt.Errorf("cloud %s: cpus must be greater than 0, got %g", c.Name, l.CPUs)
	case l.MemBytes < 0:
		return fmt.Errorf("cloud %s: mem_bytes must be greater than 0, got %d", c.Name, l.MemBytes)
	}
	return nil
}

// cloud is what the configuration says of a cloud, without its driver and nodes.
func (c *CloudConfig) cloud() Cloud {
	return Cloud{Name: c.Name, DriverName: c.Driver, Tunnel: c.Tunnel, Dumps: c.ConcurrentCheckpoints, UploadRate: c.UploadBytesPerSecond}
}

// nodes are the nodes that a local cloud is made of.
func (c *CloudConfig) nodes() []drivers.NodeSpec {
	specs := make([]drivers.NodeSpec, c.Local.Nodes)
	for i := range specs {
		specs[i] = drivers.NodeSpec{Name: fmt.Sprintf("%s-%d", c.Name, i), CPUs: c.Local.CPUs, MemBytes: c.Local.MemBytes}
	}
	return specs
}
