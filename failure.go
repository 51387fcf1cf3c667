package mesh

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// failure is why a candidate did not answer.
type failure struct {
	status    int       // the upstream's; 0 where it said nothing
	retriable bool      // another candidate may do better
	tell      *apiError // for the client, if no other answers
	cause     error     // for the log
	err       error     // what the handler returned
	reason    string    // for the ledger, where the rest does not say it
	skipped   bool      // it was not asked

	credentials bool // it is the gateway's own that were refused

	requestID string // the upstream's, if it said one
}

var errCut = &apiError{
	status: http.StatusBadGateway, code: "upstream_error",
	message: "The upstream broke off in the middle of its answer.",
}

var errUnfinished = &apiError{
	status: http.StatusGatewayTimeout, code: "gateway_timeout",
	message: "The upstream did not finish its answer in time.",
}

var errBusy = &apiError{
	status: http.StatusTooManyRequests, code: "upstream_rate_limit_error",
	message: "The upstream is at its own rate limit.",
}

func busyFor(wait time.Duration) *apiError {
	e := *errBusy
	e.retryAfter = wait
	return &e
}

// failure says why the attempt came to nothing.
func (a *answer) failure() *failure {
	if a.lost {
		return &failure{retriable: true, skipped: true, tell: notAvailable(0), cause: errLost, reason: "hedge_lost"}
	}
	if a.gaveUp {
		return &failure{retriable: true, tell: errTimeout, cause: errNoFirstByte, reason: "timeout"}
	}
	if a.status >= 300 {
		return a.refused()
	}
	f := &failure{retriable: true, cause: a.err, err: a.err, status: a.status}
	switch {
	case a.fault != nil:
		f.cause, f.reason = a.fault, "not_json"
		f.tell = errorf(http.StatusBadGateway, "upstream_error", "The upstream's answer could not be read.")
		if said := readAnswer(a.whole.Bytes(), nil); said.readable && said.failed {
			f.tell, f.reason = inBand(a.whole.Bytes()), "error"
			f.cause = answered(a.status, providerError(a.whole.Bytes()))
			f.retriable = f.tell.status >= 500
		}
	case a.stream != nil && a.stream.failed:
		f.tell, f.cause, f.reason = a.stream.fault, a.stream.fault, "stream_error"
		f.retriable = f.tell.status >= 500
	case a.stream != nil, errors.Is(a.err, errBrokenOff):
		f.tell, f.reason = errCut, "cut"
	default:
		f.tell = unreachable(a.err)
		if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](a.err); ok {
			f.cause = handlerErr.Err // without Caddy's wrapping
		}
	}
	if f.cause == nil {
		f.cause = errors.New("no answer")
	}
	return f
}

// unreachable reads an error of reverse_proxy's, which has written no answer.
func unreachable(err error) *apiError {
	_, dialFailed := errors.AsType[reverseproxy.DialError](err)
	if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok && !dialFailed {
		switch handlerErr.StatusCode {
		case http.StatusServiceUnavailable:
			return errorf(http.StatusServiceUnavailable, "provider_not_available",
				"No upstream for this model is available at the moment.")
		case http.StatusGatewayTimeout:
			return errTimeout
		}
	}
	return errorf(http.StatusBadGateway, "upstream_error", "The upstream could not be reached.")
}

// refused reads an answer with the status of an error.
func (a *answer) refused() *failure {
	provider := providerError(a.whole.Bytes())
	f := &failure{status: a.status, retriable: true, cause: answered(a.status, provider)}
	switch {
	case a.status == http.StatusUnauthorized, a.status == http.StatusPaymentRequired, a.status == http.StatusForbidden,
		a.status == http.StatusBadRequest && provider.isAboutAccount():
		f.credentials = true
		f.cause = fmt.Errorf("upstream answered %d: it refused the gateway's credentials", a.status)
		f.tell = errorf(http.StatusBadGateway, "upstream_error", "The upstream refused the gateway's credentials.")
	case a.status == http.StatusTooManyRequests:
		f.tell = busyFor(retryAfter(a.header, time.Now()))
	case a.status >= 500, a.status < 400, a.status == http.StatusNotFound && provider.providerError == nil:
		// a 404 without an error is not the provider's API but whatever answers at a wrong address
		f.tell = errorf(http.StatusBadGateway, "upstream_error", "The upstream failed (status %d).", a.status)
		f.tell.retryAfter = retryAfter(a.header, time.Now())
	default:
		f.retriable = a.status == http.StatusNotFound || a.status == http.StatusRequestTimeout
		f.tell = a.relayed(provider)
	}
	return f
}

// answered says in the log what an upstream answered. Its message stays out of it: some quote the gateway's key, or the
// prompt.
func answered(status int, provider *apiError) error {
	if words := cmp.Or(provider.providerCode, provider.errType); words != "" {
		return fmt.Errorf("upstream answered %d with %.100q", status, words)
	}
	return fmt.Errorf("upstream answered %d", status)
}

