package mesh

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// keyLine is a key that a line of a file describes.
type keyLine struct {
	number  int
	members map[string]json.RawMessage
}

// keysAtOnce is how many keys of a file are created with one request.
const keysAtOnce = 500

// createFrom creates a key for each line of a file. All lines are looked at before the first key is created. Each batch is
// printed at once, because nothing can show its secrets again.
func (c *meshCommand) createFrom(path string, usual map[string]json.RawMessage) error {
	text, err := readInput(c, path)
	if err != nil {
		return fmt.Errorf("%w; no key was created", err) // names the file
	}
	if path == "-" {
		path = "the standard input"
	}
	lines, err := readKeyFile(text, usual)
	if err != nil {
		return fmt.Errorf("%s: %w; no key was created", path, err)
	}
	if !c.json() {
		fmt.Fprintf(c.OutOrStdout(), "%-30s  %-30s  %s\n", "ID", "SECRET", "NAME")
	}
	created, told := 0, time.Now()
	for batch := range slices.Chunk(lines, keysAtOnce) {
		if err := c.createBatch(batch); err != nil {
			return fmt.Errorf("%s: %w; %d of %d keys were created", path, err, created, len(lines))
		}
		created += len(batch)
		if time.Since(told) > time.Second {
			fmt.Fprintf(c.ErrOrStderr(), "%d of %d keys created\n", created, len(lines))
			told = time.Now()
		}
	}
	return nil
}

var inBatch = regexp.MustCompile(`^key (\d+): `)

// createBatch creates the keys of some lines, or none of them.
func (c *meshCommand) createBatch(batch []keyLine) error {
	members := make([]map[string]json.RawMessage, len(batch))
	for i, line := range batch {
		members[i] = line.members
	}
	answer, err := c.ask(http.MethodPost, keysPath, nil, members)
	if err != nil {
		if found := inBatch.FindStringSubmatch(err.Error()); found != nil {
			if n, _ := strconv.Atoi(found[1]); n >= 1 && n <= len(batch) {
				return fmt.Errorf("line %d: %s", batch[n-1].number, strings.TrimPrefix(err.Error(), found[0]))
			}
		}
		return fmt.Errorf("lines %d to %d: %w", batch[0].number, batch[len(batch)-1].number, err)
	}
	var created struct{ Keys []json.RawMessage }
	if err := json.Unmarshal(answer, &created); err != nil {
		return fmt.Errorf("reading the answer of the admin endpoint: %w", err)
	}
	var out bytes.Buffer
	for _, raw := range created.Keys {
		if c.json() {
			out.Write(append(raw, '\n'))
			continue
		}
		var v keyView
		if err := json.Unmarshal(raw, &v); err != nil {
			return fmt.Errorf("reading the answer of the admin endpoint: %w", err)
		}
		fmt.Fprintf(&out, "%s  %s  %s\n", v.ID, v.Secret, cell(v.Name))
	}
	_, err = out.WriteTo(c.OutOrStdout())
	return err
}

// readKeyFile reads a file of keys, JSON lines or CSV with a header, and checks them. What is usual holds for lines that do
// not say it. Its errors name the line.
func readKeyFile(text []byte, usual map[string]json.RawMessage) (lines []keyLine, err error) {
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	switch begin := bytes.TrimSpace(text); {
	case len(begin) == 0:
	case begin[0] == '{':
		lines, err = readKeyLines(text)
	default:
		lines, err = readKeyTable(text)
	}
	if err != nil {
		return nil, err
	}
	if len(lines) == 0 {
		return nil, errors.New("there is no key in it")
	}
	for _, line := range lines {
		for name, value := range usual {
			if _, said := line.members[name]; !said {
				line.members[name] = value
			}
		}
		if err := new(Key).changeTerms(line.members); err != nil {
			return nil, fmt.Errorf("line %d: %w", line.number, err)
		}
	}
	return lines, nil
}

// readKeyLines reads a JSON object from each line, as the admin endpoint takes it; expires may be a duration.
func readKeyLines(text []byte) (lines []keyLine, err error) {
	number := 0
	for line := range bytes.Lines(text) {
		if number++; len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		members := make(map[string]json.RawMessage)
		if err := json.Unmarshal(line, &members); err != nil {
			return nil, fmt.Errorf("line %d: it is not a JSON object: %w", number, err)
		}
		var expires string
		if json.Unmarshal(members["expires"], &expires) == nil && expires != "" {
			if expires, err = expiry(expires); err != nil {
				return nil, fmt.Errorf("line %d: expires: %w", number, err)
			}
			members["expires"], _ = encodeJSON(expires)
		}
		lines = append(lines, keyLine{number, members})
	}
	return lines, nil
}

// readKeyTable reads CSV whose columns are named like the fields, or metadata.<name> and default_params.<name>. An empty
// cell says nothing.
func readKeyTable(text []byte) (lines []keyLine, err error) {
	r := csv.NewReader(bytes.NewReader(text))
	header, err := r.Read()
	if err != nil {
		return nil, fmt.Errorf("line 1: %w", err)
	}
	number, _ := r.FieldPos(0)
	for i, name := range header {
		if header[i] = strings.TrimSpace(name); slices.Contains(header[:i], header[i]) {
			return nil, fmt.Errorf("line %d: the column %s is there twice", number, header[i])
		}
		if err := checkColumn(header[i]); err != nil {
			return nil, fmt.Errorf("line %d: %s: %w", number, header[i], err)
		}
	}
	for {
		row, err := r.Read()
		if err == io.EOF {
			return lines, nil
		}
		if err != nil {
			return nil, err // names the line
		}
		number, _ := r.FieldPos(0)
		members, err := readKeyRow(header, row)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", number, err)
		}
		lines = append(lines, keyLine{number, members})
	}
}

// checkColumn checks the name of a column. One without may be there, if it is empty: spreadsheets write such.
func checkColumn(column string) error {
	if column == "" {
		return nil
	}
	name, _, nested := strings.Cut(column, ".")
	t := termNamed(name)
	if t == nil {
		return errNoField
	}
	switch t.of(new(Key)).(type) {
	case *Params, *map[string]string:
		return nil
	}
	if nested {
		return errNoField
	}
	return nil
}

func readKeyRow(header, row []string) (map[string]json.RawMessage, error) {
	members, inside := make(map[string]json.RawMessage), make(map[string]map[string]any)
	for i, text := range row {
		if text == "" {
			continue
		}
		name, member, nested := strings.Cut(header[i], ".")
		if nested {
			if inside[name] == nil {
				inside[name] = make(map[string]any)
			}
			if inside[name][member] = text; name == "default_params" {
				inside[name][member] = paramValue(text)
			}
			continue
		}
		value, err := cellValue(name, text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		members[name] = value
	}
	for _, name := range slices.Sorted(maps.Keys(inside)) {
		var err error
		if members[name], err = encodeJSON(inside[name]); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return members, nil
}

// cellValue is the JSON of a cell. A list is separated by spaces.
func cellValue(name, text string) (json.RawMessage, error) {
	t := termNamed(name)
	if t == nil {
		return nil, errNoField
	}
	switch t.of(new(Key)).(type) {
	case *int64, *bool, *Params, *map[string]string:
		return paramValue(text), nil
	case *[]string:
		return encodeJSON(strings.Fields(text))
	case *time.Time:
		when, err := expiry(text)
		if err != nil {
			return nil, err
		}
		return encodeJSON(when)
	}
	return encodeJSON(text)
}
