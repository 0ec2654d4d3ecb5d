package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
)

// The values of -o.
const (
	outputTable = "table"
	outputJSON  = "json"
)

func (c *cli) json() bool { return c.output == outputJSON }

// printDocument writes one JSON document for programs and people.
func (c *cli) printDocument(value any) error {
	encoder := json.NewEncoder(c.out)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	return encoder.Encode(value)
}

// printLine writes one JSON document on one line, as streams do.
func (c *cli) printLine(value any) error {
	encoder := json.NewEncoder(c.out)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(value)
}

// show prints value as JSON, or text when people look.
func (c *cli) show(value any, text string, args ...any) error {
	if c.json() {
		return c.printDocument(value)
	}
	_, err := fmt.Fprintf(c.out, text+"\n", args...)
	return err
}

// printTable writes aligned columns. Cells must not hold tabs or line ends.
func (c *cli) printTable(header []string, rows [][]string) error {
	table := tabwriter.NewWriter(c.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(table, strings.Join(header, "\t"))
	for _, row := range rows {
		for i, cell := range row {
			row[i] = oneLine(cell)
		}
		fmt.Fprintln(table, strings.Join(row, "\t"))
	}
	return table.Flush()
}

// note tells people, not programs, something beside the answer.
func (c *cli) note(text string, args ...any) {
	if !c.json() {
		fmt.Fprintf(c.err, text+"\n", args...)
	}
}

func oneLine(text string) string {
	if text == "" {
		return "-"
	}
	return strings.Join(strings.Fields(text), " ")
}
