package mesh

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func templateCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "template", Short: "Manages the templates in the store"}
	list := subcommand("list", "Lists templates, the newest first", cobra.NoArgs, listTemplates)
	list.Flags().String("owner", "", "Only those of this owner")
	apply := subcommand("apply FILE", "Creates the template in a file, or changes the one of its name; - reads it from the input", cobra.ExactArgs(1), applyTemplate)
	apply.Flags().String("owner", "", "Whose it is; without, everybody's")
	show := subcommand("show NAME|ID", "Shows a template as JSON", cobra.ExactArgs(1), showTemplate)
	del := confirmed(subcommand("delete NAME|ID", "Deletes a template", cobra.ExactArgs(1), deleteTemplate))
	for _, c := range []*cobra.Command{show, del} {
		c.Flags().String("owner", "", "Whose it is, where several have one of this name")
		c.ValidArgsFunction = completeTemplates
	}
	return group(cmd, list, show, apply, del)
}

// templates asks for all templates of an owner, or of all.
func (c *meshCommand) templates() (list []storedTemplate, answer []byte, err error) {
	query := url.Values{}
	if flag := c.Flag("owner"); flag != nil && flag.Changed {
		query.Set("owner", flag.Value.String())
	}
	if answer, err = c.ask(http.MethodGet, "/mesh/templates", query, nil); err != nil {
		return nil, nil, err
	}
	if err := json.Unmarshal(answer, &list); err != nil {
		return nil, nil, fmt.Errorf("reading the answer of the admin endpoint: %w", err)
	}
	return list, answer, nil
}

func listTemplates(c *meshCommand, _ []string) error {
	list, answer, err := c.templates()
	if err != nil {
		return err
	}
	return c.print(answer, func(w io.Writer) error {
		fmt.Fprintln(w, "NAME\tOWNER\tMODEL\tUPDATED\tID")
		for _, t := range list {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", t.Name, t.whose(), orDash(t.Model), t.Updated.Format(time.RFC3339), t.ID)
		}
		return nil
	})
}

func (s *storedTemplate) whose() string {
	if s.IsGlobal {
		return "(all)"
	}
	return orDash(s.Owner)
}

func orDash(s *string) string {
	if s == nil || *s == "" {
		return "-"
	}
	return *s
}

// template returns the only template of a name or id.
func (c *meshCommand) template(name string) (*storedTemplate, error) {
	list, _, err := c.templates()
	if err != nil {
		return nil, err
	}
	var found []*storedTemplate
	for i := range list {
		if list[i].ID == name {
			return &list[i], nil
		}
		if list[i].Name == name {
			found = append(found, &list[i])
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("there is no template %q", name)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("several owners have a template %q; say which with --owner, or give its id", name)
}

func showTemplate(c *meshCommand, args []string) error {
	t, err := c.template(args[0])
	if err != nil {
		return err
	}
	encoded, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(c.OutOrStdout(), string(encoded))
	return err
}

func applyTemplate(c *meshCommand, args []string) error {
	data, err := readInput(c, args[0])
	if err != nil {
		return err
	}
	var t map[string]json.RawMessage
	if err := json.Unmarshal(data, &t); err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	if owner := c.flag("owner"); owner != "" {
		t["owner"] = appendString(nil, owner)
	}
	answer, err := c.ask(http.MethodPut, "/mesh/templates", nil, t)
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	return c.print(answer, func(w io.Writer) error {
		var stored storedTemplate
		if err := json.Unmarshal(answer, &stored); err != nil {
			return err
		}
		did := "changed"
		if stored.Created.Equal(stored.Updated) {
			did = "created"
		}
		fmt.Fprintf(w, "%s %s (%s)\n", did, stored.Name, stored.ID)
		return nil
	})
}

// readInput reads a file, or the command's input.
func readInput(c *meshCommand, file string) ([]byte, error) {
	if file == "-" {
		return io.ReadAll(c.InOrStdin())
	}
	return os.ReadFile(file)
}

func deleteTemplate(c *meshCommand, args []string) error {
	t, err := c.template(args[0])
	if err != nil {
		return err
	}
	if err := c.confirm(fmt.Sprintf("Delete the template %s (%s)? Requests that name it fail then.", t.Name, t.ID)); err != nil {
		return err
	}
	if _, err := c.ask(http.MethodDelete, "/mesh/templates/"+t.ID, nil, nil); err != nil {
		return err
	}
	return c.print([]byte(`{"deleted":"`+t.ID+`"}`), func(w io.Writer) error {
		fmt.Fprintf(w, "deleted %s (%s)\n", t.Name, t.ID)
		return nil
	})
}

func completeTemplates(cmd *cobra.Command, _ []string, begun string) ([]string, cobra.ShellCompDirective) {
	list, _, err := (&meshCommand{Command: cmd}).templates()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, t := range list {
		if strings.HasPrefix(t.Name, begun) {
			names = append(names, t.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
