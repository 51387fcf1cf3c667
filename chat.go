package mesh

import (
	"cmp"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"
)

// maxRequestDepth is how deep a request's JSON may nest.
const maxRequestDepth = 200

// chatRequest is a request to /v1/chat/completions that has passed every check: the client's bytes, what the
// gateway needs to know of them, and the places where the upstream's version differs.
type chatRequest struct {
	body  []byte
	edits []edit // not overlapping; in order of their place when all are noted

	model        string // as asked for; empty if the client left the choice to the gateway
	stream       bool
	async        bool     // it is to be a job
	includeUsage bool     // the client asked for the usage frame
	fallbacks    []string // models to ask after that, as the client wants it
	sessionID    string
	timeout      time.Duration // 0: the handler's
	maxTokens    int64         // of one choice of the answer; 0 if the client set no bound
	choices      int64         // how many answers it wants; 0 if it did not say
	vague        bool          // an upstream may read something else out of what it says of the two
	options      bool          // it has stream_options
	transforms   *bool         // whether middle-out is wanted; nil if it did not say
	messages     span
	tools        span
	modalities   modalitySet // what the answer is to be made of
	image        imageWish
	images       *imageCall // what is asked of the upstream in place of a chat completion; nil: it is one

	template      string            // a name or an id; empty for none
	variables     map[string]string // for its slots
	templateModel string            // the template's, for where nobody else names one
	end           int               // where members can be added
	added         int               // bytes that the gateway has added

	prompt promptSize
}

// edit replaces a range of the client's bytes in what the upstream receives.
type edit struct {
	span
	with  string
	model bool // with is a prefix; the quoted model name comes after it
	usage bool // it adds stream_options, which not all upstreams take
	added bool // it is no change of what the client sent, but comes from a template or defaults
}

// promptSize is what an estimate of the prompt's tokens is made from.
type promptSize struct {
	bytes    int // text as it stands in the JSON, escapes included
	images   int
	media    bool // it has parts other than text
	messages int
	sample   []span // where in the body the first of the text stands, up to maxSample bytes of it
	sampled  int
	front    []byte // of the sample: text of a template, which comes first
	kept     []byte // the sample itself, once the body is forgotten
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
	if p.kept != nil {
		return p.kept
	}
	text := append(make([]byte, 0, len(p.front)+p.sampled), p.front...)
	for _, s := range p.sample {
		text = append(text, s.of(body)...)
	}
	return text
}

// forget lets go of the body, but for what an estimate needs: a stream may last long after it was sent.
func (r *chatRequest) forget() {
	r.keepSample()
	r.body, r.edits = nil, nil
}

// keepSample copies what an estimate needs, before others than the reader of an answer may let go of the body.
func (r *chatRequest) keepSample() {
	if r.prompt.kept == nil {
		r.prompt.kept = r.prompt.text(r.body)
	}
}

// parseChat reads and checks a request's body in one pass. All faults are reported at once.
func parseChat(body []byte) (*chatRequest, *apiError) {
	p := &parser{cursor: cursor{data: body, maxDepth: maxRequestDepth}, req: &chatRequest{body: body}}
	if refusal := p.wholeObject((*parser).object); refusal != nil {
		return nil, refusal
	}
	if len(p.faults) > 0 {
		return nil, validationError(p.faults)
	}
	sortEdits(p.req.edits)
	return p.req, nil
}

func validationError(faults []fault) *apiError {
	first := faults[0]
	param := first.where()
	e := errorf(http.StatusUnprocessableEntity, "validation_error", "%s: %s", param, first.Msg)
	if n := len(faults) - 1; n > 0 {
		e.message += " (and " + strconv.Itoa(n) + " more)"
	}
	e.param, e.details = param, faults
	return e
}

// object walks the request's own members: checks each, and notes what the upstream shall not see or see otherwise.
func (p *parser) object() {
	var (
		seen, folded uint64 // a bit for each of chatMembers: given by name, or in another letter case
		kept         int    // end of the last member that stays
		removed      span   // the run of members behind it that go
	)
	for more := p.enter('{'); more; more = p.next('}') {
		start := p.start()
		i, exact := lookup(chatNames, p.name())
		switch bit := bitOf(i); {
		case !exact:
			folded |= bit
			p.req.vague = p.req.vague || bit&boundingMembers != 0
			p.skip()
		case seen&bit != 0:
			p.twice(chatNames[i])
		default:
			seen |= bit
			p.known(i)
		}
		if exact && (chatMembers[i].gateway || i == memberStreamOptions && p.noStreamOptions) {
			if removed.to == 0 {
				removed.from = start
			}
			removed.to = p.pos
			continue
		}
		if removed.to != 0 { // up to here, so that the comma behind it goes too
			p.edit(edit{span: span{removed.from, start}})
			removed = span{}
		}
		kept = p.pos
	}
	if removed.to != 0 { // at the end it is the comma before it that goes
		p.edit(edit{span: span{kept, removed.to}})
	}
	switch {
	case seen&bitOf(memberMessages) == 0:
		p.missing("messages")
	case p.noMessages && p.req.template == "":
		p.tooFewMessages()
	}
	p.checkAudio()
	p.refuseAsyncStream()
	p.addMembers(kept, seen)
	p.refuseTwins(seen, folded)
}

