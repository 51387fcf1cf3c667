package mesh

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	dashboardPath = "contrib/grafana/mesh.json"
	alertsPath    = "contrib/prometheus/alerts.yml"
)

// dashboard is what the tests need of a Grafana dashboard.
type dashboard struct {
	Panels []struct {
		Title       string
		Targets     []dashboardTarget
		FieldConfig struct {
			Defaults struct{ Unit string }
		}
	}
	Templating struct {
		List []struct{ Name, Type, Query string }
	}
}

type dashboardTarget struct{ Expr, LegendFormat string }

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	raw, err := os.ReadFile(dashboardPath)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// contribQueries returns every PromQL query of the dashboard and the alerts, by where it stands.
func contribQueries(t *testing.T) map[string]string {
	t.Helper()
	queries := make(map[string]string)
	d := readDashboard(t)
	for _, p := range d.Panels {
		for i, target := range p.Targets {
			queries[fmt.Sprintf("panel %q, query %d", p.Title, i)] = target.Expr
		}
	}
	for _, v := range d.Templating.List {
		if v.Type == "query" {
			queries["variable "+v.Name] = v.Query
		}
	}
	raw, err := os.ReadFile(alertsPath)
	if err != nil {
		t.Fatal(err)
	}
	alerts := regexp.MustCompile(`(?m)^ +- alert: (\w+)\n +expr: (.+)$`).FindAllStringSubmatch(string(raw), -1)
	if n := strings.Count(string(raw), "alert:"); n != len(alerts) || n == 0 {
		t.Fatalf("%d alerts, and %d with an expr of one line behind them", n, len(alerts))
	}
	for _, a := range alerts {
		queries["alert "+a[1]] = a[2]
	}
	return queries
}

// promWords are what the queries here use of PromQL. Grafana's label_values is beside it.
var promWords = map[string]bool{
	"by": true, "sum": true, "max": true, "topk": true, "rate": true, "increase": true, "deriv": true,
	"histogram_quantile": true, "label_values": true,
}

// promToken is a string, a name, a number or variable, or one other character.
var promToken = regexp.MustCompile(`"[^"]*"|[a-zA-Z_][a-zA-Z0-9_]*|[$0-9][\w.]*|\S`)

// promNames returns the names of metrics and of labels in a query. It is no parser: Prometheus's own is no dependency of
// Caddy's. It knows where labels stand, and that brackets match; every other name must be a word of the language or
// is taken for a metric's.
func promNames(query string) (metrics, labels []string, err error) {
	var open []string
	labelList := false // what is in these parentheses are labels
	previous, beforeThat := "", ""
	for _, token := range promToken.FindAllString(query, -1) {
		inside := ""
		if len(open) > 0 {
			inside = open[len(open)-1]
		}
		switch {
		case strings.Contains("([{", token):
			open = append(open, token)
			labelList = token == "(" && previous == "by"
		case strings.Contains(")]}", token):
			if inside == "" || strings.Index("([{", inside) != strings.Index(")]}", token) {
				return nil, nil, fmt.Errorf("%s closes nothing", token)
			}
			open, labelList = open[:len(open)-1], false
		case inside == "[" || !isName(token):
		case inside == "{" || labelList || previous == "," && isName(beforeThat) && strings.HasPrefix(query, "label_values"):
			labels = append(labels, token)
		case !promWords[token]:
			metrics = append(metrics, token)
		}
		previous, beforeThat = token, previous
	}
	if len(open) > 0 {
		return nil, nil, fmt.Errorf("%s is not closed", open[len(open)-1])
	}
	return metrics, labels, nil
}

func isName(token string) bool {
	return token[0] == '_' || token[0]|0x20 >= 'a' && token[0]|0x20 <= 'z'
}

func TestDashboardAndAlertsAskForWhatThereIs(t *testing.T) {
	up := observedUpstream(t)
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, site(observedModels)))
	observed(p.gateway())
	names := make(map[string]bool)
	labels := map[string]bool{"instance": true} // Prometheus's own
	for series := range p.metrics() {
		name, inBraces, _ := strings.Cut(series, "{")
		names[name] = true
		for _, l := range regexp.MustCompile(`(\w+)="`).FindAllStringSubmatch(inBraces, -1) {
			labels[l[1]] = true
		}
	}
	asked := make(map[string]bool)
	for where, query := range contribQueries(t) {
		metrics, by, err := promNames(query)
		if err != nil || len(metrics) == 0 {
			t.Errorf("%s: %v in %s", where, err, query)
		}
		for _, name := range metrics {
			asked[name] = true
			if !names[name] {
				t.Errorf("%s: there is no metric %s", where, name)
			}
		}
		for _, label := range by {
			if !labels[label] {
				t.Errorf("%s: no metric has a label %s", where, label)
			}
		}
	}
	if len(asked) < 12 {
		t.Errorf("only %v are asked for", slices.Sorted(maps.Keys(asked)))
	}
}

func TestQueriesAreRead(t *testing.T) {
	for _, tc := range []struct {
		query           string
		metrics, labels string
		wrong           bool
	}{
		{`sum by (a, b) (rate(m_total{c=~"x|m2(", d="y"}[5m])) / n > 0.2`, "m_total n", "a b c d", false},
		{`topk(5, m)`, "m", "", false},
		{`label_values(m, a)`, "m", "a", false},
		{`max by (a) (ratee(m[$__rate_interval]))`, "ratee m", "a", false},
		{`sum(m`, "", "", true},
		{`sum(m])`, "", "", true},
		{`m)`, "", "", true},
	} {
		metrics, labels, err := promNames(tc.query)
		if (err != nil) != tc.wrong || strings.Join(metrics, " ") != tc.metrics || strings.Join(labels, " ") != tc.labels {
			t.Errorf("%s: metrics %q, labels %q, %v", tc.query, metrics, labels, err)
		}
	}
}
