//go:build linux

package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

// booked is a ledger that is right, and the answers it is about: the last client left before the end.
func booked() (*ledger, []receipt) {
	l := &ledger{spend: 2*wholeCost + 5}
	receipts := []receipt{{"req_1", true}, {"req_2", true}, {"req_3", false}}
	l.entries = []entry{{"req_1", "completed", nanos(wholeCost)}, {"req_2", "completed", nanos(wholeCost)}, {"req_3", "client_gone", 5}}
	return l, receipts
}

func TestLedgerThatIsRightPasses(t *testing.T) {
	l, receipts := booked()
	if got := l.check(receipts, 0); got != nil {
		t.Error(got)
	}
}

func TestLedgerThatIsWrongFails(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(l *ledger)
		want  string
	}{
		"a missing entry": {func(l *ledger) {
			l.entries, l.spend = l.entries[1:], l.spend-wholeCost
		}, "1 answers have no entry, such as req_1"},
		"a missing entry that was charged": {func(l *ledger) { l.entries = l.entries[1:] }, "1 answers have no entry, such as req_1"},
		"a missing entry of a client that left": {func(l *ledger) {
			l.entries, l.spend = l.entries[:2], l.spend-5
		}, "1 answers have no entry, such as req_3"},
		"a doubled entry": {func(l *ledger) {
			l.entries, l.spend = append(l.entries, l.entries[1]), l.spend+wholeCost
		}, "1 requests have more than one entry, such as req_2"},
		"charged twice, entered once": {func(l *ledger) { l.spend += wholeCost }, "were spent"},
		"a nano-dollar too little":    {func(l *ledger) { l.spend-- }, "were spent"},
		"a cost that is wrong": {func(l *ledger) {
			l.entries[0].Cost++
			l.spend++
		}, "1 whole answers did not cost"},
		"a whole answer entered as another": {func(l *ledger) { l.entries[0].Outcome = "lost" }, "1 whole answers did not cost"},
		"an entry of nobody":                {func(l *ledger) { l.entries = append(l.entries, entry{"req_4", "completed", 0}) }, "1 entries are of no answer"},
		"an entry of nobody in place of one": {func(l *ledger) {
			l.entries[0].RequestID = "req_4"
		}, "1 entries are of no answer"},
	} {
		l, receipts := booked()
		tc.spoil(l)
		if got := strings.Join(l.check(receipts, 0), "\n"); !strings.Contains(got, tc.want) {
			t.Errorf("%s: got %q, want %q", name, got, tc.want)
		}
	}
}

func TestEntryOfARequestWithoutAnAnswerIsAllowed(t *testing.T) {
	l, receipts := booked()
	l.entries = append(l.entries, entry{"req_4", "client_gone", 0})
	if got := l.check(receipts, 1); got != nil {
		t.Error(got)
	}
}

func TestLocalLedgerIsReadToTheNanoDollar(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for bucket, value := range map[string]string{
			"accounts": `{"total_usd":"9007199.254740993"}`,
			"ledger":   `{"request_id":"req_1","outcome":"completed","cost_usd":"9007199.254740993"}`,
		} {
			b, err := tx.CreateBucket([]byte(bucket))
			if err != nil {
				return err
			}
			if err := b.Put([]byte("req_1"), []byte(value)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := readLocalLedger(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(l.spend, l.entries); got != "9007199254740993 [{req_1 completed 9007199254740993}]" {
		t.Error(got)
	}
}

func TestAmountsAreReadAsNanoDollars(t *testing.T) {
	for text, want := range map[string]nanos{"0": 0, "2": 2e9, "0.0030130020": -1, "0.000000001": 1, "12.5": 12_500_000_000, "x": -1, "1.-5": -1} {
		var got nanos
		if err := got.UnmarshalText([]byte(text)); err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%s: got %d, want %d", text, got, want)
		}
	}
}
