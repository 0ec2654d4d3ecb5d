package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAgentRefusesBadUsage(t *testing.T) {
	for line, want := range map[string]string{
		"agent":                  "no controller to join",
		"agent --join https://x": "belongs to no cloud",
		"agent --join https://x --cloud a --cpus -1":     "cannot offer -1 processors",
		"agent --join https://x --cloud a --underlay n1": "is no IP address",
		"agent --config /absent":                         "no such file",
	} {
		dormouse(t, "", strings.Fields(line)...).check(t, exitUsage, "", want)
	}
}

func TestAgentMergesFileFlagsAndEnvironment(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.json")
	if err := os.WriteFile(file, []byte(`{"node":"n1","cloud":"c1","join":"https://a","state":"/s","cpus":2,"virtual":true,"underlay":"100.64.0.2"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	c := &cli{getenv: func(name string) string {
		return map[string]string{"DORMOUSE_JOIN_TOKEN": "t", "DORMOUSE_CRIU": "/criu"}[name]
	}}
	command := c.agentCommand()
	if err := command.ParseFlags([]string{"--cpus", "4", "--mem", "2G"}); err != nil {
		t.Fatal(err)
	}
	flags := agentFlags{file: file}
	flags.config.CPUs, flags.config.MemBytes = 4, 2<<30
	config, err := c.agentConfig(command, flags)
	if err != nil {
		t.Fatal(err)
	}
	if config.Node != "n1" || config.CPUs != 4 || config.MemBytes != 2<<30 || config.Token != "t" || config.CRIU != "/criu" || !config.Virtual || config.State != "/s" || config.Underlay != netip.MustParseAddr("100.64.0.2") {
		t.Errorf("merged to %+v", config)
	}
}
