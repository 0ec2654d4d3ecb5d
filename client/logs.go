package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
)

// LogChunk is some bytes that one task wrote.
type LogChunk struct {
	Task   int    `json:"task"`
	Stream string `json:"stream"` // stdout or stderr
	Data   []byte `json:"data"`   // base64 in JSON: programs write any bytes
}

// LogOptions choose what Logs reads.
type LogOptions struct {
	Task   int  // AllTasks, or a task's number
	Follow bool // go on until the job is over
}

// AllTasks merges the logs of all tasks.
const AllTasks = -1

// Logs hands what a job's tasks have written to each, in order per task and
// stream.
func (c *Client) Logs(ctx context.Context, job string, options LogOptions, each func(LogChunk) error) error {
	query := url.Values{}
	if options.Task != AllTasks {
		query.Set("task", strconv.Itoa(options.Task))
	}
	if options.Follow {
		query.Set("follow", "true")
	}
	response, err := c.send(ctx, http.MethodGet, jobPath(job)+"/logs", query, "", nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	decoder := json.NewDecoder(response.Body)
	for {
		line := struct {
			LogChunk
			Error string `json:"error"`
		}{}
		err := decoder.Decode(&line)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return c.failed(ctx, fmt.Errorf("the log ended early: %w", err))
		}
		if line.Error != "" {
			return fmt.Errorf("the log ended early: %s", line.Error)
		}
		if err := each(line.LogChunk); err != nil {
			return err
		}
	}
}
