package mesh

import (
	"encoding/hex"
	"errors"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/dustin/go-humanize"
)

// parseCaddyfile sets up the handler from Caddyfile tokens. Syntax:
//
//	mesh [<matcher>] {
//		store <name> [<args...>] {
//			...
//		}
//		key <secret> {
//			name            <name>
//			owner           <name>
//			rpm             <requests per minute>
//			rpd             <requests per day>
//			tpm             <tokens per minute>
//			max_concurrency <requests at the same time>
//			spend_cap_usd   <amount> [total|month|day] [hard]
//			models          <names or patterns...>
//			default_model   <name>
//			default_params  <name> <value> ...
//			expires         <RFC 3339 time>
//			suspended
//			metadata        <name> <value>
//		}
//		upstream <name> <addresses...>|preset [<preset>] [<addresses...>] {
//			api_key           <key>
//			api_key_header    <name>
//			header            <name> <value>
//			no_stream_options
//			provider          <its name in files of prices>
//			base_path         <path>
//			on_hangup         cancel|free|drain [<timeout> [<at once>]]
//			circuit off
//			circuit {
//				failures     <number in a row>
//				error_rate   <share, 0 to 1>
//				min_requests <number>
//				window       <duration>
//				rest         <duration>
//			}
//			reverse_proxy {
//				<any option of reverse_proxy>
//			}
//			handle {
//				<handlers, in place of addresses and reverse_proxy>
//			}
//		}
//		model <name or pattern> [<upstreams...>] {
//			upstream          <name> [as <its name for the model>] [weight <number>] [price <input> <output>] [price_audio <input> <output>]
//			                  [price_image <USD>]
//			price             <USD per million tokens of input> <of output>
//			price_cached      <USD per million cached tokens of input>
//			price_audio       <USD per million tokens of input that are sound> <of output>
//			price_image       <USD per image that it makes>
//			price_request     <USD per request>
//			context_length    <tokens>
//			transforms        middle-out
//			display_name      <name>
//			type              <word>
//			input_modalities  text|image|audio|video|file...
//			output_modalities text|image|audio|video|file...
//			supports          tools|structured_output|thinking...
//			fallback          <models...>
//			policy            first|weighted|least_latency|cheapest
//			first_byte_timeout <duration>
//			hedge             <duration>
//		}
//		prices        <files...>
//		default_model <name>
//		template <name> {
//			description <text>
//			system      <text>
//			message     <role> <text>
//			model       <name>
//			params      <name> <value> ...
//			variables   <names...>
//		}
//		templates <files...>
//		compare {
//			model        <name>
//			instructions <text>
//			max_models   <number>
//			timeout      <duration>
//		}
//		auto {
//			classifier <model>
//			candidate  <model> <description>
//			timeout    <duration>
//			default    <model>
//			max_tokens <number>
//		}
//		async {
//			workers     <number>
//			retention   <duration>
//			max_pending <number>
//			max_result  <size>
//			queue       <name>
//		}
//		max_body_size <size>
//		timeout       <duration>
//		first_byte_timeout <duration>
//		expose_upstream
//		metrics {
//			per_key
//		}
//		tracing {
//			content
//		}
//	}
//
// Addresses are those of reverse_proxy, and may end in the path that stands before /chat/completions.
func parseCaddyfile(helper httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	p := &blockParser{Helper: helper, Dispenser: helper.Dispenser, places: make(map[any]caddyfile.Dispenser)}
	h := new(Handler)
	p.Next() // the directive's name
	if p.NextArg() {
		return nil, p.ArgErr()
	}
	p.places[nil] = *p.Dispenser
	err := p.block(words{
		"store":              {parse: func() error { return p.store(h) }},
		"key":                {parse: func() error { return p.key(h) }, many: true},
		"upstream":           {parse: func() error { return p.upstream(h) }, many: true},
		"model":              {parse: func() error { return p.model(h) }, many: true},
		"prices":             {parse: func() error { return p.prices(h) }, many: true},
		"default_model":      {parse: func() error { return p.placed(&h.DefaultModel) }},
		"max_body_size":      {parse: func() error { return p.size(&h.MaxBodySize) }},
		"timeout":            {parse: func() error { return p.duration(&h.Timeout) }},
		"expose_upstream":    {parse: func() error { return p.flag(&h.ExposeUpstream) }},
		"template":           {parse: func() error { return p.template(h) }, many: true},
		"templates":          {parse: func() error { return p.templateFiles(h) }, many: true},
		"compare":            {parse: func() error { return p.compare(h) }},
		"auto":               {parse: func() error { return p.auto(h) }},
		"async":              {parse: func() error { return p.async(h) }},
		"metrics":            {parse: func() error { return p.metrics(h) }},
		"tracing":            {parse: func() error { return p.tracing(h) }},
		"first_byte_timeout": {parse: func() error { return p.duration(&h.FirstByteTimeout) }},
	})
	if err != nil {
		return nil, err
	}
	if err := h.check(); err != nil {
		return nil, p.locate(err)
	}
	return h, nil
}

