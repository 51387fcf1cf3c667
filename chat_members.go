package mesh

import (
	"math"
	"slices"
	"strconv"
	"time"
)

// member is one that the API gives a meaning.
type member struct {
	name    string
	gateway bool // not sent upstream
	check   func(*parser)
}

var chatMembers = []member{
	{name: "messages", check: (*parser).messages},
	{name: "model", check: func(p *parser) { name, _ := p.text(); p.req.model = string(name) }},
	{name: "stream", check: func(p *parser) { p.req.stream, _ = p.boolean() }},
	{name: "stream_options", check: (*parser).streamOptions},
	{name: "temperature", check: func(p *parser) { p.number(between(0, 2)) }},
	{name: "max_tokens", check: func(p *parser) {
		v, _ := p.number(rule{integer: true, min: 1, max: math.Inf(1)})
		p.bound(v)
	}},
	{name: "max_completion_tokens", check: func(p *parser) { p.bound(p.whole()) }},
	{name: "n", check: func(p *parser) { p.req.choices = tokenCount(p.whole()) }},
	{name: "top_p", check: func(p *parser) { p.number(between(0, 1)) }},
	{name: "frequency_penalty", check: func(p *parser) { p.number(between(-2, 2)) }},
	{name: "presence_penalty", check: func(p *parser) { p.number(between(-2, 2)) }},
	{name: "stop", check: (*parser).stop},
	{name: "seed", check: func(p *parser) { p.number(rule{integer: true, min: math.Inf(-1), max: math.Inf(1)}) }},
	{name: "tools", check: (*parser).tools},
	{name: "tool_choice", check: (*parser).toolChoice},
	{name: "user", check: func(p *parser) { p.shortText(256) }},
	{name: "modalities", check: func(p *parser) { p.list((*parser).outputModality) }},
	{name: "audio", check: (*parser).audio},
	{name: "session_id", gateway: true, check: func(p *parser) { p.req.sessionID = p.shortText(256) }},
	{name: "timeout", gateway: true, check: (*parser).timeout},
	{name: "cache", gateway: true, check: func(p *parser) { p.boolean() }},
	{name: "template", gateway: true, check: func(p *parser) { name, _ := p.text(); p.req.template = string(name) }},
	{name: "variables", gateway: true, check: func(p *parser) { p.req.variables = p.textMap() }},
	{name: "models", gateway: true, check: (*parser).fallbackModels},
	{name: "transforms", gateway: true, check: func(p *parser) {
		on := p.list(func(p *parser) { p.oneOf(middleOut) }) > 0
		p.req.transforms = &on
	}},
	{name: "modality", gateway: true, check: func(p *parser) { p.req.image.modality = p.oneOf("text", kindImage) == kindImage }},
	{name: "image", gateway: true, check: (*parser).image},
	{name: "async_mode", gateway: true, check: func(p *parser) { p.req.async, _ = p.boolean() }},
	{name: "async_callback_url", gateway: true, check: (*parser).callbackURL},
}

const (
	memberMessages = iota // their places in chatMembers
	memberModel
	memberStream
	memberStreamOptions
)

// boundingMembers are those that say how much there can be to pay for.
var boundingMembers = func() (bits uint64) {
	for _, name := range []string{"max_tokens", "max_completion_tokens", "n"} {
		bits |= bitOf(slices.Index(chatNames, name))
	}
	return bits
}()

var chatNames = func() (names []string) {
	for _, m := range chatMembers {
		names = append(names, m.name)
	}
	return names
}()

// known checks the value of a member of chatMembers, and notes where it stands if that matters.
func (p *parser) known(i int) {
	m := &chatMembers[i]
	p.at(m.name)
	defer p.up()
	null := p.peek() == 'n'
	value := span{from: p.pos}
	if null && i != memberMessages {
		p.skip()
	} else {
		m.check(p)
	}
	value.to = p.pos
	switch i {
	case memberMessages:
		p.req.messages = value
	case memberModel:
		p.edit(edit{span: value, model: true})
	case memberStreamOptions:
		p.options.value, p.options.null = value, null
	}
}

