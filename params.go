package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Params are members of a chat request, such as temperature, by name. They stand in for those that the client leaves out.
type Params map[string]json.RawMessage

var (
	errParamOwned = errors.New("it is the gateway's own business, and cannot be set for a request")
	errParamNull  = errors.New("null sets nothing")
)

// check finds what is wrong with the parameters. Its errors name the parameter.
func (p Params) check() error {
	for _, name := range slices.Sorted(maps.Keys(p)) {
		if err := checkParam(name, p[name]); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// checkParam holds the value of a member that the API gives a meaning to what it asks of a client's. What else a provider
// may take passes as it is.
func checkParam(name string, value json.RawMessage) error {
	i, exact := lookup(chatNames, []byte(name))
	switch {
	case name == "":
		return errors.New("a parameter needs a name")
	case i >= 0 && !exact:
		return fmt.Errorf("it differs from %s in letter case only", chatNames[i])
	case i >= 0 && (i <= memberStreamOptions || chatMembers[i].gateway):
		return errParamOwned
	}
	p := &parser{cursor: cursor{data: value, maxDepth: maxRequestDepth}, req: new(chatRequest)}
	switch {
	case p.peek() == 'n':
		return errParamNull
	case i >= 0:
		chatMembers[i].check(p)
	default:
		p.skip()
	}
	p.end()
	if p.err != nil {
		return fmt.Errorf("it is not valid JSON: %w", p.err)
	}
	if len(p.faults) > 0 {
		return errors.New(p.faults[0].Msg)
	}
	return nil
}

// params parses names and values, in turn. A value that is not JSON is a string.
func (p *blockParser) params(to *Params) error {
	args := p.RemainingArgs()
	if len(args) == 0 || len(args)%2 != 0 {
		return p.ArgErr()
	}
	*to = make(Params, len(args)/2)
	for i := 0; i < len(args); i += 2 {
		if _, twice := (*to)[args[i]]; twice {
			return p.Errf("%s is given twice", args[i])
		}
		(*to)[args[i]] = paramValue(args[i+1])
	}
	if err := to.check(); err != nil {
		return p.WrapErr(err)
	}
	return nil
}

// paramValue returns text as JSON: as it is, if it is that already, or else as a string.
func paramValue(text string) json.RawMessage {
	if json.Valid([]byte(text)) {
		return json.RawMessage(text)
	}
	return appendString(nil, text)
}
