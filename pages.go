package mesh

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"slices"
)

var errTruncated = errors.New("it has been truncated")

// checkPages reads every page of a bbolt file and returns an error where its tree or its list of free pages is not
// whole. bbolt trusts both: on a damaged file it loops, panics, or faults in memory it has mapped, and its own check
// runs in a goroutine of its own, where a fault cannot be caught. So this one uses plain reads, believes no number it
// finds, and visits no page twice. It does not see a flipped bit inside a key's value.
//
// The format is bbolt's version 2, in its internal/common/page.go and meta.go.
func checkPages(file io.ReaderAt, size int64) error {
	meta, err := newestMeta(file)
	if err != nil {
		return err
	}
	if have := uint64(size) / uint64(meta.pageSize); meta.end > have {
		return errTruncated
	}
	if meta.end < 2 {
		return errors.New("its first pages are damaged")
	}
	check := &pageCheck{file: file, size: meta.pageSize, used: make([]bool, meta.end)}
	check.used[0], check.used[1] = true, true
	if err := check.tree(meta.root, nil, nil); err != nil {
		return err
	}
	if meta.freelist == noFreelist {
		return nil
	}
	if err := check.freelist(meta.freelist); err != nil {
		return err
	}
	if lost := slices.Index(check.used, false); lost >= 0 {
		return fmt.Errorf("page %d is neither in use nor free", lost)
	}
	return nil
}

const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2
	noFreelist  = ^uint64(0)

	branchPage   = 0x01
	leafPage     = 0x02
	freelistPage = 0x10
	bucketEntry  = 0x01

	pageHeaderSize   = 16 // id, flags, count, overflow
	entryHeaderSize  = 16 // of branch and of leaf pages
	bucketHeaderSize = 16 // root page, sequence
	metaSize         = 64
)

var native = binary.NativeEndian

// pageMeta is what a meta page says of the rest of the file.
type pageMeta struct {
	pageSize       int64
	root, freelist uint64 // pages
	end            uint64 // the first page that was never used
	transaction    uint64
}

// newestMeta returns the valid meta page of the latest transaction, as bbolt chooses it. There are two, written in
// turn, so that one of them survives a power cut.
func newestMeta(file io.ReaderAt) (newest pageMeta, err error) {
	found := false
	for pageSize := int64(1 << 10); pageSize <= 1<<24; pageSize <<= 1 {
		for id := range int64(2) {
			meta, ok := readMeta(file, id*pageSize)
			if !ok || meta.pageSize != pageSize || found && meta.transaction < newest.transaction {
				continue
			}
			newest, found = meta, true
		}
	}
	if !found {
		return pageMeta{}, errors.New("it is not a mesh database, or its first pages are damaged")
	}
	return newest, nil
}

func readMeta(file io.ReaderAt, offset int64) (pageMeta, bool) {
	raw := make([]byte, pageHeaderSize+metaSize)
	if _, err := file.ReadAt(raw, offset); err != nil {
		return pageMeta{}, false
	}
	raw = raw[pageHeaderSize:]
	sum := fnv.New64a()
	sum.Write(raw[:metaSize-8])
	if native.Uint32(raw) != boltMagic || native.Uint32(raw[4:]) != boltVersion || native.Uint64(raw[56:]) != sum.Sum64() {
		return pageMeta{}, false
	}
	return pageMeta{
		pageSize:    int64(native.Uint32(raw[8:])),
		root:        native.Uint64(raw[16:]),
		freelist:    native.Uint64(raw[32:]),
		end:         native.Uint64(raw[40:]),
		transaction: native.Uint64(raw[48:]),
	}, true
}

// pageCheck is one walk over a file.
type pageCheck struct {
	file io.ReaderAt
	size int64  // of a page
	used []bool // by page: reached, or free
}

// page is a page with its overflow, header included.
type page []byte

func (p page) flags() uint16 { return native.Uint16(p[8:]) }
func (p page) count() int    { return int(native.Uint16(p[10:])) }

// take reads a page and marks it as used.
func (c *pageCheck) take(id uint64) (page, error) {
	if id >= uint64(len(c.used)) {
		return nil, fmt.Errorf("page %d is beyond the end", id)
	}
	p := make(page, c.size)
	if _, err := c.file.ReadAt(p, int64(id)*c.size); err != nil {
		return nil, fmt.Errorf("reading page %d: %w", id, err)
	}
	if named := native.Uint64(p); named != id {
		return nil, fmt.Errorf("page %d is damaged: it says that it is page %d", id, named)
	}
	overflow := uint64(native.Uint32(p[12:]))
	if overflow >= uint64(len(c.used))-id {
		return nil, fmt.Errorf("page %d is damaged: it says that it is %d pages long", id, overflow+1)
	}
	for part := id; part <= id+overflow; part++ {
		if err := c.mark(part); err != nil {
			return nil, err
		}
	}
	if overflow == 0 {
		return p, nil
	}
	p = make(page, int64(overflow+1)*c.size)
	if _, err := c.file.ReadAt(p, int64(id)*c.size); err != nil {
		return nil, fmt.Errorf("reading page %d: %w", id, err)
	}
	return p, nil
}

