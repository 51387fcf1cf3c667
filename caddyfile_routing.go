package mesh

import "strconv"

// modelUpstream parses an upstream of a model, and what is special about it there.
func (p *blockParser) modelUpstream(m *Model) (err error) {
	args := p.RemainingArgs()
	if len(args) == 0 {
		return p.ArgErr()
	}
	t := &Target{Upstream: args[0]}
	p.target(m, t)
	var said pricing
	for args = args[1:]; len(args) > 1; {
		taken := 2
		switch args[0] {
		case "as":
			t.As = args[1]
		case "weight":
			if t.Weight, err = strconv.ParseInt(args[1], 10, 64); err != nil || t.Weight < 1 || t.Weight > maxWeight {
				return p.Errf("weight: %q is not a whole number between 1 and %d", args[1], maxWeight)
			}
		default:
			if taken, err = p.targetPrice(args, &said); err != nil {
				return err
			}
		}
		args = args[taken:]
	}
	if len(args) > 0 {
		return p.ArgErr()
	}
	if t.Price, err = said.price(); err != nil {
		return p.Errf("upstream %s: %v", t.Upstream, err)
	}
	return nil
}

// circuit parses off, or a block.
func (p *blockParser) circuit(u *Upstream) error {
	u.Circuit = new(Circuit)
	if p.NextArg() {
		if p.Val() != "off" || p.NextArg() {
			return p.ArgErr()
		}
		u.Circuit.Off = true
		return nil
	}
	return p.block(words{
		"failures":     {parse: func() error { return p.number(&u.Circuit.Failures) }},
		"error_rate":   {parse: func() error { return p.share(&u.Circuit.ErrorRate) }},
		"min_requests": {parse: func() error { return p.number(&u.Circuit.MinRequests) }},
		"window":       {parse: func() error { return p.duration(&u.Circuit.Window) }},
		"rest":         {parse: func() error { return p.duration(&u.Circuit.Rest) }},
	})
}

// share parses a number above 0 and up to 1.
func (p *blockParser) share(to *float64) error {
	name := p.Val()
	var s string
	if err := p.text(&s); err != nil {
		return err
	}
	v, err := strconv.ParseFloat(s, 64)
	if err != nil || !(v > 0 && v <= 1) {
		return p.Errf("%s: %q is not a number above 0 and up to 1", name, s)
	}
	*to = v
	return nil
}
