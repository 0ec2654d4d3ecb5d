package criu

import (
	"fmt"
	"os"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

// This file is the one place where CRIU's options are set.

const (
	dumpLog    = "dump.log"
	restoreLog = "restore.log"

	// netNSKey names the job's network namespace in the images. It is made by
	// the agent, not by CRIU, on both sides.
	netNSKey = "jobnet"

	// ghostLimit bounds one deleted-but-open file that is carried in the
	// images. The default of 1 MiB is too small for MPI's shared segments.
	ghostLimit = 1 << 30

	// defaultLogLevel writes CRIU's errors and warnings.
	defaultLogLevel = 2

	// defaultFreezeSeconds bounds the time CRIU tries to stop all processes.
	defaultFreezeSeconds = 10
)

// common are the options that must be the same for dump and restore.
func common(images, work *os.File, logFile string, logLevel int) *rpc.CriuOpts {
	if logLevel == 0 {
		logLevel = defaultLogLevel
	}
	cgroups := rpc.CriuCgMode_IGNORE // the agent places tasks; see criu.md and RestoreRequest.Enter
	netlock := rpc.CriuNetworkLockMethod_SKIP
	return &rpc.CriuOpts{
		// CRIU opens /proc/OUR-PID/fd/N of these.
		ImagesDirFd: proto.Int32(int32(images.Fd())),
		WorkDirFd:   proto.Int32(int32(work.Fd())),
		LogFile:     proto.String(logFile),
		LogLevel:    proto.Int32(int32(logLevel)),

		NotifyScripts:     proto.Bool(true),
		TcpEstablished:    proto.Bool(true),
		FileLocks:         proto.Bool(true),
		LinkRemap:         proto.Bool(true),
		GhostLimit:        proto.Uint32(ghostLimit),
		ManageCgroupsMode: &cgroups,
		// The job's network is cut by the agent, which can let the cut outlive
		// CRIU; CRIU's own cut costs 50 to 100 ms and needs iptables or nft.
		NetworkLock: &netlock,
	}
}

func dumpOptions(r DumpRequest, images, work *os.File, netNS uint64) *rpc.CriuOpts {
	o := common(images, work, dumpLog, r.LogLevel)
	o.Pid = proto.Int32(int32(r.Pid))
	o.LeaveRunning = proto.Bool(r.LeaveRunning)
	o.Timeout = proto.Uint32(defaultFreezeSeconds)
	if r.FreezeTimeout > 0 {
		o.Timeout = proto.Uint32(uint32(max(1, r.FreezeTimeout.Seconds())))
	}
	if r.FreezeCgroup != "" {
		o.FreezeCgroup = proto.String(r.FreezeCgroup)
	}
	if netNS != 0 {
		o.External = append(o.External, fmt.Sprintf("net[%d]:%s", netNS, netNSKey))
	}
	for _, m := range r.ExternalMounts {
		o.External = append(o.External, fmt.Sprintf("mnt[%s]:%s", m.Mountpoint, m.Key))
	}
	return o
}

func restoreOptions(r RestoreRequest, images, work *os.File, ownNetNS bool) *rpc.CriuOpts {
	o := common(images, work, restoreLog, r.LogLevel)
	o.Root = proto.String(r.Root)
	if ownNetNS {
		o.InheritFd = []*rpc.InheritFd{{Key: proto.String(netNSKey), Fd: proto.Int32(swrkFD + 1)}}
	}
	for _, m := range r.ExternalMounts {
		o.External = append(o.External, fmt.Sprintf("mnt[%s]:%s", m.Key, m.Source))
	}
	return o
}
