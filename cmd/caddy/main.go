// Command caddy is a Caddy with its standard modules, the mesh gateway, and a demo model to try it with.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddymesh/mesh"
)

func main() { caddycmd.Main() }
