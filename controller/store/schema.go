package store

import "fmt"

// Schema is the version of the tables and of what is in them. A store that was
// written by a newer schema is refused, never guessed at; an older one is brought
// to this one before it is used.
const Schema = 3

// The tables of schema 1.
const (
	Jobs        Table = "jobs"        // by job id
	Operations  Table = "operations"  // by operation id
	Checkpoints Table = "checkpoints" // by checkpoint id
	Nodes       Table = "nodes"       // by node id
	Events      Table = "events"      // by number, %016x
	Tokens      Table = "tokens"      // join tokens, by the SHA-256 of the token
	Cleanups    Table = "cleanups"    // tasks that nodes must still destroy, by node/job/index/run
)

// The tables of schema 2.
const (
	Receipts     Table = "receipts"      // answers to requests, by the hash of whose and which key, and by age
	AccessTokens Table = "access_tokens" // tokens of people, by the SHA-256 of the secret
	Audit        Table = "audit"         // who did what, by number, %016x
)

// The tables of schema 3.
const (
	Monitor Table = "monitor" // the monitoring tree, the last verdict of each node, what is to be posted
)

// Upgrades is the way from the first schema to the present one. A change of
// tables, or of what is in them that an older dormouse would misread or a newer
// one would miss, is one more step here, and one more Schema.
func Upgrades() Plan {
	return Plan{
		{Tables: []Table{Receipts, AccessTokens, Audit}},
		{Tables: []Table{Monitor}},
	}
}

// Tables are all tables, for implementations that make them ahead.
func Tables() []Table { return Upgrades().Tables(Schema) }

// Upgrade brings a store from one schema to the next.
type Upgrade struct {
	// Tables are the ones that it brings.
	Tables []Table
	// Do changes the records that are there; nil where nothing has to be changed.
	// It runs in one transaction with all other steps and with the new schema's
	// number, so it happens as a whole or not at all, and once.
	Do func(Tx) error
}

// Plan is a list of upgrades, of which the first makes schema 2 of schema 1.
type Plan []Upgrade

// Schema is where the plan leads.
func (p Plan) Schema() int { return len(p) + 1 }

// Tables are the tables of a schema.
func (p Plan) Tables(schema int) []Table {
	tables := []Table{Jobs, Operations, Checkpoints, Nodes, Events, Tokens, Cleanups}
	for _, step := range p[:min(max(schema-1, 0), len(p))] {
		tables = append(tables, step.Tables...)
	}
	return tables
}

// Run takes the steps that follow schema from. Whoever calls it makes the new
// tables before, and writes the new schema after it.
func (p Plan) Run(tx Tx, from int) error {
	for schema := from; schema < p.Schema(); schema++ {
		step := p[schema-1]
		if step.Do == nil {
			continue
		}
		if err := step.Do(tx); err != nil {
			return fmt.Errorf("upgrade the store from schema %d to %d: %w", schema, schema+1, err)
		}
	}
	return nil
}
