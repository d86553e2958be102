// The official Gateway API conformance suite, mesh profiles, against the cluster that KUBECONFIG names.
//
// The suite's own program does set-up and run in one step. Here a command can stand between the two: what a mesh does
// for namespaces that exist by then (waypoints, say).
package conformance

import (
	"context"
	"flag"
	"os"
	"os/exec"
	"testing"
	"time"

	"sigs.k8s.io/gateway-api/conformance"
	"sigs.k8s.io/gateway-api/conformance/tests"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/yaml"
)

// Longest run of the command between set-up and run: waypoints start within seconds, on a busy machine within minutes.
const betweenWait = 5 * time.Minute

var (
	between = flag.String("between", "",
		"a command to run when the suite's namespaces and pods are there and before the first test; with /bin/sh")
	consecutive = flag.Int("consecutive", 0,
		"successes in a row that count as one; 0 is the suite's own number. More of them make luck less likely")
)

func TestConformance(t *testing.T) {
	options := conformance.DefaultOptions(t)
	if err := options.Implementation.Validate(); err != nil && options.ReportOutputPath != "" {
		t.Fatalf("a report needs to say whose it is: %v", err)
	}
	if *consecutive > 0 {
		options.TimeoutConfig.RequiredConsecutiveSuccesses = *consecutive
	}
	all, err := suite.NewConformanceTestSuite(options)
	if err != nil {
		t.Fatalf("preparing the suite: %v", err)
	}
	all.Setup(t, tests.ConformanceTests)
	if *between != "" {
		run(t, *between)
	}
	if err := all.Run(t, tests.ConformanceTests); err != nil {
		t.Fatalf("running the suite: %v", err)
	}
	if options.ReportOutputPath == "" {
		return
	}
	report, err := all.Report()
	if err != nil {
		t.Fatalf("the suite made no report: %v", err)
	}
	text, err := yaml.Marshal(report)
	if err != nil {
		t.Fatalf("writing the report: %v", err)
	}
	if err := os.WriteFile(options.ReportOutputPath, text, 0o644); err != nil {
		t.Fatalf("writing the report: %v", err)
	}
	t.Logf("the report is in %s", options.ReportOutputPath)
}

func run(t *testing.T, line string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), betweenWait)
	defer cancel()
	said, err := exec.CommandContext(ctx, "/bin/sh", "-c", line).CombinedOutput()
	t.Logf("%s\n%s", line, said)
	if err != nil {
		t.Fatalf("the command between set-up and run failed: %v", err)
	}
}
