package mesh

// compare parses the block of compare.
func (p *blockParser) compare(h *Handler) error {
	c := new(Compare)
	h.Compare = c
	p.places[c] = *p.Dispenser
	if p.NextArg() {
		return p.ArgErr()
	}
	return p.block(words{
		"model":        {parse: func() error { return p.text(&c.Model) }},
		"instructions": {parse: func() error { return p.text(&c.Instructions) }},
		"max_models":   {parse: func() error { return p.number(&c.MaxModels) }},
		"timeout":      {parse: func() error { return p.duration(&c.Timeout) }},
	})
}
