package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"dormouse/agent/sandbox/pid1"
)

// defaultPath is where commands are looked for when nobody says otherwise.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// resolve turns wishes into what will be executed: the user's numbers, the
// environment, the working directory and the command's file, all as found in
// the new root.
func resolve(cfg *pid1.Setup) (*pid1.Run, error) {
	who, err := lookupUser(cfg.User, "/etc/passwd", "/etc/group")
	if err != nil {
		return nil, err
	}
	run := &pid1.Run{
		Command: cfg.Command, Env: slices.Clone(cfg.Env), WorkDir: cfg.WorkDir,
		UID: who.uid, GID: who.gid, Groups: who.groups, User: who.name,
		Remote: cfg.Remote, JobRun: cfg.JobRun,
	}
	if run.UID != 0 {
		run.Ambient = cfg.Ambient
	} else {
		run.Env = append(slices.Clone(cfg.RootEnv), run.Env...)
	}
	for _, def := range []struct{ key, value string }{
		{"PATH", defaultPath}, {"HOME", who.home}, {"USER", who.name}, {"LOGNAME", who.name}, {"HOSTNAME", cfg.Hostname},
	} {
		if _, ok := lookupEnv(run.Env, def.key); !ok && def.value != "" {
			run.Env = append(run.Env, def.key+"="+def.value)
		}
	}
	path, _ := lookupEnv(run.Env, "PATH")
	run.Env = unique(append(run.Env, "PATH="+path+":"+inside(pid1.BinDir)))
	if run.WorkDir == "" {
		run.WorkDir = "/"
	}
	if cfg.MakeWorkDir {
		if err := os.MkdirAll(run.WorkDir, 0o755); err != nil {
			return nil, pid1.Refuse("the image's working directory %s cannot be made: %v", run.WorkDir, err)
		}
	}
	if info, err := os.Stat(run.WorkDir); err != nil || !info.IsDir() {
		return nil, pid1.Refuse("the working directory %s is not a directory of the root", run.WorkDir)
	}
	if len(run.Command) == 0 {
		return run, nil
	}
	run.Path, err = lookupCommand(run, run.Command[0])
	return run, err
}

// lookupCommand finds the file of a command as execvp(3) would, for the user
// who will run it.
func lookupCommand(run *pid1.Run, name string) (string, error) {
	if strings.Contains(name, "/") {
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(run.WorkDir, path)
		}
		if err := executable(path, run); err != nil {
			return "", pid1.NotFound("the command %s cannot be run: %v", name, err)
		}
		return path, nil
	}
	path, _ := lookupEnv(run.Env, "PATH")
	var denied error
	for dir := range strings.SplitSeq(path, ":") {
		if !filepath.IsAbs(dir) {
			dir = filepath.Join(run.WorkDir, dir)
		}
		file := filepath.Join(dir, name)
		err := executable(file, run)
		if err == nil {
			return file, nil
		}
		if denied == nil && err != errMissing {
			denied = pid1.NotFound("the command %s cannot be run: %s: %v", name, file, err)
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", pid1.NotFound("the command %s was not found in the sandbox's root (PATH is %s)", name, path)
}

var errMissing = errors.New("there is no such file in the sandbox's root")

// executable says why run's user may not execute file.
func executable(file string, run *pid1.Run) error {
	info, err := os.Stat(file)
	if errors.Is(err, os.ErrNotExist) {
		return errMissing
	}
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("it is not a regular file")
	}
	stat, mode := info.Sys().(*syscall.Stat_t), info.Mode().Perm()
	switch {
	case run.UID == 0:
		mode &= 0o111
	case stat.Uid == run.UID:
		mode &= 0o100
	case stat.Gid == run.GID || slices.Contains(run.Groups, stat.Gid):
		mode &= 0o010
	default:
		mode &= 0o001
	}
	if mode == 0 {
		return fmt.Errorf("user %d has no permission to execute it", run.UID)
	}
	return nil
}

func lookupEnv(env []string, key string) (string, bool) {
	for _, entry := range slices.Backward(env) {
		if value, ok := strings.CutPrefix(entry, key+"="); ok {
			return value, true
		}
	}
	return "", false
}

// account is a user as the root's own files know it.
type account struct {
	name, home string
	uid, gid   uint32
	groups     []uint32
}

// lookupUser resolves NAME, UID, NAME:GROUP or UID:GID; "" is root. Numbers need
// not be listed in the files; names must.
func lookupUser(spec, passwd, group string) (*account, error) {
	user, wanted, hasGroup := strings.Cut(spec, ":")
	if user == "" {
		user = "0"
	}
	who := &account{home: "/"}
	number, isNumber := parseID(user)
	found := false
	err := eachLine(passwd, 7, func(fields []string) {
		uid, ok := parseID(fields[2])
		gid, okGroup := parseID(fields[3])
		// A number is never a name: a root of the user's own making could have an
		// account that is named 1000 and is root.
		if found || !ok || !okGroup || isNumber && uid != number || !isNumber && fields[0] != user {
			return
		}
		found = true
		who.name, who.uid, who.gid, who.home = fields[0], uid, gid, fields[5]
	})
	if err != nil {
		return nil, err
	}
	switch {
	case found:
	case isNumber:
		who.uid = number
		if number == 0 {
			who.name, who.home = "root", "/root"
		}
	default:
		return nil, pid1.Refuse("there is no user %s in the root's %s", user, passwd)
	}
	if hasGroup {
		return who, who.setGroup(wanted, group)
	}
	return who, who.addGroups(group)
}

// setGroup makes wanted the only group.
func (a *account) setGroup(wanted, file string) error {
	number, isNumber := parseID(wanted)
	found := isNumber
	err := eachLine(file, 3, func(fields []string) {
		if gid, ok := parseID(fields[2]); ok && !found && fields[0] == wanted {
			number, found = gid, true
		}
	})
	if err != nil {
		return err
	}
	if !found {
		return pid1.Refuse("there is no group %s in the root's %s", wanted, file)
	}
	a.gid, a.groups = number, []uint32{number}
	return nil
}

// addGroups collects the groups that list the user as a member.
func (a *account) addGroups(file string) error {
	a.groups = []uint32{a.gid}
	return eachLine(file, 4, func(fields []string) {
		gid, ok := parseID(fields[2])
		if ok && a.name != "" && !slices.Contains(a.groups, gid) && slices.Contains(strings.Split(fields[3], ","), a.name) {
			a.groups = append(a.groups, gid)
		}
	})
}

// eachLine calls do with the fields of every line that has at least n. A root
// without the file has no such lines.
func eachLine(name string, n int, do func(fields []string)) error {
	file, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot look up users: %w", err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if fields := strings.Split(lines.Text(), ":"); len(fields) >= n {
			do(fields)
		}
	}
	return lines.Err()
}

func parseID(s string) (uint32, bool) {
	id, err := strconv.ParseUint(s, 10, 32)
	// 2^32-1 means "no change" to the kernel.
	return uint32(id), err == nil && id != 1<<32-1
}
