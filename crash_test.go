package mesh

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"
)

const (
	killedStoreEnv = "MESH_TEST_KILLED_STORE" // the database of a child that is to be killed
	killsEnv       = "MESH_TEST_KILLS"        // how often to kill one
)

// TestKilledChild is what TestKillDashNineKeepsWhatIsOlderThanFiftyMilliseconds kills. It settles until then, and says
// after each event which it was and when.
func TestKilledChild(t *testing.T) {
	path := os.Getenv(killedStoreEnv)
	if path == "" {
		t.Skip("only as a child")
	}
	s := openLocal(t, path, clock(at(t, "2026-11-24T10:00:00Z")))
	var next atomic.Int64
	for range 4 {
		go func() {
			for {
				i := int(next.Add(1))
				admit(t, s, "key", Limits{})
				settle(s, "key", i, Money(i))
				fmt.Printf("settled %d %d\n", i, time.Now().UnixNano())
				time.Sleep(time.Millisecond)
			}
		}()
	}
	select {}
}

func TestKillDashNineKeepsWhatIsOlderThanFiftyMilliseconds(t *testing.T) {
	const margin = 250 * time.Millisecond // 50 ms, and what a busy machine may add
	kills, _ := strconv.Atoi(os.Getenv(killsEnv))
	var worst time.Duration
	for i := range max(kills, 3) {
		path := filepath.Join(t.TempDir(), "mesh.db")
		settled, killed := settleAndKill(t, path, time.Duration(300+i*137%900)*time.Millisecond)
		lost := oldestLoss(t, path, settled, killed)
		worst = max(worst, lost)
		if lost > margin {
			t.Errorf("lost what had been settled %s before the kill", lost)
		}
	}
	t.Logf("the oldest loss was %s before the kill", worst)
}

// settleAndKill returns when the child said to have settled which event, and when it was killed.
func settleAndKill(t *testing.T, path string, after time.Duration) (settled map[int]time.Time, killed time.Time) {
	t.Helper()
	child := exec.Command(os.Args[0], "-test.run=^TestKilledChild$")
	child.Env = append(os.Environ(), killedStoreEnv+"="+path)
	output, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	settled = make(map[int]time.Time)
	var last time.Time
	var timer *time.Timer
	lines := bufio.NewScanner(output)
	for lines.Scan() {
		var i int
		var nanos int64
		if _, err := fmt.Sscanf(lines.Text(), "settled %d %d", &i, &nanos); err != nil {
			continue // torn by the kill
		}
		settled[i] = time.Unix(0, nanos)
		last = settled[i]
		if timer == nil {
			timer = time.AfterFunc(after, func() {
				killed = time.Now()
				child.Process.Kill()
			})
		}
	}
	if err := child.Wait(); child.ProcessState.ExitCode() != -1 || len(settled) < 100 {
		t.Fatalf("the child was not killed (%v), or settled only %d", err, len(settled))
	}
	if last.After(killed) { // it does not die at once
		killed = last
	}
	return settled, killed
}

// oldestLoss reopens the store and returns how long before the kill the first event was settled that is not there.
func oldestLoss(t *testing.T, path string, settled map[int]time.Time, killed time.Time) (lost time.Duration) {
	t.Helper()
	s := openLocal(t, path, clock(at(t, "2026-11-24T10:00:00Z")))
	ids, sum := ledger(t, s)
	if got := s.spend("key"); got != sum {
		t.Errorf("spend is %s, and the ledger sums up to %s", got, sum)
	}
	if used := admit(t, s, "key", Limits{}).Day.Used; used <= int64(len(ids)) {
		t.Errorf("%d requests counted, %d settled", used-1, len(ids))
	}
	kept := make(map[string]bool, len(ids))
	for _, id := range ids {
		kept[id] = true
	}
	for i, when := range settled {
		if !kept[requestID(i)] {
			lost = max(lost, killed.Sub(when))
		}
	}
	t.Logf("%d settled, %d kept, lost the last %s", len(settled), len(ids), lost)
	return lost
}
