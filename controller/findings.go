package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"dormouse/api"
	"dormouse/controller/store"
	"dormouse/monitor/starvation"
	"dormouse/monitor/tree"
)

// What nodes find comes up the monitoring tree, each finding once and in order.
// It is written down with the task, or the node, that it is about, and the job is
// judged by what is known of all its tasks. What is done about it is decided in
// relief.go and, for a job that is ill, in recover.go.
//
// A finding is believed as far as it may come from there: it is about the node
// that raised it, or about a task of the job's present run that is placed on it.
// Anything else is void.

// Types of the events that tell of findings, which webhooks hear of too.
const (
	eventStarving  = "starving"
	eventRecovered = "recovered"
	eventUnhealthy = "unhealthy"
	eventHealthy   = "healthy"
)

// longestExplanation is what is kept of one, in characters: the record of a job
// has one for each task.
const longestExplanation = 600

// nodeTroubled is a node as the scheduler sees it that has found itself unfit for
// more tasks.
const nodeTroubled api.NodeState = "in trouble (`dormouse nodes` tells which)"

// found writes down what a node has found, and what follows from it.
func (c *Controller) found(tx store.Tx, v tree.Verdict) error {
	var f api.Finding
	if err := json.Unmarshal(v.Body, &f); err != nil {
		c.log.Warn("a finding cannot be read", "node", v.Node, "error", err)
		return nil
	}
	f.Node = v.Node
	if runes := []rune(f.Explanation); len(runes) > longestExplanation {
		f.Explanation = string(runes[:longestExplanation]) + "..."
	}
	if f.Job == "" {
		return c.foundOfNode(tx, f)
	}
	job, err := getJob(tx, f.Job)
	if err != nil {
		return ignoreNotFound(err)
	}
	ref := taskRef{Node: f.Node, Job: f.Job, Index: f.Task, Run: f.Run}
	if !job.owns(ref) || !job.Phase.Placed() {
		return nil
	}
	switch f.Kind {
	case api.FindingStarvation:
		job.TaskStatus[f.Task].Starvation = &f
		if err := c.judgeStarvation(tx, job, f.Time); err != nil {
			return err
		}
	case api.FindingHealth:
		before := job.TaskStatus[f.Task].Health
		job.TaskStatus[f.Task].Health = &f
		if err := c.tellHealth(tx, job, before, f); err != nil {
			return err
		}
	}
	return c.settle(tx, job)
}

// foundOfNode notes what a node has found about itself.
func (c *Controller) foundOfNode(tx store.Tx, f api.Finding) error {
	n, err := store.Get[nodeRecord](tx, store.Nodes, f.Node)
	if err != nil {
		return ignoreNotFound(err)
	}
	was := n.Trouble != nil
	n.Trouble = nil
	what := "is well again"
	if f.Condition != api.ConditionHealthy {
		n.Trouble, what = &f, "gets no more jobs for now"
	}
	if err := store.Put(tx, store.Nodes, n.ID, n); err != nil || !was && n.Trouble == nil {
		return err
	}
	return c.emit(tx, api.Event{Type: "node", Node: n.ID, Message: fmt.Sprintf("node %s %s: %s", n.ID, what, f.Explanation)})
}

// hungRounds are the rounds without a word of a monitor after which its agent must
// hang although its heartbeats come: no loss of a message or of an inner node of
// the tree lasts for so long.
const hungRounds = 12

// judgeAgents notes which agents hang, and which do not any more. What a node has
// found about itself goes before that.
func (c *Controller) judgeAgents(ctx context.Context) error {
	var changed []api.Finding
	err := c.store.View(ctx, func(tx store.Tx) error {
		nodes, err := c.nodes.all(tx)
		for _, n := range nodes {
			hangs, was := c.monitor.hangs(n.ID), n.Trouble != nil && n.Trouble.Condition == api.ConditionAgentHung
			if hangs == was || n.State != api.NodeReady && n.State != api.NodeCordoned || hangs && n.Trouble != nil {
				continue
			}
			f := api.Finding{Time: c.clock.Now().UTC(), Kind: api.FindingNode, Node: n.ID, Condition: api.ConditionHealthy, Explanation: "its agent measures again"}
			if hangs {
				f.Condition = api.ConditionAgentHung
				f.Explanation = fmt.Sprintf("its agent has measured nothing for %s, although its heartbeats come", hungRounds*c.parts.Round)
			}
			changed = append(changed, f)
		}
		return err
	})
	if err != nil || len(changed) == 0 {
		return err
	}
	return c.store.Update(ctx, func(tx store.Tx) error {
		for _, f := range changed {
			if err := c.foundOfNode(tx, f); err != nil {
				return err
			}
		}
		return nil
	})
}

