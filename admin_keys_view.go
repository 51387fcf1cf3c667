package mesh

import "time"

// keyView is a key as operators see it. It never has a secret but in the answer to the request that made it up.
type keyView struct {
	ID     string `json:"id"`
	Source string `json:"source"` // of what it is a part: the store, which can be changed, or the config
	Secret string `json:"secret,omitempty"`
	Key
	Created  time.Time `json:"created_at,omitzero"`
	OldUntil time.Time `json:"old_secret_until,omitzero"` // when the secret before the last rotation ends
	Use      *useView  `json:"use,omitempty"`
	Warnings []string  `json:"warnings,omitempty"`
}

const (
	sourceStore  = "store"
	sourceConfig = "config"
)

// useView is what a key has used. Minutes, days and periods are those of UTC.
type useView struct {
	Spend          Money  `json:"spend_usd"` // ever
	SpendPeriod    Money  `json:"spend_period_usd"`
	RequestsMinute int64  `json:"requests_minute"`
	RequestsDay    int64  `json:"requests_day"`
	TokensMinute   *int64 `json:"tokens_minute,omitempty"` // where there is a limit for them
	UnderWay       *int64 `json:"under_way,omitempty"`     // where there is a limit for them
}

func viewOf(k *StoredKey, source string) keyView {
	v := keyView{ID: k.Terms.id, Source: source, Key: k.Terms, Created: k.Created}
	v.Key.Secret = ""
	if time.Now().Before(k.oldUntil) {
		v.OldUntil = k.oldUntil
	}
	return v
}

func (v *keyView) setUse(u KeyUse) {
	v.Use = &useView{Spend: u.Total, SpendPeriod: u.Total, RequestsMinute: u.RequestsMinute, RequestsDay: u.RequestsDay}
	switch v.SpendPeriod {
	case PeriodMonth:
		v.Use.SpendPeriod = u.Month
	case PeriodDay:
		v.Use.SpendPeriod = u.Day
	}
	if v.TPM > 0 {
		v.Use.TokensMinute = &u.TokensMinute
	}
	if v.MaxConcurrency > 0 {
		v.Use.UnderWay = &u.UnderWay
	}
}
