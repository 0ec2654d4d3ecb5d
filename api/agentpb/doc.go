// Package agentpb is the generated code of agent.proto, the protocol between
// node agents and the controller, and of tree.proto, what the monitor sends up a
// tree of agents.
package agentpb

//go:generate protoc --proto_path=. --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative agent.proto tree.proto
