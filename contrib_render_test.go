package mesh

import (
	"cmp"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const picturePath = "contrib/grafana/mesh.svg"

// TestDashboardInPrometheus has a real Prometheus scrape a gateway under load for a minute, with an outage of Redis in it,
// and answer every query of the dashboard. With -update it draws what came back. It needs MESH_TEST_PROMETHEUS, the path
// of the binary.
func TestDashboardInPrometheus(t *testing.T) {
	binary := os.Getenv("MESH_TEST_PROMETHEUS")
	if binary == "" {
		t.Skip("MESH_TEST_PROMETHEUS is not set")
	}
	const seconds = 75
	server := startRedis(t)
	up := busyUpstream(t)
	p := startProcess(t, up.address(), fmt.Sprintf(inSite, "metrics /metrics\n"+strings.NewReplacer(
		"store local $DIR/mesh.db", "store redis "+server.address+" {\n\t\tjournal $DIR/journal.db\n\t}",
		"model test/* up\n", "model test/* up {\n\t\tprice 0.5 1.5\n\t}\n",
		"name tester", "name team-a\n\t\trpm 1500",
	).Replace(site(observedModels))))
	prometheus := startPrometheus(t, binary, strings.TrimPrefix(p.url, "http://"))
	from := time.Now()
	outage := time.AfterFunc(seconds/2*time.Second, server.kill)
	defer outage.Stop()
	back := time.AfterFunc((seconds/2+10)*time.Second, server.start)
	defer back.Stop()
	load(p.gateway(), seconds*time.Second)

	d := readDashboard(t)
	drawn := make([][]promSeries, len(d.Panels))
	for i, panel := range d.Panels {
		for _, target := range panel.Targets {
			found := prometheus.evaluate(target, from, time.Now())
			if len(found) == 0 {
				t.Errorf("panel %q: nothing for %s", panel.Title, target.Expr)
			}
			drawn[i] = append(drawn[i], found...)
		}
	}
	if !*update {
		return
	}
	if err := os.WriteFile(picturePath, drawDashboard(d, drawn), 0o644); err != nil {
		t.Fatal(err)
	}
}

// busyUpstream takes the time a model takes, and fails now and then.
func busyUpstream(t *testing.T) *upstream {
	word := func(w http.ResponseWriter) {
		io.WriteString(w, wordFrame)
		http.NewResponseController(w).Flush()
		time.Sleep(time.Duration(10+rand.IntN(30)) * time.Millisecond)
	}
	return startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		var req struct {
			Model  string
			Stream bool
		}
		json.NewDecoder(r.Body).Decode(&req) //nolint:errcheck // the gateway's own
		time.Sleep(time.Duration(50+rand.IntN(250)) * time.Millisecond)
		switch {
		case req.Model == "two", rand.IntN(12) == 0:
			answers(503, "application/json", "{}")(w, r)
		case !req.Stream:
			answers(200, "application/json", completion)(w, r)
		default:
			w.Header().Set("Content-Type", "text/event-stream")
			for range 20 + rand.IntN(60) {
				word(w)
			}
			io.WriteString(w, finishFrame+usageFrame+doneFrame)
		}
	})
}

// load sends requests of all kinds for a while.
func load(g *gateway, d time.Duration) {
	bodies := []string{
		chatFor("test/priced", `"stream":true`), chatFor("test/priced"), chatFor("test/two"), chatFor("test/small", `"stream":true`),
		chatFor("test/large", `"stream":true`), chatFor("test/large", `"temperature":9`), chatFor("nobody/has-this"),
	}
	var clients sync.WaitGroup
	end := time.Now().Add(d)
	for i := range 14 {
		clients.Go(func() {
			for n := i; time.Now().Before(end); n++ {
				g.post(bodies[n%len(bodies)])
				time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
			}
		})
	}
	clients.Wait()
}

// prometheusServer is a Prometheus with the project's alerts.
type prometheusServer struct {
	t   *testing.T
	url string
}

