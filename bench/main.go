//go:build linux

// Command bench measures the gateway against a bare reverse_proxy of the same Caddy, and against other gateways:
//
//	go run ./bench                    everything, in less than five minutes
//	go run ./bench -only stream       only a part of it
//	go run ./bench -soak 30m          serve mixed traffic, restart what can be restarted, and check memory and ledger
//	go run ./bench -h                 what else there is
//
// It builds cmd/caddy, runs the targets, an upstream and a Redis (if redis-server is installed) as processes of their
// own on loopback, and ends them. The targets have the same load in turns, round by round, so that a machine that is
// at times busy with something else is unfair to all of them. Client and upstream share the processors with the
// target; the table says what they cost. It needs Linux.
//
// Another gateway is started by a command and has to pass OpenAI's chat completions on to the upstream:
//
//	go run ./bench -other 'other=/path/to/other --port {port} --openai-base-url http://{upstream}/v1' \
//		-header 'other=Authorization: Bearer sk-1234' -model other=gpt-4o
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == upstreamCommand {
		exit(runUpstream())
	}
	o, err := parseOptions(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		exit(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err = run(ctx, o)
	if ctx.Err() != nil {
		err = errors.New("interrupted") // what else is wrong comes from that
	}
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(ctx context.Context, o *options) error {
	if o.soak > 0 {
		return soak(ctx, o)
	}
	report, err := compare(ctx, o)
	if err != nil {
		return err
	}
	if o.json {
		return report.writeJSON(os.Stdout)
	}
	return report.writeTables(os.Stdout)
}
