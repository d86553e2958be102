// `down` and `run`: finding the cluster's processes, ending them, and looking whether anything is left.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Dying takes a moment when there are many pods; more than this is a process that cannot die.
const (
	dyingWait  = 30 * time.Second
	burialWait = 5 * time.Second
)

func down(at places) error {
	unlock, err := lock(at)
	if err != nil {
		return err
	}
	defer unlock()
	pid, err := supervisor(at)
	if err == nil {
		// It is the first process of its process namespace: the kernel ends all others with it, however deep.
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
		if err := gone(pid); err != nil {
			return err
		}
	}
	if err := removeCgroups(at); err != nil {
		return err
	}
	return wipe(at)
}

// wipe removes the cluster's files, which are in use by nobody.
func wipe(at places) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	// Cannot be, since the cluster's mounts are in namespaces of its own. Deleting through one would be bad.
	if bytes.Contains(mounts, []byte(" "+at.state()+"/")) {
		return fmt.Errorf("something is mounted below %s; unmount it first", at.state())
	}
	return os.RemoveAll(at.state())
}

func gone(pid int) error {
	deadline := time.Now().Add(dyingWait)
	var buried time.Time
	for {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return nil
		}
		// The kernel lets it become a zombie only when all the others are gone. Whose child it is then will bury it; if
		// that one sleeps, there is nothing more to do.
		if bytes.Contains(stat, []byte(") Z ")) {
			if buried.IsZero() {
				buried = time.Now().Add(burialWait)
			}
			if time.Now().After(buried) {
				return nil
			}
		} else if time.Now().After(deadline) {
			return fmt.Errorf("process %d does not die within %s", pid, dyingWait)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// supervisor finds the cluster's first process.
func supervisor(at places) (int, error) {
	return processOf(at, "supervise", "")
}

// processOf looks through the processes for ours: this program, with that command, directory and node. A number in a
// file could belong to somebody else by now.
func processOf(at places, command, nodeName string) (int, error) {
	wanted := []string{command, "-dir", at.dir}
	if nodeName != "" {
		wanted = append(wanted, nodeName)
	}
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, file := range found {
		line, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")
		if len(args) > 1 && filepath.Base(args[0]) == "cluster" && slices.Equal(args[1:], wanted) {
			return strconv.Atoi(filepath.Base(filepath.Dir(file)))
		}
	}
	if nodeName != "" {
		return 0, fmt.Errorf("%s does not run", nodeName)
	}
	return 0, fmt.Errorf("no cluster runs from %s; `make cluster-up` starts one", at.dir)
}

// run runs a command in a node's namespaces, or in those of the control plane.
func run(at places, where string, argv []string) error {
	command, err := within(at, where, argv)
	if err != nil {
		return err
	}
	command.Stdin, command.Stdout, command.Stderr = os.Stdin, os.Stdout, os.Stderr
	return command.Run()
}

func runQuiet(at places, where string, argv ...string) error {
	command, err := within(at, where, argv)
	if err != nil {
		return err
	}
	if said, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("in %s: %s: %w: %s", where, strings.Join(argv, " "), err, said)
	}
	return nil
}

func within(at places, where string, argv []string) (*exec.Cmd, error) {
	spaces, pid := []string{"--mount", "--net", "--pid"}, 0
	var err error
	if where == "control" {
		pid, err = supervisor(at)
	} else {
		spaces = append(spaces, "--uts", "--ipc", "--cgroup")
		pid, err = processOf(at, "node", where)
	}
	if err != nil {
		return nil, err
	}
	args := append([]string{"--target", strconv.Itoa(pid)}, spaces...)
	return exec.Command("nsenter", append(append(args, "--"), argv...)...), nil
}

// lock keeps two of us from starting or stopping the same cluster at once.
func lock(at places) (func(), error) {
	if err := os.MkdirAll(at.dir, 0o755); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(filepath.Join(at.dir, "lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX); err != nil {
		return nil, err
	}
	return func() { file.Close() }, nil
}

var serverLine = regexp.MustCompile(`server: "(https://[^"]+)"`)

func serverOf(kubeconfig string) (string, error) {
	content, err := os.ReadFile(kubeconfig)
	if err != nil {
		return "", err
	}
	match := serverLine.FindSubmatch(content)
	if match == nil {
		return "", fmt.Errorf("%s names no server", kubeconfig)
	}
	return string(match[1]), nil
}
