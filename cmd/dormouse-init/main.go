// Command dormouse-init is pid 1 of every sandbox: small, static, and copied
// into the sandbox so that it travels with every checkpoint.
//
// It has two stages. `setup` is started by the agent in new namespaces: it
// mounts the sandbox's file systems, makes the new root its own, gives up what
// a sandbox must not have, and replaces itself by the copy inside the sandbox.
// `run` is that copy: it starts the command, reaps every orphan, forwards
// signals, starts what is exec'ed into the sandbox as its own children (or CRIU
// would not see them), and ends when the command ends, having written how. See
// package pid1 for what it says to the agent.
//
// `hold` is no stage of a sandbox: it only keeps alive the namespaces it was
// started in, those of a virtual node or of a job's network on a node.
//
// Under the names dormouse-rsh and dormouse-ctl the same binary is what programs
// of the task run to speak to a pid 1: to that of another task, to start a
// process there, or to their own, to ask for a checkpoint.
//
// In stage `run` it holds no descriptor from outside the sandbox but
// connections that the agent can ask it to drop, and no timer, so CRIU can take
// and restore it at any instant.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"dormouse/agent/sandbox/pid1"
)

// stageSetup is the argument of the first stage.
const stageSetup = "setup"

func init() {
	// Capabilities and namespaces belong to threads: set-up has to happen on,
	// and the second stage has to be executed from, the first one. Elsewhere it
	// would cost a thread, which the runtime then keeps to start others from.
	if len(os.Args) == 2 && os.Args[1] == stageSetup {
		runtime.LockOSThread()
	}
}

func main() {
	switch filepath.Base(os.Args[0]) {
	case pid1.RemoteShell:
		os.Exit(remoteShell(os.Args))
	case pid1.Controller:
		os.Exit(controller(os.Args))
	}
	stage := ""
	if len(os.Args) == 2 {
		stage = os.Args[1]
	}
	// What follows `hold` is a label by which its starter knows it again.
	if len(os.Args) > 1 && os.Args[1] == "hold" {
		stage = "hold"
	}
	switch stage {
	case "hold":
		hold(os.Args[2:])
	case stageSetup:
		setup()
	case "run":
		run()
	default:
		fmt.Fprintln(os.Stderr, "dormouse-init is started by the dormouse agent as the first process of a sandbox; it is of no use by hand")
		os.Exit(2)
	}
}
