package mesh

import (
	"encoding/json"
	"math"
	"slices"
	"strconv"
)

// compareRequest is a request to /v1/chat/compare that has passed every check.
type compareRequest struct {
	models       []string // each once, in the order they were given in
	overrides    map[string]modelOverride
	judge        string // empty: the configured one
	instructions string // empty: the configured ones
	stream       bool
	skip         bool // nobody judges
	sessionID    string

	prompt []json.RawMessage // the messages of its template, which come first

	messages    []json.RawMessage // the client's bytes of each
	temperature json.RawMessage   // nil where it was not given, as all that follow
	maxTokens   json.RawMessage
	template    json.RawMessage
	variables   json.RawMessage
	cache       json.RawMessage
}

// modelOverride is what one model is asked otherwise than the others.
type modelOverride struct {
	temperature, maxTokens, systemPrompt json.RawMessage
}

var (
	compareFields = []string{"models", "messages", "model_overrides", "comparison_model", "comparison_instructions", "temperature",
		"max_tokens", "stream", "template", "variables", "skip_comparison", "cache", "session_id"}
	overrideFields = []string{"model", "temperature", "max_tokens", "system_prompt"}
)

// maxComparedModels is how many models one request may compare. A configuration may allow fewer.
const maxComparedModels = 10

// compareParser checks a request against the API.
type compareParser struct {
	*parser
	req       *compareRequest
	limit     int // of models
	overrides []namedOverride
}

type namedOverride struct {
	model string
	modelOverride
}

// parseCompare reads and checks a request's body. All faults are reported at once.
func parseCompare(body []byte, limit int) (*compareRequest, *apiError) {
	p := &compareParser{
		parser: &parser{cursor: cursor{data: body, maxDepth: maxRequestDepth}, req: &chatRequest{body: body}},
		req:    new(compareRequest),
		limit:  limit,
	}
	var given uint64
	if refusal := p.wholeObject(func(*parser) { given, _, _ = p.fields(compareFields, p.member) }); refusal != nil {
		return nil, refusal
	}
	p.require(compareFields, 2, given)
	p.checkOverrides()
	if len(p.faults) > 0 {
		return nil, validationError(p.faults)
	}
	return p.req, nil
}

// raw returns the bytes of a value that check consumes.
func (p *compareParser) raw(check func()) json.RawMessage {
	from := p.start()
	check()
	return p.data[from:p.pos]
}

// member checks the value of one of compareFields.
func (p *compareParser) member(i int) {
	r := p.req
	switch compareFields[i] {
	case "models":
		p.models()
	case "messages":
		p.messages()
	case "model_overrides":
		p.list(func(*parser) { p.override() })
	case "comparison_model":
		name, _ := p.text()
		r.judge = string(name)
	case "comparison_instructions":
		text, _ := p.text()
		r.instructions = string(text)
	case "temperature":
		r.temperature = p.raw(p.temperature)
	case "max_tokens":
		r.maxTokens = p.raw(p.maxTokens)
	case "stream":
		r.stream, _ = p.boolean()
	case "template":
		r.template = p.raw(func() { p.text() })
	case "variables":
		r.variables = p.raw(func() { p.textMap() })
	case "skip_comparison":
		r.skip, _ = p.boolean()
	case "cache":
		r.cache = p.raw(func() { p.boolean() })
	case "session_id":
		r.sessionID = p.shortText(256)
	}
}

func (p *compareParser) temperature() { p.number(between(0, 2)) }

func (p *compareParser) maxTokens() { p.number(rule{integer: true, min: 1, max: math.Inf(1)}) }

func (p *compareParser) models() {
	isList := p.peek() == '['
	n := p.list(func(*parser) {
		name, ok := p.text()
		if ok && len(name) == 0 {
			p.faultf("string_too_short", "String should have at least 1 character")
			return
		}
		if ok && !slices.Contains(p.req.models, string(name)) {
			p.req.models = append(p.req.models, string(name))
		}
	})
	switch distinct := len(p.req.models); {
	case n == 0 && isList:
		p.faultf("too_short", "List should have at least 1 item after validation, not 0")
	case distinct > p.limit:
		p.faultf("too_long", "List should have at most "+strconv.Itoa(p.limit)+" items after validation, not "+strconv.Itoa(distinct))
	}
}

