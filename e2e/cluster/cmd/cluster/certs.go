// The cluster's certificates and kubeconfigs, made anew at every start: nothing outlives the cluster.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Longer than any test, short enough that a forgotten file is worthless soon.
const certLife = 7 * 24 * time.Hour

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// A certificate to make: files NAME.crt and NAME.key.
type identity struct {
	name   string
	common string
	groups []string
	hosts  []string // names and addresses; with them it can serve, too
}

// makeCerts writes everything under dir: the authorities, certificates, the key of service account tokens, and
// kubeconfigs. The admin's kubeconfig is written where people look for it, with the address they can reach.
func makeCerts(at places, apiPortHere int) error {
	dir := at.state("pki")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, err := newAuthority(dir, "ca", "ambit-cluster")
	if err != nil {
		return err
	}
	front, err := newAuthority(dir, "front-proxy-ca", "ambit-cluster-front-proxy")
	if err != nil {
		return err
	}
	if err := front.issue(dir, identity{name: "front-proxy-client", common: "front-proxy-client"}); err != nil {
		return err
	}
	for _, who := range identities() {
		if err := ca.issue(dir, who); err != nil {
			return err
		}
	}
	if err := serviceAccountKey(dir); err != nil {
		return err
	}
	inside := fmt.Sprintf("https://%s:%s", controlIP, apiPort)
	users := []string{"admin", "controller-manager", "scheduler", "kube-proxy"}
	for _, one := range nodes {
		users = append(users, one.name)
	}
	for _, user := range users {
		if err := kubeconfig(dir, user, inside, filepath.Join(dir, user+".kubeconfig")); err != nil {
			return err
		}
	}
	return kubeconfig(dir, "admin", fmt.Sprintf("https://127.0.0.1:%d", apiPortHere), at.kubeconfig())
}

func identities() []identity {
	all := []identity{
		{name: "apiserver", common: "kube-apiserver", hosts: []string{
			"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + clusterDomain,
			"localhost", "127.0.0.1", controlIP, apiServiceIP,
		}},
		{name: "apiserver-kubelet-client", common: "kube-apiserver-kubelet-client", groups: []string{"system:masters"}},
		{name: "admin", common: "kubernetes-admin", groups: []string{"system:masters"}},
		{name: "controller-manager", common: "system:kube-controller-manager"},
		{name: "scheduler", common: "system:kube-scheduler"},
		{name: "kube-proxy", common: "system:kube-proxy"},
	}
	for _, one := range nodes {
		all = append(all, identity{
			name: one.name, common: "system:node:" + one.name, groups: []string{"system:nodes"},
			hosts: []string{one.name, one.ip, "127.0.0.1"},
		})
	}
	return all
}

func newAuthority(dir, name, common string) (authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: common},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	if err := fill(template); err != nil {
		return authority{}, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return authority{}, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return authority{}, err
	}
	return authority{cert: cert, key: key}, writePair(dir, name, der, key)
}

func (ca authority) issue(dir string, who identity) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: who.common, Organization: who.groups},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if err := fill(template); err != nil {
		return err
	}
	for _, host := range who.hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	if len(who.hosts) > 0 {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return err
	}
	return writePair(dir, who.name, der, key)
}

func fill(template *x509.Certificate) error {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	template.SerialNumber = serial
	// A little in the past: the clock may be set back while the cluster runs.
	template.NotBefore = time.Now().Add(-5 * time.Minute)
	template.NotAfter = time.Now().Add(certLife)
	return nil
}

func writePair(dir, name string, der []byte, key *ecdsa.PrivateKey) error {
	if err := writePEM(filepath.Join(dir, name+".crt"), "CERTIFICATE", der, 0o644); err != nil {
		return err
	}
	return writeKey(filepath.Join(dir, name+".key"), key)
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "EC PRIVATE KEY", der, 0o600)
}

func writePEM(path, kind string, der []byte, mode os.FileMode) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode)
}

func serviceAccountKey(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(dir, "sa.pub"), "PUBLIC KEY", der, 0o644); err != nil {
		return err
	}
	return writeKey(filepath.Join(dir, "sa.key"), key)
}
