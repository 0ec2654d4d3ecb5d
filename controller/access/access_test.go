package access

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"dormouse/api"
)

func TestSecretsAreLongAndDifferent(t *testing.T) {
	a, b := NewSecret(), NewSecret()
	if a == b || len(a) < 43 || Hash(a) == Hash(b) || strings.Contains(Hash(a), a) {
		t.Errorf("the secrets %q and %q", a, b)
	}
}

func TestTokenEndsWithItsTimeOrItsRevocation(t *testing.T) {
	now := time.Now()
	past, future := now.Add(-time.Second), now.Add(time.Second)
	for _, c := range []struct {
		token api.Token
		why   string
	}{
		{api.Token{}, ""},
		{api.Token{Expires: &future}, ""},
		{api.Token{Expires: &past}, "the token has expired"},
		{api.Token{Expires: &now}, "the token has expired"},
		{api.Token{Revoked: &past, Expires: &future}, "the token was revoked"},
	} {
		token := Token{Token: c.token}
		if why := token.Valid(now); why != c.why {
			t.Errorf("%+v: want %q, got %q", c.token, c.why, why)
		}
	}
}

func TestDecide(t *testing.T) {
	may := map[Rule]map[api.Role]bool{
		Admin:    {api.RoleAdmin: true},
		Operator: {api.RoleAdmin: true, api.RoleOperator: true},
		Own:      {api.RoleAdmin: true, api.RoleOperator: true, api.RoleUser: true},
		Anyone:   {api.RoleAdmin: true, api.RoleOperator: true, api.RoleUser: true},
	}
	for _, role := range []api.Role{api.RoleAdmin, api.RoleOperator, api.RoleUser} {
		for route, rule := range Rules {
			if err := Decide(Identity{Name: "x", Role: role}, route); (err == nil) != may[rule][role] {
				t.Errorf("%s as %s: %v", route, role, err)
			}
		}
		if err := Decide(Identity{Role: role}, "a new route"); (err == nil) != (role == api.RoleAdmin) {
			t.Errorf("a route without a rule, as %s: %v", role, err)
		}
	}
	if Decide(Identity{}, "version") == nil {
		t.Error("nobody was let through")
	}
}

func TestConfine(t *testing.T) {
	alice := Identity{Name: "a", Role: api.RoleUser, User: "alice", UID: 1000, GID: 1001}
	trusted := alice
	trusted.AllowRoot = true
	limits := Limits{Paths: []string{"/home/{user}", "/data"}, Priority: 10}
	volume := func(path string) api.JobSpec {
		return api.JobSpec{Volumes: []api.Volume{{Source: path, Destination: "/x"}}}
	}
	for i, c := range []struct {
		who  Identity
		spec api.JobSpec
		user string
		why  string
	}{
		{alice, api.JobSpec{}, "1000:1001", ""},
		{alice, api.JobSpec{User: "alice"}, "1000:1001", ""},
		{alice, api.JobSpec{User: "1000"}, "1000:1001", ""},
		{alice, api.JobSpec{User: "1000:1001"}, "1000:1001", ""},
		{alice, api.JobSpec{User: "1000:0"}, "", "runs as that user, not as 1000:0"},
		{alice, api.JobSpec{User: "alice:root"}, "", "runs as that user, not as alice:root"},
		{alice, api.JobSpec{User: "bob"}, "", "runs as that user, not as bob"},
		{alice, api.JobSpec{User: "root"}, "", "does not run as root"},
		{alice, api.JobSpec{User: "0"}, "", "does not run as root"},
		{alice, api.JobSpec{User: "00:5"}, "", "does not run as root"},
		{trusted, api.JobSpec{User: "root"}, "0:0", ""},
		{trusted, api.JobSpec{User: "bob"}, "", "runs as that user"},
		{Identity{Role: api.RoleUser, User: "root"}, api.JobSpec{}, "", "has not allowed this token"},
		{alice, api.JobSpec{CapAdd: []string{"CAP_SYS_ADMIN"}}, "", "no further capabilities"},
		{alice, api.JobSpec{Priority: 10}, "1000:1001", ""},
		{alice, api.JobSpec{Priority: 11}, "", "a priority of at most 10"},
		{alice, api.JobSpec{Publish: []api.Publish{{Port: 22}}}, "", "publishes ports from 1024 on"},
		{alice, volume("/home/alice"), "1000:1001", ""},
		{alice, volume("/home/alice/x"), "1000:1001", ""},
		{alice, volume("/data"), "1000:1001", ""},
		{alice, volume("/home/alicex"), "", "not below a path"},
		{alice, volume("/home/bob"), "", "not below a path"},
		{alice, volume("/home/alice/../bob"), "", "not below a path"},
		{alice, volume("/"), "", "not below a path"},
		{trusted, volume("/etc"), "", "not below a path"},
		{alice, api.JobSpec{Root: "/root"}, "", "the root /root is not below"},
		{alice, api.JobSpec{Root: "dir:/root"}, "", "the root /root is not below"},
		{alice, api.JobSpec{Root: "oci:/root/x.tar"}, "", "the root /root/x.tar is not below"},
		{alice, api.JobSpec{Root: "oci:./x.tar"}, "", "is not below"},
		{alice, api.JobSpec{Root: "oci:../x.tar"}, "", "is not below"},
		{alice, api.JobSpec{Root: "oci:debian"}, "1000:1001", ""},
		{alice, api.JobSpec{Root: "host"}, "1000:1001", ""},
	} {
		err := Confine(c.who, limits, &c.spec)
		if c.why == "" && (err != nil || c.spec.User != c.user || !c.spec.Confined) {
			t.Errorf("%d: want user %s, got %q, confined %v, %v", i, c.user, c.spec.User, c.spec.Confined, err)
		}
		if c.why != "" && (err == nil || !strings.Contains(err.Error(), c.why)) {
			t.Errorf("%d: want a refusal with %q, got %v", i, c.why, err)
		}
	}
	operator := api.JobSpec{User: "root", Priority: 1000, Confined: true}
	if err := Confine(Identity{Role: api.RoleOperator}, limits, &operator); err != nil || operator.User != "root" || operator.Confined {
		t.Errorf("an operator's job: %+v, %v", operator, err)
	}
}

func TestLimiterFillsAtItsRate(t *testing.T) {
	l, now := NewLimiter(10, 3), time.Now()
	take := func(who string) bool { _, ok := l.Take(who, now); return ok }
	for range 3 {
		if !take("a") {
			t.Fatal("a burst was cut short")
		}
	}
	if wait, ok := l.Take("a", now); ok || wait != 100*time.Millisecond {
		t.Errorf("the fourth: %v after %s", ok, wait)
	}
	if !take("b") {
		t.Error("one asker used up another's")
	}
	now = now.Add(100 * time.Millisecond)
	if !take("a") || take("a") {
		t.Error("want one more after a tenth of a second")
	}
	now = now.Add(time.Hour)
	for range 3 {
		if !take("a") {
			t.Error("the burst did not come back")
		}
	}
	if take("a") {
		t.Error("more than the burst came back")
	}
	l.Return("a")
	if !take("a") {
		t.Error("what was returned is gone")
	}
}

func TestLimiterIsBounded(t *testing.T) {
	l, now := NewLimiter(1, 2), time.Now()
	for i := range 3 * mostBuckets {
		l.Take(fmt.Sprint(i), now)
	}
	if len(l.buckets) > mostBuckets {
		t.Errorf("%d buckets", len(l.buckets))
	}
}
