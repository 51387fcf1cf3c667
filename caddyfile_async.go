package mesh

import "strconv"

// async parses the block of async.
func (p *blockParser) async(h *Handler) error {
	a := new(Async)
	h.Async = a
	p.places[a] = *p.Dispenser
	if p.NextArg() {
		return p.ArgErr()
	}
	return p.block(words{
		"workers":     {parse: func() error { return p.workers(a) }},
		"retention":   {parse: func() error { return p.duration(&a.Retention) }},
		"max_pending": {parse: func() error { return p.number(&a.MaxPending) }},
		"max_result":  {parse: func() error { return p.size(&a.MaxResult) }},
		"queue":       {parse: func() error { return p.text(&a.Queue) }},
	})
}

// workers parses a number that may be zero.
func (p *blockParser) workers(a *Async) error {
	var s string
	if err := p.text(&s); err != nil {
		return err
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return p.Errf("workers: %q is not a whole number, such as 8", s)
	}
	a.Workers = &n
	return nil
}
