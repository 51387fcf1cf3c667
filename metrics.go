package mesh

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics says what is counted beside the metrics that are always there.
type Metrics struct {
	// Whether requests, refusals, tokens and cost are counted for each key as well, under its name, or its id where it has
	// none. The first 1,000 names and ids since the start of the process are told apart; all others are `other`.
	// Default: false.
	PerKey bool `json:"per_key,omitempty"`
}

// collectors are the process's metrics. Caddy has a registry for each configuration: they are registered with every one
// of them, and being the process's own they go on counting through a reload.
var collectors = newCollectors()

// gatewayMetrics are the metrics, as Prometheus has them. Nothing in a label is a client's choice: models are named as
// the configuration names them, by a pattern where that is what it has.
type gatewayMetrics struct {
	requests   *prometheus.CounterVec
	rejections *prometheus.CounterVec
	attempts   *prometheus.CounterVec
	fallbacks  *prometheus.CounterVec
	autoRoutes *prometheus.CounterVec
	tokens     *prometheus.CounterVec
	cost       *prometheus.CounterVec
	firstToken *prometheus.HistogramVec
	perToken   *prometheus.HistogramVec
	duration   *prometheus.HistogramVec
	streams    *prometheus.GaugeVec

	openCircuits *prometheus.GaugeVec

	admits      *prometheus.HistogramVec
	storeErrors *prometheus.CounterVec
	stores      storeCollector

	jobs      *prometheus.CounterVec
	jobQueues jobCollector

	keyRequests   *prometheus.CounterVec
	keyRejections *prometheus.CounterVec
	keyTokens     *prometheus.CounterVec
	keyCost       *prometheus.CounterVec
}

// Buckets, in seconds.
var (
	answerBuckets = []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600}
	tokenBuckets  = []float64{.001, .0025, .005, .01, .015, .02, .03, .05, .075, .1, .15, .25, .5, 1}
	admitBuckets  = []float64{.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1}
)

func newCollectors() *gatewayMetrics {
	return &gatewayMetrics{
		requests: counter("requests_total",
			"Chat requests that were let through, when they end. upstream is the one that answered, or the last one tried.",
			"model", "upstream", "outcome"),
		rejections: counter("rejections_total",
			"Requests that were refused before any upstream was asked, by the code of the error.", "reason"),
		attempts: counter("upstream_attempts_total",
			"Times an upstream was asked for an answer, when that ends.", "upstream", "result"),
		fallbacks: counter("fallbacks_total",
			"Chat requests for which more than one upstream was asked, when they end.", "model"),
		autoRoutes: counter("auto_routes_total",
			"Models chosen for requests that leave the choice to the gateway. reason is chosen, or why it is the default.", "model", "reason"),
		tokens: counter("tokens_total",
			"Tokens charged when a request ends, estimates included. Those of kind cached are among those of kind prompt.",
			"model", "kind"),
		cost: counter("cost_usd_total",
			"What requests cost when they end, in USD, by the prices of the configuration.", "model"),
		firstToken: histogram("time_to_first_token_seconds",
			"Of a stream, when it ends: from the request's arrival to the first text of the answer.",
			answerBuckets, "model", "upstream"),
		perToken: histogram("time_per_output_token_seconds",
			"Of a stream, when it ends: from the first text of the answer to its end, for each token of it but the first.",
			tokenBuckets, "model", "upstream"),
		duration: histogram("request_duration_seconds",
			"Of a chat request that was let through, when it ends, however it ends: from its arrival.",
			answerBuckets, "model", "upstream"),
		streams: gauge("open_streams", "Streams that an upstream has begun to answer and that have not ended.", "model", "upstream"),

		openCircuits: gauge("open_circuits",
			"Models of an upstream, by its own names for them, that are not asked because they have failed too often.", "upstream"),

		admits: histogram("store_admit_duration_seconds",
			"How long the store took to let a request through or refuse it.", admitBuckets, "store"),
		storeErrors: counter("store_errors_total",
			"What a store failed at. admit: a request could not be decided and was refused. command: Redis did not take a command, or not in time.",
			"store", "operation"),
		stores: newStoreCollector(),

		jobs:      counter("jobs_total", "Jobs that this instance has run, by how they ended.", "status"),
		jobQueues: newJobCollector(),

		keyRequests: counter("key_requests_total",
			"With metrics per_key: chat requests that were let through, when they end.", "key", "outcome"),
		keyRejections: counter("key_rejections_total",
			"With metrics per_key: requests with a known key that were refused before any upstream was asked.", "key", "reason"),
		keyTokens: counter("key_tokens_total",
			"With metrics per_key: tokens charged when a request ends. Those of kind cached are among those of kind prompt.",
			"key", "kind"),
		keyCost: counter("key_cost_usd_total",
			"With metrics per_key: what requests cost when they end, in USD.", "key"),
	}
}

