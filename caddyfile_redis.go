package mesh

import (
	"strconv"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// UnmarshalCaddyfile sets up the store from Caddyfile tokens. Syntax:
//
//	store redis [<addresses...>] {
//		address           <addresses...>
//		master_name       <name>
//		username          <name>
//		password          <password>
//		sentinel_username <name>
//		sentinel_password <password>
//		db                <number>
//		tls
//		tls_server_name   <name>
//		tls_ca            <file>
//		key_prefix        <prefix>
//		timeout           <duration>
//		on_failure        degrade|refuse
//		journal           <file>
//		max_events        <number>
//	}
func (r *RedisStore) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	p := &blockParser{Dispenser: d}
	p.Next() // the store's name
	r.Addresses = p.RemainingArgs()
	err := p.block(words{
		"address":           {parse: func() error { return p.addresses(r) }},
		"master_name":       {parse: func() error { return p.text(&r.MasterName) }},
		"username":          {parse: func() error { return p.text(&r.Username) }},
		"password":          {parse: func() error { return p.text(&r.Password) }},
		"sentinel_username": {parse: func() error { return p.text(&r.SentinelUsername) }},
		"sentinel_password": {parse: func() error { return p.text(&r.SentinelPassword) }},
		"db":                {parse: func() error { return p.db(r) }},
		"tls":               {parse: func() error { return p.flag(&r.TLS) }},
		"tls_server_name":   {parse: func() error { return p.text(&r.TLSServerName) }},
		"tls_ca":            {parse: func() error { return p.text(&r.TLSCA) }},
		"key_prefix":        {parse: func() error { return p.text(&r.KeyPrefix) }},
		"timeout":           {parse: func() error { return p.duration(&r.Timeout) }},
		"on_failure":        {parse: func() error { return p.onFailure(r) }},
		"journal":           {parse: func() error { return p.text(&r.Journal) }},
		"max_events":        {parse: func() error { return p.number(&r.MaxEvents) }},
	})
	if err != nil {
		return err
	}
	if err := r.check(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

func (p *blockParser) addresses(r *RedisStore) error {
	if len(r.Addresses) > 0 {
		return p.Err("address is given twice")
	}
	return p.list(&r.Addresses)
}

func (p *blockParser) onFailure(r *RedisStore) error {
	if err := p.text(&r.OnFailure); err != nil {
		return err
	}
	if err := r.checkOnFailure(); err != nil {
		return p.WrapErr(err)
	}
	return nil
}

func (p *blockParser) db(r *RedisStore) error {
	var s string
	if err := p.text(&s); err != nil {
		return err
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return p.Errf("db: %q is not the number of a database", s)
	}
	r.DB = n
	return nil
}

var _ caddyfile.Unmarshaler = (*RedisStore)(nil)
