package repository

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"dormouse/repository/backend"
)

// Manifest describes one durable checkpoint. Its single write, after all
// parts, is what makes the checkpoint durable.
type Manifest struct {
	Format     int       `json:"dormouse_manifest"` // set by PutManifest
	Checkpoint string    `json:"checkpoint"`        // id; also the object's name
	Job        string    `json:"job"`
	JobName    string    `json:"job_name,omitempty"`
	Created    time.Time `json:"created"`
	Trigger    string    `json:"trigger"`
	Label      string    `json:"label,omitempty"`
	Parent     string    `json:"parent,omitempty"` // the job's checkpoint before; nothing depends on it
	PauseMS    float64   `json:"pause_ms"`

	SizeBytes   int64 `json:"size_bytes"`   // as captured, all tasks
	StoredBytes int64 `json:"stored_bytes"` // in packs, of all chunks it refers to
	NewBytes    int64 `json:"new_bytes"`    // added to the repository by it

	Tasks   []TaskManifest  `json:"tasks"`
	Spec    json.RawMessage `json:"spec,omitempty"`    // of the job, as submitted
	Network json.RawMessage `json:"network,omitempty"` // the job's network identity
}

// TaskManifest describes one task's share of a checkpoint.
type TaskManifest struct {
	Index       int             `json:"index"`
	Part        string          `json:"part"` // id of the part object
	SizeBytes   int64           `json:"size_bytes"`
	StoredBytes int64           `json:"stored_bytes"`
	NewBytes    int64           `json:"new_bytes"`
	Node        string          `json:"node"` // where it was captured
	CRIU        string          `json:"criu"` // version that wrote the images
	Kernel      string          `json:"kernel"`
	CPUVendor   string          `json:"cpu_vendor,omitempty"`
	CPUFeatures []string        `json:"cpu_features,omitempty"`
	Network     json.RawMessage `json:"network,omitempty"` // the task's network identity
	Extra       json.RawMessage `json:"extra,omitempty"`   // what the agent needs to restore
}

// Signer signs manifests; NewSigner makes one of an ed25519 key.
type Signer interface {
	// Public is the key that verifies the signatures.
	Public() ed25519.PublicKey
	// Sign returns the 64-byte ed25519 signature of message.
	Sign(message []byte) ([]byte, error)
}

// NewSigner signs with a key in memory.
func NewSigner(key ed25519.PrivateKey) Signer { return keySigner(key) }

type keySigner ed25519.PrivateKey

func (k keySigner) Public() ed25519.PublicKey {
	return ed25519.PrivateKey(k).Public().(ed25519.PublicKey)
}

func (k keySigner) Sign(message []byte) ([]byte, error) {
	return ed25519.Sign(ed25519.PrivateKey(k), message), nil
}

// Verifier holds the keys whose signatures are trusted.
type Verifier struct {
	keys map[string]ed25519.PublicKey
}

// NewVerifier trusts the given keys.
func NewVerifier(keys ...ed25519.PublicKey) *Verifier {
	v := &Verifier{keys: make(map[string]ed25519.PublicKey)}
	for _, k := range keys {
		if len(k) == ed25519.PublicKeySize {
			v.keys[keyID(k)] = k
		}
	}
	return v
}

// keyID names a public key: the first 16 hexadecimal digits of its BLAKE3 hash.
func keyID(k ed25519.PublicKey) string {
	id := hashOf(k)
	return hex.EncodeToString(id[:8])
}

// A manifest object is one line and the manifest's JSON, byte for byte as signed:
//
//	dormouse-manifest 1 ed25519 <key id> <signature, base64>\n
//	{...}
//
// What is signed is "dormouse-manifest 1\n" and the JSON.
const (
	manifestMagic   = "dormouse-manifest"
	manifestVersion = "1"
	manifestLimit   = 64 << 20
)

func signedMessage(payload []byte) []byte {
	return append([]byte(manifestMagic+" "+manifestVersion+"\n"), payload...)
}

func encodeManifest(m *Manifest, s Signer) ([]byte, error) {
	payload, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return nil, err
	}
	payload = append(payload, '\n')
	sig, err := s.Sign(signedMessage(payload))
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	line := fmt.Sprintf("%s %s ed25519 %s %s\n", manifestMagic, manifestVersion, keyID(s.Public()), base64.StdEncoding.EncodeToString(sig))
	return append([]byte(line), payload...), nil
}

// parseManifest checks the signature before it looks at the content.
func parseManifest(p []byte, v *Verifier) (*Manifest, error) {
	line, payload, ok := bytes.Cut(p, []byte("\n"))
	f := strings.Fields(string(line[:min(len(line), 1000)]))
	if !ok || len(f) < 2 || f[0] != manifestMagic {
		return nil, &DamagedError{Object: "manifest", Err: errors.New("it does not begin like a manifest")}
	}
	if f[1] != manifestVersion {
		return nil, fmt.Errorf("it has format %s, this program reads %s: %w", f[1], manifestVersion, ErrVersion)
	}
	if len(f) != 5 || f[2] != "ed25519" {
		return nil, fmt.Errorf("its first line is not a signature: %w", ErrSignature)
	}
	key, trusted := v.keys[f[3]]
	if !trusted {
		return nil, fmt.Errorf("it was signed with key %.80s, which is not trusted: %w", f[3], ErrSignature)
	}
	sig, err := base64.StdEncoding.DecodeString(f[4])
	if err != nil || !ed25519.Verify(key, signedMessage(payload), sig) {
		return nil, fmt.Errorf("it was changed after it was signed: %w", ErrSignature)
	}
	m := new(Manifest)
	if err := json.Unmarshal(payload, m); err != nil {
		return nil, &DamagedError{Object: "manifest", Err: err}
	}
	if m.Format != formatVersion {
		return nil, fmt.Errorf("it has format %d, this program reads %d: %w", m.Format, formatVersion, ErrVersion)
	}
	return m, nil
}

