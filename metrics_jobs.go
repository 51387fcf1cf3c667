package mesh

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// jobRunners are those of this process. A reload has two for one queue, until the jobs of the first have ended.
var jobRunners sync.Map

// jobCollector asks them how it stands whenever the metrics are read.
type jobCollector struct {
	waiting, running *prometheus.Desc
}

func newJobCollector() jobCollector {
	describe := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc(prometheus.BuildFQName(metricsNamespace, metricsSubsystem, name), help, []string{"queue"}, nil)
	}
	return jobCollector{
		waiting: describe("jobs_waiting", "Jobs that wait in a queue, as of at most ten seconds ago; nothing while the store cannot be asked. Instances that share the queue have the same ones."),
		running: describe("jobs_running", "Jobs of a queue that this instance runs at the moment."),
	}
}

// Describe names the metrics.
func (c jobCollector) Describe(descs chan<- *prometheus.Desc) {
	descs <- c.waiting
	descs <- c.running
}

// Collect has one value for each queue, whose name is the operator's choice.
func (c jobCollector) Collect(values chan<- prometheus.Metric) {
	waiting, running := make(map[string]int64), make(map[string]int)
	jobRunners.Range(func(runner, _ any) bool {
		r := runner.(*jobRunner)
		if n := r.waiting.Load(); n >= 0 {
			waiting[r.queue] = max(waiting[r.queue], n)
		}
		running[r.queue] += r.running()
		return true
	})
	for queue, n := range running {
		values <- prometheus.MustNewConstMetric(c.running, prometheus.GaugeValue, float64(n), queue)
	}
	for queue, n := range waiting {
		values <- prometheus.MustNewConstMetric(c.waiting, prometheus.GaugeValue, float64(n), queue)
	}
}
