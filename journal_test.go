package mesh

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func writtenJournal(t *testing.T, dir string, frames int) (files journalFiles, content []byte, ends []int) {
	t.Helper()
	files = journalFiles{prefix: filepath.Join(dir, "mesh.db.journal-"), database: []byte("0123456789abcdef")}
	j := files.journal(1)
	for i := range frames {
		account := records{"key": []byte(strconv.Itoa(i))}
		events := records{requestID(i): []byte(`{"request_id":"` + requestID(i) + `"}`)}
		if err := j.append(account, events); err != nil {
			t.Fatal(err)
		}
		ends = append(ends, int(j.end))
	}
	content, err := os.ReadFile(j.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.remove(); err != nil {
		t.Fatal(err)
	}
	return files, content, ends
}

func replayed(t *testing.T, files journalFiles, content []byte) (g *generation, left int) {
	t.Helper()
	g = newGeneration(1, files)
	if err := os.WriteFile(g.journals[0].path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	left, err := g.journals[0].replay(g)
	if err != nil {
		t.Fatal(err)
	}
	return g, left
}

func TestJournalTornAtAnyByteKeepsTheFramesBefore(t *testing.T) {
	files, content, ends := writtenJournal(t, t.TempDir(), 3)
	check := func(what string, content []byte, frames int) {
		t.Helper()
		g, _ := replayed(t, files, content)
		if len(g.events) != frames || frames > 0 && string(g.accounts["key"]) != strconv.Itoa(frames-1) {
			t.Errorf("%s: %d events and balance %q, want %d frames", what, len(g.events), g.accounts["key"], frames)
		}
	}
	for end := range len(content) + 1 {
		frames := 0
		for frames < len(ends) && ends[frames] <= end {
			frames++
		}
		check("cut at "+strconv.Itoa(end), content[:end], frames)
	}
	for at := ends[1]; at < ends[2]; at++ {
		damaged := bytes.Clone(content)
		damaged[at] ^= 0x40
		check("damaged at "+strconv.Itoa(at), damaged, 2)
		check("zero from "+strconv.Itoa(at), append(bytes.Clone(content[:ends[1]]), make([]byte, at)...), 2)
	}
	check("followed by something else", append(bytes.Clone(content), "something else"...), 3)
}

func TestReplayingTwiceIsReplayingOnce(t *testing.T) {
	files, content, _ := writtenJournal(t, t.TempDir(), 5)
	g, left := replayed(t, files, content)
	if left != 0 {
		t.Errorf("%d bytes were left", left)
	}
	once := maps.Clone(g.events)
	if _, err := g.journals[0].replay(g); err != nil {
		t.Fatal(err)
	}
	if len(g.events) != len(once) || string(g.accounts["key"]) != "4" {
		t.Errorf("after replaying twice: %d events, balance %s", len(g.events), g.accounts["key"])
	}
}

func TestJournalOfAnotherDatabaseIsNotReplayed(t *testing.T) {
	files, content, _ := writtenJournal(t, t.TempDir(), 1)
	j := files.journal(1)
	if err := os.WriteFile(j.path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	s := newLocalStore(strings.TrimSuffix(files.prefix, ".journal-"), 10)
	if err := s.open(); err == nil || !strings.Contains(err.Error(), "another database") {
		t.Errorf("opening: %v", err)
	}
	if now, err := os.ReadFile(j.path); err != nil || !bytes.Equal(now, content) {
		t.Errorf("the journal was changed (%v)", err)
	}
}

func TestFailedWriteIsOverwritten(t *testing.T) {
	files, content, ends := writtenJournal(t, t.TempDir(), 2)
	j := files.journal(1)
	torn := content[:ends[1]-3]
	if err := os.WriteFile(j.path, torn, 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if j.file, err = os.OpenFile(j.path, os.O_WRONLY, 0); err != nil {
		t.Fatal(err)
	}
	j.end = int64(ends[0])
	if err := j.append(records{"key": []byte("new")}, nil); err != nil {
		t.Fatal(err)
	}
	g := newGeneration(1, files)
	if _, err := j.replay(g); err != nil {
		t.Fatal(err)
	}
	if string(g.accounts["key"]) != "new" || len(g.events) != 1 {
		t.Errorf("replayed balance %q and %d events", g.accounts["key"], len(g.events))
	}
}

func FuzzJournalReplayNeverFails(f *testing.F) {
	dir := f.TempDir()
	files := journalFiles{prefix: filepath.Join(dir, "journal-")}
	f.Add([]byte{}, uint8(0))
	f.Add(appendRecords(nil, records{"a": []byte("b")}), uint8(1))
	f.Fuzz(func(t *testing.T, content []byte, framed uint8) {
		j := files.journal(1)
		file := appendFrame(nil, func(b []byte) []byte { return append(b, j.header...) })
		if framed%2 == 0 {
			file = append(file, content...)
		} else {
			file = appendFrame(file, func(b []byte) []byte { return append(b, content...) })
		}
		if err := os.WriteFile(j.path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		j.replay(newGeneration(1, files)) // may be an error, but no panic
	})
}
