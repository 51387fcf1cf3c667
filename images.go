package mesh

import (
	"bytes"
	"net/http"
)

const (
	completionsPath = "/chat/completions" // behind an upstream's base path
	imagesPath      = "/images/generations"
)

// imageWish is what a request says about images.
type imageWish struct {
	modality bool  // it is image
	options  bool  // there are some
	count    int64 // 0 where it does not say
}

// imageCall is a request for images as an upstream's images API gets it.
type imageCall struct {
	count int64  // how many are wanted
	rest  []byte // of the body, behind the name of the model
}

var imageOptionFields = []string{"n", "size", "quality", "response_format"}

// image checks the options of a request for images. They go to another API than what the gateway does not know of a chat
// completion, so that nothing unknown passes here.
func (p *parser) image() {
	from := p.start()
	given, _, ok := p.fields(imageOptionFields, func(i int) {
		switch i {
		case 0:
			n, _ := p.number(rule{integer: true, min: 1, max: 10})
			p.req.image.count = int64(n)
		case 3:
			p.oneOf("url", "b64_json")
		default:
			p.text()
		}
	})
	p.req.image.options = given != 0
	if !ok {
		return
	}
	c := cursor{data: p.data[:p.pos], pos: from, maxDepth: maxRequestDepth}
	c.eachMember(func(name []byte) {
		null := c.peek() == 'n'
		c.skip()
		if _, known := lookup(imageOptionFields, name); !known && !null {
			p.at(string(name)).faultf("extra_forbidden", "Extra inputs are not permitted")
			p.up()
		}
	})
}

// kindImage is the type of models that make images and nothing else.
const kindImage = "image"

// kind returns the type that the catalogue says the model has under a name; empty where it says nothing.
func (m *modelEntry) kind(name string) string {
	if m.Type != "" {
		return m.Type
	}
	if l := m.listed(name); l != nil {
		return l.about.Type
	}
	return ""
}

// wantsImages reports whether the answer of a model of this kind is to be images. A request that wants text with them is a
// chat.
func (r *chatRequest) wantsImages(kind string) bool {
	return r.image.modality || kind == kindImage && !r.modalities.text
}

// asImages makes the request one for images, if it is to the model of this kind.
func (r *chatRequest) asImages(kind string) *apiError {
	r.images = nil // of a model that was routed to before
	wanted := r.wantsImages(kind)
	if !wanted && !r.image.options {
		return nil
	}
	p := &parser{cursor: cursor{data: r.body, maxDepth: maxRequestDepth}, req: r}
	if wanted {
		r.images = p.imageCall()
	} else {
		p.at("image").faultf("value_error", "Value error, images are for the modality 'image', or for a model whose type that is")
	}
	if len(p.faults) > 0 {
		return validationError(p.faults)
	}
	return nil
}

// imageCall reads the request once more. It has passed every check of a chat completion.
func (p *parser) imageCall() *imageCall {
	parts, _ := p.req.segments("")
	body := bytes.Join(parts, nil) // with the messages of a template
	content, user := lastOfUser(body)
	call := &imageCall{count: max(p.req.image.count, 1)}
	call.rest = append(append(append(call.rest, `,"prompt":"`...), p.imagePrompt(body, content)...), '"')
	add := func(member []byte) { call.rest = append(append(call.rest, ','), member...) }
	p.eachMember(func(name []byte) {
		if string(name) == "image" {
			p.eachGiven(add)
			return
		}
		member := string(name)
		null := p.peek() == 'n'
		p.skip()
		if !null {
			p.refuseChatOnly(member)
		}
	})
	if user.to > 0 {
		add(user.of(body))
	}
	call.rest = append(call.rest, '}')
	return call
}

// eachGiven calls add for each member of an object, name and value, that is not null.
func (c *cursor) eachGiven(add func(member []byte)) {
	if c.peek() != '{' {
		c.skip()
		return
	}
	for more := c.enter('{'); more; more = c.next('}') {
		c.peek()
		from := c.pos
		c.name()
		null := c.peek() == 'n'
		c.skip()
		if !null {
			add(c.data[from:c.pos])
		}
	}
}

