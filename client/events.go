package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"dormouse/api"
)

// Events hands each event of the history (of one job, when job is not empty)
// to each, and with follow every later one, until ctx ends or each fails.
func (c *Client) Events(ctx context.Context, job string, follow bool, each func(api.Event) error) error {
	query := url.Values{}
	if job != "" {
		query.Set("job", job)
	}
	if follow {
		query.Set("follow", "true")
	}
	response, err := c.send(ctx, http.MethodGet, "/v1/events", query, "", nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	err = readEvents(response.Body, func(data []byte) error {
		event := api.Event{}
		if err := json.Unmarshal(data, &event); err != nil {
			return fmt.Errorf("read an event: %w", err)
		}
		return each(event)
	})
	var broken *readError
	if errors.As(err, &broken) {
		return c.failed(ctx, broken.err)
	}
	if err == nil && follow && ctx.Err() == nil {
		return c.failed(ctx, fmt.Errorf("the stream of events ended: %w", io.ErrUnexpectedEOF))
	}
	return err
}

// readError is a failure of the connection, as opposed to one of the reader.
type readError struct{ err error }

func (e *readError) Error() string { return e.err.Error() }

// readEvents hands the data of each server-sent event to each.
// WHATWG HTML, 9.2.6: data lines of one event are joined by a line feed; an
// empty line ends the event; lines that begin with a colon are comments.
func readEvents(stream io.Reader, each func([]byte) error) error {
	lines := bufio.NewReader(stream)
	var data [][]byte
	for {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF {
			return nil // an event that was not ended by an empty line is dropped
		}
		if err != nil {
			return &readError{err}
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			if len(data) > 0 {
				if err := each(bytes.Join(data, []byte("\n"))); err != nil {
					return err
				}
			}
			data = nil
			continue
		}
		if value, ok := bytes.CutPrefix(line, []byte("data:")); ok {
			data = append(data, bytes.TrimPrefix(value, []byte(" ")))
		}
	}
}
