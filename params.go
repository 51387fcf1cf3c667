package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Params are members of a chat completion that are sent upstream where a request does not have them, such as
// `{"temperature": 0.5}`: of any name but those that the gateway itself gives a meaning.
type Params map[string]json.RawMessage

// isOwned reports whether a member of a request is the gateway's to set, or not for the upstream at all.
func isOwned(name string) bool {
	switch name {
	case "messages", "model", "stream", "stream_options":
		return true
	}
	i := slices.Index(chatNames, name)
	return i >= 0 && chatMembers[i].gateway
}

// param checks one of the values of Params, at the place of the parser that its name leads to.
func (p *parser) param(name string) {
	i, exact := lookup(chatNames, []byte(name))
	switch {
	case name == "":
		p.skip()
		p.faultf("value_error", "Value error, a parameter needs a name")
	case isOwned(name):
		p.skip()
		p.faultf("value_error", "Value error, "+name+" cannot be a default")
	case i >= 0 && !exact:
		p.skip()
		p.faultf("value_error", "Value error, the API calls it "+chatNames[i])
	case p.peek() == 'n':
		p.skip()
		p.faultf("value_error", "Value error, a default cannot be null")
	case i >= 0:
		chatMembers[i].check(p)
	default:
		p.skip()
	}
}

// check finds what is wrong with the values, as the API checks a request's.
func (ps Params) check() error {
	for _, name := range slices.Sorted(maps.Keys(ps)) {
		p := &parser{cursor: cursor{data: ps[name], maxDepth: maxRequestDepth}, req: new(chatRequest)}
		p.at(name).param(name)
		p.end()
		if p.err != nil {
			return fmt.Errorf("%s: it is not JSON: %w", name, p.err)
		}
		if len(p.faults) > 0 {
			return errors.New(p.faults[0].where() + ": " + strings.TrimPrefix(p.faults[0].Msg, "Value error, "))
		}
	}
	return nil
}

// params parses names and values. A value is JSON, or text that is none and needs no quotes.
func (p *blockParser) params(to *Params) error {
	args := p.RemainingArgs()
	if len(args) == 0 || len(args)%2 != 0 {
		return p.Errf("%s: names and values are needed, in turn", p.Val())
	}
	ps := make(Params, len(args)/2)
	for i := 0; i < len(args); i += 2 {
		if _, twice := ps[args[i]]; twice {
			return p.Errf("%s is given twice", args[i])
		}
		ps[args[i]] = paramValue(args[i+1])
	}
	if err := ps.check(); err != nil {
		return p.WrapErr(err)
	}
	*to = ps
	return nil
}

// paramValue reads a value as people write it.
func paramValue(s string) json.RawMessage {
	if json.Valid([]byte(s)) {
		return json.RawMessage(strings.TrimSpace(s))
	}
	return appendString(nil, s)
}
