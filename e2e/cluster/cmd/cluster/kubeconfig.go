package main

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
)

// kubeconfig writes one with the certificates inside, so that the file can be copied anywhere.
func kubeconfig(pki, user, server, path string) error {
	inline := make([]any, 0, 5)
	for _, file := range []string{"ca.crt", user + ".crt", user + ".key"} {
		content, err := os.ReadFile(filepath.Join(pki, file))
		if err != nil {
			return err
		}
		inline = append(inline, base64.StdEncoding.EncodeToString(content))
	}
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: ambit
clusters:
- name: ambit
  cluster: {server: %q, certificate-authority-data: %s}
users:
- name: %s
  user: {client-certificate-data: %s, client-key-data: %s}
contexts:
- name: ambit
  context: {cluster: ambit, user: %s}
`, server, inline[0], user, inline[1], inline[2], user)
	return os.WriteFile(path, []byte(text), 0o600)
}
