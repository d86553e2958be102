// A node: namespaces of its own for processes, mounts, network, host name, IPC and control groups, with containerd,
// the kubelet and kube-proxy in them. What it writes is under the cluster's directory or in memory; the machine's own
// files are there, but cannot be written.
package main

import (
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	inNode         = "/run/cluster" // what a node sees of the cluster's directory
	criSocket      = "/run/containerd/containerd.sock"
	goDescriptor   = 3 // closed by node-enter when the cable is plugged in
	pluginsOfHost  = "/usr/lib/cni"
	plugins        = "/opt/cni/bin"
	nodePaths      = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	containerdWait = time.Minute
)

// nodeEnter runs in the outer world: it moves into control groups of the node's own, starts the node in new
// namespaces, plugs the cable in, and ends when the node does.
func nodeEnter(at places, args []string) error {
	one, err := nodeArgument(args)
	if err != nil {
		return err
	}
	if err := enterCgroups(at, one.name); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	wait, plugged, err := os.Pipe()
	if err != nil {
		return err
	}
	inside := exec.Command(self, "node", "-dir", at.dir, one.name)
	inside.Stdout, inside.Stderr = os.Stdout, os.Stderr
	inside.ExtraFiles = []*os.File{wait}
	inside.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS |
			syscall.CLONE_NEWIPC | syscall.CLONE_NEWCGROUP,
		Pdeathsig: syscall.SIGKILL,
	}
	if err := inside.Start(); err != nil {
		return fmt.Errorf("starting %s in namespaces of its own: %w", one.name, err)
	}
	wait.Close()
	pid := strconv.Itoa(inside.Process.Pid)
	for _, command := range [][]string{
		{"link", "add", one.link, "type", "veth", "peer", "name", "eth0", "netns", pid},
		{"link", "set", one.link, "master", "cluster0", "up"},
	} {
		if said, err := exec.Command("ip", command...).CombinedOutput(); err != nil {
			_ = inside.Process.Kill()
			return fmt.Errorf("ip %s: %w: %s", strings.Join(command, " "), err, said)
		}
	}
	if err := stepAside(at); err != nil {
		_ = inside.Process.Kill()
		return err
	}
	plugged.Close()
	return inside.Wait()
}

func nodeArgument(args []string) (node, error) {
	if len(args) != 1 {
		return node{}, fmt.Errorf("one node's name is expected, not %q", args)
	}
	return nodeNamed(args[0])
}

// nodeMain is the first process of a node.
func nodeMain(at places, args []string) error {
	one, err := nodeArgument(args)
	if err != nil {
		return err
	}
	if _, err := io.ReadAll(os.NewFile(goDescriptor, "plugged")); err != nil {
		return fmt.Errorf("waiting for the cable: %w", err)
	}
	if err := syscall.Sethostname([]byte(one.name)); err != nil {
		return err
	}
	if err := mountNode(at, one); err != nil {
		return err
	}
	here := places{dir: inNode}
	for key, value := range map[string]string{"PATH": nodePaths, "TMPDIR": "/run/tmp", "HOME": "/run"} {
		if err := os.Setenv(key, value); err != nil {
			return err
		}
	}
	keep := newKeeper("/var/log")
	go keep.bury()
	if err := network(keep, one); err != nil {
		return err
	}
	if err := keep.start("containerd", "containerd", "--config=/etc/containerd/config.toml"); err != nil {
		return err
	}
	if err := listening(criSocket, containerdWait); err != nil {
		return err
	}
	for _, archive := range archivesOfSystem {
		if err := importImage(keep, here.state("images", archive+".tar")); err != nil {
			return err
		}
	}
	if err := keep.start("kubelet", here.bin("kube"), "kubelet", "--config=/etc/kubernetes/kubelet.yaml",
		"--kubeconfig=/etc/kubernetes/kubelet.kubeconfig", "--hostname-override="+one.name, "--node-ip="+one.ip,
		"--root-dir=/var/lib/kubelet",
		// So that rules about zones have something to hold on to.
		"--node-labels=topology.kubernetes.io/region=lab,topology.kubernetes.io/zone="+one.name); err != nil {
		return err
	}
	if err := keep.start("kube-proxy", here.bin("kube"), "kube-proxy",
		"--config=/etc/kubernetes/kube-proxy.yaml"); err != nil {
		return err
	}
	if err := importRest(keep, here); err != nil {
		return err
	}
	select {}
}

func importImage(keep *keeper, archive string) error {
	return keep.once("ctr", "--address="+criSocket, "--namespace=k8s.io", "images", "import", archive)
}

func importRest(keep *keeper, here places) error {
	archives, err := filepath.Glob(here.state("images", "*.tar"))
	if err != nil {
		return err
	}
	for _, archive := range archives {
		if isSystem(archive) {
			continue
		}
		if err := importImage(keep, archive); err != nil {
			return err
		}
	}
	return nil
}

