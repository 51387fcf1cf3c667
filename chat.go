package mesh

import (
	"bytes"
	"errors"
	"io"
	"math"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// maxRequestDepth is how deep a request's JSON may nest.
const maxRequestDepth = 200

// chatRequest is a request to /v1/chat/completions that has passed every check: the client's bytes, what the
// gateway needs to know of them, and the places where the upstream's version differs.
type chatRequest struct {
	body  []byte
	edits []edit // in order of their place, not overlapping

	model        string // as asked for; empty if the client left the choice to the gateway
	stream       bool
	includeUsage bool // the client asked for the usage frame
	sessionID    string
	timeout      time.Duration // 0: the handler's

	prompt promptSize
}

// edit replaces a range of the client's bytes in what the upstream receives.
type edit struct {
	span
	with  string
	model bool // with is a prefix; the quoted model name comes after it
}

// promptSize is what an estimate of the prompt's tokens is made from.
type promptSize struct {
	bytes    int // text as it stands in the JSON, escapes included
	images   int
	messages int
	sample   []span // where in the body the first of the text stands, up to maxSample bytes of it
	sampled  int
}

// maxSample is how much text an estimate looks at.
const maxSample = 4 << 10

func (p *promptSize) add(s span) {
	p.bytes += s.to - s.from
	if room := maxSample - p.sampled; room > 0 && len(p.sample) < 64 {
		s.to = min(s.to, s.from+room)
		p.sampled += s.to - s.from
		p.sample = append(p.sample, s)
	}
}

// text returns the sample out of the body.
func (p *promptSize) text(body []byte) []byte {
	text := make([]byte, 0, p.sampled)
	for _, s := range p.sample {
		text = append(text, s.of(body)...)
	}
	return text
}

// readBody reads the whole body of r, at most limit bytes of it.
func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, *apiError) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" {
		return nil, errorf(http.StatusUnsupportedMediaType, "unsupported_media_type",
			"The request body must be JSON, sent with 'Content-Type: application/json'.")
	}
	if enc := r.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		return nil, errorf(http.StatusUnsupportedMediaType, "unsupported_media_type",
			"The request body must not be compressed (Content-Encoding: %s).", strconv.Quote(enc))
	}
	tooLarge := errorf(http.StatusRequestEntityTooLarge, "request_too_large", "The request body is larger than %d bytes.", limit)
	if r.ContentLength > limit {
		return nil, tooLarge
	}
	// A declared length is believed only so far: whoever declares much and sends nothing shall not cost much.
	buf := bytes.NewBuffer(make([]byte, 0, min(max(r.ContentLength, 0), 1<<20)+bytes.MinRead))
	_, err = buf.ReadFrom(http.MaxBytesReader(w, r.Body, limit))
	if err == nil {
		return buf.Bytes(), nil
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, tooLarge
	}
	// request_body in front of this handler has limits of its own and says so with a HandlerError
	if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok && handlerErr.StatusCode == http.StatusRequestEntityTooLarge {
		tooLarge.message = "The request body is too large."
		return nil, tooLarge
	}
	refused := errorf(http.StatusBadRequest, "invalid_request", "The request body could not be read to its end.")
	refused.cause = err
	return nil, refused
}

// member is one that api.md's table of request members names.
type member struct {
	name    string
	gateway bool // not sent upstream
	check   func(*parser)
}