// refuseTwins refuses members that have a twin in another letter case. The gateway itself always sends a model, and
// stream_options.include_usage with a stream, so these have a twin even where the client did not send them.
func (p *parser) refuseTwins(seen, folded uint64) {
	seen |= bitOf(memberModel)
	if p.req.stream {
		seen |= bitOf(memberStreamOptions)
	}
	p.twins(chatNames, seen&folded)
	if p.options.twin && (p.req.stream || p.options.include.to != 0) {
		p.at("stream_options").twins(usageOption, 1)
		p.up()
	}
}

// addMembers notes what the upstream gets in addition: a model, and on a stream the wish for usage. Members are
// added at end, behind the last one that stays; there is one, because messages is required.
func (p *parser) addMembers(end int, seen uint64) {
	p.req.end = end
	if seen&bitOf(memberModel) == 0 {
		p.edit(edit{span: span{end, end}, with: `,"model":`, model: true})
	}
	p.req.options = p.options.value.to != 0
	if !p.req.stream || p.noStreamOptions {
		return
	}
	const asked = `"include_usage":true`
	options := &p.options
	inside := options.value.from + 1
	switch {
	case options.value.to == 0:
		p.edit(edit{usage: true, span: span{end, end}, with: `,"stream_options":{` + asked + `}`})
	case options.null:
		p.edit(edit{span: options.value, with: `{` + asked + `}`})
	case options.include.to != 0:
		if !p.req.includeUsage {
			p.edit(edit{span: options.include, with: "true"})
		}
	case options.empty:
		p.edit(edit{span: span{inside, inside}, with: asked})
	default:
		p.edit(edit{span: span{inside, inside}, with: asked + ","})
	}
}

func (p *parser) edit(e edit) { p.req.edits = append(p.req.edits, e) }

// sortEdits puts the edits in order of their place. An insertion comes before a removal of what follows it.
func sortEdits(edits []edit) []edit {
	slices.SortStableFunc(edits, func(a, b edit) int {
		return cmp.Or(a.from-b.from, a.to-b.to)
	})
	return edits
}

// segments returns the body as the upstream receives it: the client's bytes but for the edits, cut into pieces so
// that nothing is copied.
func (r *chatRequest) segments(model string) (parts [][]byte, size int64) {
	return r.cut(r.edits, model)
}

// segmentsFor is segments for one candidate, whose upstream may have its own way.
func (r *chatRequest) segmentsFor(c *candidate) (parts [][]byte, size int64) {
	if r.images != nil {
		return r.images.segments(c.as)
	}
	edits := r.edits
	if c.upstream.NoStreamOptions {
		edits = r.editsWithoutOptions()
	}
	if cuts := r.middleOutEdits(c); len(cuts) > 0 {
		edits = sortEdits(append(cuts, edits...))
	}
	return r.cut(edits, c.as)
}

// editsWithoutOptions are the edits for an upstream that takes no stream_options. Where the client sent some, the request
// is read once more: which comma goes with a member depends on what else goes.
func (r *chatRequest) editsWithoutOptions() []edit {
	if r.options {
		p := &parser{cursor: cursor{data: r.body, maxDepth: maxRequestDepth}, req: &chatRequest{body: r.body}, noStreamOptions: true}
		p.object()
		edits := p.req.edits
		for _, e := range r.edits {
			if e.added && e.from == r.end && e.to == r.end { // which may be gone now
				e.span = span{p.req.end, p.req.end}
			}
			if e.added {
				edits = append(edits, e)
			}
		}
		return sortEdits(edits)
	}
	return slices.DeleteFunc(slices.Clone(r.edits), func(e edit) bool { return e.usage })
}

// cut applies edits to the body.
func (r *chatRequest) cut(edits []edit, model string) (parts [][]byte, size int64) {
	name := appendString(nil, model)
	parts = make([][]byte, 0, 3*len(edits)+1)
	add := func(b []byte) {
		if len(b) > 0 {
			parts = append(parts, b)
			size += int64(len(b))
		}
	}
	done := 0
	for _, e := range edits {
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

// segmentReader reads pieces one after another. It leaves the slice of them as it is, so that a request that is sent
// again can read it anew.
type segmentReader struct {
	parts [][]byte
	read  int // how much of the first part
}

func (s *segmentReader) Read(p []byte) (n int, err error) {
	for n < len(p) && len(s.parts) > 0 {
		m := copy(p[n:], s.parts[0][s.read:])
		n += m
		s.read += m
		if s.read == len(s.parts[0]) {
			s.parts, s.read = s.parts[1:], 0
		}
	}
	if n == 0 && len(p) > 0 {
		s.parts = nil // the request may be kept for as long as its answer lasts
		return 0, io.EOF
	}
	return n, nil
}

func (s *segmentReader) Close() error { return nil }
