package mesh

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"
)

func usageCommand() *cobra.Command {
	cmd := subcommand("usage", "Shows what was used, by default in the last 30 days and by model", cobra.NoArgs, showUsage)
	flags := cmd.Flags()
	flags.String("from", "", "From when on: a date, or a time of RFC 3339, in whole hours")
	flags.String("to", "", "Until when; a date with all of its day")
	flags.String("by", "model", "What to group by: any of day, model, key, owner and session, by commas")
	flags.String("key", "", "Only the key of this id or name")
	flags.String("owner", "", "Only keys of this owner")
	flags.String("model", "", "Only this model")
	flags.String("session", "", "Only this session")
	flags.String("status", "", "Only success, or error")
	flags.Bool("csv", false, "Print CSV")
	for name, values := range map[string][]string{"by": usageBy, "status": {"success", "error"}} {
		cmd.RegisterFlagCompletionFunc(name, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) { //nolint:errcheck // the flag is there
			return values, cobra.ShellCompDirectiveNoFileComp
		})
	}
	return cmd
}

func showUsage(c *meshCommand, _ []string) error {
	if c.flag("csv") == "true" && c.json() {
		return errors.New("--csv and --json exclude each other")
	}
	query := url.Values{}
	for flag, name := range map[string]string{"from": "from", "to": "to", "by": "by", "key": "key", "owner": "owner", "model": "model",
		"session": "session_id", "status": "status"} {
		if c.Flag(flag).Changed || flag == "by" {
			query.Set(name, c.flag(flag))
		}
	}
	if c.flag("csv") == "true" {
		query.Set("format", "csv")
	}
	answer, err := c.ask(http.MethodGet, "/mesh/usage", query, nil)
	if err != nil {
		return err
	}
	if query.Has("format") {
		_, err := c.OutOrStdout().Write(answer)
		return err
	}
	return c.print(answer, func(w io.Writer) error {
		var t usageTable
		if err := json.Unmarshal(answer, &t); err != nil {
			return fmt.Errorf("reading the answer of the admin endpoint: %w", err)
		}
		for _, by := range t.By {
			fmt.Fprint(w, strings.ToUpper(by), "\t")
		}
		fmt.Fprintln(w, "REQUESTS\tERRORS\tPROMPT TOKENS\tCOMPLETION TOKENS\tUSD")
		for _, l := range t.Lines {
			for _, by := range t.By {
				cell := l.cell(by)
				if by == "key" {
					cell = cmp.Or(l.KeyName, l.Key)
				}
				fmt.Fprint(w, cmp.Or(cell, "-"), "\t")
			}
			fmt.Fprintln(w, l.cells())
		}
		if len(t.Lines) > 1 {
			fmt.Fprint(w, "total", strings.Repeat("\t", len(t.By)), t.Total.cells(), "\n")
		}
		return nil
	})
}
