package mesh

import (
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestJobsAreCountedWhereTheyAre(t *testing.T) {
	server := startRedis(t)
	for name, store := range map[string]string{
		"local": "store local $DIR/mesh.db",
		"redis": "store redis " + server.address + " {\n\t\ttimeout 2s\n\t\tjournal $DIR/journal.db\n\t}",
	} {
		t.Run(name, func(t *testing.T) {
			shortJobTimes(t)
			release := make(chan struct{})
			up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				<-release
				answers(200, "application/json", completion)(w, r)
			})
			text := strings.Replace(site("\tasync {\n\t\tworkers 2\n\t\tqueue metered\n\t}"), "store local $DIR/mesh.db", store, 1)
			g := startGateway(t, up.address(), text)
			count := func(name, labels string) float64 { return gathered(t, "caddy_mesh_"+name, labels) }
			before := count("jobs_total", "completed")
			for range 5 {
				if r := g.post(asyncBody); r.StatusCode != http.StatusAccepted {
					t.Fatalf("%d %s", r.StatusCode, r.body)
				}
			}
			eventually(t, "two run", func() bool { return count("jobs_running", "metered") == 2 })
			eventually(t, "three wait", func() bool { return count("jobs_waiting", "metered") == 3 })
			close(release)
			eventually(t, "all have ended", func() bool { return count("jobs_total", "completed") == before+5 })
			eventually(t, "none is left", func() bool { return count("jobs_running", "metered")+count("jobs_waiting", "metered") == 0 })
		})
	}
}

// gathered is the sum of a metric over the series with a label value, in this process.
func gathered(t *testing.T, name, label string) (sum float64) {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	if err := collectors.register(registry); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.GetMetric() {
			if m.GetLabel()[0].GetValue() == label {
				sum += m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	return sum
}