// tellHealth tells when a task has fallen ill, or recovered.
func (c *Controller) tellHealth(tx store.Tx, job *jobRecord, before *api.Finding, f api.Finding) error {
	kind := eventHealthy
	switch ill := before != nil && before.Condition == api.ConditionUnhealthy; {
	case f.Condition == api.ConditionUnhealthy && !ill:
		kind = eventUnhealthy
	case f.Condition == api.ConditionUnhealthy || !ill:
		return nil
	}
	c.metrics.findings.WithLabelValues(string(f.Kind), f.Condition).Inc()
	err := c.emit(tx, api.Event{Job: job.ID, Type: kind, Node: f.Node, Message: f.Explanation})
	return errors.Join(err, c.postFinding(tx, job, kind, f, &f.Task))
}

// judgeStarvation judges a running job by what was found of its tasks last, and
// tells when that has changed.
func (c *Controller) judgeStarvation(tx store.Tx, job *jobRecord, now time.Time) error {
	verdicts := make([]starvation.Verdict, len(job.TaskStatus))
	for i, t := range job.TaskStatus {
		verdicts[i] = starvation.VerdictOf(api.Finding{})
		if t.Starvation != nil && t.ExitCode == nil {
			verdicts[i] = starvation.VerdictOf(*t.Starvation)
		}
	}
	before := job.Starvation
	if job.Starvation = starvationOf(job, starvation.Judge(verdicts), now); job.Starvation == nil {
		return c.breathesAgain(tx, job, before, now)
	}
	s := job.Starvation
	if before != nil {
		s.Action = before.Action
		if before.Condition == s.Condition && sameTask(before.Task, s.Task) {
			s.Since = before.Since
			return nil
		}
	}
	message := s.Explanation
	if s.Task != nil && job.Tasks > 1 {
		message += fmt.Sprintf("; task %d keeps the job back", *s.Task)
	}
	c.metrics.findings.WithLabelValues(string(api.FindingStarvation), s.Condition).Inc()
	c.log.Info("job starves", "job", job.ID, "condition", s.Condition, "why", s.Explanation)
	err := c.emit(tx, api.Event{Job: job.ID, Type: eventStarving, Node: s.Node, Message: message})
	f := api.Finding{Time: now, Kind: api.FindingStarvation, Condition: s.Condition, Since: &s.Since, Explanation: message, Node: s.Node}
	return errors.Join(err, c.postFinding(tx, job, eventStarving, f, s.Task))
}

// breathesAgain tells that a job is no longer kept from working.
func (c *Controller) breathesAgain(tx store.Tx, job *jobRecord, before *api.Starvation, now time.Time) error {
	if before == nil {
		return nil
	}
	node, explanation := before.Node, "its tasks work again"
	if before.Task != nil && job.TaskStatus[*before.Task].Starvation != nil {
		explanation = job.TaskStatus[*before.Task].Starvation.Explanation
	}
	message := fmt.Sprintf("%s; it was kept from working for %s", explanation, now.Sub(before.Since).Round(time.Second))
	f := api.Finding{Time: now, Kind: api.FindingStarvation, Condition: api.ConditionHealthy, Since: &before.Since, Explanation: message, Node: node}
	err := c.emit(tx, api.Event{Job: job.ID, Type: eventRecovered, Node: node, Message: message})
	return errors.Join(err, c.postFinding(tx, job, eventRecovered, f, before.Task))
}

// starvationOf is what is to be known of a verdict; nil when the job is well.
func starvationOf(job *jobRecord, v starvation.JobVerdict, now time.Time) *api.Starvation {
	if v.Condition == starvation.Healthy {
		return nil
	}
	s := &api.Starvation{Condition: string(v.Condition), Since: now, Waiting: v.Waiting, Explanation: v.Explanation}
	if v.Straggler >= 0 {
		s.Task, s.Node = &v.Straggler, job.TaskStatus[v.Straggler].Node
		if since := job.TaskStatus[v.Straggler].Starvation.Since; since != nil {
			s.Since = *since
		}
	}
	return s
}

func sameTask(a, b *int) bool { return a == nil && b == nil || a != nil && b != nil && *a == *b }

// short reports whether a condition is a shortage of the node's, rather than of
// the program's own making.
func short(condition string) bool {
	return slices.Contains([]string{string(starvation.StarvedCPU), string(starvation.StarvedMemory), string(starvation.StarvedIO)}, condition)
}
