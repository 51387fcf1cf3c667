package mesh

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// apiError is an answer that refuses or reports a failure. One place writes it: see (*exchange).refuse.
type apiError struct {
	status  int
	code    string
	message string

	errType string // OpenAI's type; derived from the status where empty
	param   string
	details []fault

	providerCode  string
	providerError json.RawMessage // the provider's error object, in its own bytes

	retryAfter time.Duration // until the client may try again; 0 where that says nothing
	allow      string        // the Allow header of a 405

	// for the log only
	cause  error
	model  string // that it is about, where the client asked for one; no metric's label, as it may be anything
	reason string // why a key was not accepted
}

func (e *apiError) Error() string {
	if e.cause != nil {
		return e.code + ": " + e.message + ": " + e.cause.Error()
	}
	return e.code + ": " + e.message
}

func (e *apiError) Unwrap() error { return e.cause }

// fault is one thing wrong with a request, in pydantic's form.
type fault struct {
	Type string `json:"type"`
	Loc  []any  `json:"loc"`
	Msg  string `json:"msg"`
}

// where returns the place of the fault in the body, as an OpenAI SDK's param.
func (f fault) where() string {
	var param strings.Builder
	for i, l := range f.Loc[1:] { // without "body"
		switch l := l.(type) {
		case string:
			if i > 0 {
				param.WriteByte('.')
			}
			param.WriteString(l)
		case int:
			param.WriteString("[" + strconv.Itoa(l) + "]")
		}
	}
	return param.String()
}

func errorf(status int, code, format string, args ...any) *apiError {
	return &apiError{status: status, code: code, message: fmt.Sprintf(format, args...)}
}

// refusals whose words never change
var (
	errUnauthorized = &apiError{
		status: http.StatusUnauthorized, code: "unauthorized",
		message: "Missing or invalid API key. Send it as 'Authorization: Bearer rsk_...'.",
	}
	errExpired = &apiError{
		status: http.StatusUnauthorized, code: "unauthorized",
		message: "This API key has expired.", reason: "expired",
	}
	errSuspended = &apiError{
		status: http.StatusForbidden, code: "forbidden",
		message: "This API key is suspended.",
	}
	errStoreUnavailable = &apiError{
		status: http.StatusServiceUnavailable, code: "store_unavailable",
		message: "The gateway cannot reach its store at the moment. Try again shortly.",
	}
	errTimeout = &apiError{
		status: http.StatusGatewayTimeout, code: "gateway_timeout",
		message: "The upstream did not answer in time.",
	}
)

// the ways to have no key, which clients are told alike
var (
	errMissingKey   = unauthorized("missing")
	errMalformedKey = unauthorized("malformed")
	errUnknownKey   = unauthorized("unknown")
)

func unauthorized(reason string) *apiError {
	e := *errUnauthorized
	e.reason = reason
	return &e
}

// errorTypes are the types OpenAI's SDKs know, by status.
func errorType(status int) string {
	switch status {
	case http.StatusUnauthorized:
		return "authentication_error"
	case http.StatusPaymentRequired:
		return "insufficient_quota"
	case http.StatusForbidden:
		return "permission_error"
	case http.StatusTooManyRequests:
		return "rate_limit_error"
	}
	if status >= 500 {
		return "api_error"
	}
	return "invalid_request_error"
}

// seconds rounds d up to whole seconds: a client that waits that long does not come too early. It is never negative.
func seconds(d time.Duration) int {
	d = max(d, 0)
	whole := d / time.Second
	if d%time.Second != 0 {
		whole++
	}
	return int(whole)
}

// errorBody is the envelope of every error.
type errorBody struct {
	Error struct {
		Code          string          `json:"code"`
		Message       string          `json:"message"`
		Type          string          `json:"type"`
		Param         *string         `json:"param"`
		Details       []fault         `json:"details,omitempty"`
		ProviderCode  string          `json:"provider_code,omitempty"`
		ProviderError json.RawMessage `json:"provider_error,omitempty"`
		RetryAfter    int             `json:"retry_after_seconds,omitempty"`
	} `json:"error"`
	RequestID string `json:"request_id"`
}

// write sends e as the whole answer. Headers that belong to every answer are already set.
func (e *apiError) write(w http.ResponseWriter, requestID string) error {
	body := errorBody{RequestID: requestID}
	body.Error.Code = e.code
	body.Error.Message = e.message
	body.Error.Type = e.errType
	if body.Error.Type == "" {
		body.Error.Type = errorType(e.status)
	}
	if e.param != "" {
		body.Error.Param = &e.param
	}
	body.Error.Details = e.details
	body.Error.ProviderCode = e.providerCode
	body.Error.ProviderError = e.providerError
	body.Error.RetryAfter = seconds(e.retryAfter)

	header := w.Header()
	if e.retryAfter > 0 {
		header.Set("Retry-After", strconv.Itoa(body.Error.RetryAfter))
	}
	if e.allow != "" {
		header.Set("Allow", e.allow)
	}
	if e.status == http.StatusUnauthorized {
		header.Set("WWW-Authenticate", "Bearer") // RFC 9110, 11.6.1: a 401 must name a scheme
	}
	return writeJSON(w, e.status, body)
}

// frame returns e as the stream event that stands in for an answer's missing rest, and the end of the stream.
func (e *apiError) frame(requestID string) []byte {
	var body struct {
		Error struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
		RequestID string `json:"request_id"`
	}
	body.Error.Code, body.Error.Message, body.RequestID = e.code, e.message, requestID
	encoded, _ := encodeJSON(body) // strings only: cannot fail
	return []byte("data: " + string(encoded) + "\n\ndata: [DONE]\n\n")
}

// writeJSON sends v as a whole JSON answer.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	encoded, err := encodeJSON(v)
	if err != nil {
		return fmt.Errorf("encoding answer: %w", err)
	}
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("Content-Length", strconv.Itoa(len(encoded)))
	w.WriteHeader(status)
	_, err = w.Write(encoded)
	return err
}

// encodeJSON is json.Marshal without the escapes that only HTML needs.
func encodeJSON(v any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n")), err
}