// blockParser parses a mesh block.
type blockParser struct {
	httpcaddyfile.Helper
	*caddyfile.Dispenser

	places map[any]caddyfile.Dispenser // where each part of the configuration is defined
}

// words are what a block may contain.
type words map[string]word

type word struct {
	parse func() error // is called at the word
	many  bool         // it may be given more than once
}

// block parses the block that follows, if there is one.
func (p *blockParser) block(known words) error {
	seen := make(map[string]bool)
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		name := p.Val()
		w, ok := known[name]
		if !ok {
			return p.Errf("unrecognized subdirective %q", name)
		}
		if seen[name] && !w.many {
			return p.Errf("%s is given twice", name)
		}
		seen[name] = true
		if err := w.parse(); err != nil {
			return err
		}
	}
	return nil
}

// locate adds the file and line of the part that an error is about.
func (p *blockParser) locate(err error) error {
	if part, ok := errors.AsType[*configError](err); ok {
		if at, ok := p.places[part.part]; ok {
			return at.WrapErr(err)
		}
	}
	return p.WrapErr(err)
}

// text parses one argument.
func (p *blockParser) text(to *string) error {
	if !p.AllArgs(to) {
		return p.ArgErr()
	}
	return nil
}

// placed parses one argument that other parts of the configuration have to agree with.
func (p *blockParser) placed(to *string) error {
	p.places[to] = *p.Dispenser
	return p.text(to)
}

// placedList parses arguments that other parts of the configuration have to agree with.
func (p *blockParser) placedList(to *[]string) error {
	p.places[to] = *p.Dispenser
	return p.list(to)
}

func (p *blockParser) flag(to *bool) error {
	if p.NextArg() {
		return p.ArgErr()
	}
	*to = true
	return nil
}

func (p *blockParser) size(to *int64) error {
	var s string
	if err := p.text(&s); err != nil {
		return err
	}
	n, err := humanize.ParseBytes(s)
	if err != nil || n == 0 || n > 1<<40 {
		return p.Errf("%q is not a size between 1 byte and 1 TiB, such as 32MB", s)
	}
	*to = int64(n)
	return nil
}

func (p *blockParser) duration(to *caddy.Duration) error {
	var s string
	if err := p.text(&s); err != nil {
		return err
	}
	d, err := caddy.ParseDuration(s)
	if err != nil || d <= 0 {
		return p.Errf("%q is not a duration above zero, such as 300s", s)
	}
	*to = caddy.Duration(d)
	return nil
}

