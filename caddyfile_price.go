package mesh

import "errors"

// pricing is what a block says of prices, in any order; nil where it does not say it.
type pricing struct {
	input, output           *Money
	cached                  *Money
	audioInput, audioOutput *Money
	request, image          *Money
}

// price returns the price that was said, or nil.
func (s *pricing) price() (*Price, error) {
	if s.input == nil {
		switch {
		case s.cached != nil:
			return nil, errors.New("price_cached needs a price beside it")
		case s.audioInput != nil:
			return nil, errors.New("price_audio needs a price beside it")
		case s.request == nil && s.image == nil:
			return nil, nil
		}
	}
	price := &Price{Cached: s.cached, AudioInput: s.audioInput, AudioOutput: s.audioOutput}
	for _, part := range []struct{ to, said *Money }{
		{&price.Input, s.input}, {&price.Output, s.output}, {&price.Request, s.request}, {&price.Image, s.image},
	} {
		if part.said != nil {
			*part.to = *part.said
		}
	}
	return price, nil
}

// amounts parses as many amounts of USD as there are places for them.
func (p *blockParser) amounts(to ...**Money) error {
	args := p.RemainingArgs()
	if len(args) != len(to) {
		return p.ArgErr()
	}
	return p.setAmounts(args, to...)
}

func (p *blockParser) setAmounts(args []string, to ...**Money) error {
	for i := range to {
		amount, err := p.money(args[i])
		if err != nil {
			return err
		}
		*to[i] = &amount
	}
	return nil
}

// targetPrice parses what the first of args says of the price at one of a model's upstreams, and returns how many of them
// that took.
func (p *blockParser) targetPrice(args []string, said *pricing) (taken int, err error) {
	var to []**Money
	switch args[0] {
	case "price":
		to = []**Money{&said.input, &said.output}
	case "price_audio":
		to = []**Money{&said.audioInput, &said.audioOutput}
	case "price_image":
		to = []**Money{&said.image}
	}
	if taken = 1 + len(to); len(to) == 0 || len(args) < taken {
		return 0, p.ArgErr()
	}
	return taken, p.setAmounts(args[1:taken], to...)
}
