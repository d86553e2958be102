// The first process of a process namespace: it starts the others, starts again what ends, and buries orphans.
// When it dies the kernel ends everything in the namespace: that is how the cluster stops without leftovers.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

const (
	restartAfter = time.Second
	// A part that ends this often, each time soon, is broken: then the whole ends, and the log says why.
	restartsAtMost = 5
	soon           = 30 * time.Second
)

type part struct {
	name     string
	argv     []string
	started  time.Time
	restarts int
}

type keeper struct {
	logs    string // directory
	mu      sync.Mutex
	running map[int]*part
	waiting map[int]chan syscall.WaitStatus
}

func newKeeper(logs string) *keeper {
	return &keeper{logs: logs, running: map[int]*part{}, waiting: map[int]chan syscall.WaitStatus{}}
}

// start starts a part that is to run as long as the cluster.
func (k *keeper) start(name string, argv ...string) error {
	return k.launch(&part{name: name, argv: argv})
}

func (k *keeper) launch(one *part) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	pid, err := k.spawn(one.name, one.argv)
	if err != nil {
		return fmt.Errorf("starting %s: %w", one.name, err)
	}
	one.started = time.Now()
	k.running[pid] = one
	return nil
}

// once runs a command to its end. Commands must be run by this, never by os/exec's Run: the burying below would
// take their exit status away.
func (k *keeper) once(argv ...string) error {
	k.mu.Lock()
	log := filepath.Base(argv[0])
	pid, err := k.spawn(log, argv)
	if err != nil {
		k.mu.Unlock()
		return fmt.Errorf("starting %s: %w", argv[0], err)
	}
	ended := make(chan syscall.WaitStatus, 1)
	k.waiting[pid] = ended
	k.mu.Unlock()
	if how := <-ended; how.ExitStatus() != 0 {
		return fmt.Errorf("%v ended with status %d; see %s.log", argv, how.ExitStatus(), filepath.Join(k.logs, log))
	}
	return nil
}

// spawn must be called with the lock held, so that a quick death is looked up only after it is known.
func (k *keeper) spawn(log string, argv []string) (int, error) {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return 0, err
	}
	out, err := os.OpenFile(filepath.Join(k.logs, log+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	process, err := os.StartProcess(path, argv, &os.ProcAttr{
		Files: []*os.File{null, out, out},
		Env:   os.Environ(),
		// A session of its own: a signal for the terminal's group is not for these.
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, err
	}
	pid := process.Pid
	return pid, process.Release()
}

// bury waits for children for ever.
func (k *keeper) bury() {
	for {
		var how syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &how, 0, nil)
		switch err {
		case nil:
			k.ended(pid, how)
		case syscall.ECHILD:
			time.Sleep(100 * time.Millisecond)
		}
	}
}

func (k *keeper) ended(pid int, how syscall.WaitStatus) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if waiting, ok := k.waiting[pid]; ok {
		delete(k.waiting, pid)
		waiting <- how
		return
	}
	one, ok := k.running[pid]
	if !ok {
		return // an orphan
	}
	delete(k.running, pid)
	if time.Since(one.started) > soon {
		one.restarts = 0
	}
	one.restarts++
	fmt.Fprintf(os.Stderr, "%s: %s ended (exit status %d, signal %d)\n",
		time.Now().Format(time.RFC3339), one.name, how.ExitStatus(), how.Signal())
	if one.restarts > restartsAtMost {
		fmt.Fprintf(os.Stderr, "%s has ended %d times; the end of %s.log:\n%s\n",
			one.name, one.restarts, one.name, tail(filepath.Join(k.logs, one.name+".log")))
		os.Exit(1)
	}
	time.AfterFunc(restartAfter, func() {
		if err := k.launch(one); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	})
}