func (c *pageCheck) mark(id uint64) error {
	if id >= uint64(len(c.used)) {
		return fmt.Errorf("page %d is beyond the end", id)
	}
	if c.used[id] {
		return fmt.Errorf("page %d is in use twice", id)
	}
	c.used[id] = true
	return nil
}

// tree checks the pages below id, whose keys are to lie between from and before. nil is no bound.
func (c *pageCheck) tree(id uint64, from, before []byte) error {
	p, err := c.take(id)
	if err != nil {
		return err
	}
	switch p.flags() {
	case leafPage:
		err = c.leaf(p, from, before)
	case branchPage:
		err = c.branch(p, from, before)
	default:
		err = fmt.Errorf("it is of no known kind (%#x)", p.flags())
	}
	if err != nil {
		return fmt.Errorf("page %d is damaged: %w", id, err)
	}
	return nil
}

var errEntries = errors.New("its entries overlap its end")

// entry returns the fields of the header of the i-th entry of a page, and the bytes that positions in it count from.
func (p page) entry(i int) (a, b, c, d uint32, rest []byte, err error) {
	offset := pageHeaderSize + i*entryHeaderSize
	if offset+entryHeaderSize > len(p) {
		return 0, 0, 0, 0, nil, errEntries
	}
	rest = p[offset:]
	return native.Uint32(rest), native.Uint32(rest[4:]), native.Uint32(rest[8:]), native.Uint32(rest[12:]), rest, nil
}

// within returns length bytes at position.
func within(b []byte, position, length uint32) ([]byte, error) {
	if uint64(position)+uint64(length) > uint64(len(b)) {
		return nil, errEntries
	}
	return b[position : position+length], nil
}

func (c *pageCheck) branch(p page, from, before []byte) error {
	if p.count() == 0 {
		return errors.New("it is a branch without leaves")
	}
	keys, children := make([][]byte, p.count()), make([]uint64, p.count())
	for i := range keys {
		position, keyLength, _, _, rest, err := p.entry(i)
		if err != nil {
			return err
		}
		if keys[i], err = within(rest, position, keyLength); err != nil {
			return err
		}
		children[i] = native.Uint64(rest[8:])
	}
	if err := inOrder(keys, from, before); err != nil {
		return err
	}
	for i, child := range children {
		end := before
		if i+1 < len(keys) {
			end = keys[i+1]
		}
		if err := c.tree(child, keys[i], end); err != nil {
			return err
		}
	}
	return nil
}

func (c *pageCheck) leaf(p page, from, before []byte) error {
	keys := make([][]byte, p.count())
	for i := range keys {
		flags, position, keyLength, valueLength, rest, err := p.entry(i)
		if err != nil {
			return err
		}
		if keys[i], err = within(rest, position, keyLength); err != nil {
			return err
		}
		value, err := within(rest[position+keyLength:], 0, valueLength)
		if err != nil {
			return err
		}
		if flags&bucketEntry == 0 {
			continue
		}
		if err := c.bucket(value); err != nil {
			return fmt.Errorf("bucket %q: %w", keys[i], err)
		}
	}
	return inOrder(keys, from, before)
}

// bucket checks a nested bucket. A small one is a leaf page inside its parent's value, with no page of its own.
func (c *pageCheck) bucket(value []byte) error {
	if len(value) < bucketHeaderSize {
		return errEntries
	}
	if root := native.Uint64(value); root != 0 {
		return c.tree(root, nil, nil)
	}
	inline := page(value[bucketHeaderSize:])
	if len(inline) < pageHeaderSize || inline.flags() != leafPage {
		return errEntries
	}
	return c.leaf(inline, nil, nil)
}

func inOrder(keys [][]byte, from, before []byte) error {
	for i, key := range keys {
		if i == 0 && bytes.Compare(key, from) < 0 || i > 0 && bytes.Compare(key, keys[i-1]) <= 0 {
			return errors.New("its keys are not in order")
		}
		if before != nil && bytes.Compare(key, before) >= 0 {
			return errors.New("its keys are not in order")
		}
	}
	return nil
}

// freelist checks the list of free pages: its length stands in the header, or as the first entry where it is long.
func (c *pageCheck) freelist(id uint64) error {
	p, err := c.take(id)
	if err != nil {
		return err
	}
	if p.flags() != freelistPage {
		return fmt.Errorf("page %d is damaged: it is not the list of free pages", id)
	}
	entries, count := p[pageHeaderSize:], uint64(p.count())
	if count == 0xFFFF {
		count, entries = native.Uint64(entries), entries[8:]
	}
	if count > uint64(len(entries))/8 {
		return fmt.Errorf("page %d is damaged: %w", id, errEntries)
	}
	for i := range count {
		if err := c.mark(native.Uint64(entries[i*8:])); err != nil {
			return fmt.Errorf("list of free pages: %w", err)
		}
	}
	return nil
}
