//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"go.etcd.io/bbolt"
)

// The price of the model, in USD per million tokens: odd, so that each cost has to be rounded.
const (
	inputPrice  = "1.000001"
	outputPrice = "10.000003"
)

// wholeCost is what one whole answer costs, in nano-dollars.
var wholeCost = costOf(promptTokens, completionTokens)

func costOf(prompt, completion int64) int64 {
	const input, output = 1_000_001_000, 10_000_003_000 // nano-dollars per million tokens
	return (prompt*input + completion*output + 500_000) / 1_000_000
}

// ledger is what a store says of the requests it has settled.
type ledger struct {
	entries []entry
	spend   int64 // nano-dollars; of all keys
}

// entry is what is checked of the gateway's event.
type entry struct {
	RequestID string `json:"request_id"`
	Outcome   string `json:"outcome"`
	Cost      nanos  `json:"cost_usd"`
}

// nanos is an amount in nano-dollars, written as a decimal number of USD. It is read here, and not by the gateway's own
// code, because that is what is checked.
type nanos int64

// UnmarshalText implements encoding.TextUnmarshaler.
func (n *nanos) UnmarshalText(text []byte) error {
	whole, fraction, _ := strings.Cut(string(text), ".")
	if len(fraction) > 9 {
		return fmt.Errorf("%q is not in nano-dollars", text)
	}
	amount, err := strconv.ParseInt(whole+fraction+strings.Repeat("0", 9-len(fraction)), 10, 64)
	*n = nanos(amount)
	return err
}

func (l *ledger) add(event []byte) error {
	var e entry
	if err := json.Unmarshal(event, &e); err != nil {
		return fmt.Errorf("ledger entry %.200q: %w", event, err)
	}
	l.entries = append(l.entries, e)
	return nil
}

// check returns what is wrong: each answer that has begun must have one entry, each whole answer must have cost what
// it costs, the entries must add up to what was spent, and there must be no entries of nobody, but for requests of
// which the client knows no more than that it sent them.
func (l *ledger) check(receipts []receipt, unsure int) (failures []string) {
	var sum int64
	times := make(map[string]int, len(l.entries))
	byID := make(map[string]entry, len(l.entries))
	for _, e := range l.entries {
		sum += int64(e.Cost)
		times[e.RequestID]++
		byID[e.RequestID] = e
	}
	var missing, doubled, mischarged findings
	for id, n := range times {
		if n > 1 {
			doubled.add(id)
		}
	}
	for _, r := range receipts {
		e, found := byID[r.id]
		switch {
		case !found:
			missing.add(r.id)
		case r.whole && (int64(e.Cost) != wholeCost || e.Outcome != "completed"):
			mischarged.add(fmt.Sprintf("%s, %s, %d nano-dollars", r.id, e.Outcome, e.Cost))
		}
	}
	failures = append(failures, missing.told("answers have no entry")...)
	failures = append(failures, doubled.told("requests have more than one entry")...)
	failures = append(failures, mischarged.told(fmt.Sprintf("whole answers did not cost %d nano-dollars", wholeCost))...)
	if extra := len(times) - len(receipts) + missing.count; extra > unsure {
		failures = append(failures, fmt.Sprintf("%d entries are of no answer, at most %d can be", extra, unsure))
	}
	if sum != l.spend {
		failures = append(failures, fmt.Sprintf("the entries add up to %d nano-dollars, and %d were spent", sum, l.spend))
	}
	return failures
}

// findings are things of one kind, and one of them to look for.
type findings struct {
	count int
	one   string
}

func (f *findings) add(what string) {
	f.count++
	f.one = what
}

func (f *findings) told(what string) []string {
	if f.count == 0 {
		return nil
	}
	return []string{fmt.Sprintf("%d %s, such as %s", f.count, what, f.one)}
}

// readLocalLedger reads the database of a local store that is not open.
func readLocalLedger(path string) (*ledger, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: 5 * time.Second})
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", path, err)
	}
	defer db.Close()
	l := new(ledger)
	return l, db.View(func(tx *bbolt.Tx) error {
		accounts, events := tx.Bucket([]byte("accounts")), tx.Bucket([]byte("ledger"))
		if accounts == nil || events == nil {
			return fmt.Errorf("%s: a bucket is missing", path)
		}
		return errors.Join(accounts.ForEach(l.addAccount), events.ForEach(func(_, event []byte) error { return l.add(event) }))
	})
}

func (l *ledger) addAccount(key, account []byte) error {
	var a struct {
		Total nanos `json:"total_usd"`
	}
	if err := json.Unmarshal(account, &a); err != nil {
		return fmt.Errorf("account %q: %w", key, err)
	}
	l.spend += int64(a.Total)
	return nil
}

// accountsOf returns the names of what belongs to each key, up to the colon.
func accountsOf(ctx context.Context, client *redis.Client) ([]string, error) {
	names, err := client.Keys(ctx, "mesh:{*}:account").Result()
	for i := range names {
		names[i] = strings.TrimSuffix(names[i], "account")
	}
	return names, err
}

// readSharedLedger reads what gateways have left in Redis.
func readSharedLedger(ctx context.Context, client *redis.Client) (*ledger, error) {
	defer client.Close()
	names, err := accountsOf(ctx, client)
	if err != nil {
		return nil, err
	}
	l := new(ledger)
	for _, name := range names {
		total, err := client.HGet(ctx, name+"account", "total").Int64()
		if err != nil {
			return nil, fmt.Errorf("%saccount: %w", name, err)
		}
		l.spend += total
		if err := l.addStream(ctx, client, name+"ledger"); err != nil {
			return nil, fmt.Errorf("%sledger: %w", name, err)
		}
	}
	return l, nil
}

func (l *ledger) addStream(ctx context.Context, client *redis.Client, name string) error {
	const page = 5000
	for after := "-"; ; {
		messages, err := client.XRangeN(ctx, name, after, "+", page).Result()
		if err != nil {
			return err
		}
		for _, m := range messages {
			event, _ := m.Values["event"].(string)
			if err := l.add([]byte(event)); err != nil {
				return err
			}
			after = "(" + m.ID
		}
		if len(messages) < page {
			return nil
		}
	}
}

// unsettled returns how many requests Redis knows of, or a gateway keeps for it, that are not in the ledger yet.
func (s *endurance) unsettled(ctx context.Context, client *redis.Client) (n int64, err error) {
	names, err := accountsOf(ctx, client)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		pending, err := client.HLen(ctx, name+"pending").Result()
		if err != nil {
			return 0, err
		}
		n += pending
	}
	for _, g := range s.gateways {
		waiting, err := g.caddy.waiting(ctx)
		if err != nil {
			return 0, err
		}
		n += waiting
	}
	return n, nil
}
