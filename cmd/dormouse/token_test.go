package main

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"dormouse/api"
)

// aToken is alice's, and lasts another hour.
func aToken() api.Token {
	expires := testNow.Add(time.Hour)
	return api.Token{ID: "t-11111111", Name: "alice-laptop", Role: api.RoleUser, User: "alice", Created: moment(time.Minute), Expires: &expires}
}

func TestTokenCreatePrintsTheSecretAlone(t *testing.T) {
	f := newFake(t, map[string]any{"POST /v1/tokens": api.NewToken{Token: aToken(), Secret: "dm_secret"}})
	for args, want := range map[string]string{
		"alice-laptop --user alice --expires 720h":           `{"name":"alice-laptop","role":"user","user":"alice","expires_ms":2592000000}`,
		"a --role user --user alice:1000:1000 --allow-root":  `{"name":"a","role":"user","user":"alice:1000:1000","allow_root":true}`,
		"night-shift --role operator":                        `{"name":"night-shift","role":"operator"}`,
		"night-shift --role operator --expires 1500ms -o id": "",
	} {
		got := dormouse(t, f.url, append([]string{"token", "create"}, strings.Fields(args)...)...)
		if want == "" {
			got.check(t, exitUsage, "", "")
			continue
		}
		got.check(t, exitDone, "", "")
		if got.out != "dm_secret\n" || got.errors != "" {
			t.Errorf("%s printed %q and %q, want the secret alone", args, got.out, got.errors)
		}
		if !f.called("POST /v1/tokens " + want) {
			t.Errorf("%s called\n%s\nwant\n%s", args, strings.Join(f.calls, "\n"), want)
		}
	}
	got := dormouse(t, f.url, "-o", "json", "token", "create", "alice-laptop", "--user", "alice")
	var document api.NewToken
	if err := json.Unmarshal([]byte(got.out), &document); err != nil || document.Secret != "dm_secret" || document.ID != "t-11111111" {
		t.Errorf("the document %s: %v", got.out, err)
	}
}

func TestTokenCommandsThatCannotBeMeantAskNobody(t *testing.T) {
	f := newFake(t, nil)
	for args, want := range map[string]string{
		"token create":                       "NAME is missing",
		"token create a --expires 0s":        "--expires must be greater than 0, got 0s",
		"token create a --expires -1h":       "--expires must be greater than 0, got -1h0m0s",
		"token create a --expires tomorrow":  `--expires is "tomorrow", but it must be a duration`,
		"token revoke":                       "TOKEN is missing",
		"token forget a":                     `"forget" is not a command of dormouse token`,
		"audit --limit 0":                    "--limit and --since must be greater than 0",
		"audit --since -1h":                  "--limit and --since must be greater than 0",
		"operations cancel":                  "OPERATION is missing",
		"operations cancel o-1 o-2":          "o-2",
		"operations cancel o-11111111 --now": "there is no flag --now",
	} {
		dormouse(t, f.url, strings.Fields(args)...).check(t, exitUsage, "", want)
	}
	if len(f.calls) > 0 {
		t.Errorf("the controller was asked: %v", f.calls)
	}
}

// TestTokenWhoseSecretWasLostIsRevokedByItsID: the answer to a repeated request
// has no secret.
func TestTokenWhoseSecretWasLostIsRevokedByItsID(t *testing.T) {
	f := newFake(t, map[string]any{"POST /v1/tokens": api.NewToken{Token: aToken()}})
	dormouse(t, f.url, "token", "create", "alice-laptop", "--user", "alice").
		check(t, exitFailed, "", "its secret was lost with the controller's answer: revoke it with `dormouse token revoke t-11111111`")
}

func TestTokensAreListedWithTheirState(t *testing.T) {
	past := moment(time.Minute)
	valid, expired, revoked, forever := aToken(), aToken(), aToken(), aToken()
	expired.Expires, revoked.Revoked, forever.Expires = &past, &past, nil
	f := newFake(t, map[string]any{"GET /v1/tokens": []api.Token{valid, expired, revoked, forever}})
	for _, name := range []string{"ls", "list"} {
		got := dormouse(t, f.url, "token", name)
		got.check(t, exitDone, "ID          NAME          ROLE  USER   STATE                       AGE", "")
		var states []string
		for _, line := range strings.Split(strings.TrimSpace(got.out), "\n")[1:] {
			fields := strings.Fields(line)
			states = append(states, strings.Join(fields[4:len(fields)-1], " "))
		}
		if want := []string{"until 2026-11-21T13:00:00Z", "expired", "revoked", "valid"}; !slices.Equal(states, want) {
			t.Errorf("the states are %q, want %q", states, want)
		}
	}
}

