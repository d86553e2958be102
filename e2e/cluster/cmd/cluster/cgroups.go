// Control groups: each node sees a directory of its own as the root of every hierarchy, as a machine would.
// Version 1, version 2 and both at once are met in the wild.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const cgroupRoot = "/sys/fs/cgroup"

type hierarchy struct {
	name    string // of the cluster's one directory in it
	point   string // where it is mounted
	kind    string // cgroup or cgroup2
	options string // which controllers; empty for version 2
}

// alone: version 2 and nothing else. Beside version 1 it has hardly a controller, and is left as it is.
func (h hierarchy) alone() bool { return h.kind == "cgroup2" && h.point == cgroupRoot }

func (h hierarchy) home(parts ...string) string {
	return filepath.Join(append([]string{h.point, h.name}, parts...)...)
}

// cgroupMounts reads this process's list of mounts. Clusters of different directories have different control groups.
func cgroupMounts(at places) ([]hierarchy, error) {
	sum := sha256.Sum256([]byte(at.dir))
	name := "ambit-cluster-" + hex.EncodeToString(sum[:4])
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var found []hierarchy
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		// 36 35 98:0 /root /point options - kind source super-options
		before, after, ok := strings.Cut(lines.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 || !strings.HasPrefix(left[4], cgroupRoot) {
			continue
		}
		switch right[0] {
		case "cgroup2":
			found = append(found, hierarchy{name: name, point: left[4], kind: right[0]})
		case "cgroup":
			found = append(found, hierarchy{name: name, point: left[4], kind: right[0], options: controllersOf(right[2])})
		}
	}
	if len(found) == 0 && lines.Err() == nil {
		return nil, errors.New("no control groups are mounted below " + cgroupRoot + ": the kubelet needs them")
	}
	return found, lines.Err()
}

// controllersOf leaves out what is true of any file system ("rw").
func controllersOf(options string) string {
	kept := slices.DeleteFunc(strings.Split(options, ","), func(option string) bool {
		return option == "rw" || option == "ro" || strings.HasPrefix(option, "release_agent=")
	})
	return strings.Join(kept, ",")
}

// enterCgroups moves this process into directories of the node's own.
func enterCgroups(at places, name string) error {
	hierarchies, err := cgroupMounts(at)
	if err != nil {
		return err
	}
	for _, one := range hierarchies {
		for _, dir := range []string{one.home(), one.home(name)} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return fmt.Errorf("this needs to make control groups: %w", err)
			}
			if one.alone() {
				if err := handOn(filepath.Dir(dir)); err != nil {
					return err
				}
			}
			if err := inheritCpuset(dir); err != nil {
				return err
			}
		}
		if err := os.WriteFile(one.home(name, "cgroup.procs"), []byte("0"), 0o644); err != nil {
			return fmt.Errorf("entering a control group: %w", err)
		}
	}
	return nil
}

// stepAside moves this process out of the node's group again, once the node has started in it: with version 2 a group
// with processes cannot hand controllers on, and node-enter cannot be moved from inside the node.
func stepAside(at places) error {
	hierarchies, err := cgroupMounts(at)
	if err != nil {
		return err
	}
	for _, one := range hierarchies {
		if !one.alone() {
			continue
		}
		if err := os.MkdirAll(one.home("outside"), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(one.home("outside", "cgroup.procs"), []byte("0"), 0o644); err != nil {
			return fmt.Errorf("leaving the node's control group: %w", err)
		}
	}
	return nil
}

// A new cpuset of version 1 has no CPU, and takes no process until it has.
func inheritCpuset(dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		from, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		to := filepath.Join(dir, name)
		if has, err := os.ReadFile(to); err != nil || len(strings.TrimSpace(string(has))) > 0 {
			continue // version 2 has no such file at the root, or it is set
		}
		if err := os.WriteFile(to, from, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// mountCgroups mounts what the machine has, as seen from this process's cgroup namespace.
func mountCgroups(hierarchies []hierarchy) error {
	for _, one := range hierarchies {
		if one.alone() {
			if err := (mounting{"cgroup2", cgroupRoot, "cgroup2", 0, ""}).do(); err != nil {
				return err
			}
			return delegate()
		}
		if err := os.MkdirAll(one.point, 0o755); err != nil {
			return err
		}
		if err := (mounting{one.kind, one.point, one.kind, 0, one.options}).do(); err != nil {
			return err
		}
	}
	return nil
}

// delegate moves the node's first process into a group below, so that this one may hand controllers on.
func delegate() error {
	aside := filepath.Join(cgroupRoot, "node")
	if err := os.MkdirAll(aside, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(aside, "cgroup.procs"), []byte("0"), 0o644); err != nil {
		return err
	}
	return handOn(cgroupRoot)
}

// handOn lets the groups below use every controller that this one has.
func handOn(dir string) error {
	controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(controllers)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0o644); err != nil {
			return fmt.Errorf("handing on the controller %s in %s: %w", name, dir, err)
		}
	}
	return nil
}

// removeCgroups removes every node's directories. Dead processes leave them a moment after they are gone.
func removeCgroups(at places) error {
	hierarchies, err := cgroupMounts(at)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(10 * time.Second)
	for _, one := range hierarchies {
		for {
			err := removeTree(one.home())
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("removing control groups: %w", err)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	return nil
}

// removeTree: the files in a control group are the kernel's; only the directories are removed, the deepest first.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeTree(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	err = syscall.Rmdir(dir)
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	return err
}
