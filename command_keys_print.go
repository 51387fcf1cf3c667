package mesh

import (
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// cell returns text as it may stand in a table: what a key is called is anybody's choice, and must not move a cursor.
func cell(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(text)
	}
	return text
}

// printKey prints a key, one line for each thing that is said of it.
func (c *meshCommand) printKey(answer []byte) error {
	var v keyView
	if err := json.Unmarshal(answer, &v); err != nil {
		return fmt.Errorf("reading the answer of the admin endpoint: %w", err)
	}
	err := c.print(answer, func(w io.Writer) error {
		for _, row := range v.rows() {
			fmt.Fprintf(w, "%s\t%s\n", row[0], row[1])
		}
		return nil
	})
	if err != nil || c.json() {
		return err
	}
	for _, warning := range v.Warnings {
		fmt.Fprintf(c.ErrOrStderr(), "warning: %s\n", cell(warning))
	}
	if v.Secret != "" {
		fmt.Fprintln(c.ErrOrStderr(), "The secret is shown this once.")
	}
	return nil
}

// rows are the names and values of what is said of a key.
func (v *keyView) rows() (rows [][2]string) {
	add := func(name, value string) {
		if value != "" {
			rows = append(rows, [2]string{name, value})
		}
	}
	add("id", v.ID)
	add("secret", v.Secret)
	for _, t := range keyTerms {
		add(t.name, termText(t.of(&v.Key)))
	}
	add("source", v.Source)
	add("created_at", timeText(v.Created))
	add("old_secret_until", timeText(v.OldUntil))
	if u := v.Use; u != nil {
		add("spend_usd", u.Spend.String())
		add("spend_period_usd", u.SpendPeriod.String())
		add("requests_minute", strconv.FormatInt(u.RequestsMinute, 10))
		add("requests_day", strconv.FormatInt(u.RequestsDay, 10))
		if u.TokensMinute != nil {
			add("tokens_minute", strconv.FormatInt(*u.TokensMinute, 10))
		}
		if u.UnderWay != nil {
			add("under_way", strconv.FormatInt(*u.UnderWay, 10))
		}
	}
	return rows
}

// termText returns the value of a term, or nothing where it is the default.
func termText(value any) string {
	if reflect.ValueOf(value).Elem().IsZero() {
		return ""
	}
	switch v := value.(type) {
	case *string:
		return cell(*v)
	case *[]string:
		return cell(strings.Join(*v, " "))
	case *time.Time:
		return timeText(*v)
	case *map[string]string, *Params:
		encoded, _ := encodeJSON(v) // it was JSON
		return string(encoded)
	}
	return fmt.Sprint(reflect.ValueOf(value).Elem().Interface())
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
