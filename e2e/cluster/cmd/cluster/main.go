// cluster starts and stops a real Kubernetes of two nodes on this machine, without a container of its own and without
// a network: README.md beside go.mod says how it is made.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

const usage = `usage: cluster COMMAND [ARGUMENTS]

  up                     start the cluster; prints the KUBECONFIG to use
  down                   stop it and remove what it wrote
  status                 what runs
  load [NAME...]         pack images anew and give them to every node; without names those that the lab starts with,
                         by name also ztunnel, waypoint, istiod-lite and meshctl
  pack DIR [NAME...]     pack them into files, for another cluster
  run WHERE COMMAND...   run a command in a node ("node-1") or beside the control plane ("control")

Flags of all of them, before the command's arguments:
  -dir DIR               where the cluster keeps its files (default $AMBIT_CACHE/cluster)
  -programs DIR          where our own programs are built (default target/debug of this workspace)
`

// Where everything is. The same for all commands, so that any of them finds a cluster that another has started.
type places struct {
	dir      string // of this cluster
	programs string // of cargo
}

func (p places) bin(name string) string { return filepath.Join(p.dir, "bin", name) }
func (p places) state(parts ...string) string {
	return filepath.Join(append([]string{p.dir, "state"}, parts...)...)
}
func (p places) log(name string) string { return p.state("log", name+".log") }
func (p places) kubeconfig() string     { return p.state("kubeconfig") }

func main() {
	if err := dispatch(os.Args[1:]); err != nil {
		var failed *exec.ExitError
		if errors.As(err, &failed) && len(os.Args) > 1 && os.Args[1] == "run" {
			os.Exit(failed.ExitCode())
		}
		fmt.Fprintf(os.Stderr, "cluster: %v\n", err)
		os.Exit(1)
	}
}

func dispatch(args []string) error {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	command := args[0]
	flags := flag.NewFlagSet("cluster "+command, flag.ExitOnError)
	flags.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	var at places
	flags.StringVar(&at.dir, "dir", defaultDir(), "")
	flags.StringVar(&at.programs, "programs", "target/debug", "")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	dir, err := filepath.Abs(at.dir)
	if err != nil {
		return err
	}
	at.dir = dir
	rest := flags.Args()
	switch command {
	case "up":
		return up(at)
	case "down":
		return down(at)
	case "status":
		return status(at)
	case "load":
		return load(at, rest)
	case "pack":
		if len(rest) == 0 {
			return errors.New("pack: which directory?")
		}
		_, err := packAll(at, rest[0], rest[1:])
		return err
	case "run":
		if len(rest) < 2 {
			return errors.New("run: where, and what? For example: cluster run node-1 nft list ruleset")
		}
		return run(at, rest[0], rest[1:])
	// The next three are this program inside the namespaces that it has made.
	case "supervise":
		return supervise(at)
	case "node-enter":
		return nodeEnter(at, rest)
	case "node":
		return nodeMain(at, rest)
	case "help", "-h", "--help":
		fmt.Print(usage)
		return nil
	}
	return fmt.Errorf("no command %q; `cluster help` lists them", command)
}

func defaultDir() string {
	if cache := os.Getenv("AMBIT_CACHE"); cache != "" {
		return filepath.Join(cache, "cluster")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = "/var/tmp"
	}
	return filepath.Join(cache, "ambit", "cluster")
}
