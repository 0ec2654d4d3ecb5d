package policy

import (
	"strings"
	"testing"

	"dormouse/api"
)

func TestCheck(t *testing.T) {
	health := func(h api.HealthCheck) api.JobSpec { return api.JobSpec{Health: &h} }
	command := []string{"/bin/true"}
	for name, c := range map[string]struct {
		spec api.JobSpec
		want string // part of the refusal; empty: none
	}{
		"nothing asked":           {api.JobSpec{}, ""},
		"each action":             {api.JobSpec{OnStarvation: "migrate"}, ""},
		"no such action":          {api.JobSpec{OnStarvation: "kill"}, `got "kill"`},
		"a period":                {api.JobSpec{StarvationPeriodMS: 2500}, ""},
		"too short a period":      {api.JobSpec{StarvationPeriodMS: 2499}, "every 2.5s at most"},
		"a negative period":       {api.JobSpec{StarvationPeriodMS: -1}, "every 2.5s at most"},
		"a period that overflows": {api.JobSpec{StarvationPeriodMS: 1 << 62}, "every 24h0m0s at least"},
		"an expression":           {api.JobSpec{ProgressRegex: `step (\d+)`}, ""},
		"a broken expression":     {api.JobSpec{ProgressRegex: `step (\d+`}, "expression for progress"},
		"a long expression":       {api.JobSpec{ProgressRegex: strings.Repeat("a", 5000)}, "5000 characters"},
		"a webhook":               {api.JobSpec{Webhook: "http://10.0.0.1:9000/x?y=z"}, ""},
		"a webhook of a file":     {api.JobSpec{Webhook: "file:///etc/passwd"}, "http or https"},
		"a webhook of no host":    {api.JobSpec{Webhook: "http://:80/"}, "http or https"},
		"an empty health check":   {health(api.HealthCheck{}), "asks nothing"},
		"a command":               {health(api.HealthCheck{Command: command}), ""},
		"a path":                  {health(api.HealthCheck{HTTP: "/"}), ""},
		"a port and a path":       {health(api.HealthCheck{HTTP: ":8080/healthz?x=1"}), ""},
		"a port only":             {health(api.HealthCheck{HTTP: ":8080"}), "[:PORT]/PATH"},
		"a port that is none":     {health(api.HealthCheck{HTTP: ":70000/"}), "[:PORT]/PATH"},
		"port 0":                  {health(api.HealthCheck{HTTP: ":0/"}), "[:PORT]/PATH"},
		"another host":            {health(api.HealthCheck{HTTP: "http://example.org/"}), "[:PORT]/PATH"},
		"a path of two lines":     {health(api.HealthCheck{HTTP: "/a HTTP/1.0\r\nX: y"}), "[:PORT]/PATH"},
		"both":                    {health(api.HealthCheck{Command: command, HTTP: "/"}), "not both"},
		"a negative delay":        {health(api.HealthCheck{Command: command, StartDelayMS: -1}), "start delay must be from 0s"},
		"a short timeout":         {health(api.HealthCheck{Command: command, TimeoutMS: 99}), "timeout must be from 100ms"},
		"many failures":           {health(api.HealthCheck{Command: command, Retries: 1001}), "from 1 to 1000"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Check(c.spec)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("want %q, got %v", c.want, err)
			}
		})
	}
}

func TestFillLeavesWhatWasAskedAndTheCallersCopyAlone(t *testing.T) {
	mine := api.HealthCheck{HTTP: "/", TimeoutMS: 7000}
	spec := api.JobSpec{Health: &mine}
	Fill(&spec)
	if want := (api.HealthCheck{HTTP: "/", PeriodMS: 10_000, TimeoutMS: 7000, Retries: 3}); spec.Health.HTTP != want.HTTP ||
		spec.Health.PeriodMS != want.PeriodMS || spec.Health.TimeoutMS != want.TimeoutMS || spec.Health.Retries != want.Retries {
		t.Errorf("filled: %+v, want %+v", *spec.Health, want)
	}
	if mine.PeriodMS != 0 {
		t.Error("what the caller has was changed")
	}
}

func TestTargets(t *testing.T) {
	for text, want := range map[string]Target{"/": {80, "/"}, ":8080/healthz?deep=1": {8080, "/healthz?deep=1"}, "/a/b": {80, "/a/b"}} {
		if got, err := ParseTarget(text); err != nil || got != want {
			t.Errorf("%q is %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", ":1", "8080/x", ":0/", ":65536/", "http://host/", ":80/a b", ":80/a\r\nX: y", "host:80/"} {
		if got, err := ParseTarget(text); err == nil {
			t.Errorf("%q is taken for %+v", text, got)
		}
	}
}

func FuzzParseTarget(f *testing.F) {
	f.Add(":8080/healthz")
	f.Add("//")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseTarget(text)
		if err == nil && (got.Port == 0 || !strings.HasPrefix(got.Path, "/") || strings.ContainsAny(got.Path, " \r\n\t")) {
			t.Errorf("%q is %+v", text, got)
		}
	})
}
