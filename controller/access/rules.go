package access

import (
	"path"

	"dormouse/api"
)

func clean(name string) string { return path.Clean("/" + name) }

// Rule says who may use a route.
type Rule int

// The rules.
const (
	Admin    Rule = iota // admins
	Operator             // operators too
	Own                  // users too, for what is theirs
	Anyone               // every token
)

// Rules are the rules of all routes, by the operationId of their OpenAPI
// description. A route without one is for admins.
var Rules = map[string]Rule{
	"submit":          Anyone, // Confine has its say
	"jobs":            Own,
	"job":             Own,
	"wait-job":        Own,
	"remove-job":      Own,
	"suspend":         Own,
	"resume":          Own,
	"restart":         Own,
	"kill":            Own,
	"logs":            Own,
	"exec":            Own,
	"events":          Own,
	"checkpoint":      Own,
	"job-checkpoints": Own,
	"checkpoints":     Own,

	"show-checkpoint":   Own,
	"remove-checkpoint": Own,
	"verify-checkpoint": Own,
	"clone":             Own,

	"operations":       Own,
	"operation":        Own,
	"cancel-operation": Own,

	"plan-preempt": Operator, // who may take others' places?
	"preempt":      Operator,
	"plan-swap":    Operator,
	"swap":         Operator,
	"verify":       Operator, // reads everything

	"top":        Own,
	"nodes":      Anyone,
	"clouds":     Anyone,
	"version":    Anyone,
	"whoami":     Anyone,
	"drain":      Operator,
	"uncordon":   Operator,
	"label-node": Operator,
	"kill-node":  Operator,
	"start-node": Operator,
	"metrics":    Operator,

	"controllers": Operator,

	"create-token": Admin,
	"tokens":       Admin,
	"revoke-token": Admin,
	"audit":        Admin,
	"backup":       Admin, // it holds the controller's keys
}

// Decide refuses a route to a token whose role may not use it. Whose the thing
// is that an Own route is about is not known here.
func Decide(who Identity, route string) error {
	rule := Rules[route]
	switch {
	case who.Role == api.RoleAdmin,
		who.Role == api.RoleOperator && rule != Admin,
		who.Role == api.RoleUser && (rule == Own || rule == Anyone):
		return nil
	case rule == Admin:
		return denied("only an admin may do that, and the token %s has the role %s", who.Name, who.Role)
	}
	return denied("only an admin or an operator may do that, and the token %s has the role %s", who.Name, who.Role)
}