func listening(socket string, within time.Duration) error {
	deadline := time.Now().Add(within)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return conn.Close()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("nobody listens on %s after %s: %w", socket, within, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

type mounting struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

func (m mounting) do() error {
	if err := syscall.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
		return fmt.Errorf("mounting %s (%s) on %s: %w", m.source, m.kind, m.target, err)
	}
	return nil
}

func mountAll(mounts []mounting) error {
	for _, one := range mounts {
		if err := one.do(); err != nil {
			return err
		}
	}
	return nil
}

func mountNode(at places, one node) error {
	hierarchies, err := cgroupMounts(at)
	if err != nil {
		return err
	}
	lib, log, run := at.state(one.name, "lib"), logsOf(at, one), at.state(one.name, "run")
	for _, dir := range []string{lib, log, run, filepath.Join(lib, "kubelet"), filepath.Join(lib, "containerd")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// The new /run is built beside the old one: the cluster's directory may itself be below a place that is hidden.
	if err := mountAll([]mounting{
		{"", "/", "", syscall.MS_REC | syscall.MS_PRIVATE, ""},
		{"tmpfs", run, "tmpfs", 0, "mode=0755"},
	}); err != nil {
		return err
	}
	for _, dir := range []string{"cluster/bin", "cluster/state/images", "etc/upper", "etc/work", "tmp", "sys"} {
		if err := os.MkdirAll(filepath.Join(run, dir), 0o755); err != nil {
			return err
		}
	}
	bind := uintptr(syscall.MS_BIND)
	if err := mountAll([]mounting{
		{at.bin(""), filepath.Join(run, "cluster/bin"), "", bind, ""},
		{"", filepath.Join(run, "cluster/bin"), "", bind | syscall.MS_REMOUNT | syscall.MS_RDONLY, ""},
		{at.state("images"), filepath.Join(run, "cluster/state/images"), "", bind, ""},
		{"", filepath.Join(run, "cluster/state/images"), "", bind | syscall.MS_REMOUNT | syscall.MS_RDONLY, ""},
		{"overlay", "/etc", "overlay", 0, fmt.Sprintf("lowerdir=/etc,upperdir=%s,workdir=%s",
			filepath.Join(run, "etc/upper"), filepath.Join(run, "etc/work"))},
	}); err != nil {
		return err
	}
	if err := writeConfigs(at, one); err != nil {
		return err
	}
	if err := mountAll([]mounting{
		{run, "/run", "", bind | syscall.MS_REC, ""},
		{log, "/var/log", "", bind, ""},
		{lib, "/var/lib", "", bind, ""},
		{"tmpfs", "/opt", "tmpfs", 0, "mode=0755"},
		{"proc", "/proc", "proc", 0, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{"tmpfs", "/sys/fs/cgroup", "tmpfs", 0, "mode=0755"},
	}); err != nil {
		return err
	}
	if err := mountCgroups(hierarchies); err != nil {
		return err
	}
	if err := ownTunables(); err != nil {
		return err
	}
	if err := copyPlugins(); err != nil {
		return err
	}
	// Pods may write into /, if they mount it: not into this machine's.
	return mountAll([]mounting{
		{"", "/", "", syscall.MS_BIND | syscall.MS_REMOUNT | syscall.MS_RDONLY, ""},
		{"", "/", "", syscall.MS_REC | syscall.MS_SHARED, ""},
	})
}

// The kubelet sets values of the whole kernel, not of its namespaces. It gets files of its own in their place, with
// what it wants in them already: this machine stays as it is.
func ownTunables() error {
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		target := filepath.Join("/proc/sys", name)
		if _, err := os.Stat(target); os.IsNotExist(err) {
			continue // not every kernel has all of them
		}
		own := filepath.Join("/run/sys", strings.ReplaceAll(name, "/", "."))
		if err := os.WriteFile(own, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := (mounting{own, target, "", syscall.MS_BIND, ""}).do(); err != nil {
			return err
		}
	}
	return nil
}

func copyPlugins() error {
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		return err
	}
	return filepath.WalkDir(pluginsOfHost, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(plugins, entry.Name()), content, 0o755)
	})
}

func network(keep *keeper, one node) error {
	commands := [][]string{
		{"ip", "link", "set", "lo", "up"},
		{"ip", "address", "add", one.ip + "/" + networkBits, "dev", "eth0"},
		{"ip", "link", "set", "eth0", "up"},
		// Leads nowhere but to the control plane; Service addresses need some route to be looked up at all.
		{"ip", "route", "add", "default", "via", controlIP},
	}
	for _, other := range nodes {
		if other.name != one.name {
			commands = append(commands, []string{"ip", "route", "add", other.pods, "via", other.ip})
		}
	}
	for _, command := range commands {
		if err := keep.once(command...); err != nil {
			return err
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1\n"), 0o644)
}