// accountWords are the codes and types of errors that are about the gateway's account with the provider. Their
// messages name organizations and quote keys, so that no client gets to see them.
var accountWords = map[string]bool{
	"account_deactivated": true, "authentication_error": true, "billing_error": true, "billing_hard_limit_reached": true,
	"billing_not_active": true, "insufficient_quota": true, "invalid_api_key": true, "invalid_organization": true,
	"permission_error": true, "rate_limit_error": true, "rate_limit_exceeded": true,
}

func (e *apiError) isAboutAccount() bool {
	return accountWords[e.providerCode] || accountWords[e.errType]
}

// inBand is what a client hears of an error that an upstream reports with status 200, in a body or in a stream: the
// provider's words where the request was at fault, and the gateway's where anything else was.
func inBand(body []byte) *apiError {
	provider := providerError(body)
	if provider.errType != "invalid_request_error" || provider.isAboutAccount() {
		return errorf(http.StatusBadGateway, "upstream_error", "The upstream reported an error.")
	}
	provider.status = http.StatusBadRequest
	if provider.providerCode == "" {
		provider.code = codeOf(provider.status)
	}
	return provider
}

// relayed is a refusal that is the client's business: the provider's words, under the provider's status.
func (a *answer) relayed(provider *apiError) *apiError {
	provider.status = a.status
	if provider.providerCode == "" {
		provider.code = codeOf(a.status)
	}
	if provider.providerError == nil {
		provider.message = fmt.Sprintf("The upstream refused the request (status %d).", a.status)
	}
	provider.retryAfter = retryAfter(a.header, time.Now())
	return provider
}

// codeOf is the gateway's own code for the status of a refusal whose provider gives none.
func codeOf(status int) string {
	switch status {
	case http.StatusNotFound:
		return "not_found"
	case http.StatusConflict:
		return "conflict"
	case http.StatusRequestEntityTooLarge:
		return "request_too_large"
	case http.StatusUnsupportedMediaType:
		return "unsupported_media_type"
	case http.StatusUnprocessableEntity:
		return "unprocessable_entity"
	}
	return "invalid_request"
}

// providerError reads a provider's error out of the body of an answer or the data of an event. Providers agree on
// little: {"error":{…}} (OpenAI), {"error":"…"} (Ollama), {"object":"error","message":…} (vLLM before 0.10, Mistral),
// {"detail":…} (FastAPI). What is no JSON object gives an error without a providerError.
func providerError(body []byte) *apiError {
	e := errorf(http.StatusBadGateway, "upstream_error", "The upstream reported an error.")
	var envelope struct {
		Error json.RawMessage
	}
	if json.Unmarshal(body, &envelope) != nil {
		return e
	}
	raw := json.RawMessage(body)
	if len(envelope.Error) > 0 && string(envelope.Error) != "null" {
		raw = envelope.Error
	}
	e.providerError = raw
	var words struct {
		Message, Detail, Type, Code, Param any
	}
	if json.Unmarshal(raw, &words) != nil {
		words.Message = nil
		json.Unmarshal(raw, &words.Message) //nolint:errcheck // it was valid JSON above
	}
	text := func(v any) string { s, _ := v.(string); return s }
	e.message = cmp.Or(text(words.Message), text(words.Detail), e.message)
	e.providerCode = text(words.Code)
	e.code = cmp.Or(e.providerCode, e.code)
	e.errType, e.param = text(words.Type), text(words.Param)
	return e
}

// retryAfter reads when an upstream wants to be asked again: Retry-After in seconds or as a date (RFC 9110, 10.2.3),
// or the retry-after-ms of Azure. 0 where it does not say.
func retryAfter(header http.Header, now time.Time) time.Duration {
	if ms, err := strconv.ParseFloat(header.Get("Retry-After-Ms"), 64); err == nil && ms > 0 {
		return clampWait(ms * float64(time.Millisecond))
	}
	value := header.Get("Retry-After")
	if s, err := strconv.ParseFloat(value, 64); err == nil && s > 0 {
		return clampWait(s * float64(time.Second))
	}
	if at, err := http.ParseTime(value); err == nil && at.After(now) {
		return clampWait(float64(at.Sub(now)))
	}
	return 0
}

// clampWait keeps nonsense out of our own Retry-After: nobody waits for more than a day.
func clampWait(ns float64) time.Duration { return time.Duration(min(ns, float64(24*time.Hour))) }

// tell chooses what the client hears when no candidate answered: what the last one that was asked had to say, if it was
// not that it is busy; else what kept one from being asked; else that all are busy. Where it may come back, the
// earliest time at which one of them can be asked again.
func tell(failures []*failure) *apiError {
	var chosen *apiError
	for rank, i := 4, len(failures)-1; i >= 0; i-- {
		if r := failures[i].rank(); r < rank {
			chosen, rank = failures[i].tell, r
		}
	}
	for _, f := range failures {
		if wait := f.tell.retryAfter; wait > 0 && f.rank() > 0 && f.tell.code == chosen.code && (chosen.retryAfter == 0 || wait < chosen.retryAfter) {
			chosen = f.tell
		}
	}
	return chosen
}

func (f *failure) rank() int {
	switch {
	case f.tell.code == errBusy.code:
		return 2
	case f.reason == "spend_cap":
		return 3
	case f.skipped:
		return 1
	}
	return 0
}
