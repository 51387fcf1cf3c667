package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"
)

// Template is a prompt that requests can name instead of sending it. Its system prompt and messages come before the
// messages of the request, with the request's variables in their slots: `{{name}}` or `{{ name }}`, of letters, digits
// and underscores.
type Template struct {
	// What requests call it, up to 128 characters.
	Name string `json:"name"`

	// What it is for.
	Description string `json:"description,omitempty"`

	// The system prompt.
	System string `json:"system,omitempty"`

	// Messages after the system prompt.
	Messages []TemplateMessage `json:"messages,omitempty"`

	// The model of requests that name none and whose key has no default.
	Model string `json:"model,omitempty"`

	// Members of the request for the upstream, where neither the request nor its key has them.
	Params Params `json:"params,omitempty"`

	// The names of the variables. Documentation only: what counts are the slots.
	Variables []string `json:"variables,omitempty"`

	id               string
	scope            templateScope
	owner            string // as the API shows it
	created, updated time.Time
	size             int // bytes of its JSON
	prompt           *compiledPrompt
}

// TemplateMessage is a message of a template.
type TemplateMessage struct {
	// `system`, `developer`, `user` or `assistant`.
	Role string `json:"role"`

	// A text, or a list of parts as in a request.
	Content json.RawMessage `json:"content"`
}

const (
	maxTemplateSize     = 64 << 10 // bytes of its JSON
	maxTemplateName     = 128      // characters
	maxTemplateMessages = 100
	maxTemplates        = 1000    // of one owner
	maxTemplatesSize    = 8 << 20 // bytes of all of them
)

// templateScope says whose a template is: "o:" and an owner, "k:" and the id of a key that has no owner, or "g" for
// those that are everybody's. No owner can have a name that makes it another's scope.
type templateScope string

const globalScope templateScope = "g"

func (k *Key) templateScope() templateScope {
	if k.Owner != "" {
		return templateScope("o:" + k.Owner)
	}
	return templateScope("k:" + k.id)
}

func (k *Key) templateOwner() string {
	if k.Owner != "" {
		return k.Owner
	}
	return k.id
}

var templateFields = []string{"name", "description", "system", "messages", "model", "params", "variables", "owner", "is_global"}

// templateDraft is a template as it was sent: what was given, and what was explicitly null.
type templateDraft struct {
	Template
	given, null uint64 // bits of templateFields
	ownerAsked  string // is for operators
	global      bool
}

func (d *templateDraft) gave(name string) bool {
	i, _ := lookup(templateFields, []byte(name))
	return (d.given|d.null)&bitOf(i) != 0
}

// parseTemplate reads and checks a template. All faults are reported at once.
func parseTemplate(body []byte) (*templateDraft, *apiError) {
	p := &parser{cursor: cursor{data: body, maxDepth: maxRequestDepth}, req: &chatRequest{body: body}}
	d := new(templateDraft)
	refusal := p.wholeObject(func(p *parser) {
		d.given, d.null, _ = p.fields(templateFields, func(i int) { p.templateMember(templateFields[i], d) })
	})
	if refusal != nil {
		return nil, refusal
	}
	if len(p.faults) > 0 {
		return nil, validationError(p.faults)
	}
	return d, nil
}

// unknownTemplateMembers is the error for a template of an operator's that has members which mean nothing: a slip of the
// pen would cost it a prompt. What the API says of a template and does not take may be there.
func unknownTemplateMembers(body []byte) *apiError {
	p := &parser{cursor: cursor{data: body, maxDepth: maxRequestDepth}}
	p.eachMember(func(name []byte) {
		if !slices.Contains(templateFields, string(name)) && !slices.Contains(answeredOnly, string(name)) {
			p.at(string(name)).faultf("extra_forbidden", "Extra inputs are not permitted")
			p.up()
		}
		p.skip()
	})
	if len(p.faults) == 0 {
		return nil
	}
	return validationError(p.faults)
}

var answeredOnly = []string{"id", "created_at", "updated_at"}

func (p *parser) templateMember(name string, d *templateDraft) {
	text := func() string { t, _ := p.text(); return string(t) }
	switch name {
	case "name":
		d.Name = p.shortText(maxTemplateName)
		if d.Name == "" && len(p.faults) == 0 {
			p.faultf("string_too_short", "String should have at least 1 character")
		}
	case "description":
		d.Description = text()
	case "system":
		d.System = text()
	case "messages":
		d.Messages = p.templateMessages()
	case "model":
		if d.Model = text(); checkName(d.Model) != nil && d.Model != "" {
			p.faultf("value_error", "Value error, "+checkName(d.Model).Error())
		}
	case "params":
		d.Params = p.templateParams()
	case "variables":
		p.list(func(p *parser) { d.Variables = append(d.Variables, text()) })
	case "owner":
		d.ownerAsked = text()
	case "is_global":
		d.global, _ = p.boolean()
	}
}