var chatMembers = []member{
	{name: "messages", check: (*parser).messages},
	{name: "model", check: func(p *parser) { p.req.model, _ = p.text() }},
	{name: "stream", check: func(p *parser) { p.req.stream, _ = p.boolean() }},
	{name: "stream_options", check: (*parser).streamOptions},
	{name: "temperature", check: func(p *parser) { p.number(between(0, 2)) }},
	{name: "max_tokens", check: func(p *parser) { p.number(rule{integer: true, min: 1, max: math.Inf(1)}) }},
	{name: "top_p", check: func(p *parser) { p.number(between(0, 1)) }},
	{name: "frequency_penalty", check: func(p *parser) { p.number(between(-2, 2)) }},
	{name: "presence_penalty", check: func(p *parser) { p.number(between(-2, 2)) }},
	{name: "stop", check: (*parser).stop},
	{name: "seed", check: func(p *parser) { p.number(rule{integer: true, min: math.Inf(-1), max: math.Inf(1)}) }},
	{name: "tools", check: (*parser).tools},
	{name: "tool_choice", check: (*parser).toolChoice},
	{name: "user", check: func(p *parser) { p.shortText(256) }},
	{name: "modalities", check: func(p *parser) { p.list((*parser).modalityName) }},
	{name: "audio", check: (*parser).audio},
	{name: "session_id", gateway: true, check: func(p *parser) { p.req.sessionID = p.shortText(256) }},
	{name: "timeout", gateway: true, check: (*parser).timeout},
	{name: "cache", gateway: true, check: func(p *parser) { p.boolean() }},
	{name: "template", gateway: true, check: func(p *parser) { _, given := p.text(); p.unbuilt(given) }},
	{name: "variables", gateway: true, check: func(p *parser) { p.unbuilt(p.textMap() > 0) }},
	{name: "models", gateway: true, check: func(p *parser) { p.unbuilt(p.list(func(p *parser) { p.text() }) > 0) }},
	{name: "transforms", gateway: true, check: func(p *parser) {
		p.unbuilt(p.list(func(p *parser) { p.oneOf("middle-out") }) > 0)
	}},
	{name: "modality", gateway: true, check: func(p *parser) { p.unbuilt(p.oneOf("text", "image") == "image") }},
	{name: "image", gateway: true, check: func(p *parser) { p.unbuilt(p.image()) }},
	{name: "async_mode", gateway: true, check: func(p *parser) { on, _ := p.boolean(); p.unbuilt(on) }},
}

const (
	memberMessages = iota // their places in chatMembers
	memberModel
	memberStream
	memberStreamOptions
)

// lookup returns the place in chatMembers of a name, and whether it is the exact name or only one that a parser
// which ignores case would take for it.
func lookup(name []byte) (i int, exact bool) {
	for i := range chatMembers {
		if string(name) == chatMembers[i].name {
			return i, true
		}
	}
	for i := range chatMembers {
		if bytes.EqualFold(name, []byte(chatMembers[i].name)) {
			return i, false
		}
	}
	return -1, false
}

// parseChat reads and checks a request's body in one pass. All faults are reported at once.
func parseChat(body []byte) (*chatRequest, *apiError) {
	if !utf8.Valid(body) {
		return nil, errorf(http.StatusBadRequest, "invalid_request", "The request body is not valid UTF-8.")
	}
	p := &parser{cursor: cursor{data: body, maxDepth: maxRequestDepth}, req: &chatRequest{body: body}}
	if b := p.peek(); b != '{' {
		p.skip()
		p.end()
		if p.err == nil {
			return nil, errorf(http.StatusBadRequest, "invalid_request", "The request body must be a JSON object.")
		}
	} else {
		p.object()
		p.end()
	}
	if p.err != nil {
		return nil, errorf(http.StatusBadRequest, "invalid_request", "The request body is not valid JSON: %s.", p.err)
	}
	if len(p.faults) > 0 {
		return nil, validationError(p.faults)
	}
	return p.req, nil
}

func validationError(faults []fault) *apiError {
	first := faults[0]
	var param strings.Builder
	for _, l := range first.Loc[1:] { // without "body"
		switch l := l.(type) {
		case string:
			if param.Len() > 0 {
				param.WriteByte('.')
			}
			param.WriteString(l)
		case int:
			param.WriteString("[" + strconv.Itoa(l) + "]")
		}
	}
	e := errorf(http.StatusUnprocessableEntity, "validation_error", "%s: %s", param.String(), first.Msg)
	if n := len(faults) - 1; n > 0 {
		e.message += " (and " + strconv.Itoa(n) + " more)"
	}
	e.param, e.details = param.String(), faults
	return e
}

// object walks the request's own members: checks each, and notes what the upstream shall not see or see otherwise.
func (p *parser) object() {
	var (
		seen, folded [64]bool // by place in chatMembers
		kept         = span{} // the last member that stays
		removed      = span{} // the run of members before this one that go
		options      = -1     // offset of stream_options
	)
	open := p.pos + 1
	for more := p.enter('{'); more; more = p.next('}') {
		p.peek()
		start := p.pos
		name := p.name()
		i, exact := lookup(name)
		value := p.peekSpan()
		switch {
		case p.err != nil:
			return
		case !exact:
			if i >= 0 {
				folded[i] = true
			}
			p.skip()
		case seen[i]:
			p.at(chatMembers[i].name).faultf("value_error", "Value error, the member is given twice")
			p.up()
			p.skip()
		default:
			seen[i] = true
			p.known(i)
		}
		value.to = p.pos
		this := span{start, p.pos}
		if exact && chatMembers[i].gateway {
			if removed.to == 0 {
				removed = this
			}
			removed.to = this.to
			continue
		}
		if removed.to != 0 { // up to here, so that the comma behind it goes too
			p.edit(edit{span: span{removed.from, start}})
			removed = span{}
		}
		kept = this
		switch {
		case exact && i == memberModel:
			p.edit(edit{span: value, model: true})
		case exact && i == memberStreamOptions:
			options = value.from
		}
	}
	if removed.to != 0 { // at the end it is the comma before it that goes
		if kept.to != 0 {
			removed.from = kept.to
		}
		p.edit(edit{span: removed})
	}
	if !seen[memberMessages] {
		p.at("messages").faultf("missing", "Field required")
		p.up()
	}
	p.addMembers(open, kept.to, seen[memberModel], options)
	p.refuseTwins(&seen, &folded)
}

