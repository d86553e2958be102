// `up`, `status` and `load`: what a person asks for, said with progress.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// On a machine that is busy with other things the first start takes its time.
const readyWait = 5 * time.Minute

func up(at places) error {
	unlock, err := lock(at)
	if err != nil {
		return err
	}
	defer unlock()
	if pid, err := supervisor(at); err == nil {
		fmt.Fprintf(os.Stderr, "the cluster runs already (process %d)\n", pid)
		fmt.Println(at.kubeconfig())
		return nil
	}
	if err := preflight(at); err != nil {
		return err
	}
	began := time.Now()
	say := func(format string, values ...any) {
		fmt.Fprintf(os.Stderr, "%5.1f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, values...))
	}
	if err := wipe(at); err != nil {
		return err
	}
	if err := os.MkdirAll(at.state("log"), 0o755); err != nil {
		return err
	}
	packed, err := packAll(at, at.state("images"), nil)
	if err != nil {
		return err
	}
	say("%d images packed", len(packed))
	ended, err := launch(at)
	if err != nil {
		return err
	}
	api, err := newAPI(at)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), readyWait)
	defer cancel()
	go func() {
		<-ended
		cancel()
	}()
	if err := becomeReady(ctx, at, api, say); err != nil {
		if context.Cause(ctx) != nil {
			err = fmt.Errorf("%w; the end of the log:\n%s", err, tail(at.log("supervisor")))
		}
		return fmt.Errorf("%w\nThe logs are in %s and %s; `cluster down` cleans up", err, at.state("log"),
			at.state("node-1", "log"))
	}
	say("ready")
	fmt.Println(at.kubeconfig())
	return nil
}

func becomeReady(ctx context.Context, at places, api *api, say func(string, ...any)) error {
	if err := poll(ctx, "the API server", func() error { return api.get(ctx, "/readyz", nil) }); err != nil {
		return err
	}
	say("the API server is ready")
	facts := struct{ Domain, DNS, Image string }{clusterDomain, dnsServiceIP, dnsImage}
	manifest, err := render("dns.yaml", facts)
	if err != nil {
		return err
	}
	if err := kubectl(at, manifest, "apply", "--server-side", "-f", "-"); err != nil {
		return err
	}
	for _, one := range nodes {
		if err := poll(ctx, one.name, func() error { return api.nodeReady(ctx, one.name) }); err != nil {
			return err
		}
		// No controller hands out ranges here; the object shows the one that the node has.
		patch := fmt.Sprintf(`{"spec":{"podCIDR":%q,"podCIDRs":[%q]}}`, one.pods, one.pods)
		if err := kubectl(at, nil, "patch", "node", one.name, "--type=merge", "-p", patch); err != nil {
			return err
		}
		say("%s is ready", one.name)
	}
	if err := poll(ctx, "cluster DNS", func() error { return api.dnsReady(ctx) }); err != nil {
		return err
	}
	say("cluster DNS is ready")
	return nil
}

func preflight(at places) error {
	if os.Geteuid() != 0 {
		return errors.New("the lab cluster runs a real containerd and kubelet: it needs root")
	}
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr", "runc", "ip", "nft", "iptables", "nsenter"} {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("%s is missing; `.ci/programs cluster` installs what is needed", name)
		}
	}
	for _, file := range []string{filepath.Join(pluginsOfHost, "ptp"), at.bin("kube"), at.bin("coredns"), at.bin("pause")} {
		if _, err := os.Stat(file); err != nil {
			return fmt.Errorf("%w; `make cluster-up` builds and installs what is needed", err)
		}
	}
	return nil
}