func TestTokenRevoke(t *testing.T) {
	f := newFake(t, map[string]any{"DELETE /v1/tokens/alice-laptop": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNoContent)
	})})
	dormouse(t, f.url, "token", "revoke", "alice-laptop").check(t, exitDone, "alice-laptop revoked\n", "")
	dormouse(t, f.url, "token", "revoke", "nobody").check(t, exitNotFound, "", "dormouse: there is no /v1/tokens/nobody")
}

func TestWhatATokenMayNotDoIsOneSentence(t *testing.T) {
	denied := &api.Problem{Status: http.StatusForbidden, Detail: "only an admin may do that, and the token x has the role user"}
	ended := &api.Problem{Status: http.StatusUnauthorized, Detail: "the token was revoked"}
	f := newFake(t, map[string]any{
		"GET /v1/tokens": denied, "GET /v1/audit": denied, "POST /v1/tokens": denied, "DELETE /v1/tokens/x": denied, "POST /v1/operations/o-11111111/cancel": denied,
		"GET /v1/jobs": ended,
	})
	for _, args := range []string{"token ls", "audit", "token create a --role admin", "token revoke x", "operations cancel o-11111111"} {
		dormouse(t, f.url, strings.Fields(args)...).check(t, exitRefused, "", "dormouse: only an admin may do that, and the token x has the role user\n")
	}
	dormouse(t, f.url, "ps").check(t, exitFailed, "", "dormouse: the token was revoked\n")
}

func TestAuditShowsWhoDidWhat(t *testing.T) {
	f := newFake(t, map[string]any{"GET /v1/audit": []api.AuditEntry{
		{Time: moment(time.Minute), Name: "alice-laptop", User: "alice", Role: api.RoleUser, Address: "10.0.0.7", Method: "POST", Path: "/v1/jobs", Status: 201, Target: "j-aaaaaaaa"},
		{Time: moment(time.Second), Address: "10.0.0.8", Method: "GET", Path: "/v1/jobs", Status: 401, Detail: "the token is wrong"},
	}})
	got := dormouse(t, f.url, "audit", "--since", "24h", "-n", "7")
	got.check(t, exitDone, "2026-11-21T11:59:00Z  alice-laptop  10.0.0.7  POST /v1/jobs  201 j-aaaaaaaa", "")
	got.check(t, exitDone, "2026-11-21T11:59:59Z  -             10.0.0.8  GET /v1/jobs   401             the token is wrong", "")
	dormouse(t, f.url, "audit").check(t, exitDone, "", "")
	for _, call := range []string{"GET /v1/audit?limit=7&since=2026-11-20T12%3A00%3A00Z", "GET /v1/audit?limit=100"} {
		if !f.called(call) {
			t.Errorf("called %v, want %s", f.calls, call)
		}
	}
}

// TestOperationsCancelWaitsUntilItIsUndone, and its success is the operation's end
// as cancelled.
func TestOperationsCancelWaitsUntilItIsUndone(t *testing.T) {
	running, cancelled, done := operation(api.OpCheckpoint, api.OpRunning), operation(api.OpCheckpoint, api.OpCancelled), operation(api.OpCheckpoint, api.OpDone)
	cancelled.Error = "cancelled by `dormouse operations cancel`"
	failedToUndo := operation(api.OpCheckpoint, api.OpFailed)
	failedToUndo.Error = "node east-1 was lost"
	for _, test := range []struct {
		flags  string
		ends   api.Operation
		status int
		out    string
		errors string
	}{
		{"", cancelled, exitDone, "o-11111111 cancelled\n", ""},
		{"", done, exitDone, "o-11111111 done\n", ""},
		{"", failedToUndo, exitFailed, "", "dormouse: node east-1 was lost\n"},
		{"--detach", cancelled, exitDone, "o-11111111 running\n", ""},
	} {
		f := newFake(t, map[string]any{"POST /v1/operations/o-11111111/cancel": running, "GET /v1/operations/o-11111111": inTurn(running, test.ends)})
		got := dormouse(t, f.url, append([]string{"operations", "cancel", "o-11111111"}, strings.Fields(test.flags)...)...)
		got.check(t, test.status, test.out, test.errors)
		if asked := slices.ContainsFunc(f.calls, func(call string) bool { return strings.HasPrefix(call, "GET ") }); asked == (test.flags != "") {
			t.Errorf("%q %s: called %v", test.flags, test.ends.Phase, f.calls)
		}
	}
}

func TestOperationsCancelSaysWhyNot(t *testing.T) {
	why := "operation o-11111111 (checkpoint) cannot be cancelled: its step publish and what follows cannot be undone"
	f := newFake(t, map[string]any{"POST /v1/operations/o-11111111/cancel": &api.Problem{Status: http.StatusConflict, Detail: why}})
	dormouse(t, f.url, "operations", "cancel", "o-11111111").check(t, exitRefused, "", "dormouse: "+why+"\n")
	dormouse(t, f.url, "operations", "cancel", "o-2").check(t, exitNotFound, "", "dormouse: there is no /v1/operations/o-2")
}
