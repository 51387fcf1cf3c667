package mesh

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "mesh",
		Short: "Manages the LLM gateway of a running Caddy",
		Long: `
Manages the LLM gateway of a running Caddy, through its admin endpoint. That is
found as the commands of Caddy itself find it: at --address, or where the
configuration file says, or at the default.

Tables are for people; --json prints what the admin endpoint answers. The exit
code is 0, or 1 if something is wrong.
`,
		CobraFunc: func(cmd *cobra.Command) {
			flags := cmd.PersistentFlags()
			flags.String("address", "", "The address of the admin endpoint")
			flags.StringP("config", "c", "", "Configuration file to find that address in")
			flags.StringP("adapter", "a", "", "Name of config adapter to apply to it")
			flags.String("store", "", "The store's name, as the command health prints it, where there are several")
			flags.Bool("json", false, "Print JSON")
			group(cmd, healthCommand(), keyCommand(), templateCommand(), usageCommand())
		},
	})
}

// group makes cmd one that has subcommands and does nothing itself.
func group(cmd *cobra.Command, subcommands ...*cobra.Command) *cobra.Command {
	cmd.Args = cobra.NoArgs // else an unknown command prints the help, and is no error
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	cmd.AddCommand(subcommands...)
	return cmd
}

// subcommand makes a command of `caddy mesh` out of what it does. Its errors go through Caddy's log, like those of
// Caddy's own commands.
func subcommand(use, short string, args cobra.PositionalArgs, do func(c *meshCommand, args []string) error) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Args:  args,
		RunE: func(cmd *cobra.Command, args []string) error {
			return caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) {
				if err := do(&meshCommand{Command: cmd}, args); err != nil {
					return caddy.ExitCodeFailedStartup, err
				}
				return caddy.ExitCodeSuccess, nil
			})(cmd, args)
		},
	}
}

// meshCommand is a subcommand of `caddy mesh` that runs.
type meshCommand struct {
	*cobra.Command
	admin *adminClient // once it has asked
}

func (c *meshCommand) flag(name string) string { return c.Flag(name).Value.String() }

// json reports whether the answer is for programs.
func (c *meshCommand) json() bool { return c.flag("json") == "true" }

// ask sends a request to the admin endpoint, with v as its JSON body if that is not nil, and returns the body of the
// answer. A status that says that something is wrong is an error, unless it is one of those that are fine.
func (c *meshCommand) ask(method, path string, query url.Values, v any, fine ...int) ([]byte, error) {
	if c.admin == nil {
		address, err := caddycmd.DetermineAdminAPIAddress(c.flag("address"), nil, c.flag("config"), c.flag("adapter"))
		if err != nil {
			return nil, fmt.Errorf("finding the admin endpoint: %w", err)
		}
		if c.admin, err = newAdminClient(address); err != nil {
			return nil, err
		}
	}
	if store := c.flag("store"); store != "" {
		query = maps.Clone(query)
		if query == nil {
			query = make(url.Values)
		}
		query.Set("store", store)
	}
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	return c.admin.ask(c.Context(), method, path, v, fine)
}

// adminClient asks an admin endpoint. caddycmd.AdminAPIRequest does that too, with a connection for each request, and
// without the answer where its status says that something is wrong.
type adminClient struct {
	origin string
	socket bool // which has no origin that a request could say
	http.Client
}

func newAdminClient(address string) (*adminClient, error) {
	parsed, err := caddy.ParseNetworkAddress(address)
	if err != nil || parsed.PortRangeSize() > 1 {
		return nil, fmt.Errorf("%s is not the address of an admin endpoint: %w", address, err)
	}
	c := &adminClient{origin: "http://" + parsed.JoinHostPort(0)}
	if c.socket = parsed.IsUnixNetwork() || parsed.IsFdNetwork(); c.socket {
		c.origin = "http://127.0.0.1"
	}
	parsed.Host, _, _ = strings.Cut(parsed.Host, "|") // the socket's permissions
	c.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, parsed.Network, parsed.JoinHostPort(0))
	}}
	return c, nil
}

func (c *adminClient) ask(ctx context.Context, method, path string, v any, fine []int) ([]byte, error) {
	var body io.Reader
	if v != nil {
		encoded, err := encodeJSON(v)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(encoded)
	}
	r, err := http.NewRequestWithContext(ctx, method, c.origin+path, body)
	if err != nil {
		return nil, err
	}
	if !c.socket {
		r.Header.Set("Origin", c.origin)
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := c.Do(r)
	if err != nil {
		return nil, fmt.Errorf("asking the admin endpoint, is Caddy running? %w", err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("reading the answer of the admin endpoint: %w", err)
	}
	if resp.StatusCode >= 400 && !slices.Contains(fine, resp.StatusCode) {
		return nil, adminRefusal(resp.StatusCode, answer)
	}
	return answer, nil
}

// adminRefusal is an error of the admin endpoint, in its own words.
func adminRefusal(status int, answer []byte) error {
	var said caddy.APIError
	switch err := json.Unmarshal(answer, &said); {
	case err == nil && said.Message != "":
		return errors.New(said.Message)
	case status == http.StatusNotFound:
		return errors.New("the admin endpoint does not know this; is it of a Caddy with this version of mesh?")
	}
	return fmt.Errorf("the admin endpoint answered %d %s", status, http.StatusText(status))
}

// print prints an answer of the admin endpoint: as it is, or by table.
func (c *meshCommand) print(answer []byte, table func(w io.Writer) error) error {
	if c.json() {
		_, err := fmt.Fprintln(c.OutOrStdout(), strings.TrimSpace(string(answer)))
		return err
	}
	w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
	if err := table(w); err != nil {
		return err
	}
	return w.Flush()
}

// confirmed gives a command that cannot be undone the flag to confirm it beforehand.
func confirmed(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().Bool("yes", false, "Do not ask")
	return cmd
}

// confirm asks for a yes, where it was not given beforehand.
func (c *meshCommand) confirm(question string) error {
	if c.flag("yes") == "true" {
		return nil
	}
	if !isTerminal(os.Stdin) {
		return errors.New("there is no terminal to ask on, and nothing was done; use --yes to do it without being asked")
	}
	fmt.Fprintf(c.ErrOrStderr(), "%s [y/N] ", question)
	said, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	if !slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(said))) {
		return errors.New("the answer was not yes, and nothing was done")
	}
	return nil
}

// isTerminal reports whether somebody may answer.
func isTerminal(f *os.File) bool {
	stat, err := f.Stat()
	if err != nil || stat.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull)
	return err != nil || !os.SameFile(stat, null)
}

var errDegraded = errors.New("a store cannot be reached")

func healthCommand() *cobra.Command {
	return subcommand("health", "Shows the stores, and whether they can be reached", cobra.NoArgs, func(c *meshCommand, _ []string) error {
		answer, err := c.ask(http.MethodGet, "/mesh/health", nil, nil, http.StatusServiceUnavailable)
		if err != nil {
			return err
		}
		var health struct {
			Status string
			Stores []storeStatus
		}
		if err := json.Unmarshal(answer, &health); err != nil {
			return fmt.Errorf("reading the answer of the admin endpoint: %w", err)
		}
		err = c.print(answer, func(w io.Writer) error {
			fmt.Fprintln(w, "STORE\tSTATUS\tWAITING")
			for _, s := range health.Stores {
				status := "ok"
				if s.Degraded {
					status = "degraded"
				}
				fmt.Fprintf(w, "%s\t%s\t%d\n", s.Name, status, s.Waiting)
			}
			return nil
		})
		if err == nil && health.Status != "ok" {
			return errDegraded
		}
		return err
	})
}