// refuseAsyncStream refuses a job whose answer would be a stream: there is nobody to read it.
func (p *parser) refuseAsyncStream() {
	if p.req.async && p.req.stream {
		p.at("async_mode").faultf("value_error", "Value error, async_mode cannot be used together with stream")
		p.up()
	}
}

// callbackURL refuses a URL that a job's result would be sent to: the gateway is not to be made to send requests into
// its own network.
func (p *parser) callbackURL() {
	p.skip()
	p.faultf("value_error", "Value error, results are not sent to URLs: ask for the job until it has ended")
}

func (p *parser) messages() {
	isList := p.peek() == '['
	p.noMessages = p.list((*parser).message) == 0 && isList
}

// tooFewMessages is a fault of a request that has no messages, and no template that would bring some.
func (p *parser) tooFewMessages() {
	p.at("messages").faultf("too_short", "List should have at least 1 item after validation, not 0")
	p.up()
}

var messageFields = []string{"role", "content", "name", "tool_call_id", "tool_calls", "function_call", "audio", "refusal"}

// message checks one of the conversation. Content may be null or absent beside tool_calls, and, because OpenAI's
// own API returns such messages for the client to send back, beside function_call, audio and refusal.
func (p *parser) message() {
	const role, content, toolCallID, toolCalls = 1 << 0, 1 << 1, 1 << 3, 1 << 4
	var kind string
	noCalls := false
	given, null, ok := p.fields(messageFields, func(i int) {
		switch i {
		case 0:
			kind = p.oneOf("system", "developer", "user", "assistant", "tool")
		case 1:
			p.content()
		case 2, 3:
			p.text()
		case 4:
			noCalls = p.list(func(p *parser) { p.fields(nil, nil) }) == 0
		case 6: // what was said aloud before, which the upstream has kept
			p.req.prompt.media = true
			p.skip()
		default:
			p.skip()
		}
	})
	if !ok {
		return
	}
	p.req.prompt.messages++
	if noCalls {
		given &^= toolCalls
	}
	p.require(messageFields, 1, given)
	if kind == "tool" && given&toolCallID == 0 {
		p.missing("tool_call_id")
	}
	switch {
	case given&content != 0 || given>>4 != 0: // tool_calls and what follows it
	case null&content != 0:
		p.at("content").faultf("value_error", "Value error, content may be null only beside tool_calls")
		p.up()
	default:
		p.missing("content")
	}
}

func (p *parser) content() {
	switch p.peek() {
	case '"':
		s, _ := p.rawText()
		p.req.prompt.add(s)
	case '[':
		p.list((*parser).part)
	default:
		p.wrongType("value_error", "Value error, content should be a string, a list of parts, or null")
	}
}

var (
	partFields  = [...]string{"type", "text", "image_url", "input_audio", "video_url"}
	imageFields = []string{"url", "detail"}
	audioFields = []string{"format", "data", "url", "uri"}
)

// part checks one part of a message's content. Its type says which other member it needs, and how that looks; a part
// of a type not known here passes with whatever is in it. A member that comes before the type is checked after it.
func (p *parser) part() {
	var kind string
	var early [len(partFields)]int // where those before the type begin
	given, _, ok := p.fields(partFields[:], func(i int) {
		switch {
		case i == 0:
			text, _ := p.text()
			kind = string(text)
		case kind == partFields[i]:
			p.partMember(i)
		default:
			early[i] = p.pos
			p.skip()
		}
	})
	if !ok {
		return
	}
	p.require(partFields[:], 1, given)
	p.req.prompt.media = p.req.prompt.media || kind != "text" && kind != "refusal"
	i := slices.Index(partFields[:], kind)
	if i <= 0 {
		return
	}
	if given&bitOf(i) == 0 {
		p.missing(kind)
		return
	}
	if early[i] != 0 {
		end := p.pos
		p.pos = early[i]
		p.at(kind).partMember(i)
		p.up()
		p.pos = end
	}
}

