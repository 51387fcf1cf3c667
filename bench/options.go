//go:build linux

package main

import (
	"errors"
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// options are what the command line says.
type options struct {
	only        []string
	duration    time.Duration
	rounds      int
	connections int
	rate        float64
	prompt      int
	streams     streamOptions
	targets     []string
	json        bool
	profiles    string
	soak        time.Duration

	others  []assignment
	headers map[string][]string
	models  map[string]string
}

// streamOptions are for the parts that measure streams.
type streamOptions struct {
	atOnce int // streams whose frames are timed
	frames frames
	open   []int // streams that are held open while memory is measured
}

// assignment is a name and what is said of it.
type assignment struct{ name, value string }

// The parts of a run.
const (
	partCompletion = "completion"
	partStream     = "stream"
	partMemory     = "memory"
)

func parseOptions(args []string) (*options, error) {
	o := &options{headers: make(map[string][]string), models: make(map[string]string)}
	o.streams.open = []int{1000, 5000}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.Func("only", "measure only `completion`, stream or memory; may be a list", listInto(&o.only, partCompletion, partStream, partMemory))
	f.DurationVar(&o.duration, "duration", 2*time.Second, "of each measurement in each round")
	f.IntVar(&o.rounds, "rounds", 7, "how often each target has its turn")
	f.IntVar(&o.connections, "c", 32, "connections of the client; reverse_proxy keeps 32 idle ones to an upstream")
	f.Float64Var(&o.rate, "rate", 0, "requests/s of the open loop (default: half of what the slowest target does at saturation)")
	f.IntVar(&o.prompt, "prompt", 2000, "size of a prompt in bytes")
	f.IntVar(&o.streams.atOnce, "streams", 8, "streams at once when frames are timed")
	f.IntVar(&o.streams.frames.count, "frames", 50, "frames of a stream")
	f.DurationVar(&o.streams.frames.gap, "gap", 2*time.Millisecond, "between two frames of a stream")
	f.Func("open", "numbers of `streams` held open when memory is measured (default 1000,5000)", func(s string) error { return o.streams.parseOpen(s) })
	f.Func("targets", "`names` of what is compared: bare, local, redis, and others (default: all)", listInto(&o.targets))
	f.BoolVar(&o.json, "json", false, "print everything that was measured as JSON")
	f.StringVar(&o.profiles, "cpuprofile", "", "write CPU profiles of each Caddy under load into this `folder`")
	f.DurationVar(&o.soak, "soak", 0, "instead of all that, serve mixed traffic for this long and check what is left of it")
	f.Func("other", "another gateway, as `name=command`; {port}, {upstream} and {dir} are replaced", func(s string) error { return o.other(s) })
	f.Func("header", "a header for one of the others, as `name=Header: value`", func(s string) error { return o.header(s) })
	f.Func("model", "the model to ask one of the others for, as `name=model`", func(s string) error { return o.model(s) })
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q", f.Arg(0))
	}
	return o, o.check()
}

func (o *options) check() error {
	if o.duration <= 0 || o.rounds <= 0 || o.connections <= 0 || o.prompt <= 0 || o.rate < 0 || o.soak < 0 {
		return errors.New("a number on the command line is not positive")
	}
	if s := o.streams; s.atOnce <= 0 || s.frames.count <= 1 || s.frames.gap <= 0 {
		return errors.New("a stream needs at least two frames and a gap between them")
	}
	return nil
}

func listInto(list *[]string, allowed ...string) func(string) error {
	return func(s string) error {
		for _, word := range strings.Split(s, ",") {
			if allowed != nil && !slices.Contains(allowed, word) {
				return fmt.Errorf("it can be %s", strings.Join(allowed, ", "))
			}
			*list = append(*list, word)
		}
		return nil
	}
}

func (s *streamOptions) parseOpen(text string) error {
	s.open = nil
	for _, word := range strings.Split(text, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n <= 0 || len(s.open) > 0 && n <= s.open[len(s.open)-1] {
			return errors.New("they are positive numbers, the smallest first")
		}
		s.open = append(s.open, n)
	}
	return nil
}

func assign(s string) (assignment, error) {
	name, value, ok := strings.Cut(s, "=")
	if !ok || name == "" || value == "" {
		return assignment{}, errors.New("it has the form name=…")
	}
	return assignment{name, value}, nil
}

func (o *options) other(s string) error {
	a, err := assign(s)
	if err == nil {
		o.others = append(o.others, a)
	}
	return err
}

func (o *options) header(s string) error {
	a, err := assign(s)
	if err == nil {
		o.headers[a.name] = append(o.headers[a.name], a.value)
	}
	return err
}

func (o *options) model(s string) error {
	a, err := assign(s)
	if err == nil {
		o.models[a.name] = a.value
	}
	return err
}

// wants reports whether a target was asked for.
func (o *options) wants(target string) bool {
	return len(o.targets) == 0 || slices.Contains(o.targets, target)
}

// does reports whether a part of the run was asked for.
func (o *options) does(part string) bool { return len(o.only) == 0 || slices.Contains(o.only, part) }
