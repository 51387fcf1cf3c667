package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/spf13/cobra"
)

func keyCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "key",
		Short: "Manages the keys of the store",
		Long: `
Manages the keys of the store. Every instance of the gateway that shares the
store acts on a change within a second. A secret is shown once, when it is
made; the gateway keeps only its SHA-256. Keys of the configuration are
listed and shown; they are changed there.
`,
	}, createKeyCommand(), listKeysCommand(), showKeyCommand(), updateKeyCommand(),
		suspendCommand("suspend", "Refuses a key's requests with 403", true),
		suspendCommand("unsuspend", "Lets a suspended key in again", false),
		rotateKeyCommand(), revokeKeyCommand())
}

// ofKey has a command complete the id of a key, its only argument.
func ofKey(cmd *cobra.Command) *cobra.Command {
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		keys, _, err := (&meshCommand{Command: cmd}).listKeys(url.Values{"limit": {strconv.Itoa(maxKeysPage)}}, maxKeysPage)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		var ids []string
		for _, k := range keys {
			if strings.HasPrefix(k.ID, begun) {
				ids = append(ids, k.ID+"\t"+cell(k.Name))
			}
		}
		return ids, cobra.ShellCompDirectiveNoFileComp
	}
	return cmd
}

// termFlags adds a flag for each term of a key.
func termFlags(cmd *cobra.Command) *cobra.Command {
	flags := cmd.Flags()
	flags.String("name", "", "What the key is called in logs and reports")
	flags.String("owner", "", "Whom it belongs to")
	flags.Int64("rpm", 0, "Requests in each UTC minute")
	flags.Int64("rpd", 0, "Requests in each UTC day")
	flags.Int64("tpm", 0, "Tokens in each UTC minute")
	flags.Int64("max-concurrency", 0, "Requests at the same time")
	flags.String("spend-cap-usd", "", "What it may spend in each spend period, such as 25.00")
	flags.String("spend-period", "", "total, month or day")
	flags.Bool("spend-cap-hard", false, "Whether spend never passes the cap")
	flags.StringArray("model", nil, "A model it may use, or a pattern; may be repeated")
	flags.String("default-model", "", "The model of a request that names none")
	flags.StringArray("default-param", nil, "name=value: an inference parameter; may be repeated")
	flags.String("expires", "", "A time as RFC 3339 writes it, or a duration from now, such as 30d")
	flags.Bool("suspended", false, "Whether it is refused for now")
	flags.StringArray("metadata", nil, "name=value: what else is to be known of it; may be repeated")
	return cmd
}

// flag is what the flag for a term is called. One that may be repeated is called after one value.
func (t *keyTerm) flag() string {
	name := strings.ReplaceAll(t.name, "_", "-")
	switch t.of(new(Key)).(type) {
	case *[]string, *map[string]string, *Params:
		return strings.TrimSuffix(name, "s")
	}
	return name
}

// terms returns the members that the flags say, as the admin endpoint wants them.
func (c *meshCommand) terms() (map[string]json.RawMessage, error) {
	members := make(map[string]json.RawMessage)
	for _, t := range keyTerms {
		name, value := t.flag(), any(nil)
		var err error
		switch t.of(new(Key)).(type) {
		case *int64:
			value, _ = c.Flags().GetInt64(name)
		case *bool:
			value, _ = c.Flags().GetBool(name)
		case *[]string:
			value, _ = c.Flags().GetStringArray(name)
		case *map[string]string, *Params:
			value, err = c.pairs(name, t.name == "default_params")
		case *time.Time:
			value, err = expiry(c.flag(name))
		default:
			value = c.flag(name)
		}
		if !c.Flag(name).Changed {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("--%s: %w", name, err)
		}
		if members[t.name], err = encodeJSON(value); err != nil {
			return nil, fmt.Errorf("--%s: %w", name, err)
		}
	}
	return members, nil
}

// pairs reads name=value of a flag that may be repeated.
func (c *meshCommand) pairs(flag string, anyJSON bool) (map[string]any, error) {
	given, _ := c.Flags().GetStringArray(flag)
	pairs := make(map[string]any, len(given))
	for _, pair := range given {
		name, value, ok := strings.Cut(pair, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("%q is not name=value", pair)
		}
		if _, twice := pairs[name]; twice {
			return nil, fmt.Errorf("%s is given twice", name)
		}
		if pairs[name] = value; anyJSON {
			pairs[name] = paramValue(value)
		}
	}
	return pairs, nil
}

// expiry reads a time, or a duration from now.
func expiry(text string) (string, error) {
	if _, err := time.Parse(time.RFC3339, text); err == nil {
		return text, nil
	}
	d, err := caddy.ParseDuration(text)
	if err != nil || d <= 0 {
		return "", fmt.Errorf("%q is neither a time as RFC 3339 writes it nor a duration, such as 30d", text)
	}
	return time.Now().Add(d).UTC().Truncate(time.Second).Format(time.RFC3339), nil
}

func createKeyCommand() *cobra.Command {
	cmd := termFlags(subcommand("create [--from <file>]", "Creates a key, or many", cobra.NoArgs, func(c *meshCommand, _ []string) error {
		members, err := c.terms()
		if err != nil {
			return err
		}
		if from := c.flag("from"); from != "" {
			return c.createFrom(from, members)
		}
		if c.Flag("spend-period").Changed && !c.Flag("spend-cap-usd").Changed {
			return errors.New("--spend-period needs --spend-cap-usd beside it")
		}
		answer, err := c.ask(http.MethodPost, keysPath, nil, members)
		if err != nil {
			return err
		}
		return c.printKey(answer)
	}))
	cmd.Flags().String("from", "", "A file with a key in each line, JSON or CSV; - is the standard input. What the flags say holds for lines that do not say it")
	return cmd
}

