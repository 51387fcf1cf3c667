package mesh

import (
	"encoding/json"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// expand adds to a request what its template brings, and the parameters that its key or the template has by default.
func (x *exchange) expand(req *chatRequest) *apiError {
	if x.expanded != nil {
		req.templateModel = x.expanded.TemplateModel
		return nil
	}
	if req.template == "" && len(x.key.DefaultParams) == 0 {
		return nil
	}
	var params Params
	if req.template != "" {
		t, refusal := x.findTemplate(req.template)
		if refusal != nil {
			return refusal
		}
		if refusal := req.addTemplate(t, x.h.MaxBodySize); refusal != nil {
			return refusal
		}
		params = t.Params
	}
	added := x.key.DefaultParams.over(params)
	if len(added) > 0 {
		if refusal := req.addParams(added); refusal != nil {
			return refusal
		}
	}
	req.edits = sortEdits(req.edits)
	return nil
}

// over returns both, its own values first.
func (ps Params) over(others Params) Params {
	if len(ps) == 0 || len(others) == 0 {
		if len(ps) == 0 {
			return others
		}
		return ps
	}
	both := maps.Clone(ps)
	for name, value := range others {
		if ps.lacks(name) {
			both[name] = value
		}
	}
	return both
}

// lacks reports whether a default of this name has its place yet. Two members bound the length of an answer.
func (ps Params) lacks(name string) bool {
	for _, n := range sameMeaning(name) {
		if _, ok := ps[n]; ok {
			return false
		}
	}
	return true
}

// sameMeaning returns the names under which a request can say the same.
func sameMeaning(name string) []string {
	if name == "max_tokens" || name == "max_completion_tokens" {
		return []string{"max_tokens", "max_completion_tokens"}
	}
	return []string{name}
}

// addTemplate puts the template's messages before those of the request.
func (r *chatRequest) addTemplate(t *Template, limit int64) *apiError {
	prompt := t.prompt
	if missing := prompt.missing(r.variables); len(missing) > 0 {
		return missingVariables(t.Name, missing)
	}
	if prompt.messages == 0 && r.prompt.messages == 0 {
		p := new(parser)
		p.tooFewMessages()
		return validationError(p.faults)
	}
	if int64(len(r.body))+prompt.size(r.variables) > limit {
		return errorf(http.StatusRequestEntityTooLarge, "request_too_large", "With its template the request is larger than %d bytes.", limit)
	}
	r.templateModel = t.Model
	if prompt.messages == 0 {
		return nil
	}
	rendered := prompt.render(r.variables)
	r.variables = nil
	r.prompt.bytes += len(rendered)
	r.prompt.front = rendered[:min(len(rendered), maxSample):min(len(rendered), maxSample)]
	r.prompt.media = r.prompt.media || prompt.media
	if r.prompt.messages > 0 {
		rendered = append(rendered, ',')
	}
	r.prompt.messages += prompt.messages
	r.insert(span{r.messages.from + 1, r.messages.from + 1}, string(rendered))
	return nil
}

// templateMessages returns the messages that the template has put before those of the request.
func (r *chatRequest) templateMessages() (messages []json.RawMessage) {
	front := span{r.messages.from + 1, r.messages.from + 1}
	for _, e := range r.edits {
		if e.added && e.span == front {
			json.Unmarshal([]byte("["+strings.TrimSuffix(e.with, ",")+"]"), &messages) //nolint:errcheck // it is of this gateway's making
		}
	}
	return messages
}

func missingVariables(template string, names []string) *apiError {
	e := errorf(http.StatusUnprocessableEntity, "unprocessable_entity", "The template %q needs a value for %s.", template, quotedList(names))
	e.param = "variables"
	for _, name := range names {
		e.details = append(e.details, fault{Type: "missing", Loc: []any{"body", "variables", name}, Msg: "Field required"})
	}
	return e
}

func quotedList(names []string) (list string) {
	for i, name := range names {
		switch {
		case i == 0:
		case i == len(names)-1:
			list += " and "
		default:
			list += ", "
		}
		list += strconv.Quote(name)
	}
	return list
}

func (r *chatRequest) insert(at span, text string) {
	r.edits = append(r.edits, edit{span: at, with: text, added: true})
	r.added += len(text)
}

// addParams adds members that the request does not have. One that is null in it is as good as absent.
func (r *chatRequest) addParams(params Params) *apiError {
	nulls := make(map[string]span)
	has := make(map[string]bool)
	p := &parser{cursor: cursor{data: r.body, maxDepth: maxRequestDepth}}
	var twins []string
	for more := p.enter('{'); more; more = p.next('}') {
		name := string(p.name())
		null := p.peek() == 'n'
		value := p.skip()
		switch {
		case null:
			nulls[name] = value
		default:
			has[name] = true
		}
		if twin := params.twin(name); twin != "" {
			twins = append(twins, twin)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(params)) {
		if slices.ContainsFunc(sameMeaning(name), func(n string) bool { return has[n] }) {
			continue
		}
		if slices.Contains(twins, name) {
			p.at(name).faultf("value_error", "Value error, the member is given in another letter case")
			p.up()
			continue
		}
		value := params[name]
		if null, ok := nulls[name]; ok {
			r.insert(null, string(value))
		} else {
			r.insert(span{r.end, r.end}, ","+string(appendString(nil, name))+":"+string(value))
		}
		r.noteParam(name, value)
	}
	if len(p.faults) > 0 {
		return validationError(p.faults)
	}
	return nil
}

// twin returns the default that a member's name differs from in letter case only; empty where there is none.
func (ps Params) twin(name string) string {
	for known := range ps {
		if i, exact := lookup([]string{known}, []byte(name)); i == 0 && !exact {
			return known
		}
	}
	return ""
}

// noteParam has the gateway know what the added member means for the cost.
func (r *chatRequest) noteParam(name string, value []byte) {
	number, err := strconv.ParseFloat(string(value), 64)
	if err != nil {
		return
	}
	switch name {
	case "max_tokens", "max_completion_tokens":
		r.maxTokens = max(r.maxTokens, tokenCount(number))
	case "n":
		r.choices = tokenCount(math.Ceil(number))
	}
}
