//go:build linux

package main

import (
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// machine is where and when something was measured.
type machine struct {
	Processor string `json:"processor"`
	Cores     int    `json:"cores"`
	Date      string `json:"date"`
	Go        string `json:"go"`
	Caddy     string `json:"caddy"`
}

// thisMachine also says which Caddy the binary is.
func thisMachine(binary string) (machine, error) {
	m := machine{Processor: processorName(), Cores: runtime.NumCPU(), Date: time.Now().UTC().Format(time.DateOnly)}
	build, err := buildinfo.ReadFile(binary)
	if err != nil {
		return m, err
	}
	m.Go = build.GoVersion
	for _, dependency := range build.Deps {
		if dependency.Path == "github.com/caddyserver/caddy/v2" {
			m.Caddy = dependency.Version
		}
	}
	return m, nil
}

// report is what a run prints.
type report struct {
	machine machine
	options *options
	rate    float64 // of the open loop
	*results
}

// writeTables writes Markdown that can be read as it is.
func (r *report) writeTables(w io.Writer) error {
	var b strings.Builder
	m, o := r.machine, r.options
	fmt.Fprintf(&b, "%s, %d cores, %s, Caddy %s, %s. %d connections, prompts of %d bytes, ", m.Processor, m.Cores, m.Date, m.Caddy, m.Go, o.connections, o.prompt)
	fmt.Fprintf(&b, "a fixed rate of %s requests/s; median (lowest–highest) of %d rounds of %s.\n\n", number(r.rate, 0), o.rounds, o.duration)

	header := []string{""}
	for _, t := range r.targets {
		header = append(header, t.title())
	}
	rows := [][]string{header}
	for _, m := range r.metrics {
		row := []string{m.Name + unitOf(m)}
		for _, t := range r.targets {
			row = append(row, shown(r.summary(m, t.name), m.scale, "", false))
		}
		rows = append(rows, row)
	}
	b.WriteString(markdown(rows))
	if rows := r.comparison(); len(rows) > 1 {
		b.WriteString("\n" + markdown(rows))
	}
	b.WriteString(r.overtaxed())
	_, err := io.WriteString(w, b.String())
	return err
}

// overtaxed says which latencies are not worth comparing.
func (r *report) overtaxed() (notes string) {
	for _, t := range r.targets {
		if most := r.summary(throughput, t.name).Median; most < r.rate {
			notes += fmt.Sprintf("\n%s: %s requests/s are more than it can do here, so that its latencies are those of a growing queue; "+
				"-rate %.0f would be half of what it can.\n", t.title(), number(r.rate, 0), most/2)
		}
	}
	return notes
}

func unitOf(m metric) string {
	if m.Unit == "1/s" {
		return ""
	}
	return ", " + m.Unit
}

// comparison has one row for each goal.
func (r *report) comparison() [][]string {
	header := []string{"against a bare reverse_proxy"}
	for _, t := range r.targets[1:] {
		header = append(header, t.title(), "goal")
	}
	rows := [][]string{header}
	for _, g := range goals {
		row, any := []string{g.title}, false
		for _, t := range r.targets[1:] {
			v, ok := g.judge(r.results, t.name)
			any = any || ok
			row = append(row, shown(v.Got, g.scale, g.unit, g.unit == " µs"), mark(v, &g))
		}
		if any {
			rows = append(rows, row)
		}
	}
	return rows
}

func mark(v verdict, g *goal) string {
	if v.Met == nil {
		return ""
	}
	sign, word := "≤", "missed"
	if g.atLeast {
		sign = "≥"
	}
	if *v.Met {
		word = "met"
	}
	return fmt.Sprintf("%s %s%s: %s", sign, number(*v.Limit, g.scale), g.unit, word)
}

// shown writes a summary, with its spread where there is one.
func shown(s summary, scale int, unit string, signed bool) string {
	if math.IsNaN(s.Median) {
		return "–"
	}
	sign := ""
	if signed && s.Median > 0 {
		sign = "+"
	}
	low, median, high := number(s.Lowest, scale), number(s.Median, scale), number(s.Most, scale)
	if low == high {
		return sign + median + unit
	}
	between := "–"
	if signed {
		between = " to "
	}
	return fmt.Sprintf("%s%s%s (%s%s%s)", sign, median, unit, low, between, high)
}

func number(f float64, decimals int) string {
	s := strconv.FormatFloat(f, 'f', decimals, 64)
	whole, fraction, _ := strings.Cut(s, ".")
	if n, err := strconv.ParseInt(whole, 10, 64); err == nil && (n >= 1000 || n <= -1000) {
		whole = humanize.Comma(n)
	}
	if fraction == "" {
		return whole
	}
	return whole + "." + fraction
}

// markdown writes a table whose columns are as wide as their widest cell.
func markdown(rows [][]string) string {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(cell)))
		}
	}
	var b strings.Builder
	for i, row := range rows {
		for j, cell := range row {
			fmt.Fprintf(&b, "| %-*s ", widths[j], cell)
		}
		b.WriteString("|\n")
		if i == 0 {
			for _, width := range widths {
				b.WriteString("|" + strings.Repeat("-", width+2))
			}
			b.WriteString("|\n")
		}
	}
	return b.String()
}

// measurement is a metric of a target, as JSON has it.
type measurement struct {
	metric
	Target string     `json:"target"`
	Rounds []*float64 `json:"rounds"` // null where the target does not say
	summary
}

func (r *report) writeJSON(w io.Writer) error {
	out := struct {
		Machine     machine       `json:"machine"`
		Rate        float64       `json:"fixed_rate"`
		Connections int           `json:"connections"`
		Prompt      int           `json:"prompt_bytes"`
		Duration    string        `json:"duration"`
		Measured    []measurement `json:"measured"`
		Verdicts    []verdict     `json:"verdicts"`
	}{Machine: r.machine, Rate: r.rate, Connections: r.options.connections, Prompt: r.options.prompt, Duration: r.options.duration.String()}
	for _, m := range r.metrics {
		for _, t := range r.targets {
			if s := r.summary(m, t.name); !math.IsNaN(s.Median) {
				out.Measured = append(out.Measured, measurement{m, t.name, pointers(r.values[m][t.name]), s})
			}
		}
	}
	for _, g := range goals {
		for _, t := range r.targets {
			if v, ok := g.judge(r.results, t.name); ok && t.name != bare {
				out.Verdicts = append(out.Verdicts, v)
			}
		}
	}
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "\t")
	return encoder.Encode(out)
}

// pointers is for JSON, which has no NaN.
func pointers(values []float64) (p []*float64) {
	for i := range values {
		if math.IsNaN(values[i]) {
			p = append(p, nil)
			continue
		}
		p = append(p, &values[i])
	}
	return p
}
