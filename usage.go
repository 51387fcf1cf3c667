package mesh

import (
	"slices"
	"strconv"
	"time"
)

// usage is what an answer used.
type usage struct {
	prompt     int64
	cached     int64 // part of prompt
	completion int64

	promptAudio     int64 // part of prompt
	completionAudio int64 // part of completion

	images int64 // that were made for a request for images
}

// cost is what a request costs that used u; nothing where there is no price.
func (p *Price) cost(u usage) Money {
	if p == nil {
		return 0
	}
	cached := min(u.cached, u.prompt)
	heard := min(u.promptAudio, u.prompt-cached) // sound that was cached has the price of what is cached
	spoken := min(u.completionAudio, u.completion)
	var c tokenCost
	c.add(u.prompt-cached-heard, p.Input)
	c.add(cached, p.cachedInput())
	c.add(heard, p.audioInput())
	c.add(u.completion-spoken, p.Output)
	c.add(spoken, p.audioOutput())
	c.addEach(u.images, p.Image)
	return c.round().plus(p.Request)
}

func (p *Price) cachedInput() Money {
	if p.Cached != nil {
		return *p.Cached
	}
	return p.Input
}

// use notes what the request used.
func (e *Event) use(u usage) {
	e.PromptTokens, e.CachedTokens, e.CompletionTokens = u.prompt, u.cached, u.completion
	e.PromptAudioTokens, e.CompletionAudioTokens = u.promptAudio, u.completionAudio
	e.Images = u.images
}

// settle closes the request's account: what it used, what that costs, and the ledger's entry. By now the client has
// all of its answer, or it has been flushed.
func (x *exchange) settle(store Store, req *chatRequest, s *served) {
	e := &x.event
	e.Outcome, e.Status = s.outcome, s.status
	e.Error = s.errorCode
	if s.refusal != nil {
		e.Status, e.Error = s.refusal.status, s.refusal.code
	}
	u := s.usage
	if s.known && req.images == nil {
		x.h.answers.note(u.completion)
	}
	if !s.known && s.prompt {
		e.Estimated = true
		if !s.told {
			u = req.estimate(s)
		}
	}
	e.use(u)
	if s.by != nil {
		e.Model, e.Upstream = s.by.model, s.by.upstream.Name
		if s.known || s.prompt { // else it has not reached an upstream that may charge for it
			e.Cost = s.by.price.cost(u)
		}
		if s.outcome == OutcomeClientGone && s.by.upstream.OnHangup.Policy == hangupFree {
			e.Cost = 0
		}
	}
	e.Time = time.Now().UTC()
	e.Duration = e.Time.Sub(x.started)
	store.Settle(*e)
}

// estimate returns about what was used for an answer whose upstream does not say. What images would have cost that nobody
// has received is not known.
func (r *chatRequest) estimate(s *served) usage {
	if r.images != nil {
		return usage{}
	}
	var body []byte
	if r.prompt.kept == nil { // else another goroutine may be letting go of it
		body = r.body
	}
	u := usage{prompt: r.prompt.estimate(body), completion: s.text.estimate()}
	if s.by != nil && r.wantsMiddleOut(s.by) { // more than that was not sent
		u.prompt = min(u.prompt, s.by.context)
	}
	return u
}

// said is what one JSON text of an answer, a whole body or the data of one event, says about itself.
type said struct {
	readable bool // it is a JSON object
	choices  int
	finished bool // a choice says why it ended
	usage    usage
	hasUsage bool
	badUsage bool // it has one that cannot be believed
	failed   bool // it has a member error, and is no answer
	usageEnd int  // the offset of the last brace of its usage
	cost     span // the value of a member cost that is there already
	id       span // of these three the values, too
	created  span
	model    span
	closing  int // the offset of the last brace
}

// maxAnswerDepth is how deep an answer may nest to be read.
const maxAnswerDepth = 1000

// readAnswer reads a chat.completion or a chat.completion.chunk, and adds its text to t, which may be nil.
func readAnswer(text []byte, t *textSample) (s said) {
	c := cursor{data: text, maxDepth: maxAnswerDepth}
	if c.peek() != '{' {
		return s
	}
	for more := c.enter('{'); more; more = c.next('}') {
		switch string(c.name()) {
		case "choices":
			c.eachOf(func() {
				s.choices++
				s.finished = c.choice(t) || s.finished
			})
		case "usage":
			isObject := c.peek() == '{'
			s.usage, s.hasUsage = c.usage()
			s.badUsage = isObject && !s.hasUsage
			s.usageEnd = c.pos - 1
		case "error":
			s.failed = c.peek() != 'n'
			c.skip()
		case "cost":
			s.cost = c.skip()
		case "id":
			s.id = c.skip()
		case "created":
			s.created = c.skip()
		case "model":
			s.model = c.skip()
		default:
			c.skip()
		}
	}
	s.closing = c.pos - 1
	c.end()
	s.readable = c.err == nil
	return s
}

// anew returns what an answer says after members were added to it, which is the same at other places.
func (s said) anew(text []byte) said {
	again := readAnswer(text, nil)
	again.usage = s.usage // has images, of which the text says nothing
	return again
}

// costEdit returns what is to be put in place of text[from:until] so that the answer says what it cost; nil, and an
// empty range at the end, where there is nothing to say.
func (s said) costEdit(p *Price) (insert []byte, from, until int) {
	if !s.hasUsage || p == nil {
		return nil, s.closing, s.closing
	}
	from, until = s.cost.from, s.cost.to
	if until == 0 {
		from, until = s.closing, s.closing
		insert = append(make([]byte, 0, 32), `,"cost":`...)
	}
	return append(p.cost(s.usage).append(append(insert, '"')), '"'), from, until
}

