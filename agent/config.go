package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"

	"gopkg.in/yaml.v3"

	"dormouse/internal/lazyregexp"
)

// Config is what an agent needs to know. Its names in JSON and YAML are the
// same; see LoadConfig.
type Config struct {
	Node  string `yaml:"node" json:"node"`
	Cloud string `yaml:"cloud" json:"cloud"`

	// Join is the controller: https://HOST:PORT, HOST:PORT, or
	// unix:///PATH of its socket; several with commas between.
	Join string `yaml:"join" json:"join"`
	// ServerName is the name that the controller's certificate must carry.
	// Empty: the host in Join, or "dormouse" for a socket.
	ServerName string `yaml:"server_name" json:"server_name,omitempty"`
	// Token, or the contents of TokenFile, lets the agent join. Only the first
	// start needs it: the certificate it buys is kept in State.
	Token     string `yaml:"token" json:"token,omitempty"`
	TokenFile string `yaml:"token_file" json:"token_file,omitempty"`
	// CA is the file with the controller's certificate authority, PEM.
	CA string `yaml:"ca" json:"ca,omitempty"`

	// State is the directory that holds all the agent must remember.
	State string `yaml:"state" json:"state"`
	// Hide are directories, besides State, that no task may see.
	Hide []string `yaml:"hide" json:"hide,omitempty"`
	// Cgroup is the path below the cgroup v2 mount under which the cgroups of
	// tasks are made. Empty: dormouse/NODE/jobs.
	Cgroup string `yaml:"cgroup" json:"cgroup,omitempty"`
	// CPUs and MemBytes are the capacity the node offers; 0: all the host has.
	CPUs     float64 `yaml:"cpus" json:"cpus,omitempty"`
	MemBytes int64   `yaml:"mem_bytes" json:"mem_bytes,omitempty"`

	// Underlay is the address by which the agents of other nodes reach this one,
	// for the networks of jobs that span nodes. Empty: the address from which the
	// controller is reached, or none if that is a socket.
	Underlay netip.Addr `yaml:"underlay" json:"underlay,omitzero"`

	CRIU string `yaml:"criu" json:"criu,omitempty"` // program; empty: where set-up puts it, then PATH
	Init string `yaml:"init" json:"init,omitempty"` // dormouse-init; empty: beside this program
	Shim string `yaml:"shim" json:"shim,omitempty"` // preload library for CRIU; empty: beside this program, if there

	// Spool is the directory for captured images when they are not kept in
	// memory. Empty: State/spool.
	Spool string `yaml:"spool" json:"spool,omitempty"`
	// SpoolMemBytes bounds the images kept in memory at any time. 0: as much as
	// the host can spare, asked anew for each capture; negative: none.
	SpoolMemBytes int64 `yaml:"spool_mem_bytes" json:"spool_mem_bytes,omitempty"`
	// RestoreFromSpool has restores fetch all memory into the spool before CRIU
	// reads any, as they do by themselves where the kernel has no FUSE.
	RestoreFromSpool bool `yaml:"restore_from_spool" json:"restore_from_spool,omitempty"`

	// Virtual says that whoever started the agent gave it a mount and a network
	// namespace of its own.
	Virtual bool   `yaml:"virtual" json:"virtual,omitempty"`
	Version string `yaml:"version" json:"version,omitempty"`

	Logger *slog.Logger `yaml:"-" json:"-"`
}

// LoadConfig reads a Config from a JSON or YAML file. Unknown fields are an
// error: they are misspelled ones.
func LoadConfig(path string) (Config, error) {
	var c Config
	raw, err := os.ReadFile(path)
	if err != nil {
		return c, err
	}
	decoder := yaml.NewDecoder(bytes.NewReader(raw)) // JSON is YAML
	decoder.KnownFields(true)
	if err := decoder.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return c, fmt.Errorf("agent configuration %s: %w", path, err)
	}
	return c, nil
}

// validName keeps names usable as file and cgroup names.
var validName = lazyregexp.New(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$`)

// complete checks c and fills in what was left out.
func (c Config) complete() (Config, error) {
	if !validName.MatchString(c.Node) {
		return c, fmt.Errorf("agent: node name %q must be 1 to 63 letters, digits, '.', '_' or '-'", c.Node)
	}
	if c.State == "" {
		return c, errors.New("agent: no state directory given")
	}
	if c.Join == "" {
		return c, errors.New("agent: no controller to join given")
	}
	if c.CPUs < 0 || c.MemBytes < 0 {
		return c, errors.New("agent: cpus and mem_bytes may not be negative")
	}
	var err error
	if c.State, err = filepath.Abs(c.State); err != nil {
		return c, err
	}
	if c.Cgroup == "" {
		c.Cgroup = filepath.Join("dormouse", c.Node, "jobs")
	}
	if c.Spool == "" {
		c.Spool = filepath.Join(c.State, "spool")
	}
	if c.Init == "" {
		c.Init = besideProgram("dormouse-init")
	}
	if c.Shim == "" {
		if shim := besideProgram("libdormouse-criu.so"); fileExists(shim) {
			c.Shim = shim
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// besideProgram names a file in the directory of the running program.
func besideProgram(name string) string {
	program, err := os.Executable()
	if err != nil {
		return name
	}
	return filepath.Join(filepath.Dir(program), name)
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
