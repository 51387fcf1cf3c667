package mesh

// metrics parses what is to be counted beside the metrics that are always there.
func (p *blockParser) metrics(h *Handler) error {
	if p.NextArg() {
		return p.ArgErr()
	}
	h.Metrics = new(Metrics)
	return p.block(words{
		"per_key": {parse: func() error { return p.flag(&h.Metrics.PerKey) }},
	})
}

// tracing parses what is to be added to spans.
func (p *blockParser) tracing(h *Handler) error {
	if p.NextArg() {
		return p.ArgErr()
	}
	h.Tracing = new(Tracing)
	return p.block(words{
		"content": {parse: func() error { return p.flag(&h.Tracing.Content) }},
	})
}
