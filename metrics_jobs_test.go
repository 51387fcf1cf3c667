package mesh

import (
	"net/http"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestJobsAreCountedWhereTheyAre(t *testing.T) {
	jobStores(t, func(t *testing.T, store string) {
		shortJobTimes(t)
		release := make(chan struct{})
		up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
			<-release
			answers(200, "application/json", completion)(w, r)
		})
		g := startGateway(t, up.address(), jobSite(store, "", "\tasync {\n\t\tworkers 2\n\t\tqueue metered\n\t}"))
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
