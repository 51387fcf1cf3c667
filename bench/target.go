//go:build linux

package main

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// The targets this program knows how to start.
const (
	bare       = "bare"
	meshLocal  = "local"
	meshShared = "redis"
)

var titles = map[string]string{bare: "bare reverse_proxy", meshLocal: "mesh, store local", meshShared: "mesh, store redis"}

// target is one of the servers that are compared.
type target struct {
	name   string
	model  string
	header []string // of each request, as "Name: value"
	launch func(ctx context.Context) (*server, error)
	*server
}

func (t *target) title() string {
	if title, ok := titles[t.name]; ok {
		return title
	}
	return t.name
}

const (
	benchKey = "rsk_01ARZ3NDEKTSV4RRFFQ69G5FAV"
	bareSite = "\treverse_proxy $UPSTREAM\n"

	// A key with limits and a model with a price: what a gateway is there for has to be done, and be in the numbers.
	meshSite = `	mesh {
		store %s
		key ` + benchKey + ` {
			name bench
			rpm 100000000
			rpd 100000000000
			spend_cap_usd 100000000 month
		}
		upstream up http://$UPSTREAM/v1 {
			api_key sk-bench
		}
		model bench/* up {
			price ` + inputPrice + " " + outputPrice + `
		}
	}
`
)

// targets returns those of the targets that were asked for, not yet started, bare reverse_proxy first.
func (r *rig) targets(ctx context.Context, o *options) ([]*target, error) {
	key := []string{"Authorization: Bearer " + benchKey}
	all := []*target{
		{name: bare, header: key, launch: func(ctx context.Context) (*server, error) { return r.startCaddy(ctx, bare, bareSite) }},
		{name: meshLocal, header: key, launch: func(ctx context.Context) (*server, error) {
			return r.startCaddy(ctx, meshLocal, fmt.Sprintf(meshSite, "local $DIR/mesh.db"))
		}},
	}
	if shared, err := r.sharedTarget(ctx, o); err != nil {
		return nil, err
	} else if shared != nil {
		shared.header = key
		all = append(all, shared)
	}
	for _, other := range o.others {
		all = append(all, &target{name: other.name, model: o.models[other.name], header: o.headers[other.name],
			launch: func(ctx context.Context) (*server, error) { return r.startOther(ctx, other.name, other.value) }})
	}
	wanted := slices.DeleteFunc(all, func(t *target) bool { return !o.wants(t.name) })
	if len(wanted) == 0 {
		return nil, fmt.Errorf("there is none of the targets %s", strings.Join(o.targets, ", "))
	}
	return wanted, nil
}

// sharedTarget returns nothing where it is not wanted, or where there is no Redis.
func (r *rig) sharedTarget(ctx context.Context, o *options) (*target, error) {
	if !o.wants(meshShared) {
		return nil, nil
	}
	if !redisInstalled() {
		progress("redis-server is not installed: the target %s is left out", meshShared)
		return nil, nil
	}
	redis, err := r.startRedis(ctx, "everysec")
	if err != nil {
		return nil, err
	}
	site := fmt.Sprintf(meshSite, "redis "+redis.address+" {\n\t\t\tjournal $DIR/journal.db\n\t\t}")
	return &target{name: meshShared, launch: func(ctx context.Context) (*server, error) { return r.startCaddy(ctx, meshShared, site) }}, nil
}

// startOther runs a command by the shell, with an address that it has to listen on.
func (r *rig) startOther(ctx context.Context, name, command string) (*server, error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(address)
	command = strings.NewReplacer("{port}", port, "{upstream}", r.upstream.address, "{dir}", r.dir).Replace(command)
	p, err := r.start(name, exec.Command("sh", "-c", "exec "+command))
	if err != nil {
		return nil, err
	}
	return &server{process: p, address: address}, p.ready(ctx, func() error { return dials(address) })
}

// start launches the target and waits until it answers.
func (t *target) start(ctx context.Context, request func() []byte) (err error) {
	if t.server, err = t.launch(ctx); err != nil {
		return err
	}
	return t.ready(ctx, func() error {
		c, err := dial(t.address)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(startTimeout)); err != nil {
			return err
		}
		_, err = c.complete(request(), false)
		return err
	})
}