// head returns what an event of the answer begins with, of which text is another: its clients put together what has the
// same id.
func (s said) head(text []byte) []byte {
	var o objectWriter
	for _, member := range []struct {
		name string
		at   span
	}{{"id", s.id}, {"created", s.created}, {"model", s.model}} {
		if member.at.to > 0 {
			o.name(member.name)
			o.buf = append(o.buf, member.at.of(text)...)
		}
	}
	o.text("object", "chat.completion.chunk")
	return o.buf
}

// usageEvent returns the JSON text of an event that reports an estimate and nothing else.
func usageEvent(head []byte, u usage) []byte {
	var used objectWriter
	used.number("prompt_tokens", u.prompt)
	used.number("completion_tokens", u.completion)
	used.number("total_tokens", u.prompt+u.completion)
	used.trueIf("estimated", true)
	o := objectWriter{buf: slices.Clone(head)}
	o.name("choices")
	o.buf = append(o.buf, "[]"...)
	o.name("usage")
	o.buf = append(append(o.buf, used.buf...), '}')
	return append(o.buf, '}')
}

// eachOf calls element for each element of an array, which must consume it. Anything else is passed over.
func (c *cursor) eachOf(element func()) {
	if c.peek() != '[' {
		c.skip()
		return
	}
	for more := c.enter('['); more; more = c.next(']') {
		element()
	}
}

// eachMember calls member for each member of an object, which must consume its value. Anything else is passed over.
func (c *cursor) eachMember(member func(name []byte)) {
	if c.peek() != '{' {
		c.skip()
		return
	}
	for more := c.enter('{'); more; more = c.next('}') {
		member(c.name())
	}
}

// choice reads one of the choices of an answer.
func (c *cursor) choice(t *textSample) (finished bool) {
	c.eachMember(func(name []byte) {
		switch string(name) {
		case "finish_reason":
			finished = c.peek() == '"'
			c.skip()
		case "delta", "message":
			c.message(t)
		default:
			c.skip()
		}
	})
	return finished
}

// message reads what a model says: its text, aloud or not, its reasoning, and the tools it calls.
func (c *cursor) message(t *textSample) {
	if t == nil {
		c.skip()
		return
	}
	c.eachMember(func(name []byte) {
		switch string(name) {
		case "content", "reasoning_content", "reasoning", "refusal":
			c.textTo(t)
		case "tool_calls":
			c.eachOf(func() { c.toolCall(t) })
		case "function_call":
			c.functionCall(t)
		case "audio":
			c.transcript(t)
		default:
			c.skip()
		}
	})
}

func (c *cursor) toolCall(t *textSample) {
	c.eachMember(func(name []byte) {
		if string(name) == "function" {
			c.functionCall(t)
			return
		}
		c.skip()
	})
}

func (c *cursor) functionCall(t *textSample) { c.eachMember(func([]byte) { c.textTo(t) }) }

// textTo adds text to t.
func (c *cursor) textTo(t *textSample) { c.eachText(t.add) }

// eachText calls text for a string, or for the text of each part of a list.
func (c *cursor) eachText(text func(raw []byte)) {
	switch c.peek() {
	case '"':
		raw, _ := c.str()
		text(raw)
	case '[':
		c.eachOf(func() {
			c.eachMember(func(name []byte) {
				if string(name) == "text" {
					c.eachText(text)
					return
				}
				c.skip()
			})
		})
	default:
		c.skip()
	}
}

// usage reads OpenAI's usage object. It says nothing unless it has both counts. No part is more than its whole: what the ledger
// says is what was charged.
func (c *cursor) usage() (u usage, ok bool) {
	hasPrompt, hasCompletion := false, false
	c.eachMember(func(name []byte) {
		switch string(name) {
		case "prompt_tokens":
			u.prompt, hasPrompt = c.count()
		case "completion_tokens":
			u.completion, hasCompletion = c.count()
		case "prompt_tokens_details":
			u.cached, u.promptAudio = c.tokenDetails()
		case "completion_tokens_details":
			_, u.completionAudio = c.tokenDetails()
		default:
			c.skip()
		}
	})
	u.cached, u.promptAudio = min(u.cached, u.prompt), min(u.promptAudio, u.prompt)
	u.completionAudio = min(u.completionAudio, u.completion)
	return u, hasPrompt && hasCompletion
}

// tokenDetails reads of which kinds the tokens were.
func (c *cursor) tokenDetails() (cached, audio int64) {
	c.eachMember(func(name []byte) {
		switch string(name) {
		case "cached_tokens":
			cached, _ = c.count()
		case "audio_tokens":
			audio, _ = c.count()
		default:
			c.skip()
		}
	})
	return cached, audio
}

// maxUsedTokens is how many tokens an answer may say it has used. To believe more, such as the 2^53+1 of a provider's bug, could
// exhaust a key's spend for good.
const maxUsedTokens = 1 << 30

// count reads a number of tokens, if it is one that makes sense.
func (c *cursor) count() (n int64, ok bool) {
	if n, ok = c.natural(); n > maxUsedTokens {
		return 0, false
	}
	return n, ok
}

// natural reads an integer that is not negative.
func (c *cursor) natural() (n int64, ok bool) {
	at := c.skip()
	n, err := strconv.ParseInt(string(at.of(c.data)), 10, 64)
	if err != nil || n < 0 {
		return 0, false
	}
	return n, true
}
