package main

import (
	"archive/tar"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/template"
)

func TestControllersOf(t *testing.T) {
	for given, want := range map[string]string{
		"rw,cpu,cpuacct":                         "cpu,cpuacct",
		"rw,memory":                              "memory",
		"rw,xattr,release_agent=/x,name=systemd": "xattr,name=systemd",
		"ro,rw":                                  "",
	} {
		if got := controllersOf(given); got != want {
			t.Errorf("controllersOf(%q) = %q, want %q", given, got, want)
		}
	}
}

func TestTreeBecomesAnArchiveWithParentsFirst(t *testing.T) {
	tree := func() map[string]entry {
		return map[string]entry{
			"usr/local/bin/a": {content: []byte("x"), mode: 0o755},
			"bin/sh":          {link: "busybox", mode: 0o777},
			"tmp":             {dir: true, mode: 0o1777},
		}
	}
	first, err := tree2tar(tree())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	reader := tar.NewReader(bytes.NewReader(first))
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, header.Name+header.Linkname)
	}
	want := []string{"bin/", "bin/shbusybox", "tmp/", "usr/", "usr/local/", "usr/local/bin/", "usr/local/bin/a"}
	if !slices.Equal(names, want) {
		t.Errorf("the archive has %q, want %q", names, want)
	}
	if again, _ := tree2tar(tree()); !bytes.Equal(first, again) {
		t.Error("the same tree gives another archive")
	}
}

func TestProgramsBringTheirLibraries(t *testing.T) {
	if _, err := os.Stat("/bin/ls"); err != nil {
		t.Skip("no /bin/ls here")
	}
	tree := map[string]entry{}
	if err := addProgram(tree, "bin/ls", "/bin/ls"); err != nil {
		t.Fatal(err)
	}
	var libc, loader bool
	for name := range tree {
		libc = libc || strings.HasPrefix(name, "lib/libc.so")
		loader = loader || strings.Contains(name, "ld-linux")
	}
	if !libc || !loader {
		t.Errorf("libc: %v, loader: %v", libc, loader)
	}
	if err := addProgram(tree, "x", "/nowhere"); !errors.Is(err, fs.ErrNotExist) && err == nil {
		t.Error("a program that is not there is packed")
	}
}

func TestCertificatesAreGoodForWhatTheyAreFor(t *testing.T) {
	at := places{dir: t.TempDir()}
	if err := makeCerts(at, 12345); err != nil {
		t.Fatal(err)
	}
	authority, err := os.ReadFile(at.state("pki", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	for _, want := range []struct {
		name, host string
		server     bool
		group      string
	}{
		{"apiserver", "127.0.0.1", true, ""},
		{"apiserver", apiServiceIP, true, ""},
		{"apiserver", "kubernetes.default.svc", true, ""},
		{"node-1", "172.30.0.11", true, "system:nodes"},
		{"admin", "", false, "system:masters"},
		{"kube-proxy", "", false, ""},
	} {
		pair, err := tls.LoadX509KeyPair(at.state("pki", want.name+".crt"), at.state("pki", want.name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		usage := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		if want.server {
			usage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}
		options := x509.VerifyOptions{Roots: roots, DNSName: want.host, KeyUsages: usage}
		if _, err := pair.Leaf.Verify(options); err != nil {
			t.Errorf("%s for %q: %v", want.name, want.host, err)
		}
		if want.group != "" && !slices.Contains(pair.Leaf.Subject.Organization, want.group) {
			t.Errorf("%s is not of %s", want.name, want.group)
		}
		if !want.server {
			options.KeyUsages = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
			if _, err := pair.Leaf.Verify(options); err == nil {
				t.Errorf("%s may serve", want.name)
			}
		}
	}
	if server, err := serverOf(at.kubeconfig()); err != nil || server != "https://127.0.0.1:12345" {
		t.Errorf("the kubeconfig's server is %q: %v", server, err)
	}
	if info, err := os.Stat(at.kubeconfig()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the kubeconfig is for all eyes: %v, %v", info.Mode(), err)
	}
}

func TestEveryFileCanBeRendered(t *testing.T) {
	facts := fileFacts{Domain: "cluster.local", DNS: "10.96.0.10", PodRange: podRange, PauseImage: pauseImage}
	facts.Node.Name, facts.Node.Pods = "node-1", "10.244.1.0/24"
	for _, name := range []string{"kubelet.yaml", "kube-proxy.yaml", "containerd.toml", "pods.conflist"} {
		if text, err := render(name, facts); err != nil || bytes.Contains(text, []byte("<no value>")) {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
	}
	var missing template.ExecError
	if _, err := render("kubelet.yaml", map[string]string{}); !errors.As(err, &missing) {
		t.Errorf("a fact that is not there is not missed: %v", err)
	}
}

func TestRemoveTree(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a")
	if err := os.MkdirAll(filepath.Join(dir, "b", "c"), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time there is nothing, which is fine
		if err := removeTree(dir); err != nil {
			t.Fatal(err)
		}
	}
}
