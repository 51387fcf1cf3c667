package mesh

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strconv"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Tried is a way to serve a request that came to nothing.
type Tried struct {
	Model    string `json:"model"`
	Upstream string `json:"upstream"`
	Reason   string `json:"reason"` // a short code, such as connect, timeout, not_json, or the status of an answer
}

// note enters that a candidate did not serve the request.
func (x *exchange) note(c *candidate, f *failure) {
	x.event.Tried = append(x.event.Tried, Tried{Model: c.model, Upstream: c.upstream.Name, Reason: f.why()})
}

// logFallback says that another candidate than the first has served.
func (x *exchange) logFallback(by *candidate) {
	x.h.logger.Info("fallback served",
		zap.String("request_id", x.event.RequestID),
		zap.String("model", by.model),
		zap.String("upstream", by.upstream.Name),
		zap.Array("tried", triedList(x.event.Tried)))
}

// why is the failure's reason as the ledger has it.
func (f *failure) why() string {
	_, dialFailed := errors.AsType[reverseproxy.DialError](f.err)
	netErr, isNet := errors.AsType[net.Error](f.err)
	switch {
	case f.reason != "":
		return f.reason
	case f.status >= 300:
		return strconv.Itoa(f.status)
	case f.tell != nil && f.tell.status == http.StatusGatewayTimeout,
		errors.Is(f.err, context.DeadlineExceeded), isNet && netErr.Timeout() && !dialFailed:
		return "timeout"
	case errors.Is(f.err, errBrokenOff):
		return "cut"
	case f.tell != nil && f.tell.status == http.StatusServiceUnavailable:
		return "unavailable"
	}
	return "connect"
}

// triedList writes what was tried into a log.
type triedList []Tried

// MarshalLogArray writes each as an object.
func (l triedList) MarshalLogArray(enc zapcore.ArrayEncoder) error {
	for _, t := range l {
		if err := enc.AppendObject(t); err != nil {
			return err
		}
	}
	return nil
}

// MarshalLogObject writes t with the names of its JSON.
func (t Tried) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddString("model", t.Model)
	enc.AddString("upstream", t.Upstream)
	enc.AddString("reason", t.Reason)
	return nil
}

// tried adds the member of that name.
func (o *objectWriter) tried(list []Tried) {
	o.name("tried")
	for i, t := range list {
		separator := byte(',')
		if i == 0 {
			separator = '['
		}
		one := objectWriter{buf: make([]byte, 0, 128)}
		one.text("model", t.Model)
		one.text("upstream", t.Upstream)
		one.text("reason", t.Reason)
		o.buf = append(append(append(o.buf, separator), one.buf...), '}')
	}
	o.buf = append(o.buf, ']')
}