func startPrometheus(t *testing.T, binary, target string) *prometheusServer {
	t.Helper()
	dir, address := t.TempDir(), freeAddress(t)
	rules, err := filepath.Abs(alertsPath)
	if err != nil {
		t.Fatal(err)
	}
	config := "global:\n  scrape_interval: 1s\nrule_files: [" + strconv.Quote(rules) + "]\n" +
		"scrape_configs:\n  - job_name: caddy\n    static_configs:\n      - targets: [" + strconv.Quote(target) + "]\n" +
		"        labels: {instance: gateway-1}\n"
	if err := os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "--config.file="+filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill() //nolint:errcheck // it is waited for
		cmd.Wait()         //nolint:errcheck // a killed process has no other way to end
	})
	s := &prometheusServer{t: t, url: "http://" + address}
	eventually(t, "Prometheus is ready", func() bool {
		resp, err := http.Get(s.url + "/-/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return s
}

// promSeries is a line of a panel.
type promSeries struct {
	name   string
	points [][2]float64 // time in Unix seconds, value
}

// evaluate answers a query as Grafana would have it answered.
func (s *prometheusServer) evaluate(target dashboardTarget, from, to time.Time) (found []promSeries) {
	s.t.Helper()
	resp, err := http.PostForm(s.url+"/api/v1/query_range", url.Values{
		"query": {strings.NewReplacer("$__rate_interval", "10s", "$model", ".*").Replace(target.Expr)},
		"start": {fmt.Sprint(from.Unix())}, "end": {fmt.Sprint(to.Unix())}, "step": {"1"},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct {
		Error string
		Data  struct {
			Result []struct {
				Metric map[string]string
				Values [][2]any
			}
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Error != "" {
		s.t.Fatalf("%s: %v %s", target.Expr, err, answer.Error)
	}
	for _, r := range answer.Data.Result {
		one := promSeries{name: target.LegendFormat}
		for label, value := range r.Metric {
			one.name = strings.ReplaceAll(one.name, "{{"+label+"}}", value)
		}
		for _, v := range r.Values {
			if y, err := strconv.ParseFloat(v[1].(string), 64); err == nil && y == y { // no NaN
				one.points = append(one.points, [2]float64{v[0].(float64), y})
			}
		}
		if len(one.points) > 0 {
			found = append(found, one)
		}
	}
	slices.SortFunc(found, func(a, b promSeries) int { return cmp.Compare(a.name, b.name) })
	return found
}

const (
	panelWidth, panelHeight = 400, 190
	panelColumns            = 3
)

var lineColors = []string{"#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0"}

// drawDashboard draws the panels as SVG.
func drawDashboard(d dashboard, drawn [][]promSeries) []byte {
	var b strings.Builder
	rows := (len(d.Panels) + panelColumns - 1) / panelColumns
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="10">`+"\n",
		panelColumns*panelWidth, rows*panelHeight)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#111217"/>`+"\n")
	for i, panel := range d.Panels {
		fmt.Fprintf(&b, `<g transform="translate(%d %d)"><rect x="3" y="3" width="%d" height="%d" rx="2" fill="#181b1f" stroke="#2c3235"/>`+"\n",
			i%panelColumns*panelWidth, i/panelColumns*panelHeight, panelWidth-6, panelHeight-6)
		fmt.Fprintf(&b, `<text x="12" y="20" fill="#d8d9da" font-size="12">%s</text>`+"\n", html.EscapeString(panel.Title))
		drawPanel(&b, panel.FieldConfig.Defaults.Unit, drawn[i])
		b.WriteString("</g>\n")
	}
	b.WriteString("</svg>\n")
	return []byte(b.String())
}

// drawPanel draws the lines of one panel, each as it is: unlike Grafana's they are not stacked.
func drawPanel(b *strings.Builder, unit string, lines []promSeries) {
	const left, right, top, bottom = 62, 14, 32, 36
	first, last, most := 0.0, 0.0, 0.0
	for _, l := range lines {
		if first == 0 || l.points[0][0] < first {
			first = l.points[0][0]
		}
		last = max(last, l.points[len(l.points)-1][0])
		for _, p := range l.points {
			most = max(most, p[1])
		}
	}
	if most == 0 {
		most = 1
	}
	width, height := float64(panelWidth-left-right), float64(panelHeight-top-bottom)
	y := func(v float64) float64 { return top + height*(1-v/most) }
	for _, share := range []float64{0, .5, 1} {
		fmt.Fprintf(b, `<path d="M%d %.1fh%.0f" stroke="#2c3235"/><text x="%d" y="%.1f" fill="#8e8e8e" text-anchor="end">%s</text>`+"\n",
			left, y(share*most), width, left-5, y(share*most)+3, withUnit(share*most, unit))
	}
	x := 12
	for i, l := range lines {
		color := lineColors[i%len(lineColors)]
		fmt.Fprintf(b, `<polyline fill="none" stroke="%s" stroke-width="1.3" points="`, color)
		for _, p := range l.points {
			fmt.Fprintf(b, "%.0f,%.1f ", left+width*(p[0]-first)/max(last-first, 1), y(p[1]))
		}
		b.WriteString(`"/>` + "\n")
		if x < panelWidth-80 {
			fmt.Fprintf(b, `<text x="%d" y="%d" fill="%s">%s</text>`+"\n", x, panelHeight-13, color, html.EscapeString(l.name))
			x += 16 + 6*len(l.name)
		}
	}
}

func withUnit(v float64, unit string) string {
	switch unit {
	case "s":
		if v < 1 {
			return short(v*1000) + " ms"
		}
		return short(v) + " s"
	case "percentunit":
		return short(v*100) + " %"
	case "currencyUSD":
		return "$" + short(v)
	case "reqps", "ops":
		return short(v) + "/s"
	}
	return short(v)
}

func short(v float64) string {
	decimals := 0
	if v < 10 && v != float64(int(v)) {
		decimals = 2
	}
	return strconv.FormatFloat(v, 'f', decimals, 64)
}