// listKeys returns the keys that a query is for, up to most; and whether there are more.
func (c *meshCommand) listKeys(query url.Values, most int) (keys []keyView, more bool, err error) {
	query = maps.Clone(query)
	for {
		answer, err := c.ask(http.MethodGet, keysPath, query, nil)
		if err != nil {
			return nil, false, err
		}
		var page struct {
			Keys []keyView
			Next string
		}
		if err := json.Unmarshal(answer, &page); err != nil {
			return nil, false, fmt.Errorf("reading the answer of the admin endpoint: %w", err)
		}
		keys = append(keys, page.Keys...)
		if page.Next == "" || len(keys) >= most {
			return keys[:min(most, len(keys))], page.Next != "", nil
		}
		query.Set("after", page.Next)
	}
}

func listKeysCommand() *cobra.Command {
	cmd := subcommand("list", "Lists the keys", cobra.NoArgs, func(c *meshCommand, _ []string) error {
		most, _ := c.Flags().GetInt("limit")
		query := url.Values{"limit": {strconv.Itoa(min(most, maxKeysPage))}}
		for _, name := range []string{"owner", "after"} {
			if c.Flag(name).Changed {
				query.Set(name, c.flag(name))
			}
		}
		keys, more, err := c.listKeys(query, most)
		if err != nil {
			return err
		}
		answer, err := encodeJSON(map[string]any{"keys": keys})
		if err != nil {
			return err
		}
		err = c.print(answer, func(w io.Writer) error {
			fmt.Fprintln(w, "ID\tNAME\tOWNER\tSTATE\tSOURCE\tEXPIRES")
			for _, k := range keys {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", k.ID, cell(k.Name), cell(k.Owner), k.state(time.Now()), k.Source, writeTime(k.Expires))
			}
			return nil
		})
		if err == nil && more {
			fmt.Fprintf(c.ErrOrStderr(), "There are more; go on with --after %s\n", keys[len(keys)-1].ID)
		}
		return err
	})
	cmd.Flags().String("owner", "", "Only those of this owner")
	cmd.Flags().String("after", "", "Only those whose id comes after this one")
	cmd.Flags().Int("limit", 10_000, "How many at most")
	return cmd
}

func (v *keyView) state(now time.Time) string {
	switch {
	case v.Suspended:
		return "suspended"
	case !v.Expires.IsZero() && !now.Before(v.Expires):
		return "expired"
	}
	return "active"
}

func showKeyCommand() *cobra.Command {
	return ofKey(subcommand("show <id|name>", "Shows a key, and what it has used", cobra.ExactArgs(1), func(c *meshCommand, args []string) error {
		answer, err := c.ask(http.MethodGet, keyPath(args[0]), nil, nil)
		if err != nil {
			return err
		}
		return c.printKey(answer)
	}))
}

func keyPath(id string) string { return keysPath + "/" + url.PathEscape(id) }

func updateKeyCommand() *cobra.Command {
	cmd := ofKey(termFlags(subcommand("update <id>", "Changes what a key may do", cobra.ExactArgs(1), func(c *meshCommand, args []string) error {
		members, err := c.terms()
		if err != nil {
			return err
		}
		reset, _ := c.Flags().GetStringArray("reset")
		for _, name := range reset {
			field := strings.ReplaceAll(name, "-", "_")
			if t := termNamed(field); t != nil && c.Flag(t.flag()).Changed {
				return fmt.Errorf("--%s and --reset %s contradict each other", t.flag(), name)
			}
			members[field] = json.RawMessage("null")
		}
		if len(members) == 0 {
			return errors.New("there is nothing to change")
		}
		return c.patchKey(args[0], members)
	})))
	cmd.Flags().StringArray("reset", nil, "A field, such as rpm, that the key shall not have any more; may be repeated")
	return cmd
}

func (c *meshCommand) patchKey(id string, members any) error {
	answer, err := c.ask(http.MethodPatch, keyPath(id), nil, members)
	if err != nil {
		return err
	}
	return c.printKey(answer)
}

func suspendCommand(use, short string, suspended bool) *cobra.Command {
	return ofKey(subcommand(use+" <id>", short, cobra.ExactArgs(1), func(c *meshCommand, args []string) error {
		return c.patchKey(args[0], map[string]bool{"suspended": suspended})
	}))
}

func rotateKeyCommand() *cobra.Command {
	cmd := ofKey(subcommand("rotate <id>", "Gives a key a new secret", cobra.ExactArgs(1), func(c *meshCommand, args []string) error {
		answer, err := c.ask(http.MethodPost, keyPath(args[0])+"/rotate", nil, map[string]string{"grace": c.flag("grace")})
		if err != nil {
			return err
		}
		return c.printKey(answer)
	}))
	cmd.Flags().String("grace", "0s", "For how long the old secret is valid beside it, such as 1h")
	return cmd
}

func revokeKeyCommand() *cobra.Command {
	cmd := ofKey(subcommand("revoke <id>", "Deletes a key, for good", cobra.ExactArgs(1), func(c *meshCommand, args []string) error {
		if err := c.confirm(fmt.Sprintf("Revoke %s? Its secrets stop working at once, for good.", args[0])); err != nil {
			return err
		}
		if _, err := c.ask(http.MethodDelete, keyPath(args[0]), nil, nil); err != nil {
			return err
		}
		return c.print([]byte("{}"), func(w io.Writer) error {
			fmt.Fprintf(w, "%s is revoked\n", args[0])
			return nil
		})
	}))
	return confirmed(cmd)
}
