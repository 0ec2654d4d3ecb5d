package controller

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"dormouse/controller/store"
	"dormouse/controller/store/bolt"
	"dormouse/controller/store/etcd"
)

// OpenStore opens the store that a configuration names.
func OpenStore(ctx context.Context, config Config, log *slog.Logger) (store.Store, error) {
	if config.Store.Backend != storeEtcd {
		s, err := bolt.Open(filepath.Join(config.State, "controller.db"))
		if err != nil {
			return nil, err // and no *bolt.Store that is nil
		}
		return s, nil
	}
	options, err := config.Store.options()
	if err != nil {
		return nil, err
	}
	options.Logger = log
	s, err := etcd.Open(ctx, options)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// options reads the files that the configuration names.
func (c *StoreConfig) options() (etcd.Options, error) {
	options := etcd.Options{Endpoints: c.Endpoints, Prefix: c.Prefix, User: c.User}
	if c.PasswordFile != "" {
		password, err := os.ReadFile(c.PasswordFile)
		if err != nil {
			return options, fmt.Errorf("read the password for etcd: %w", err)
		}
		options.Password = strings.TrimSpace(string(password))
	}
	if !strings.HasPrefix(c.Endpoints[0], "https://") {
		return options, nil
	}
	options.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CA != "" {
		text, err := os.ReadFile(c.CA)
		if err != nil {
			return options, fmt.Errorf("read the authority of etcd's certificates: %w", err)
		}
		options.TLS.RootCAs = x509.NewCertPool()
		if !options.TLS.RootCAs.AppendCertsFromPEM(bytes.TrimSpace(text)) {
			return options, fmt.Errorf("%s holds no PEM certificate: store.ca must be that of etcd's authority", c.CA)
		}
	}
	if c.Cert != "" {
		pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
		if err != nil {
			return options, fmt.Errorf("read the certificate to show to etcd: %w", err)
		}
		options.TLS.Certificates = []tls.Certificate{pair}
	}
	return options, nil
}
