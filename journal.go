package mesh

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A journal is a file of frames, each a length, a checksum, and a payload of records. It is not synced: it is there
// for a process that is killed, whose writes the kernel still has. It is only ever written at its end, so that what a
// crash can damage is the last frame. The first frame says whose journal it is.
type journal struct {
	path   string
	number uint64   // of the generation
	header []byte   // the number, and the database's id
	exists bool     // there is none until there is something to write
	file   *os.File // open for writing
	end    int64    // of the last whole frame
	frames []byte   // what was written last, for its room
}

// journalFiles are the journals of one database.
type journalFiles struct {
	prefix   string // of their paths
	database []byte // the database's id, so that a journal left over from another database is never replayed
}

func (f journalFiles) journal(number uint64) *journal {
	return &journal{
		path:   fmt.Sprintf("%s%020d", f.prefix, number),
		number: number,
		header: append(binary.LittleEndian.AppendUint64(nil, number), f.database...),
	}
}

// find returns the journals there are, lowest number first.
func (f journalFiles) find() ([]*journal, error) {
	entries, err := os.ReadDir(filepath.Dir(f.prefix))
	if err != nil {
		return nil, err
	}
	var found []*journal
	for _, entry := range entries {
		suffix, ok := strings.CutPrefix(entry.Name(), filepath.Base(f.prefix))
		if number, err := strconv.ParseUint(suffix, 10, 64); ok && err == nil && len(suffix) == 20 {
			j := f.journal(number)
			j.exists = true
			found = append(found, j)
		}
	}
	slices.SortFunc(found, func(a, b *journal) int { return cmp.Compare(a.number, b.number) })
	return found, nil
}

const (
	frameHeaderSize = 8       // length, checksum
	maxJournalSize  = 1 << 30 // bytes; what a replay reads into memory
)

var (
	errJournalFull = errors.New("the journal is full")
	castagnoli     = crc32.MakeTable(crc32.Castagnoli)
)

// append writes accounts and events as one frame, with one write. After an error the same place is written again, over
// what may have been left there.
func (j *journal) append(accounts, events records) error {
	frames := j.frames[:0]
	if j.end == 0 {
		frames = appendFrame(frames, func(b []byte) []byte { return append(b, j.header...) })
	}
	frames = appendFrame(frames, func(b []byte) []byte { return appendRecords(appendRecords(b, accounts), events) })
	j.frames = frames
	if j.end+int64(len(frames)) > maxJournalSize {
		return errJournalFull
	}
	if err := j.create(); err != nil {
		return err
	}
	n, err := j.file.WriteAt(frames, j.end)
	if err != nil {
		return err
	}
	j.end += int64(n)
	return nil
}

func (j *journal) create() (err error) {
	if j.file != nil {
		return nil
	}
	if j.file, err = os.OpenFile(j.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		j.file = nil
		return err
	}
	j.exists = true
	return nil
}

// remove deletes the file, if there is one.
func (j *journal) remove() error {
	if !j.exists {
		return nil
	}
	if j.file != nil {
		j.file.Close()
	}
	return os.Remove(j.path)
}

// appendFrame appends a frame with what payload appends.
func appendFrame(b []byte, payload func(b []byte) []byte) []byte {
	start := len(b)
	b = payload(append(b, make([]byte, frameHeaderSize)...))
	header, body := b[start:], b[start+frameHeaderSize:]
	binary.LittleEndian.PutUint32(header, uint32(len(body)))
	binary.LittleEndian.PutUint32(header[4:], crc32.Checksum(body, castagnoli))
	return b
}

// cutFrame returns the payload of the first frame of b, and what follows it. A frame that is torn, damaged or empty
// is none.
func cutFrame(b []byte) (payload, rest []byte, ok bool) {
	if len(b) < frameHeaderSize {
		return nil, b, false
	}
	length, sum := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
	body := b[frameHeaderSize:]
	if length == 0 || uint64(length) > uint64(len(body)) || crc32.Checksum(body[:length], castagnoli) != sum {
		return nil, b, false
	}
	return body[:length], body[length:], true
}

// records are the encoded entries of one bucket of the database. They are absolute, so that writing them twice is
// writing them once.
type records map[string][]byte

// appendRecords writes the number of records, then each one's key and value with their lengths in front.
func appendRecords(b []byte, r records) []byte {
	b = binary.AppendUvarint(b, uint64(len(r)))
	for key, value := range r {
		b = append(binary.AppendUvarint(b, uint64(len(key))), key...)
		b = append(binary.AppendUvarint(b, uint64(len(value))), value...)
	}
	return b
}

var errRecords = errors.New("a frame is whole, but not of records")

// cutRecords reads into r what appendRecords wrote, and returns what follows it.
func cutRecords(b []byte, r records) ([]byte, error) {
	count, n := binary.Uvarint(b)
	if n <= 0 {
		return nil, errRecords
	}
	b = b[n:]
	for range count {
		key, rest, ok := cutBytes(b)
		if !ok {
			return nil, errRecords
		}
		value, rest, ok := cutBytes(rest)
		if !ok {
			return nil, errRecords
		}
		r[string(key)], b = value, rest
	}
	return b, nil
}

func cutBytes(b []byte) (field, rest []byte, ok bool) {
	length, n := binary.Uvarint(b)
	if n <= 0 || length > uint64(len(b)-n) {
		return nil, nil, false
	}
	return b[n : n+int(length)], b[n+int(length):], true
}

// replay adds the journal's records to g, up to the first frame that is not whole, and returns how many bytes it left.
func (j *journal) replay(g *generation) (left int, err error) {
	rest, err := os.ReadFile(j.path)
	if err != nil {
		return 0, err
	}
	header, rest, ok := cutFrame(rest)
	if !ok {
		return len(rest), nil
	}
	if !bytes.Equal(header, j.header) {
		return 0, fmt.Errorf("%s is the journal of another database; move it away", j.path)
	}
	for {
		payload, next, ok := cutFrame(rest)
		if !ok {
			return len(rest), nil
		}
		if payload, err = cutRecords(payload, g.accounts); err == nil {
			_, err = cutRecords(payload, g.events)
		}
		if err != nil {
			return 0, fmt.Errorf("%s: %w", j.path, err)
		}
		rest = next
	}
}
