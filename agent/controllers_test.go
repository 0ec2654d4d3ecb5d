package agent

import (
	"testing"

	"google.golang.org/grpc/metadata"

	"dormouse/api"
)

func TestAnAgentTriesEveryControllerAndBelievesTheHint(t *testing.T) {
	c, err := parseControllers("https://a:1, https://b:2,unix:///c", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ told, want string }{
		{"", "b:2"},
		{"", "/c"},
		{"", "a:1"},
		{"https://leader:9", "leader:9"},
		{"", "a:1"}, // the hint was wrong: on from where it was
		{"nonsense", "b:2"},
		{"https://x:1", "x:1"},
		{"https://y:2", "y:2"},
	} {
		c.failed(metadata.Pairs(api.LeaderHeader, step.told))
		if got := c.now().address; got != step.want {
			t.Fatalf("told %q: want %s next, got %s", step.told, step.want, got)
		}
	}
	if one, err := parseControllers("a:1", ""); err != nil || one.several() || !c.several() {
		t.Errorf("several: %v", err)
	}
	if _, err := parseControllers("https://a:1,", ""); err == nil {
		t.Error("an empty address was accepted")
	}
}
