package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"dormouse/api"
	"dormouse/client"
)

// operationPoll is how long one question for an operation's progress may stay
// open at the controller.
const operationPoll = 20 * time.Second

// barWidth is the number of cells of a progress bar.
const barWidth = 24

// follow waits until an operation has ended, drawing its progress when a person
// watches. Interrupted, it only stops looking: the operation goes on.
func (c *cli) follow(ctx context.Context, controller *client.Client, operation *api.Operation) (*api.Operation, error) {
	bar := &progressBar{cli: c}
	defer bar.clear()
	for operation.Phase == api.OpRunning {
		bar.draw(operation)
		err := c.patiently(ctx, func() error {
			next, err := controller.Operation(ctx, operation.ID, operationPoll)
			if err == nil {
				operation = next
			}
			return err
		})
		if ctx.Err() != nil {
			return nil, fmt.Errorf("stopped waiting, but the %s goes on: `dormouse operations %s` shows it", operation.Kind, operation.ID)
		}
		if err != nil {
			return nil, err
		}
	}
	if operation.Phase != api.OpDone {
		return nil, &operationError{operation}
	}
	return operation, nil
}

// progressBar is one line on the terminal that is drawn over and over.
type progressBar struct {
	cli   *cli
	drawn bool
}

func (b *progressBar) draw(operation *api.Operation) {
	if !b.cli.terminal {
		return
	}
	done := min(max(int(operation.Progress*barWidth), 0), barWidth)
	what := firstOf(operation.Message, operation.Step, string(operation.Kind))
	// CSI K clears what a longer line left behind.
	fmt.Fprintf(b.cli.err, "\r[%s%s] %3.0f%% %.*s\x1b[K", strings.Repeat("=", done), strings.Repeat(" ", barWidth-done), operation.Progress*100, b.room(), oneLine(what))
	b.drawn = true
}

// room is how many characters fit behind the bar: a line that is longer than the
// terminal is wide could not be drawn over.
func (b *progressBar) room() int {
	const bar, least, usual = barWidth + len("[] 100% ") + 1, 20, 80
	width := usual
	if file, ok := b.cli.err.(*os.File); ok {
		if columns, _, err := term.GetSize(int(file.Fd())); err == nil {
			width = columns
		}
	}
	return max(width-bar, least)
}

func (b *progressBar) clear() {
	if b.drawn {
		fmt.Fprint(b.cli.err, "\r\x1b[K")
	}
}