func (p *compareParser) messages() {
	p.list(func(*parser) {
		p.req.messages = append(p.req.messages, p.raw(p.parser.message))
	})
}

// override reads one of model_overrides. Whether its model is among those compared shows when all has been read.
func (p *compareParser) override() {
	var o namedOverride
	given, _, ok := p.fields(overrideFields, func(i int) {
		switch i {
		case 0:
			name, _ := p.text()
			o.model = string(name)
		case 1:
			o.temperature = p.raw(p.temperature)
		case 2:
			o.maxTokens = p.raw(p.maxTokens)
		case 3:
			o.systemPrompt = p.raw(func() { p.text() })
		}
	})
	if ok {
		p.require(overrideFields, 1, given)
	}
	p.overrides = append(p.overrides, o)
}

// checkOverrides checks what depends on more than one member.
func (p *compareParser) checkOverrides() {
	r := p.req
	if r.messages == nil && r.template == nil && len(p.faults) == 0 {
		p.at("messages").faultf("too_short", "List should have at least 1 item after validation, not 0")
		p.up()
	}
	r.overrides = make(map[string]modelOverride, len(p.overrides))
	p.at("model_overrides")
	for i, o := range p.overrides {
		p.path = append(p.path, step{element: i})
		switch _, twice := r.overrides[o.model]; {
		case o.model == "": // is a fault already
		case !slices.Contains(r.models, o.model):
			p.at("model").faultf("value_error", "Value error, "+strconv.Quote(o.model)+" is not among the models to compare")
			p.up()
		case twice:
			p.at("model").faultf("value_error", "Value error, "+strconv.Quote(o.model)+" is overridden twice")
			p.up()
		}
		r.overrides[o.model] = o.modelOverride
		p.up()
	}
	p.up()
}

// bodyFor returns the chat completion that one model is asked for.
func (r *compareRequest) bodyFor(model string, stream bool) []byte {
	own := r.overrides[model]
	o := objectWriter{buf: make([]byte, 0, 1024)}
	o.text("model", model)
	o.name("messages")
	o.buf = appendList(o.buf, r.messagesFor(own))
	o.rawIfAny("temperature", firstOf(own.temperature, r.temperature))
	o.rawIfAny("max_tokens", firstOf(own.maxTokens, r.maxTokens))
	o.rawIfAny("template", r.template)
	o.rawIfAny("variables", r.variables)
	o.rawIfAny("cache", r.cache)
	o.textIfAny("session_id", r.sessionID)
	if stream {
		o.raw("stream_options", json.RawMessage(`{"include_usage":true}`))
	}
	o.trueIf("stream", stream)
	return append(o.buf, '}')
}

func firstOf(values ...json.RawMessage) json.RawMessage {
	for _, v := range values {
		if v != nil {
			return v
		}
	}
	return nil
}

// messagesFor returns the messages for a model. A system prompt of its own takes the place of those at the beginning.
func (r *compareRequest) messagesFor(own modelOverride) []json.RawMessage {
	if own.systemPrompt == nil {
		return r.messages
	}
	rest := r.messages
	for len(rest) > 0 && isSystem(rest[0]) {
		rest = rest[1:]
	}
	system := objectWriter{}
	system.text("role", "system")
	system.raw("content", own.systemPrompt)
	return append([]json.RawMessage{append(system.buf, '}')}, rest...)
}

func isSystem(message json.RawMessage) bool {
	var m struct{ Role string }
	return json.Unmarshal(message, &m) == nil && (m.Role == "system" || m.Role == "developer")
}

// appendList appends a JSON list.
func appendList(b []byte, elements []json.RawMessage) []byte {
	b = append(b, '[')
	for i, e := range elements {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, e...)
	}
	return append(b, ']')
}

func (o *objectWriter) raw(name string, value json.RawMessage) {
	o.name(name)
	o.buf = append(o.buf, value...)
}

func (o *objectWriter) rawIfAny(name string, value json.RawMessage) {
	if value != nil {
		o.raw(name, value)
	}
}
