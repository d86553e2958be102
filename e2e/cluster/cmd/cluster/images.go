// Images, packed from programs that are on this machine: a program, the shared libraries it names, and the few files
// that programs expect. The result is an archive as `docker save` writes it.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

const (
	pauseImage = "ambit.local/pause:1"
	dnsImage   = "ambit.local/coredns:1"
	// The name by which the conformance suite's manifests (v1.6.1) ask for their echo application.
	suiteEcho = "registry.k8s.io/gateway-api/echo-advanced:v1.5.1"
	busybox   = "/usr/bin/busybox"
	anyone    = "65532" // the user of distroless images that say "nonroot"
)

// Those of its tests of requests from outside.
var suiteBasic = []string{
	"ambit.local/echo-basic:dev", "registry.k8s.io/gateway-api/echo-basic:v1.5.1",
	"registry.k8s.io/gateway-api/echo-basic:v1.6.0-dev.2", "registry.k8s.io/gateway-api/echo-basic:v1.6.0-dev.3",
}

// Without these no pod starts; the rest is imported while the kubelet begins.
var archivesOfSystem = []string{"pause", "coredns"}

func isSystem(archive string) bool {
	return slices.Contains(archivesOfSystem, strings.TrimSuffix(filepath.Base(archive), ".tar"))
}

type image struct {
	name     string
	tags     []string
	programs map[string]string // path in the image: path here
	links    map[string]string // path in the image: where it leads
	entry    []string
	user     string
	// Packed only by name: large, and not what every cluster is for.
	asked bool
	// A certificate for nobody, as the conformance suite's manifests name it: /cert.crt, /cert.key.
	certificate bool
}

func images(at places) []image {
	own := func(name string) image {
		return image{
			name: name, tags: []string{"ambit.local/" + name + ":dev"},
			programs: map[string]string{"usr/local/bin/" + name: filepath.Join(at.programs, name)},
			entry:    []string{"/usr/local/bin/" + name}, user: "0", asked: true,
		}
	}
	return []image{
		{name: "pause", tags: []string{pauseImage}, entry: []string{"/pause"}, user: anyone,
			programs: map[string]string{"pause": at.bin("pause")}},
		{name: "coredns", tags: []string{dnsImage}, entry: []string{"/coredns"}, user: "0",
			programs: map[string]string{"coredns": at.bin("coredns")}},
		{name: "echo", tags: []string{"ambit.local/echo:dev", suiteEcho}, entry: []string{"/usr/local/bin/server"},
			user: "1338", certificate: true,
			programs: map[string]string{
				"usr/local/bin/server": filepath.Join(at.programs, "echo-server"),
				"usr/local/bin/client": filepath.Join(at.programs, "echo-client"),
			}},
		{name: "echo-basic", tags: suiteBasic, entry: []string{"/usr/local/bin/echo-basic"}, user: "1338",
			programs: map[string]string{"usr/local/bin/echo-basic": filepath.Join(at.programs, "echo-basic")}},
		// For looking around: a shell with the usual small programs, and curl.
		{name: "tools", tags: []string{"ambit.local/tools:dev"}, entry: []string{"/bin/sh"}, user: "0",
			programs: map[string]string{"bin/busybox": busybox, "usr/bin/curl": "/usr/bin/curl"},
			links:    busyboxLinks()},
		own("ztunnel"), own("waypoint"), own("istiod-lite"), own("meshctl"),
	}
}

// busyboxLinks gives every small program that busybox has a name of its own.
func busyboxLinks() map[string]string {
	links := map[string]string{}
	names, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return links // then the image is not packed either: the program is missing
	}
	for name := range strings.FieldsSeq(string(names)) {
		links["bin/"+name] = "busybox"
	}
	delete(links, "bin/busybox")
	return links
}

func (i image) missing() []string {
	var missing []string
	for _, from := range i.programs {
		if _, err := os.Stat(from); err != nil {
			missing = append(missing, from)
		}
	}
	return missing
}

// packAll writes DIR/NAME.tar for the named images; without names for those of the lab whose programs are here.
func packAll(at places, dir string, names []string) ([]image, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var packed []image
	for _, one := range images(at) {
		named := slices.Contains(names, one.name)
		if !named && (one.asked || len(names) > 0) {
			continue
		}
		if missing := one.missing(); len(missing) > 0 {
			if named {
				return nil, fmt.Errorf("image %s: no %s: build it first", one.name, strings.Join(missing, ", "))
			}
			continue
		}
		if err := one.pack(filepath.Join(dir, one.name+".tar")); err != nil {
			return nil, fmt.Errorf("image %s: %w", one.name, err)
		}
		packed = append(packed, one)
	}
	for _, name := range names {
		if !slices.ContainsFunc(packed, func(one image) bool { return one.name == name }) {
			return nil, fmt.Errorf("no image is called %q", name)
		}
	}
	return packed, nil
}

func (i image) pack(target string) error {
	tree := map[string]entry{
		"etc/passwd": {content: []byte("root:x:0:0::/:/sbin/nologin\nnonroot:x:65532:65532::/:/sbin/nologin\n" +
			"application:x:1338:1338::/:/sbin/nologin\n"), mode: 0o644},
		"etc/group":         {content: []byte("root:x:0:\nnonroot:x:65532:\napplication:x:1338:\n"), mode: 0o644},
		"etc/nsswitch.conf": {content: []byte("hosts: files dns\n"), mode: 0o644},
		"tmp":               {dir: true, mode: 0o1777},
	}
	for to, from := range i.programs {
		if err := addProgram(tree, to, from); err != nil {
			return err
		}
	}
	for to, leads := range i.links {
		tree[to] = entry{link: leads, mode: 0o777}
	}
	if i.certificate {
		if err := addCertificate(tree); err != nil {
			return err
		}
	}
	layer, err := tree2tar(tree)
	if err != nil {
		return err
	}
	return i.write(target, layer)
}

