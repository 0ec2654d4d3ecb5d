package controller

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"dormouse/api"
	"dormouse/client"
	"dormouse/controller/store"
	"dormouse/controller/store/archive"
	"dormouse/controller/store/etcd/etcdtest"
)

// everything is what a store has, as text.
func everything(t *testing.T, s store.Store) string {
	t.Helper()
	var lines []string
	if _, err := s.(store.Copier).Copy(t.Context(), func(item store.Item) error {
		lines = append(lines, fmt.Sprintf("%s %s %d %s", item.Table, item.Key, item.Sequence, item.Value))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines) // tables have no order
	return strings.Join(lines, "\n")
}

// fill writes some thousand records, more than etcd takes at once.
func fill(t *testing.T, s store.Store) {
	t.Helper()
	err := s.Update(t.Context(), func(tx store.Tx) error {
		for i := range 2500 {
			if err := store.Put(tx, store.Jobs, fmt.Sprintf("j-%04d", i), jobRecord{}); err != nil {
				return err
			}
		}
		_, err := tx.Sequence(store.Events)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// backupFile takes a back-up of a store.
func backupFile(t *testing.T, s store.Store, state string) string {
	t.Helper()
	var buffer bytes.Buffer
	if err := Backup(t.Context(), &buffer, s, state, "test"); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "backup")
	if err := os.WriteFile(file, buffer.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func openConfigured(t *testing.T, config Config) store.Store {
	t.Helper()
	if err := config.complete(); err != nil {
		t.Fatal(err)
	}
	s, err := OpenStore(t.Context(), config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func restore(t *testing.T, config Config, file string, force bool) error {
	t.Helper()
	_, err := Restore(t.Context(), config, file, force, slog.New(slog.DiscardHandler))
	return err
}

// Out of either store, and into either.
func TestABackupIsRestoredIntoEitherStore(t *testing.T) {
	t.Parallel()
	server := etcdtest.Start(t)
	secret := filepath.Join(t.TempDir(), "secret")
	writeTestFile(t, secret, strings.Repeat("s3cret", 8))
	kinds := map[string]func(t *testing.T) Config{
		"bolt": localConfig,
		"etcd": func(t *testing.T) Config {
			config := localConfig(t)
			config.Store = StoreConfig{Backend: storeEtcd, Endpoints: []string{server.URL}, SecretFile: secret, Prefix: "/" + t.Name() + "/"}
			return config
		},
	}
	for from, fromConfig := range kinds {
		for to, toConfig := range kinds {
			t.Run(from+" to "+to, func(t *testing.T) {
				source := fromConfig(t)
				source.Store.Prefix += "source/"
				if from == "bolt" {
					source.Store.Prefix = ""
				}
				closeDaemon(t, startDaemon(t, source)) // makes the keys
				s := openConfigured(t, source)
				fill(t, s)
				want := everything(t, s)
				file := backupFile(t, s, source.State)
				target := toConfig(t)
				if err := restore(t, target, file, false); err != nil {
					t.Fatal(err)
				}
				d := startDaemon(t, target)
				if token, err := os.ReadFile(filepath.Join(source.State, "admin.token")); err != nil || strings.TrimSpace(string(token)) != d.Token() {
					t.Error("the keys are others than in the back-up")
				}
				closeDaemon(t, d)
				restored := openConfigured(t, target)
				got := everything(t, restored)
				restored.Close()
				if got != want {
					t.Errorf("the restored store differs: %d bytes instead of %d", len(got), len(want))
				}
				var notEmpty *store.NotEmptyError
				if err := restore(t, target, file, false); !errors.As(err, &notEmpty) {
					t.Errorf("over a store that is not empty: want a refusal, got %v", err)
				}
				if err := restore(t, target, file, true); err != nil {
					t.Errorf("with force: %v", err)
				}
			})
		}
	}
}

func TestABackupIsTakenWhileTheControllerRuns(t *testing.T) {
	d := startDaemon(t, localConfig(t))
	asked, err := client.New(client.Config{URL: d.URL(), Token: d.Token(), CAFile: d.CAPath()})
	if err != nil {
		t.Fatal(err)
	}
	defer asked.Close()
	if _, err := asked.Submit(t.Context(), api.JobSpec{Name: "kept", Command: []string{"true"}}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "backup")
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(asked.Backup(t.Context(), out), out.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := archive.Check(file); err != nil {
		t.Fatal(err)
	}
	if err := restore(t, d.config, file, true); err == nil || !strings.Contains(err.Error(), "another controller runs") {
		t.Errorf("a restore under a running controller: want a refusal, got %v", err)
	}
	response, err := http.Get(d.URL() + "/v1/backup")
	if err == nil { // it is not trusted, and has no token
		response.Body.Close()
		t.Error("a stranger was answered")
	}
	other := localConfig(t)
	if err := restore(t, other, file, false); err != nil {
		t.Fatal(err)
	}
	again := startDaemon(t, other)
	var jobs []jobRecord
	err = again.store.View(t.Context(), func(tx store.Tx) (err error) {
		jobs, err = store.All[jobRecord](tx, store.Jobs)
		return err
	})
	if err != nil || len(jobs) != 1 || jobs[0].Name != "kept" {
		t.Errorf("want the submitted job, got %+v, %v", jobs, err)
	}
}

func TestRestoreRefusesWhatIsNotWhole(t *testing.T) {
	source := localConfig(t)
	closeDaemon(t, startDaemon(t, source))
	whole, err := os.ReadFile(backupFile(t, openConfigured(t, source), source.State))
	if err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(t.TempDir(), "half")
	writeTestFile(t, half, string(whole[:len(whole)/2]))
	target := localConfig(t)
	var damaged *archive.DamagedError
	if err := restore(t, target, half, false); !errors.As(err, &damaged) {
		t.Errorf("want a refusal, got %v", err)
	}
	if entries, err := os.ReadDir(target.State); err != nil || len(entries) != 0 {
		t.Errorf("the refused restore left %v behind", entries)
	}
	var buffer bytes.Buffer
	if err := archive.Write(&buffer, archive.Header{Schema: store.Schema + 1}, nil, nil); err != nil {
		t.Fatal(err)
	}
	newer := filepath.Join(t.TempDir(), "newer")
	writeTestFile(t, newer, buffer.String())
	var refusal *store.NewerSchemaError
	if err := restore(t, target, newer, false); !errors.As(err, &refusal) {
		t.Errorf("a back-up of a newer schema: want a refusal, got %v", err)
	}
}

func TestRestoreKeepsWhatItReplaces(t *testing.T) {
	source, target := localConfig(t), localConfig(t)
	closeDaemon(t, startDaemon(t, source))
	file := backupFile(t, openConfigured(t, source), source.State)
	d := startDaemon(t, target)
	token := d.Token()
	closeDaemon(t, d)
	if err := restore(t, target, file, false); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("over other keys: want a refusal, got %v", err)
	}
	if err := restore(t, target, file, true); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"controller.db", "admin.token", "pki/ca.key"} {
		kept, err := filepath.Glob(filepath.Join(target.State, name+".before-*"))
		if err != nil || len(kept) != 1 {
			t.Errorf("%s: want one that was kept, got %v", name, kept)
		}
	}
	if d := startDaemon(t, target); d.Token() == token {
		t.Error("the token is not that of the back-up")
	}
}

// controller/testdata/schema-1.db.gz was written by the last dormouse of schema 1:
// a job that sleeps in its second checkpoint.
func TestAStoreOfSchema1IsUpgraded(t *testing.T) {
	file, err := os.Open("testdata/schema-1.db.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	reader, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	old, err := io.ReadAll(reader)
	if err != nil {
		t.Fatal(err)
	}
	config := localConfig(t)
	if err := os.WriteFile(filepath.Join(config.State, "controller.db"), old, 0o600); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, config)
	var jobs []jobRecord
	var checkpoints []api.Checkpoint
	err = d.store.View(t.Context(), func(tx store.Tx) (err error) {
		if jobs, err = store.All[jobRecord](tx, store.Jobs); err != nil {
			return err
		}
		checkpoints, err = checkpointsOf(tx, jobs[0].ID)
		return err
	})
	if err != nil || len(jobs) != 1 || jobs[0].Name != "from-schema-1" || jobs[0].Phase != api.PhaseSuspended || len(checkpoints) != 2 {
		t.Errorf("want the sleeping job with its two checkpoints, got %+v, %v, %v", jobs, checkpoints, err)
	}
	if _, err := os.Stat(filepath.Join(config.State, "controller.db.schema-1")); err != nil {
		t.Errorf("no copy was kept: %v", err)
	}
}
