package controller

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Whoever follows docs/monitoring.md, or imports the dashboard, asks for metrics
// that exist, and every metric of the monitor is told of there.
func TestTheMetricsOfTheDocsExist(t *testing.T) {
	read := func(name string) string {
		t.Helper()
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	known := map[string]bool{}
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	named, gauges := regexp.MustCompile(`"(dormouse_[a-z_]+)"`), regexp.MustCompile(`gauge\("([a-z_]+)"`)
	for _, source := range sources {
		if strings.HasSuffix(source, "_test.go") {
			continue
		}
		text := read(source)
		for _, m := range named.FindAllStringSubmatch(text, -1) {
			known[m[1]] = true
		}
		for _, m := range gauges.FindAllStringSubmatch(text, -1) {
			known["dormouse_"+m[1]] = true
		}
	}
	guide, dashboard := read("../docs/monitoring.md"), read("../docs/grafana-dashboard.json")
	if !json.Valid([]byte(dashboard)) {
		t.Error("the dashboard is not JSON")
	}
	asked := regexp.MustCompile(`dormouse_[a-z_]+`)
	for _, name := range asked.FindAllString(guide+dashboard, -1) {
		if base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, ""); !known[name] && !known[base] {
			t.Errorf("the docs ask for %s, which does not exist", name)
		}
	}
	for name := range known {
		if part := strings.Split(name, "_")[1]; (part == "node" || part == "job" || part == "monitor") && !strings.Contains(guide, name) {
			t.Errorf("docs/monitoring.md does not tell of %s", name)
		}
	}
}