func (i image) write(target string, layer []byte) error {
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{
			"Entrypoint": i.entry, "User": i.user, "WorkingDir": "/",
			"Env": []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer)}},
	})
	if err != nil {
		return err
	}
	configName, layerName := digest(config)+".json", digest(layer)+".tar"
	manifest, err := json.Marshal([]any{
		map[string]any{"Config": configName, "RepoTags": i.tags, "Layers": []string{layerName}},
	})
	if err != nil {
		return err
	}
	archive, err := tree2tar(map[string]entry{
		"manifest.json": {content: manifest, mode: 0o644},
		configName:      {content: config, mode: 0o644},
		layerName:       {content: layer, mode: 0o644},
	})
	if err != nil {
		return err
	}
	// Renamed into place: a node may be reading the old one.
	if err := os.WriteFile(target+".new", archive, 0o644); err != nil {
		return err
	}
	return os.Rename(target+".new", target)
}

func digest(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

type entry struct {
	content []byte
	link    string
	dir     bool
	mode    int64
}

// tree2tar writes parents before children, everything owned by root and of no date.
func tree2tar(tree map[string]entry) ([]byte, error) {
	for name := range tree {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if _, ok := tree[dir]; !ok {
				tree[dir] = entry{dir: true, mode: 0o755}
			}
		}
	}
	names := make([]string, 0, len(tree))
	for name := range tree {
		names = append(names, name)
	}
	slices.Sort(names)
	var out bytes.Buffer
	writer := tar.NewWriter(&out)
	for _, name := range names {
		one := tree[name]
		header := &tar.Header{Name: name, Mode: one.mode, Size: int64(len(one.content)), Typeflag: tar.TypeReg}
		switch {
		case one.dir:
			header.Typeflag, header.Name = tar.TypeDir, name+"/"
		case one.link != "":
			header.Typeflag, header.Linkname = tar.TypeSymlink, one.link
		}
		if err := writer.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := writer.Write(one.content); err != nil {
			return nil, err
		}
	}
	err := writer.Close()
	return out.Bytes(), err
}

// addProgram adds a program and the libraries it needs. Libraries go to /lib, where the loader looks at last.
func addProgram(tree map[string]entry, to, from string) error {
	content, err := stripped(from)
	if err != nil {
		return err
	}
	tree[to] = entry{content: content, mode: 0o755}
	wanted := []string{from}
	for len(wanted) > 0 {
		file := wanted[0]
		wanted = wanted[1:]
		loader, libraries, err := needs(file)
		if err != nil {
			return err
		}
		if loader != "" {
			if err := addFile(tree, strings.TrimPrefix(loader, "/"), loader); err != nil {
				return err
			}
		}
		for _, library := range libraries {
			if _, ok := tree["lib/"+library]; ok {
				continue
			}
			found, err := findLibrary(library)
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			if err := addFile(tree, "lib/"+library, found); err != nil {
				return err
			}
			wanted = append(wanted, found)
		}
	}
	return nil
}

// stripped leaves debug information out, where binutils is at hand: it is most of a debug build.
func stripped(program string) ([]byte, error) {
	strip, err := exec.LookPath("strip")
	if err != nil {
		return os.ReadFile(program)
	}
	small, err := os.CreateTemp("", "cluster-image-*")
	if err != nil {
		return nil, err
	}
	defer os.Remove(small.Name())
	small.Close()
	if said, err := exec.Command(strip, "--strip-debug", "-o", small.Name(), program).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("strip %s: %w: %s", program, err, said)
	}
	return os.ReadFile(small.Name())
}

func addFile(tree map[string]entry, to, from string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	tree[to] = entry{content: content, mode: 0o755}
	return nil
}

// needs reads an ELF file: its loader, and the names of its libraries.
func needs(program string) (loader string, libraries []string, err error) {
	file, err := elf.Open(program)
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", program, err)
	}
	defer file.Close()
	for _, header := range file.Progs {
		if header.Type == elf.PT_INTERP {
			content := make([]byte, header.Filesz)
			if _, err := header.ReadAt(content, 0); err != nil {
				return "", nil, err
			}
			loader = strings.TrimRight(string(content), "\x00")
		}
	}
	libraries, err = file.ImportedLibraries()
	return loader, libraries, err
}

func findLibrary(name string) (string, error) {
	for _, pattern := range []string{"/lib/*-linux-gnu", "/usr/lib/*-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"} {
		matches, err := filepath.Glob(filepath.Join(pattern, name))
		if err != nil {
			return "", err
		}
		if len(matches) > 0 {
			return matches[0], nil
		}
	}
	return "", fmt.Errorf("library %s: %w", name, fs.ErrNotExist)
}

func addCertificate(tree map[string]entry) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "echo"}, DNSNames: []string{"echo"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if err := fill(template); err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	keyDer, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	crt := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	private := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDer})
	if crt == nil || private == nil {
		return errors.New("a certificate could not be written as PEM")
	}
	tree["cert.crt"] = entry{content: crt, mode: 0o644}
	// Readable for the image's user. It is nobody's secret.
	tree["cert.key"] = entry{content: private, mode: 0o644}
	return nil
}
