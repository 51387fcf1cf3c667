package mesh

import (
	"os"
	"strings"
	"testing"
)

func TestFlushIntervalThatDetachesUpstreamsIsWarnedOf(t *testing.T) {
	g := startGateway(t, "127.0.0.1:1", site("\tupstream live http://127.0.0.1:1 {\n\t\treverse_proxy {\n\t\t\tflush_interval -1\n\t\t}\n\t}"))
	eventually(t, "the log warns of that upstream alone", func() bool {
		text, err := os.ReadFile(g.dir + "/caddy.log")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(text), `flush_interval -1 is not needed`) == 1 && strings.Contains(string(text), `"upstream":"live"`)
	})
}