// refuseTwins refuses a member that stands beside one whose name differs only in letter case: a parser that
// ignores case, as Go's does, would read another request than the gateway. The gateway itself always sends a
// model, and stream_options with a stream, so these have a twin even where the client did not send them.
func (p *parser) refuseTwins(seen, folded *[64]bool) {
	seen[memberModel] = true
	seen[memberStreamOptions] = seen[memberStreamOptions] || p.req.stream
	for i := range chatMembers {
		if seen[i] && folded[i] {
			p.at(chatMembers[i].name).faultf("value_error", "Value error, the member is given again in another letter case")
			p.up()
		}
	}
}

// addMembers notes what the upstream gets in addition: a model, and on a stream the wish for usage. Members are
// added behind the last one kept, or at open where there is none.
func (p *parser) addMembers(open, end int, hasModel bool, options int) {
	sep := ","
	if end == 0 {
		end, sep = open, ""
	}
	if !hasModel {
		p.editAt(end, edit{with: sep + `"model":`, model: true})
		sep = ","
	}
	if !p.req.stream {
		return
	}
	const asked = `"include_usage":true`
	switch {
	case options < 0:
		p.editAt(end, edit{with: sep + `"stream_options":{` + asked + `}`})
	case p.options.null:
		p.editAt(options, edit{span: span{0, len("null")}, with: `{` + asked + `}`})
	case p.options.include.to != 0 && !p.req.includeUsage:
		p.editAt(p.options.include.from, edit{span: span{0, p.options.include.to - p.options.include.from}, with: "true"})
	case p.options.include.to == 0 && p.options.empty:
		p.editAt(options+1, edit{with: asked})
	case p.options.include.to == 0:
		p.editAt(options+1, edit{with: asked + ","})
	}
}

// edit notes a change behind all others so far.
func (p *parser) edit(e edit) { p.req.edits = append(p.req.edits, e) }

// editAt notes a change at offset, wherever that is; e's span holds its length. A change at the same place as
// another goes behind it, unless the other one removes what follows.
func (p *parser) editAt(offset int, e edit) {
	e.from, e.to = offset, offset+e.to
	i := len(p.req.edits)
	for i > 0 {
		before := p.req.edits[i-1]
		if before.from < offset || before.from == offset && before.to == offset {
			break
		}
		i--
	}
	p.req.edits = append(p.req.edits, edit{})
	copy(p.req.edits[i+1:], p.req.edits[i:])
	p.req.edits[i] = e
}

// segments returns the body as the upstream receives it: the client's bytes but for the edits, cut into pieces so
// that nothing is copied.
func (r *chatRequest) segments(model string) (parts [][]byte, size int64) {
	name, _ := encodeJSON(model) // a string: cannot fail
	parts = make([][]byte, 0, 3*len(r.edits)+1)
	add := func(b []byte) {
		if len(b) > 0 {
			parts = append(parts, b)
			size += int64(len(b))
		}
	}
	done := 0
	for _, e := range r.edits {
		add(r.body[done:e.from])
		add([]byte(e.with))
		if e.model {
			add(name)
		}
		done = e.to
	}
	add(r.body[done:])
	return parts, size
}

// segmentReader reads pieces one after another, and lets go of each when it has been read.
type segmentReader struct{ parts [][]byte }

func (s *segmentReader) Read(p []byte) (n int, err error) {
	for n < len(p) && len(s.parts) > 0 {
		m := copy(p[n:], s.parts[0])
		n += m
		if s.parts[0] = s.parts[0][m:]; len(s.parts[0]) == 0 {
			s.parts = s.parts[1:]
		}
	}
	if n == 0 && len(p) > 0 {
		s.parts = nil
		return 0, io.EOF
	}
	return n, nil
}

func (s *segmentReader) Close() error { return nil }