// launch starts the first process of the cluster; the channel is closed when it has ended.
func launch(at places) (<-chan struct{}, error) {
	door, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer door.Close()
	if err := makeCerts(at, door.Addr().(*net.TCPAddr).Port); err != nil {
		return nil, fmt.Errorf("making certificates: %w", err)
	}
	socket, err := door.(*net.TCPListener).File()
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	log, err := os.Create(at.log("supervisor"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	process := exec.Command(self, "supervise", "-dir", at.dir)
	process.Dir = "/"
	process.Stdout, process.Stderr = log, log
	process.ExtraFiles = []*os.File{socket}
	process.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET,
	}
	if err := process.Start(); err != nil {
		return nil, fmt.Errorf("starting the cluster in namespaces of its own: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		_ = process.Wait()
		close(ended)
	}()
	return ended, nil
}

func poll(ctx context.Context, what string, ask func() error) error {
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s did not become ready: %w", what, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func kubectl(at places, input []byte, args ...string) error {
	command := exec.Command(at.bin("kube"), append([]string{"kubectl", "--kubeconfig=" + at.kubeconfig()}, args...)...)
	command.Stdin = bytes.NewReader(input)
	if said, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, said)
	}
	return nil
}

// api asks the API server what readiness needs, without starting a program for each look.
type api struct {
	client http.Client
	base   string
}

func newAPI(at places) (*api, error) {
	pair, err := tls.LoadX509KeyPair(at.state("pki", "admin.crt"), at.state("pki", "admin.key"))
	if err != nil {
		return nil, err
	}
	authority, err := os.ReadFile(at.state("pki", "ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	base, err := serverOf(at.kubeconfig())
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots}}
	return &api{client: http.Client{Transport: transport, Timeout: 10 * time.Second}, base: base}, nil
}

// get reads an object into what `into` points to, if that is given.
func (a *api) get(ctx context.Context, path string, into any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, a.base+path, nil)
	if err != nil {
		return err
	}
	answer, err := a.client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	// An object is at most as large as etcd takes it: 1.5 MB.
	body, err := io.ReadAll(io.LimitReader(answer.Body, 2<<20))
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s: %.300s", path, answer.Status, body)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(body, into)
}

type conditions struct {
	Status struct {
		Conditions []struct{ Type, Status, Message string }
	}
}

func (c conditions) has(wanted string) error {
	for _, one := range c.Status.Conditions {
		if one.Type == wanted {
			if one.Status == "True" {
				return nil
			}
			return fmt.Errorf("%s is %s: %s", wanted, one.Status, one.Message)
		}
	}
	return fmt.Errorf("%s is not known yet", wanted)
}

func (a *api) nodeReady(ctx context.Context, name string) error {
	var found conditions
	if err := a.get(ctx, "/api/v1/nodes/"+name, &found); err != nil {
		return err
	}
	return found.has("Ready")
}

func (a *api) dnsReady(ctx context.Context) error {
	var found conditions
	if err := a.get(ctx, "/apis/apps/v1/namespaces/kube-system/deployments/coredns", &found); err != nil {
		return err
	}
	return found.has("Available")
}

func status(at places) error {
	pid, err := supervisor(at)
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "process %d; KUBECONFIG=%s\n", pid, at.kubeconfig())
	command := exec.Command(at.bin("kube"), "kubectl", "--kubeconfig="+at.kubeconfig(), "get", "nodes,pods", "-A", "-o", "wide")
	command.Stdout, command.Stderr = os.Stdout, os.Stderr
	return command.Run()
}

// load packs images and imports them on every node.
func load(at places, names []string) error {
	if _, err := supervisor(at); err != nil {
		return err
	}
	packed, err := packAll(at, at.state("images"), names)
	if err != nil {
		return err
	}
	for _, one := range nodes {
		for _, each := range packed {
			archive := filepath.Join(inNode, "state/images", each.name+".tar")
			if err := runQuiet(at, one.name, "ctr", "--address="+criSocket, "--namespace=k8s.io", "images", "import", archive); err != nil {
				return err
			}
		}
	}
	for _, each := range packed {
		fmt.Fprintln(os.Stderr, strings.Join(each.tags, " "))
	}
	return nil
}

func tail(path string) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	const enough = 2000
	if len(content) > enough {
		content = content[len(content)-enough:]
	}
	return string(content)
}
