//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// server is something that listens.
type server struct {
	*process
	address string
	caddy   *caddy // if it is one
}

// caddy is how a Caddy was started, and its admin endpoint.
type caddy struct {
	admin     string
	caddyfile []byte
	dir       string
}

const caddyfile = `{
	admin %s
	auto_https off
	persist_config off
	skip_install_trust
}
http://:%s {
	bind 127.0.0.1
%s}
`

// startCaddy runs a Caddy with one site, whose block it is given. In it, $UPSTREAM stands for the upstream's address and
// $DIR for a folder of this Caddy's own, which it finds as it left it if it has run before.
func (r *rig) startCaddy(ctx context.Context, name, site string) (*server, error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	admin, err := freeAddress()
	if err != nil {
		return nil, err
	}
	c := &caddy{admin: admin, dir: filepath.Join(r.dir, name)}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, err
	}
	_, port, _ := strings.Cut(address, ":")
	site = strings.NewReplacer("$UPSTREAM", r.upstream.address, "$DIR", c.dir).Replace(site)
	c.caddyfile = fmt.Appendf(nil, caddyfile, admin, port, site)
	path := filepath.Join(c.dir, "Caddyfile")
	if err := os.WriteFile(path, c.caddyfile, 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(r.binary, "run", "--config", path)
	cmd.Env = append(os.Environ(), "HOME="+c.dir, "XDG_DATA_HOME="+c.dir, "XDG_CONFIG_HOME="+c.dir)
	p, err := r.start(name, cmd)
	if err != nil {
		return nil, err
	}
	return &server{p, address, c}, p.ready(ctx, func() error { return dials(address) })
}

// adminTimeout is long because a profile takes as long as it is asked to.
const adminTimeout = 2 * time.Minute

// adminTries is how often something is asked of an admin endpoint whose connections break.
const adminTries = 5

// get asks the admin endpoint for something.
func (c *caddy) get(ctx context.Context, path string) ([]byte, error) {
	answer, _, err := c.ask(ctx, http.MethodGet, path, nil)
	return answer, err
}

// ask sends a request to the admin endpoint, and again where the connection broke: each reload replaces the endpoint, and
// breaks what it is answering, be it that reload. It returns how often it asked.
func (c *caddy) ask(ctx context.Context, method, path string, body []byte) (answer []byte, times int, err error) {
	for {
		times++
		answer, err = c.askOnce(ctx, method, path, body)
		broken, ok := errors.AsType[*url.Error](err)
		if !ok || broken.Timeout() || times == adminTries {
			return answer, times, err
		}
		if err := wait(ctx, time.Duration(times)*500*time.Millisecond); err != nil {
			return nil, times, err
		}
	}
}

// askOnce uses a connection of its own, so that none is counted as the server's load.
func (c *caddy) askOnce(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "http://"+c.admin+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Close = true
	r.Header.Set("Content-Type", "text/caddyfile")
	r.Header.Set("Cache-Control", "must-revalidate") // an unchanged configuration is loaded too
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, &url.Error{Op: method, URL: path, Err: err}
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %s", path, resp.Status, answer)
	}
	return answer, nil
}

// reload loads the configuration again, as `caddy reload --force` does. It returns how often it had that done: more than
// once where no answer came.
func (c *caddy) reload(ctx context.Context) (times int, err error) {
	_, times, err = c.ask(ctx, http.MethodPost, "/load", c.caddyfile)
	return times, err
}

// live returns how many bytes heap and stacks take after a garbage collection.
func (c *caddy) live(ctx context.Context) (bytes float64, err error) {
	var profile []byte
	for range 2 { // what a finalizer lets go is gone after the second
		if profile, err = c.get(ctx, "/debug/pprof/heap?gc=1&debug=1"); err != nil {
			return 0, err
		}
	}
	for _, name := range []string{"HeapAlloc", "Stack"} {
		n, err := numberAfter(profile, "# "+name+" = ")
		if err != nil {
			return 0, err
		}
		bytes += n
	}
	return bytes, nil
}

func (c *caddy) goroutines(ctx context.Context) (float64, error) {
	profile, err := c.get(ctx, "/debug/pprof/goroutine?debug=1")
	if err != nil {
		return 0, err
	}
	return numberAfter(profile, "goroutine profile: total ")
}

func numberAfter(text []byte, mark string) (n float64, err error) {
	_, rest, _ := bytes.Cut(text, []byte(mark))
	if _, err := fmt.Sscan(string(rest[:min(len(rest), 30)]), &n); err != nil {
		return 0, fmt.Errorf("%q and a number: %w in %.100q", mark, err, text)
	}
	return n, nil
}

// profile writes a CPU profile of the time to come.
func (c *caddy) profile(ctx context.Context, path string, d time.Duration) error {
	seconds := max(1, int(d.Seconds()))
	profile, err := c.get(ctx, fmt.Sprintf("/debug/pprof/profile?seconds=%d", seconds))
	if err != nil {
		return err
	}
	return os.WriteFile(path, profile, 0o600)
}

// waiting returns how many settlements wait in a journal. It is an error where the gateway says it is degraded.
func (c *caddy) waiting(ctx context.Context) (n int64, err error) {
	said, err := c.get(ctx, "/mesh/health")
	if err != nil {
		return 0, err
	}
	var health struct{ Stores []struct{ Waiting int64 } }
	if err := json.Unmarshal(said, &health); err != nil {
		return 0, fmt.Errorf("/mesh/health: %w in %s", err, said)
	}
	for _, store := range health.Stores {
		n += store.Waiting
	}
	return n, nil
}