// partMember checks the member of a part that its type asks for.
func (p *parser) partMember(i int) {
	switch partFields[i] {
	case "text":
		s, _ := p.rawText()
		p.req.prompt.add(s)
	case "image_url":
		p.req.prompt.images++
		p.urlObject()
	case "input_audio":
		p.inputAudio()
	case "video_url":
		p.urlObject()
	}
}

// urlObject checks {url, detail?}.
func (p *parser) urlObject() {
	given, _, ok := p.fields(imageFields, func(i int) {
		if i == 0 {
			p.rawText()
		} else {
			p.oneOf("auto", "low", "high")
		}
	})
	if ok {
		p.require(imageFields, 1, given)
	}
}

func (p *parser) inputAudio() {
	given, _, ok := p.fields(audioFields, func(int) { p.rawText() })
	if ok && given>>1 == 0 {
		p.missing("data")
	}
	if ok {
		p.require(audioFields, 1, given)
	}
}

func (p *parser) stop() {
	switch p.peek() {
	case '"':
		p.skip()
	case '[':
		p.list(func(p *parser) { p.text() })
	default:
		p.wrongType("value_error", "Value error, stop should be a string or a list of strings")
	}
}

func (p *parser) toolChoice() {
	switch p.peek() {
	case '"', '{':
		p.skip()
	default:
		p.wrongType("value_error", "Value error, tool_choice should be a string or an object")
	}
}

var (
	toolFields     = []string{"type", "function"}
	functionFields = []string{"name", "description", "parameters"}
)

func (p *parser) tools() {
	from := p.start()
	p.list(func(p *parser) {
		given, _, ok := p.fields(toolFields, func(i int) {
			if i == 0 {
				p.oneOf("function")
			} else {
				p.function()
			}
		})
		if ok {
			p.require(toolFields, 2, given)
		}
	})
	p.req.tools = span{from, p.pos}
	p.req.prompt.add(p.req.tools)
}

func (p *parser) function() {
	given, _, ok := p.fields(functionFields, func(i int) {
		if i == 2 {
			p.fields(nil, nil)
		} else {
			p.rawText()
		}
	})
	if ok {
		p.require(functionFields, 1, given)
	}
}

// timeout is in seconds. More than a day is as good as a day.
func (p *parser) timeout() {
	v, ok := p.number(rule{above: true, min: 0, max: math.Inf(1)})
	if ok {
		p.req.timeout = max(time.Nanosecond, time.Duration(min(v, 24*60*60)*float64(time.Second)))
	}
}

// bound notes how long an answer may become. Where both of the members that say so are given, it is up to the upstream
// which one counts.
func (p *parser) bound(tokens float64) { p.req.maxTokens = max(p.req.maxTokens, tokenCount(tokens)) }

// tokenCount is for a number that a client chose: what is out of range is as good as endless, or as none.
func tokenCount(v float64) int64 { return int64(min(max(v, 0), 1<<53)) }

// whole reads a number that the upstream alone checks. It is 0 where it is none.
func (p *parser) whole() (v float64) {
	if b := p.peek(); b != '-' && !isDigit(b) {
		p.req.vague = p.req.vague || b != 'n'
		p.skip()
		return 0
	}
	v, _ = strconv.ParseFloat(string(p.cursor.number()), 64) // infinite where it is out of range
	return math.Ceil(v)
}

var usageOption = []string{"include_usage"}

// streamOptions is the upstream's, but for include_usage, which the gateway must know and may have to change.
func (p *parser) streamOptions() {
	if p.peek() != '{' {
		p.wrongType("dict_type", "Input should be a valid dictionary")
		return
	}
	options := &p.options
	options.empty = true
	for more := p.enter('{'); more; more = p.next('}') {
		options.empty = false
		switch i, exact := lookup(usageOption, p.name()); {
		case !exact:
			options.twin = options.twin || i == 0
			p.skip()
		case options.include.to != 0:
			p.twice("include_usage")
		default:
			options.include.from = p.start()
			p.includeUsage()
			options.include.to = p.pos
		}
	}
}

func (p *parser) includeUsage() {
	if p.peek() == 'n' {
		p.skip()
		return
	}
	p.at("include_usage")
	p.req.includeUsage, _ = p.boolean()
	p.up()
}
