package mesh

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"
)

// usedPages returns the pages of the database that its tree or free list reaches, without those that are free.
func usedPages(t *testing.T, content []byte) []int {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mesh.db")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var used []int
	err = db.View(func(tx *bbolt.Tx) error {
		for id := 2; ; id++ {
			switch page, err := tx.Page(id); {
			case err != nil:
				return err
			case page == nil:
				return nil
			case page.Type != "free":
				used = append(used, id)
				id += page.OverflowCount
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return used
}

func TestFlippedPageIsRefusedAndLeftAlone(t *testing.T) {
	whole, size := filledDatabase(t), os.Getpagesize()
	used := usedPages(t, whole)
	if len(used) < 20 {
		t.Fatalf("only %d pages are used", len(used))
	}
	for _, id := range used {
		flipped := bytes.Clone(whole)
		for i := id * size; i < (id+1)*size; i++ {
			flipped[i] = ^flipped[i]
		}
		wantRefused(t, flipped, "damaged")
	}
	for _, id := range used {
		zeroed := bytes.Clone(whole)
		clear(zeroed[id*size : (id+1)*size])
		wantRefused(t, zeroed, "damaged")
	}
}

func TestMisplacedPageIsRefused(t *testing.T) {
	whole, size := filledDatabase(t), os.Getpagesize()
	var branch int
	for _, id := range usedPages(t, whole) {
		if p := page(whole[id*size:]); p.flags() == branchPage && p.count() > 5 {
			branch = id
		}
	}
	if branch == 0 {
		t.Fatal("no branch has more than five pages")
	}
	child := func(content []byte, i int) []byte {
		return content[branch*size+pageHeaderSize+i*entryHeaderSize+8:]
	}
	var leaves []int // of one bucket, in the order of their keys
	for i := range 3 {
		leaves = append(leaves, int(native.Uint64(child(whole, i))))
	}
	for _, tc := range []struct {
		name, want string
		misplace   func(content []byte)
	}{
		{"a page where another should be", "it says that it is page", func(content []byte) {
			copy(content[leaves[1]*size:], whole[leaves[2]*size:(leaves[2]+1)*size])
		}},
		{"the entries of a page in another", "not in order", func(content []byte) {
			copy(content[leaves[1]*size+8:], whole[leaves[2]*size+8:(leaves[2]+1)*size])
		}},
		{"a branch that is its own child", "in use twice", func(content []byte) {
			native.PutUint64(child(content, 0), uint64(branch))
		}},
		{"a child twice", "in use twice", func(content []byte) { copy(child(content, 1)[:8], child(whole, 0)[:8]) }},
		{"a child far beyond the end", "beyond the end", func(content []byte) {
			native.PutUint64(child(content, 1), 1<<50)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			content := bytes.Clone(whole)
			tc.misplace(content)
			wantRefused(t, content, tc.want)
		})
	}
}

func TestPageOfAnotherBucketIsRefused(t *testing.T) {
	whole, size := filledDatabase(t), os.Getpagesize()
	var jobs, other int
	for _, id := range usedPages(t, whole) {
		p := page(whole[id*size:])
		if p.flags() != leafPage {
			continue
		}
		if _, position, length, _, rest, err := p.entry(0); err != nil {
			t.Fatal(err)
		} else if string(rest[position:position+length]) == "bodies" {
			jobs = id
		} else if bytes.HasPrefix(rest[position:], []byte("req_")) {
			other = id
		}
	}
	if jobs == 0 || other == 0 {
		t.Fatalf("jobs %d, other %d", jobs, other)
	}
	content := bytes.Clone(whole)
	copy(content[jobs*size+8:], whole[other*size+8:(other+1)*size])
	wantRefused(t, content, "a bucket is missing")
}

func TestWrongListOfFreePagesIsRefused(t *testing.T) {
	whole, size := filledDatabase(t), os.Getpagesize()
	meta, err := newestMeta(bytes.NewReader(whole))
	if err != nil {
		t.Fatal(err)
	}
	list := func(content []byte) page { return content[int(meta.freelist)*size:] }
	if list(whole).count() == 0 {
		t.Fatal("no page is free")
	}
	inUse := bytes.Clone(whole)
	native.PutUint64(list(inUse)[pageHeaderSize:], meta.root)
	wantRefused(t, inUse, "in use twice")

	missing := bytes.Clone(whole)
	native.PutUint16(list(missing)[10:], uint16(list(whole).count()-1))
	wantRefused(t, missing, "neither in use nor free")

	long := bytes.Clone(whole)
	native.PutUint16(list(long)[10:], 0xFFFF)
	native.PutUint64(list(long)[pageHeaderSize:], 1<<61)
	wantRefused(t, long, "overlap")
}

// A page's header and its entries' headers are where bbolt would be led astray.
func TestNoFlippedByteCrashesTheProcess(t *testing.T) {
	whole, size := filledDatabase(t), os.Getpagesize()
	path := filepath.Join(t.TempDir(), "mesh.db")
	for _, id := range usedPages(t, whole) {
		for _, offset := range []int{0, 8, 10, 12, 15, 16, 17, 20, 24, 28, 31, 40} {
			flipped := bytes.Clone(whole)
			flipped[id*size+offset] ^= 0x15
			if checkPages(bytes.NewReader(flipped), int64(len(flipped))) != nil {
				continue
			}
			if err := os.WriteFile(path, flipped, 0o600); err != nil {
				t.Fatal(err)
			}
			s := newLocalStore(path, 10)
			if s.open() == nil {
				s.events(func(Event) bool { return true }) // may be an error
				s.Destruct()
			}
		}
	}
}

func TestCheckAgreesWithBolt(t *testing.T) {
	for range 3 {
		path := filepath.Join(t.TempDir(), "mesh.db")
		if err := os.WriteFile(path, filledDatabase(t), 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = db.View(func(tx *bbolt.Tx) error {
			for err := range tx.Check() {
				t.Error(err)
			}
			return nil
		})
		if err != nil || db.Close() != nil {
			t.Error(err)
		}
	}
}