// refuseChatOnly is a fault at a member that the images API has no use for. What is ignored in silence is taken for granted.
func (p *parser) refuseChatOnly(name string) {
	switch name {
	case "messages", "model", "stream", "stream_options", "user":
		return
	case "n":
		if p.req.choices == 1 {
			return
		}
	case "modalities":
		if !p.req.modalities.audio {
			return
		}
	}
	if i, exact := lookup(chatNames, []byte(name)); exact && chatMembers[i].gateway {
		return
	}
	msg := "Value error, it has no meaning for images"
	if _, known := lookup(imageOptionFields, []byte(name)); known {
		msg = "Value error, for images it is image." + name
	}
	p.at(name).faultf("value_error", msg)
	p.up()
}

// lastOfUser returns where the content of the user's last message stands in a body, and the whole of its member user.
func lastOfUser(body []byte) (content, user span) {
	c := cursor{data: body, maxDepth: maxRequestDepth}
	for more := c.enter('{'); more; more = c.next('}') {
		c.peek()
		from := c.pos
		switch name := string(c.name()); {
		case name == "messages":
			c.eachOf(func() {
				if said, byUser := c.roleAndContent(); byUser {
					content = said
				}
			})
		case name == "user" && c.peek() != 'n':
			c.skip()
			user = span{from, c.pos}
		default:
			c.skip()
		}
	}
	return content, user
}

func (c *cursor) roleAndContent() (content span, byUser bool) {
	c.eachMember(func(name []byte) {
		switch {
		case string(name) == "role" && c.peek() == '"':
			byUser = c.textValue() == "user"
		case string(name) == "content":
			content = c.skip()
		default:
			c.skip()
		}
	})
	return content, byUser
}

// imagePrompt returns the text of a message's content as it stands in the JSON: of several parts each in a line of its own.
func (p *parser) imagePrompt(body []byte, content span) (text []byte) {
	c := cursor{data: body, pos: content.from, maxDepth: maxRequestDepth}
	onlyText := true
	switch c.peek() {
	case '"':
		text, _ = c.str()
	case '[':
		text, onlyText = c.textParts()
	}
	p.at("messages")
	defer p.up()
	switch {
	case !onlyText:
		p.faultf("value_error", "Value error, images are made of text alone, and the last message of the user has other parts")
	case len(text) == 0:
		p.faultf("value_error", "Value error, the last message of the user has no text to make images of")
	}
	return text
}

// textParts joins the parts of a content that are text, and reports whether there were no others.
func (c *cursor) textParts() (text []byte, only bool) {
	only = true
	c.eachOf(func() {
		var kind string
		var said []byte
		c.eachMember(func(name []byte) {
			switch {
			case string(name) == "type" && c.peek() == '"':
				kind = c.textValue()
			case string(name) == "text" && c.peek() == '"':
				said, _ = c.str()
			default:
				c.skip()
			}
		})
		if kind != "text" {
			only = false
			return
		}
		if len(text) > 0 && len(said) > 0 {
			text = append(text, `\n`...)
		}
		text = append(text, said...)
	})
	return text, only
}

// path is where an upstream takes the request, behind its base path.
func (r *chatRequest) path() string {
	if r.images != nil {
		return imagesPath
	}
	return completionsPath
}

// wantsEvents reports whether the upstream is asked for a stream.
func (r *chatRequest) wantsEvents() bool { return r.stream && r.images == nil }

// segments returns the body as an upstream receives it that calls the model by this name.
func (c *imageCall) segments(model string) (parts [][]byte, size int64) {
	head := appendString([]byte(`{"model":`), model)
	return [][]byte{head, c.rest}, int64(len(head) + len(c.rest))
}

// maxCost returns the most that the images can cost at a candidate, and whether there is such a bound: only its context
// bounds what tokens there are in images. That an upstream makes more images than it was asked for is not provided for.
func (c *imageCall) maxCost(at *candidate) (Money, bool) {
	price := at.price
	if at.context == 0 && price.dearestOutput() > 0 {
		return 0, false
	}
	prompt := int64(len(c.rest)) + maxTokensPerMessage + tokensPerAnswer
	if at.context > 0 {
		prompt = min(prompt, at.context)
	}
	var cost tokenCost
	cost.add(prompt, price.dearestInput())
	for range c.count {
		cost.add(at.context, price.dearestOutput())
	}
	cost.addEach(c.count, price.Image)
	return cost.round().plus(price.Request), true
}

var errUnboundedImages = errorf(http.StatusPaymentRequired, "spend_limit_exceeded",
	"This API key has a hard spend cap, and nothing bounds what these images can cost: their tokens have a price, and the model has no context length.")