const (
	metricsNamespace = "caddy"
	metricsSubsystem = "mesh"
)

func counter(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricsNamespace, Subsystem: metricsSubsystem, Name: name, Help: help,
	}, labels)
}

func gauge(name, help string, labels ...string) *prometheus.GaugeVec {
	return prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: metricsNamespace, Subsystem: metricsSubsystem, Name: name, Help: help,
	}, labels)
}

func histogram(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: metricsNamespace, Subsystem: metricsSubsystem, Name: name, Help: help, Buckets: buckets,
	}, labels)
}

// register adds the metrics to a configuration's registry, unless another handler has done so.
func (m *gatewayMetrics) register(registry prometheus.Registerer) error {
	for _, c := range []prometheus.Collector{
		m.requests, m.rejections, m.attempts, m.fallbacks, m.autoRoutes, m.tokens, m.cost, m.firstToken, m.perToken, m.duration, m.streams, m.openCircuits,
		m.admits, m.storeErrors, m.stores, m.jobs, m.jobQueues, m.keyRequests, m.keyRejections, m.keyTokens, m.keyCost,
	} {
		err := registry.Register(c)
		if _, known := errors.AsType[prometheus.AlreadyRegisteredError](err); err != nil && !known {
			return err
		}
	}
	return nil
}

// storeCollector asks the open stores how they are whenever the metrics are read.
type storeCollector struct {
	degraded, journal *prometheus.Desc
}

func newStoreCollector() storeCollector {
	name := func(s string) string { return prometheus.BuildFQName(metricsNamespace, metricsSubsystem, s) }
	return storeCollector{
		degraded: prometheus.NewDesc(name("store_degraded"),
			"Whether a store of this kind cannot be reached at the moment: 1 or 0.", []string{"store"}, nil),
		journal: prometheus.NewDesc(name("store_journal_entries"),
			"Settlements that wait in a journal until their store can be reached.", []string{"store"}, nil),
	}
}

// Describe names the metrics.
func (c storeCollector) Describe(descs chan<- *prometheus.Desc) {
	descs <- c.degraded
	descs <- c.journal
}

// Collect has one value for each kind of store, as stores that differ only in their address have no name that tells
// them apart.
func (c storeCollector) Collect(values chan<- prometheus.Metric) {
	degraded, waiting := make(map[string]float64), make(map[string]float64)
	eachOpenStore(func(key string, s storeStatus) {
		kind := storeKind(key)
		degraded[kind] += 0
		if s.Degraded {
			degraded[kind] = 1
		}
		waiting[kind] += float64(s.Waiting)
	})
	for kind := range degraded {
		values <- prometheus.MustNewConstMetric(c.degraded, prometheus.GaugeValue, degraded[kind], kind)
		values <- prometheus.MustNewConstMetric(c.journal, prometheus.GaugeValue, waiting[kind], kind)
	}
}

// storeKind returns the name of the module that a store's key begins with. More of a key must not become a label.
func storeKind(key string) string {
	kind, _, ok := strings.Cut(key, ":")
	if !ok {
		return "other"
	}
	return kind
}

// storeSeries are the metrics of one kind of store.
type storeSeries struct {
	admits prometheus.Observer
	failed prometheus.Counter
}

func (m *gatewayMetrics) ofStore(kind string) *storeSeries {
	return &storeSeries{
		admits: m.admits.WithLabelValues(kind),
		failed: m.storeErrors.WithLabelValues(kind, "admit"),
	}
}

// ask has the store decide, and takes the time.
func (s *storeSeries) ask(ctx context.Context, store Store, a Admission) (Verdict, error) {
	if job, ok := store.(*submission); ok { // which waits for a disk, or more of Redis
		return job.Admit(ctx, a)
	}
	began := time.Now()
	verdict, err := store.Admit(ctx, a)
	s.admits.Observe(time.Since(began).Seconds())
	if err != nil {
		s.failed.Inc()
	}
	return verdict, err
}
