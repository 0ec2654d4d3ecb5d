package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"dormouse/client"
)

// defaultRunDir is where `up` leaves its pointer file; /run is empty after a boot.
const defaultRunDir = "/run/dormouse"

// pointerFile is the name of the file, in the run directory and in the state
// directory, by which the other commands find a running `up`.
const pointerFile = "up.json"

// controllerGrace is how long a command that waits bears with a controller that
// is away: long enough for one to be restarted.
const controllerGrace = time.Minute

// pointer says how to reach a running `up`.
type pointer struct {
	URL       string `json:"url"`
	TokenFile string `json:"token_file"`
	CAFile    string `json:"ca_file"`
	State     string `json:"state"`
	Pid       int    `json:"pid"`
}

func readPointer(file string) (*pointer, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	found := &pointer{}
	if err := json.Unmarshal(content, found); err != nil {
		return nil, fmt.Errorf("%s is damaged (%w): restart `dormouse up`", file, err)
	}
	return found, nil
}

// config resolves the pointer into what a client needs.
func (p *pointer) config() (client.Config, error) {
	token, err := os.ReadFile(p.TokenFile)
	if err != nil {
		return client.Config{}, fmt.Errorf("read the token of `dormouse up`: %w", err)
	}
	return client.Config{URL: p.URL, Token: strings.TrimSpace(string(token)), CAFile: p.CAFile}, nil
}

// connect returns a client of the controller that the flags, the environment or
// this machine's `up` name, in this order; each of address, token and CA may be
// set on its own.
func (c *cli) connect() (*client.Client, error) {
	config := client.Config{
		URL:    firstOf(c.controller, c.getenv("DORMOUSE_CONTROLLER")),
		Token:  firstOf(c.token, c.getenv("DORMOUSE_TOKEN")),
		CAFile: firstOf(c.ca, c.getenv("DORMOUSE_CA")),
	}
	if config.URL == "" {
		local, err := c.localConfig()
		if err != nil {
			return nil, err
		}
		config.URL = local.URL
		config.Token = firstOf(config.Token, local.Token)
		config.CAFile = firstOf(config.CAFile, local.CAFile)
	}
	made, err := client.New(config)
	if err != nil {
		return nil, usagef("%v", err)
	}
	return made, nil
}

func (c *cli) localConfig() (client.Config, error) {
	file := filepath.Join(c.runDir, pointerFile)
	found, err := readPointer(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return client.Config{}, errors.New("no controller is known: run `sudo dormouse up` here, or set DORMOUSE_CONTROLLER, DORMOUSE_TOKEN and DORMOUSE_CA to what `dormouse env` prints on the controller's machine")
	case errors.Is(err, fs.ErrPermission):
		return client.Config{}, fmt.Errorf("%s belongs to root: use sudo, or set the variables that `sudo dormouse env` prints", file)
	case err != nil:
		return client.Config{}, err
	}
	return found.config()
}

// patiently repeats call while the controller cannot be reached, for as long as
// the grace lasts: what the user waits for outlives a controller's restart.
func (c *cli) patiently(ctx context.Context, call func() error) error {
	deadline := c.now().Add(controllerGrace)
	told := false
	for {
		err := call()
		if !client.IsUnreachable(err) || c.now().After(deadline) {
			return err
		}
		if !told {
			fmt.Fprintf(c.err, "dormouse: the controller is away; waiting up to %s for it\n", controllerGrace)
			told = true
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func firstOf(values ...string) string {
	for _, value := range values {
		if value != "" {
			return value
		}
	}
	return ""
}