func (p *parser) templateParams() Params {
	if p.peek() != '{' {
		p.wrongType("dict_type", "Input should be a valid dictionary")
		return nil
	}
	ps := make(Params)
	for more := p.enter('{'); more; more = p.next('}') {
		name := string(p.name())
		from := p.start()
		p.at(name).param(name)
		p.up()
		if p.err == nil {
			ps[name] = json.RawMessage(p.data[from:p.pos])
		}
	}
	return ps
}

var templateMessageFields = []string{"role", "content"}

func (p *parser) templateMessages() (list []TemplateMessage) {
	n := p.list(func(p *parser) {
		var m TemplateMessage
		given, _, ok := p.fields(templateMessageFields, func(i int) {
			if i == 0 {
				m.Role = p.oneOf("system", "developer", "user", "assistant")
				return
			}
			from := p.start()
			p.content()
			m.Content = json.RawMessage(p.data[from:p.pos])
		})
		if ok {
			p.require(templateMessageFields, 2, given)
		}
		list = append(list, m)
	})
	if n > maxTemplateMessages {
		p.faultf("too_long", "List should have at most "+strconv.Itoa(maxTemplateMessages)+" items after validation, not "+strconv.Itoa(n))
	}
	return list
}

// apply changes in t what the draft has.
func (d *templateDraft) apply(t *Template) {
	for i, name := range templateFields {
		if (d.given|d.null)&bitOf(i) == 0 {
			continue
		}
		switch name {
		case "name":
			t.Name = d.Name
		case "description":
			t.Description = d.Description
		case "system":
			t.System = d.System
		case "messages":
			t.Messages = d.Messages
		case "model":
			t.Model = d.Model
		case "params":
			t.Params = d.Params
		case "variables":
			t.Variables = d.Variables
		}
	}
}

// missingName is the error for a template without one, or nil.
func (d *templateDraft) missingName() *apiError {
	if d.Name != "" {
		return nil
	}
	return validationError([]fault{{Type: "missing", Loc: []any{"body", "name"}, Msg: "Field required"}})
}

// check finds what is wrong with a template of the configuration, as the API checks one that is sent.
func (t *Template) check() error {
	encoded, err := encodeJSON(t)
	if err != nil {
		return err
	}
	if len(encoded) > maxTemplateSize {
		return fmt.Errorf("it has more than %d bytes", maxTemplateSize)
	}
	if t.Name == "" {
		return errors.New("it has no name")
	}
	if _, refusal := parseTemplate(encoded); refusal != nil {
		return errors.New(refusal.message)
	}
	return nil
}

// storedTemplate is a template as stores keep it and operators see it.
type storedTemplate struct {
	ID          string            `json:"id"`
	Name        string            `json:"name"`
	Owner       *string           `json:"owner"`
	IsGlobal    bool              `json:"is_global"`
	Description *string           `json:"description"`
	System      *string           `json:"system"`
	Messages    []TemplateMessage `json:"messages"`
	Model       *string           `json:"model"`
	Params      Params            `json:"params"`
	Variables   []string          `json:"variables"`
	Created     time.Time         `json:"created_at"`
	Updated     time.Time         `json:"updated_at"`
}

func (t *Template) stored() storedTemplate {
	optional := func(s string) *string {
		if s == "" {
			return nil
		}
		return &s
	}
	return storedTemplate{
		ID: t.id, Name: t.Name, Owner: optional(t.owner), IsGlobal: t.scope == globalScope,
		Description: optional(t.Description), System: optional(t.System), Messages: t.Messages, Model: optional(t.Model),
		Params: t.Params, Variables: t.Variables, Created: t.created, Updated: t.updated,
	}
}

// template is the inverse of stored, in a scope.
func (s *storedTemplate) template(scope templateScope) *Template {
	text := func(p *string) string {
		if p == nil {
			return ""
		}
		return *p
	}
	t := &Template{
		Name: s.Name, Description: text(s.Description), System: text(s.System), Messages: s.Messages, Model: text(s.Model),
		Params: s.Params, Variables: s.Variables,
		id: s.ID, scope: scope, owner: text(s.Owner), created: s.Created, updated: s.Updated,
	}
	t.prompt = t.compile()
	return t
}

// configuredIDs is the namespace of the ids of a configuration's templates, which are the same at every start.
var configuredIDs = uuid.MustParse("5a6c1f0e-7d0b-4c58-9a55-2f1c8f3b6d11")

// configure makes t a template that is everybody's.
func (t *Template) configure(now time.Time) {
	t.id = uuid.NewSHA1(configuredIDs, []byte(t.Name)).String()
	t.scope, t.created, t.updated = globalScope, now, now
	t.prompt = t.compile()
}
