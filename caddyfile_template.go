package mesh

import (
	"path/filepath"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
)

// template parses a prompt that requests can name.
func (p *blockParser) template(h *Handler) error {
	t := new(Template)
	p.places[t] = *p.Dispenser
	if err := p.text(&t.Name); err != nil {
		return err
	}
	h.Templates = append(h.Templates, t)
	return p.block(words{
		"description": {parse: func() error { return p.text(&t.Description) }},
		"system":      {parse: func() error { return p.slottedText(&t.System) }},
		"message":     {parse: func() error { return p.templateMessage(t) }, many: true},
		"model":       {parse: func() error { return p.text(&t.Model) }},
		"params":      {parse: func() error { return p.params(&t.Params) }},
		"variables": {parse: func() error {
			if t.Variables = p.RemainingArgs(); len(t.Variables) == 0 {
				return p.ArgErr()
			}
			return nil
		}},
	})
}

func (p *blockParser) templateMessage(t *Template) error {
	var text string
	m := TemplateMessage{}
	if !p.AllArgs(&m.Role, &text) {
		return p.ArgErr()
	}
	m.Content = appendString(nil, slotsAsWritten().Replace(text))
	t.Messages = append(t.Messages, m)
	return nil
}

// slottedText parses a text that may have slots.
func (p *blockParser) slottedText(to *string) error {
	err := p.text(to)
	*to = slotsAsWritten().Replace(*to)
	return err
}

// slotsAsWritten undoes what the Caddyfile's adapter does before any directive sees its tokens: it makes the slot
// {{host}} into {{http.request.host}}, as {host} is its shorthand for that.
var slotsAsWritten = sync.OnceValue(func() *strings.Replacer {
	var pairs []string
	for _, name := range []string{
		"host", "hostport", "port", "orig_method", "orig_uri", "orig_path", "orig_dir", "orig_file", "orig_query", "method", "uri",
		"path", "dir", "file", "query", "remote", "remote_host", "remote_port", "scheme", "uuid", "tls_cipher", "tls_version",
		"tls_client_fingerprint", "tls_client_issuer", "tls_client_serial", "tls_client_subject", "tls_client_certificate_pem",
		"tls_client_certificate_der_base64", "upstream_hostport", "client_ip",
	} {
		written := "{{" + name + "}}"
		segment := caddyfile.Segment{{Text: written}}
		httpcaddyfile.NewShorthandReplacer().ApplyToSegment(&segment)
		pairs = append(pairs, segment[0].Text, written)
	}
	return strings.NewReplacer(pairs...)
})

// templateFiles parses names of files, which are relative to the Caddyfile.
func (p *blockParser) templateFiles(h *Handler) error {
	files := p.RemainingArgs()
	if len(files) == 0 {
		return p.ArgErr()
	}
	for _, file := range files {
		if !filepath.IsAbs(file) {
			absolute, err := filepath.Abs(filepath.Join(filepath.Dir(p.File()), file))
			if err != nil {
				return p.WrapErr(err)
			}
			file = absolute
		}
		if _, err := filepath.Match(file, ""); err != nil {
			return p.Errf("%s: %v", file, err)
		}
		h.TemplateFiles = append(h.TemplateFiles, file)
	}
	return nil
}