// number parses a whole number above zero.
func (p *blockParser) number(to *int64) error {
	name := p.Val()
	var s string
	if err := p.text(&s); err != nil {
		return err
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 1 {
		return p.Errf("%s: %q is not a whole number above zero", name, s)
	}
	*to = n
	return nil
}

// money reads an amount of USD.
func (p *blockParser) money(s string) (Money, error) {
	amount, err := ParseMoney(s)
	if err != nil {
		return 0, p.WrapErr(err)
	}
	return amount, nil
}

func (p *blockParser) store(h *Handler) error {
	if !p.NextArg() {
		return p.ArgErr()
	}
	name := p.Val()
	module, err := caddyfile.UnmarshalModule(p.Dispenser, "mesh.stores."+name)
	if err != nil {
		return err
	}
	if _, ok := module.(StoreModule); !ok {
		return p.Errf("module mesh.stores.%s is not a store", name)
	}
	h.StoreRaw = caddyconfig.JSONModuleObject(module, "module", name, nil)
	return nil
}

func (p *blockParser) key(h *Handler) error {
	k := new(Key)
	p.places[k] = *p.Dispenser
	if err := p.text(&k.Secret); err != nil {
		return err
	}
	if d, ok := digestOfToken(k.Secret); ok { // the secret itself shall not be in the adapted configuration
		k.Secret = digestPrefix + hex.EncodeToString(d[:])
	}
	h.Keys = append(h.Keys, k)
	return p.block(words{
		"name":            {parse: func() error { return p.text(&k.Name) }},
		"owner":           {parse: func() error { return p.text(&k.Owner) }},
		"rpm":             {parse: func() error { return p.number(&k.RPM) }},
		"rpd":             {parse: func() error { return p.number(&k.RPD) }},
		"tpm":             {parse: func() error { return p.number(&k.TPM) }},
		"max_concurrency": {parse: func() error { return p.number(&k.MaxConcurrency) }},
		"spend_cap_usd":   {parse: func() error { return p.spendCap(k) }},
		"models":          {parse: func() error { return p.list(&k.Models) }},
		"default_model":   {parse: func() error { return p.text(&k.DefaultModel) }},
		"default_params":  {parse: func() error { return p.params(&k.DefaultParams) }},
		"expires":         {parse: func() error { return p.time(&k.Expires) }},
		"suspended":       {parse: func() error { return p.flag(&k.Suspended) }},
		"metadata":        {parse: func() error { return p.metadata(k) }, many: true},
	})
}

func (p *blockParser) metadata(k *Key) error {
	var name, value string
	if !p.AllArgs(&name, &value) {
		return p.ArgErr()
	}
	if _, twice := k.Metadata[name]; twice {
		return p.Errf("metadata %s is given twice", name)
	}
	if k.Metadata == nil {
		k.Metadata = make(map[string]string)
	}
	k.Metadata[name] = value
	return nil
}

func (p *blockParser) spendCap(k *Key) (err error) {
	args := p.RemainingArgs()
	if n := len(args); n > 1 && args[n-1] == "hard" {
		k.HardCap, args = true, args[:n-1]
	}
	if len(args) < 1 || len(args) > 2 {
		return p.ArgErr()
	}
	if k.SpendCap, err = p.money(args[0]); err != nil {
		return err
	}
	if k.SpendCap == 0 {
		return p.Errf("a spend cap of %s USD would refuse every request; to do that, suspend the key", args[0])
	}
	if len(args) == 2 {
		k.SpendPeriod = Period(args[1])
	}
	if err := k.SpendPeriod.check(); err != nil {
		return p.WrapErr(err)
	}
	return nil
}

func (p *blockParser) prices(h *Handler) error {
	files := p.RemainingArgs()
	if len(files) == 0 {
		return p.ArgErr()
	}
	h.Prices = append(h.Prices, files...)
	return nil
}

func (p *blockParser) list(to *[]string) error {
	*to = p.RemainingArgs()
	if len(*to) == 0 {
		return p.ArgErr()
	}
	return nil
}

func (p *blockParser) time(to *time.Time) (err error) {
	var s string
	if err := p.text(&s); err != nil {
		return err
	}
	if *to, err = time.Parse(time.RFC3339, s); err != nil {
		return p.Errf("%q is not a time as RFC 3339 writes it, such as 2027-01-01T00:00:00Z", s)
	}
	return nil
}

func (p *blockParser) model(h *Handler) error {
	m := new(Model)
	p.places[m] = *p.Dispenser
	args := p.RemainingArgs()
	if len(args) == 0 {
		return p.ArgErr()
	}
	m.Name = args[0]
	for _, upstream := range args[1:] {
		p.target(m, &Target{Upstream: upstream})
	}
	h.Models = append(h.Models, m)
	var said pricing
	err := p.block(words{
		"upstream":       {parse: func() error { return p.modelUpstream(m) }, many: true},
		"price":          {parse: func() error { return p.amounts(&said.input, &said.output) }},
		"price_cached":   {parse: func() error { return p.amounts(&said.cached) }},
		"price_audio":    {parse: func() error { return p.amounts(&said.audioInput, &said.audioOutput) }},
		"price_image":    {parse: func() error { return p.amounts(&said.image) }},
		"price_request":  {parse: func() error { return p.amounts(&said.request) }},
		"context_length": {parse: func() error { return p.number(&m.ContextLength) }},

		"transforms":         {parse: func() error { return p.list(&m.Transforms) }},
		"display_name":       {parse: func() error { return p.text(&m.DisplayName) }},
		"type":               {parse: func() error { return p.text(&m.Type) }},
		"input_modalities":   {parse: func() error { return p.list(&m.InputModalities) }},
		"output_modalities":  {parse: func() error { return p.list(&m.OutputModalities) }},
		"supports":           {parse: func() error { return p.list(&m.Supports) }},
		"policy":             {parse: func() error { return p.text(&m.Policy) }},
		"hedge":              {parse: func() error { return p.duration(&m.Hedge) }},
		"first_byte_timeout": {parse: func() error { return p.duration(&m.FirstByteTimeout) }},
		"fallback":           {parse: func() error { return p.placedList(&m.Fallback) }},
	})
	if err != nil {
		return err
	}
	if m.Price, err = said.price(); err != nil {
		return p.locate(wrongf(m, "model %s: %w", m.Name, err))
	}
	return nil
}

func (p *blockParser) target(m *Model, t *Target) {
	p.places[t] = *p.Dispenser
	m.Targets = append(m.Targets, t)
}

// UnmarshalCaddyfile sets up the store from Caddyfile tokens. Syntax:
//
//	store local [<path>] {
//		path       <file>
//		max_events <number>
//	}
func (s *LocalStore) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	p := &blockParser{Dispenser: d}
	p.Next() // the store's name
	if p.NextArg() {
		s.Path = p.Val()
	}
	if p.NextArg() {
		return p.ArgErr()
	}
	return p.block(words{
		"path":       {parse: func() error { return p.text(&s.Path) }},
		"max_events": {parse: func() error { return p.number(&s.MaxEvents) }},
	})
}

var _ caddyfile.Unmarshaler = (*LocalStore)(nil)
