package controller

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"dormouse/controller/pki"
	"dormouse/controller/store/etcd"
)

// sharedFiles are the files of a state directory that all controllers on one
// store have in common: without them an agent or a user of one is a stranger to
// the next, and a checkpoint that one signed is refused by the other.
var sharedFiles = []string{"pki/ca.pem", "pki/ca.key", "pki/manifest.key", "pki/manifest.pub", "admin.token", "join.token"}

// leastSecret is how many characters the controllers' common secret must have.
const leastSecret = 32

// shareKeys brings the keys of the state directory and of the store together.
// The first controller puts its own into the store, encrypted with the secret
// that the operator gave to each; later ones take them from there.
func (d *Daemon) shareKeys(ctx context.Context, shared *etcd.Store) error {
	secret, err := readSecret(d.config.Store.SecretFile)
	if err != nil {
		return err
	}
	sealed, err := shared.Shared(ctx, nil)
	if err == nil && sealed == nil {
		sealed, err = d.offerKeys(ctx, shared, secret)
	}
	if err != nil {
		return err
	}
	files, err := openKeys(sealed, secret)
	if err != nil {
		return fmt.Errorf("%w: is %s the file that the other controllers use?", err, d.config.Store.SecretFile)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !slices.Contains(sharedFiles, name) {
			continue // of a newer dormouse
		}
		if err := d.placeKey(name, files[name]); err != nil {
			return err
		}
	}
	return nil
}

// offerKeys puts this controller's keys into the store unless another was faster,
// and returns what is there then. Keys that are made for it are kept only if they
// are the ones.
func (d *Daemon) offerKeys(ctx context.Context, shared *etcd.Store, secret []byte) ([]byte, error) {
	dir := d.config.State
	if _, err := os.Stat(d.path("pki/ca.pem")); errors.Is(err, fs.ErrNotExist) {
		if dir, err = os.MkdirTemp(d.config.State, "keys-*"); err != nil {
			return nil, fmt.Errorf("make keys: %w", err)
		}
		defer os.RemoveAll(dir)
	}
	files, err := keysIn(dir)
	if err != nil {
		return nil, err
	}
	sealed, err := sealKeys(files, secret)
	if err != nil {
		return nil, err
	}
	return shared.Shared(ctx, sealed)
}

// keysIn reads the shared files of a state directory, making those that are not there.
func keysIn(dir string) (map[string][]byte, error) {
	if _, err := pki.Open(filepath.Join(dir, "pki"), time.Now); err != nil {
		return nil, err
	}
	files := make(map[string][]byte)
	for _, name := range sharedFiles {
		if strings.HasSuffix(name, ".token") {
			if _, err := secret(filepath.Join(dir, name)); err != nil {
				return nil, err
			}
		}
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, fmt.Errorf("read a key: %w", err)
		}
		files[name] = content
	}
	return files, nil
}

// placeKey writes one of the shared files, unless it is there. A different one is
// never replaced: it may be the only copy of another installation's.
func (d *Daemon) placeKey(name string, content []byte) error {
	file := d.path(name)
	present, err := os.ReadFile(file)
	switch {
	case err == nil && bytes.Equal(present, content):
		return nil
	case err == nil:
		return fmt.Errorf("%s is not the one that the other controllers on this store have: is the state directory of another installation? Move it away", file)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read a key: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	temporary := file + ".new"
	if err := os.WriteFile(temporary, content, 0o600); err != nil {
		return fmt.Errorf("write a key: %w", err)
	}
	return os.Rename(temporary, file)
}

func readSecret(file string) ([]byte, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the secret of the controllers: %w", err)
	}
	text = bytes.TrimSpace(text)
	if len(text) < leastSecret {
		return nil, fmt.Errorf("%s has %d characters: the secret of the controllers must have at least %d, as `head -c 32 /dev/urandom | base64` prints", file, len(text), leastSecret)
	}
	return text, nil
}

// sealedKeys is how the shared files are in the store: AES-256-GCM, its key
// derived from the secret (RFC 5869) with a salt of its own, so that no key is
// used twice.
type sealedKeys struct {
	Salt  []byte `json:"salt"`
	Files []byte `json:"files"`
}

func keyCipher(secret, salt []byte) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, secret, salt, "dormouse: keys of the controllers, 1", 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func sealKeys(files map[string][]byte, secret []byte) ([]byte, error) {
	text, err := json.Marshal(files)
	if err != nil {
		return nil, err
	}
	salt := make([]byte, 32)
	rand.Read(salt)
	c, err := keyCipher(secret, salt)
	if err != nil {
		return nil, err
	}
	return json.Marshal(sealedKeys{Salt: salt, Files: c.Seal(nil, nil, text, nil)})
}

var errWrongSecret = errors.New("the controllers' keys in the store cannot be decrypted")

func openKeys(text, secret []byte) (map[string][]byte, error) {
	var sealed sealedKeys
	if err := json.Unmarshal(text, &sealed); err != nil {
		return nil, errWrongSecret
	}
	c, err := keyCipher(secret, sealed.Salt)
	if err != nil {
		return nil, err
	}
	plain, err := c.Open(nil, nil, sealed.Files, nil)
	if err != nil {
		return nil, errWrongSecret
	}
	var files map[string][]byte
	if err := json.Unmarshal(plain, &files); err != nil {
		return nil, errWrongSecret
	}
	return files, nil
}
