package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"dormouse/api"
)

const (
	protocolTCP = "tcp"
	protocolUDP = "udp"
	maxPort     = 1<<16 - 1
)

// The values of --launch and --connections; the first is the default.
var (
	launches    = []string{api.LaunchAuto, api.LaunchEach, api.LaunchFirst}
	connections = []string{api.ConnectionsRefuse, api.ConnectionsClose, api.ConnectionsKeep}
)

// parsePublish reads [TASK:]PORT[:TARGET][/tcp|/udp]. Of two numbers, the first
// is a task if the job has one of that number, and otherwise a port of the node:
// 1:8080 and 8080:80 both mean what they seem to.
func parsePublish(text string, tasks int) (api.Publish, error) {
	wrong := fmt.Errorf("the published port %q is not [TASK:]PORT[:TARGET][/udp], as in 8080, 8080:80 or 1:8080:80/udp", text)
	ports, protocol, tagged := strings.Cut(text, "/")
	if tagged && protocol != protocolTCP && protocol != protocolUDP {
		return api.Publish{}, wrong
	}
	numbers := []int{}
	for _, word := range strings.Split(ports, ":") {
		number, err := strconv.ParseUint(word, 10, 31)
		if err != nil {
			return api.Publish{}, wrong
		}
		numbers = append(numbers, int(number))
	}
	publish := api.Publish{}
	if protocol == protocolUDP {
		publish.Protocol = protocolUDP
	}
	switch {
	case len(numbers) == 1:
		publish.Port = numbers[0]
	case len(numbers) == 2 && numbers[0] < tasks:
		publish.Task, publish.Port = numbers[0], numbers[1]
	case len(numbers) == 2:
		publish.Port, publish.Target = numbers[0], numbers[1]
	case len(numbers) == 3:
		publish.Task, publish.Port, publish.Target = numbers[0], numbers[1], numbers[2]
	default:
		return api.Publish{}, wrong
	}
	return publish, nil
}

// target is the port of the task that a published port leads to.
func target(publish api.Publish) int {
	if publish.Target == 0 {
		return publish.Port
	}
	return publish.Target
}

// checkParallel refuses what no controller would accept about the network and
// the launch.
func checkParallel(spec api.JobSpec) error {
	if spec.Launch != "" && !slices.Contains(launches, spec.Launch) {
		return usagef("the launch %q is not one of %s", spec.Launch, strings.Join(launches, ", "))
	}
	if spec.Connections != "" && !slices.Contains(connections, spec.Connections) {
		return usagef("the policy for connections %q is not one of %s", spec.Connections, strings.Join(connections, ", "))
	}
	taken := map[string]bool{}
	for _, publish := range spec.Publish {
		protocol := firstOf(publish.Protocol, protocolTCP)
		port := fmt.Sprintf("%d/%s", publish.Port, protocol)
		switch {
		case protocol != protocolTCP && protocol != protocolUDP:
			return usagef("the protocol %q of a published port is neither tcp nor udp", publish.Protocol)
		case publish.Port < 1 || publish.Port > maxPort:
			return usagef("%d cannot be published: a port is 1 to %d", publish.Port, maxPort)
		case publish.Target < 0 || publish.Target > maxPort:
			return usagef("%d cannot be published: a port is 1 to %d", publish.Target, maxPort)
		case publish.Task < 0 || publish.Task >= spec.Tasks:
			return usagef("a port of task %d is to be published, but the job has the tasks 0 to %d", publish.Task, spec.Tasks-1)
		case taken[port]:
			return usagef("the port %s is published twice; tasks may share a node, so each needs its own", port)
		}
		taken[port] = true
	}
	return nil
}
