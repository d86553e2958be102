// The files that a node's programs read. They are written into the node's own layer over /etc.
package main

import (
	"bytes"
	"crypto/rand"
	"embed"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"text/template"
)

//go:embed files
var files embed.FS

type fileFacts struct {
	Domain, DNS, PodRange, PauseImage string
	Node                              struct{ Name, Pods string }
}

func writeConfigs(at places, one node) error {
	facts := fileFacts{Domain: clusterDomain, DNS: dnsServiceIP, PodRange: podRange, PauseImage: pauseImage}
	facts.Node.Name, facts.Node.Pods = one.name, one.pods
	// The machine's own pod networks are not ours. This is the layer over /etc, not the machine's /etc.
	if err := os.RemoveAll("/etc/cni"); err != nil {
		return err
	}
	for name, target := range map[string]string{
		"kubelet.yaml":    "/etc/kubernetes/kubelet.yaml",
		"kube-proxy.yaml": "/etc/kubernetes/kube-proxy.yaml",
		"containerd.toml": "/etc/containerd/config.toml",
		"pods.conflist":   "/etc/cni/net.d/50-pods.conflist",
	} {
		text, err := render(name, facts)
		if err != nil {
			return err
		}
		if err := writeAnew(target, text, 0o644); err != nil {
			return err
		}
	}
	// Only what this node may have: pods can read a node's files, if they mount them.
	for from, target := range map[string]string{
		"ca.crt":                 "/etc/kubernetes/pki/ca.crt",
		one.name + ".crt":        "/etc/kubernetes/pki/node.crt",
		one.name + ".key":        "/etc/kubernetes/pki/node.key",
		one.name + ".kubeconfig": "/etc/kubernetes/kubelet.kubeconfig",
		"kube-proxy.kubeconfig":  "/etc/kubernetes/kube-proxy.kubeconfig",
	} {
		content, err := os.ReadFile(at.state("pki", from))
		if err != nil {
			return err
		}
		if err := writeAnew(target, content, 0o600); err != nil {
			return err
		}
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return err
	}
	for target, text := range map[string]string{
		"/etc/hostname":   one.name + "\n",
		"/etc/machine-id": hex.EncodeToString(id) + "\n",
		"/etc/hosts":      fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s %s\n", one.ip, one.name),
		// Nobody answers there: names outside the cluster cannot be asked for.
		"/etc/resolv.conf": "nameserver " + controlIP + "\n",
	} {
		if err := writeAnew(target, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func render(name string, facts any) ([]byte, error) {
	parsed, err := template.New(name).Option("missingkey=error").ParseFS(files, "files/"+name)
	if err != nil {
		return nil, err
	}
	var text bytes.Buffer
	err = parsed.Execute(&text, facts)
	return text.Bytes(), err
}

// writeAnew does not follow a link that stands there: it may lead out of /etc.
func writeAnew(path string, content []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.WriteFile(path, content, mode)
}
