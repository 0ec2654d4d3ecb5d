package pid1

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
)

// A remote start: dormouse-rsh in one task connects to the pid 1 of another by
// TCP, over the job's own network.
//
//	pid 1         FrameChallenge   fresh random bytes
//	dormouse-rsh  FrameProof       that it knows the job's secret
//	dormouse-rsh  FrameRequest     a RemoteRequest
//	pid 1         FrameOK, and then an exec session, or FrameFailure
//
// The session is the same as the agent's, and cannot be detached: when the
// connection ends, the process is hung up.

// RemotePort is the TCP port for remote starts on a task's virtual address.
const RemotePort = 7999

// Bounds of what comes from the network.
const (
	ChallengeSize = 32
	// MaxProof is for frames of those who have not proved anything.
	MaxProof = sha256.Size
	// MaxRemoteRequest and MaxRemoteFrame are for frames of those who have.
	MaxRemoteRequest = MaxRemoteCommand*3/2 + 4096
	MaxRemoteFrame   = Window
	// MaxRemoteCommand is execve(2)'s limit of one argument (MAX_ARG_STRLEN).
	MaxRemoteCommand = 128<<10 - 1
)

// RemoteRequest asks for a process.
type RemoteRequest struct {
	Command []byte `json:"command"`        // for sh -c, in whatever encoding
	User    string `json:"user,omitempty"` // if given, it has to be the job's
}

// Check finds what no request may hold.
func (r *RemoteRequest) Check() error {
	switch {
	case len(r.Command) == 0:
		return Refuse("no command was given, and a remote start has no terminal for a shell")
	case len(r.Command) > MaxRemoteCommand:
		return Refuse("a command of %d bytes is longer than the %d allowed", len(r.Command), MaxRemoteCommand)
	case bytes.IndexByte(r.Command, 0) >= 0:
		return Refuse("the command holds a zero byte")
	}
	return nil
}

// Proof answers a challenge.
func Proof(secret, challenge []byte) []byte {
	mac := hmac.New(sha256.New, secret)
	fmt.Fprintf(mac, "dormouse remote start 1\n%s", challenge)
	return mac.Sum(nil)
}

// Proves reports whether proof answers challenge. No proof holds for an empty
// secret.
func Proves(proof, secret, challenge []byte) bool {
	return len(secret) > 0 && hmac.Equal(proof, Proof(secret, challenge))
}
