package mesh

// auto parses the block of auto.
func (p *blockParser) auto(h *Handler) error {
	a := new(Auto)
	h.Auto = a
	p.places[a] = *p.Dispenser
	if p.NextArg() {
		return p.ArgErr()
	}
	return p.block(words{
		"classifier": {parse: func() error { return p.text(&a.Classifier) }},
		"candidate":  {parse: func() error { return p.autoCandidate(a) }, many: true},
		"timeout":    {parse: func() error { return p.duration(&a.Timeout) }},
		"default":    {parse: func() error { return p.text(&a.Default) }},
		"max_tokens": {parse: func() error { return p.number(&a.MaxTokens) }},
	})
}

func (p *blockParser) autoCandidate(a *Auto) error {
	c := new(AutoCandidate)
	if !p.AllArgs(&c.Model, &c.Description) {
		return p.ArgErr()
	}
	a.Candidates = append(a.Candidates, c)
	return nil
}
