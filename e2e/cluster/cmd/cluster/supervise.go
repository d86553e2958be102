// The outer world: this runs as the first process of the cluster's own process, network and mount namespaces.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// The number under which `up` hands over the listening socket on this machine's loopback.
const listenerFD = 3

// Connections through the door at once: kubectl and test suites use tens; a loop gone wild must not eat all memory.
const doorLimit = 512

// A part that has not answered by then will not; the API server's first start takes 10 s on a busy machine.
const partWait = 2 * time.Minute

func supervise(at places) error {
	keep := newKeeper(at.state("log"))
	go keep.bury()
	if err := outerWorld(keep, at); err != nil {
		return err
	}
	if err := startControl(keep, at); err != nil {
		return err
	}
	for _, one := range nodes {
		if err := startNode(keep, at, one); err != nil {
			return err
		}
	}
	return door()
}

func outerWorld(keep *keeper, at places) error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	// In memory: the cluster is thrown away, so nothing is gained by waiting for a disk.
	if err := os.MkdirAll(at.state("etcd"), 0o700); err != nil {
		return err
	}
	if err := syscall.Mount("tmpfs", at.state("etcd"), "tmpfs", 0, "size=1g,mode=0700"); err != nil {
		return fmt.Errorf("mounting memory for etcd: %w", err)
	}
	for _, command := range [][]string{
		{"ip", "link", "set", "lo", "up"},
		{"ip", "link", "add", "cluster0", "type", "bridge"},
		{"ip", "address", "add", controlIP + "/" + networkBits, "dev", "cluster0"},
		{"ip", "link", "set", "cluster0", "up"},
	} {
		if err := keep.once(command...); err != nil {
			return err
		}
	}
	// The API server calls webhooks in pods; pods of different nodes do not come this way.
	for _, one := range nodes {
		if err := keep.once("ip", "route", "add", one.pods, "via", one.ip); err != nil {
			return err
		}
	}
	return nil
}

func startControl(keep *keeper, at places) error {
	if err := keep.start("etcd", at.bin("kube"), "etcd",
		"--data-dir="+at.state("etcd", "data"), "--listen-client-urls="+etcdURL, "--advertise-client-urls="+etcdURL,
		"--listen-peer-urls=http://127.0.0.1:2380", "--unsafe-no-fsync", "--log-level=warn"); err != nil {
		return err
	}
	if err := await("etcd", etcdURL+"/health", nil); err != nil {
		return err
	}
	pki := func(name string) string { return at.state("pki", name) }
	if err := keep.start("kube-apiserver", at.bin("kube"), "kube-apiserver",
		"--etcd-servers="+etcdURL, "--secure-port="+apiPort, "--advertise-address="+controlIP,
		"--service-cluster-ip-range="+serviceRange, "--allow-privileged=true",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--client-ca-file="+pki("ca.crt"),
		"--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"),
		"--kubelet-certificate-authority="+pki("ca.crt"),
		"--kubelet-client-certificate="+pki("apiserver-kubelet-client.crt"),
		"--kubelet-client-key="+pki("apiserver-kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc."+clusterDomain,
		"--service-account-key-file="+pki("sa.pub"), "--service-account-signing-key-file="+pki("sa.key"),
		"--requestheader-client-ca-file="+pki("front-proxy-ca.crt"),
		"--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file="+pki("front-proxy-client.crt"),
		"--proxy-client-key-file="+pki("front-proxy-client.key"),
		// No kube-proxy runs beside the control plane: webhooks are called at their pods' addresses.
		"--enable-aggregator-routing=true", "--profiling=false"); err != nil {
		return err
	}
	// The others would end after ten seconds without it, which is too early on a busy machine.
	authority, err := os.ReadFile(pki("ca.crt"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	if err := await("kube-apiserver", "https://"+net.JoinHostPort(controlIP, apiPort)+"/livez", roots); err != nil {
		return err
	}
	asUser := func(name string) []string {
		file := pki(name + ".kubeconfig")
		return []string{
			"--kubeconfig=" + file, "--authentication-kubeconfig=" + file, "--authorization-kubeconfig=" + file,
			"--leader-elect=false", "--bind-address=127.0.0.1", "--profiling=false",
		}
	}
	controllers := append([]string{at.bin("kube"), "kube-controller-manager",
		"--service-account-private-key-file=" + pki("sa.key"), "--root-ca-file=" + pki("ca.crt"),
		"--cluster-signing-cert-file=" + pki("ca.crt"), "--cluster-signing-key-file=" + pki("ca.key"),
		"--use-service-account-credentials=true", "--cluster-cidr=" + podRange, "--allocate-node-cidrs=false",
	}, asUser("controller-manager")...)
	if err := keep.start("kube-controller-manager", controllers...); err != nil {
		return err
	}
	scheduler := append([]string{at.bin("kube"), "kube-scheduler"}, asUser("scheduler")...)
	return keep.start("kube-scheduler", scheduler...)
}

func startNode(keep *keeper, at places, one node) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return keep.start(one.name, self, "node-enter", "-dir", at.dir, one.name)
}

// await returns when a page answers 200.
func await(name, page string, roots *x509.CertPool) error {
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	defer transport.CloseIdleConnections()
	client := http.Client{Timeout: time.Second, Transport: transport}
	deadline := time.Now().Add(partWait)
	for {
		answer, err := client.Get(page)
		if err == nil {
			_, _ = io.Copy(io.Discard, answer.Body)
			answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				return nil
			}
			err = fmt.Errorf("it answered %s", answer.Status)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s did not become ready within %s: %w; see %s.log", name, partWait, err, name)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// door serves the one way in: a socket that listens on this machine's loopback, opened before the namespaces were
// made. A connection to it is joined to one to the API server inside.
func door() error {
	file := os.NewFile(listenerFD, "door")
	if file == nil {
		return errors.New("the listening socket was not handed over: start this by `cluster up`")
	}
	listener, err := net.FileListener(file)
	if err != nil {
		return fmt.Errorf("taking over the listening socket: %w", err)
	}
	places := make(chan struct{}, doorLimit)
	for {
		outside, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accepting: %w", err)
		}
		if err != nil {
			// Out of descriptors, or the client is gone again: both pass.
			time.Sleep(50 * time.Millisecond)
			continue
		}
		places <- struct{}{}
		go func() {
			defer func() { <-places }()
			defer outside.Close()
			inside, err := net.DialTimeout("tcp", net.JoinHostPort(controlIP, apiPort), 5*time.Second)
			if err != nil {
				return
			}
			defer inside.Close()
			join(outside.(*net.TCPConn), inside.(*net.TCPConn))
		}()
	}
}

// join copies both ways until both have ended.
func join(one, other *net.TCPConn) {
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(one, other)
		_ = one.CloseWrite()
		close(ended)
	}()
	_, _ = io.Copy(other, one)
	_ = other.CloseWrite()
	<-ended
}

// logsOf is where the parts of a node write.
func logsOf(at places, one node) string { return filepath.Join(at.state(one.name), "log") }
