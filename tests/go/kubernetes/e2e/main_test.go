// Kubernetes' own tests of its network, as one program that `cargo xtask conformance` runs against a cluster. The specs
// and their framework are Kubernetes'; here is decided only which groups of them are linked, and how results come out.
package e2e

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"k8s.io/kubernetes/test/e2e"
	"k8s.io/kubernetes/test/e2e/framework"
	"k8s.io/kubernetes/test/e2e/framework/config"
	"k8s.io/kubernetes/test/e2e/framework/testfiles"
	manifests "k8s.io/kubernetes/test/e2e/testing-manifests"

	_ "k8s.io/kubernetes/test/e2e/common/network"
	_ "k8s.io/kubernetes/test/e2e/feature"
	_ "k8s.io/kubernetes/test/e2e/framework/debug/init"
	_ "k8s.io/kubernetes/test/e2e/framework/node/init"
	_ "k8s.io/kubernetes/test/e2e/network"
	_ "k8s.io/kubernetes/test/utils/format"
)

// A line of the file of results: a spec that has ended.
type line struct {
	Spec    string  `json:"spec"`
	State   string  `json:"state"`
	Seconds float64 `json:"seconds"`
	Message string  `json:"message,omitempty"`
	Log     string  `json:"log,omitempty"`
}

var results = flag.String("kproxy.results", "", "append a JSON line to this file for each spec that ended")
var logs = flag.String("kproxy.logs", "", "put what a failed spec printed into this folder")

func TestMain(m *testing.M) {
	config.CopyFlags(config.Flags, flag.CommandLine)
	framework.RegisterCommonFlags(flag.CommandLine)
	framework.RegisterClusterFlags(flag.CommandLine)
	flag.Parse()
	testfiles.AddFileSource(manifests.GetE2ETestingManifestsFS())
	framework.AfterReadingAllFlags(&framework.TestContext)
	// Not before: that walks through all specs without running them, and would be reported, and not the run itself.
	ginkgo.ReportAfterEach(report)
	os.Exit(m.Run())
}

func TestE2E(t *testing.T) {
	e2e.RunE2ETests(t)
}

func report(report ginkgo.SpecReport) {
	// Of the thousands that the focus leaves out nobody wants to hear.
	if report.State == types.SpecStateSkipped && report.Failure.Message == "" {
		return
	}
	result := line{
		Spec:    report.FullText(),
		State:   report.State.String(),
		Message: report.Failure.Message,
	}
	// Its run time is counted up only after this.
	if !report.StartTime.IsZero() {
		result.Seconds = time.Since(report.StartTime).Seconds()
	}
	if report.Failed() && *logs != "" {
		result.Log = filepath.Join(*logs, fileName(report.FullText())+".log")
		text := report.Failure.Message + "\n" + report.Failure.Location.String() + "\n\n" +
			report.CapturedGinkgoWriterOutput + report.CapturedStdOutErr
		if err := os.WriteFile(result.Log, []byte(text), 0o644); err != nil {
			result.Log = "not written: " + err.Error()
		}
	}
	write(result)
}

// Processes that run specs in parallel append to one file: a line is one write.
func write(result line) {
	if *results == "" {
		return
	}
	text, err := json.Marshal(result)
	if err == nil {
		var file *os.File
		if file, err = os.OpenFile(*results, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644); err == nil {
			_, err = file.Write(append(text, '\n'))
			if closed := file.Close(); err == nil {
				err = closed
			}
		}
	}
	if err != nil {
		ginkgo.Fail("cannot write the result: " + err.Error())
	}
}

var unfit = regexp.MustCompile(`[^A-Za-z0-9]+`)

func fileName(spec string) string {
	name := strings.Trim(unfit.ReplaceAllString(spec, "-"), "-")
	if len(name) > 150 {
		name = name[:150]
	}
	return name
}