// PutManifest makes a checkpoint durable: it checks that all parts, and every
// chunk they refer to, are there and stay there, signs, and writes once. The
// parts' contents are not read; Verify does that.
func (r *Repository) PutManifest(ctx context.Context, m *Manifest, s Signer) error {
	if err := r.putManifest(ctx, m, s); err != nil {
		return fmt.Errorf("write the manifest of checkpoint %s: %w", m.Checkpoint, err)
	}
	return nil
}

func (r *Repository) putManifest(ctx context.Context, m *Manifest, s Signer) error {
	h := backend.Handle{Kind: backend.Manifest, Name: m.Checkpoint}
	if err := h.Valid(); err != nil {
		return err
	}
	m.Format = formatVersion
	p, err := encodeManifest(m, s)
	if err != nil {
		return err
	}
	if len(p) > manifestLimit {
		return fmt.Errorf("it has %d bytes, more than the %d allowed", len(p), manifestLimit)
	}
	l, err := r.newLease(ctx, leasePrefix, "manifest of checkpoint "+m.Checkpoint)
	if err != nil {
		return err
	}
	defer l.release()
	if err := r.checkParts(ctx, l, m.Tasks); err != nil {
		return err
	}
	if err := l.check(); err != nil {
		return err
	}
	return r.be.Save(ctx, h, bytes.NewReader(p), int64(len(p)))
}

// checkParts looks up everything that the parts refer to, and makes sure that
// it stays. The lease l knows no condemned list, so from now on none is
// carried out, except by a garbage collection that began before. What that one
// may delete is in a list that is read here, and is refused, unless the part's
// own lease is still alive: then that has been in its way all the time.
func (r *Repository) checkParts(ctx context.Context, l *lease, tasks []TaskManifest) error {
	if _, err := l.readCondemned(ctx); err != nil {
		return err
	}
	if err := r.sync(ctx); err != nil {
		return err
	}
	now, err := l.backendTime(ctx)
	if err != nil {
		return err
	}
	living, err := r.leases(ctx, leasePrefix, now)
	if err != nil {
		return err
	}
	for _, t := range tasks {
		if err := r.checkPart(ctx, t.Part, l.avoid, living); err != nil {
			return fmt.Errorf("task %d: %w", t.Index, err)
		}
	}
	return nil
}

func (r *Repository) checkPart(ctx context.Context, id string, avoid map[ID]bool, living map[string]leaseRecord) error {
	name, err := ParseID(id)
	if err != nil {
		return err
	}
	p, err := r.loadPart(ctx, name)
	if err != nil {
		return err
	}
	if _, alive := living[p.Lease]; alive {
		avoid = nil
	}
	if avoid[name] {
		return fmt.Errorf("part %s: %w", id, ErrPartExpired)
	}
	return r.walkPart(ctx, &p, make(map[ID]bool), func(id ID) error {
		if _, ok, err := r.db.lookup(id, avoid); ok || err != nil {
			return err
		}
		if _, ok, err := r.db.lookup(id, nil); ok || err != nil {
			return errors.Join(err, fmt.Errorf("part %s: %w", name, ErrPartExpired))
		}
		return &DamagedError{Object: "part " + name.String(), Chunk: id.String(), Err: errors.New("no pack contains it")}
	})
}

// LoadManifest reads a checkpoint's manifest and verifies its signature.
func (r *Repository) LoadManifest(ctx context.Context, checkpoint string, v *Verifier) (*Manifest, error) {
	h := backend.Handle{Kind: backend.Manifest, Name: checkpoint}
	if err := h.Valid(); err != nil {
		return nil, fmt.Errorf("checkpoint %q: %w", checkpoint, backend.ErrNotExist)
	}
	p, err := backend.ReadAll(ctx, r.be, h, manifestLimit)
	if err != nil {
		return nil, fmt.Errorf("read the manifest of checkpoint %s: %w", checkpoint, err)
	}
	m, err := parseManifest(p, v)
	if err != nil {
		return nil, fmt.Errorf("manifest of checkpoint %s refused: %w", checkpoint, err)
	}
	if m.Checkpoint != checkpoint {
		return nil, fmt.Errorf("manifest of checkpoint %s refused: it is that of checkpoint %s: %w", checkpoint, m.Checkpoint, ErrSignature)
	}
	return m, nil
}

// ListManifests returns the ids of all durable checkpoints.
func (r *Repository) ListManifests(ctx context.Context) ([]string, error) {
	var ids []string
	err := r.be.List(ctx, backend.Manifest, func(info backend.Info) error {
		ids = append(ids, info.Name)
		return nil
	})
	return ids, err
}

// RemoveManifest forgets a checkpoint; GC frees what only it needed. It does
// not insist on a manifest that is whole, so that a damaged one can be removed.
func (r *Repository) RemoveManifest(ctx context.Context, checkpoint string) error {
	if err := r.removeManifest(ctx, backend.Handle{Kind: backend.Manifest, Name: checkpoint}); err != nil {
		return fmt.Errorf("remove checkpoint %s: %w", checkpoint, err)
	}
	return nil
}

func (r *Repository) removeManifest(ctx context.Context, h backend.Handle) error {
	p, err := backend.ReadAll(ctx, r.be, h, manifestLimit)
	if errors.Is(err, backend.ErrNotExist) {
		return err
	}
	if err == nil {
		if err := r.release(ctx, p); err != nil {
			return err
		}
	}
	return r.be.Remove(ctx, h)
}
