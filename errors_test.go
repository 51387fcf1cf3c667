package mesh

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestErrorIsWrittenInItsEnvelope(t *testing.T) {
	const id = `,"request_id":"req_1"}`
	cases := map[string]struct {
		err    *apiError
		body   string
		header map[string]string
	}{
		"bad request": {
			err:  errorf(400, "invalid_request", "no %s", "JSON"),
			body: `{"error":{"code":"invalid_request","message":"no JSON","type":"invalid_request_error","param":null}` + id,
		},
		"unauthorized": {
			err: errUnauthorized,
			body: `{"error":{"code":"unauthorized","message":"Missing or invalid API key. Send it as 'Authorization: Bearer rsk_...'.",` +
				`"type":"authentication_error","param":null}` + id,
			header: map[string]string{"Www-Authenticate": "Bearer"},
		},
		"spend limit": {
			err:  errorf(402, "spend_limit_exceeded", "m"),
			body: `{"error":{"code":"spend_limit_exceeded","message":"m","type":"insufficient_quota","param":null}` + id,
		},
		"forbidden": {
			err:  errSuspended,
			body: `{"error":{"code":"forbidden","message":"This API key is suspended.","type":"permission_error","param":null}` + id,
		},
		"method": {
			err:    &apiError{status: 405, code: "method_not_allowed", message: "m", allow: "GET, POST"},
			body:   `{"error":{"code":"method_not_allowed","message":"m","type":"invalid_request_error","param":null}` + id,
			header: map[string]string{"Allow": "GET, POST"},
		},
		"validation": {
			err: validationError([]fault{
				{"less_than_equal", []any{"body", "temperature"}, "Input should be less than or equal to 2"},
				{"missing", []any{"body", "messages", 0, "content", 2, "type"}, "Field required"},
			}),
			body: `{"error":{"code":"validation_error","message":"temperature: Input should be less than or equal to 2 (and 1 more)",` +
				`"type":"invalid_request_error","param":"temperature","details":[` +
				`{"type":"less_than_equal","loc":["body","temperature"],"msg":"Input should be less than or equal to 2"},` +
				`{"type":"missing","loc":["body","messages",0,"content",2,"type"],"msg":"Field required"}]}` + id,
		},
		"validation of an element": {
			err: validationError([]fault{{"missing", []any{"body", "messages", 0, "content", 2, "type"}, "Field required"}}),
			body: `{"error":{"code":"validation_error","message":"messages[0].content[2].type: Field required",` +
				`"type":"invalid_request_error","param":"messages[0].content[2].type","details":[` +
				`{"type":"missing","loc":["body","messages",0,"content",2,"type"],"msg":"Field required"}]}` + id,
		},
		"rate limit": {
			err:    &apiError{status: 429, code: "rate_limit_exceeded", message: "m", retryAfter: 11*time.Second + 1},
			body:   `{"error":{"code":"rate_limit_exceeded","message":"m","type":"rate_limit_error","param":null,"retry_after_seconds":12}` + id,
			header: map[string]string{"Retry-After": "12"},
		},
		"store": {
			err: errStoreUnavailable,
			body: `{"error":{"code":"store_unavailable","message":"The gateway cannot reach its store at the moment. Try again shortly.",` +
				`"type":"api_error","param":null}` + id,
		},
		"timeout": {
			err:  errTimeout,
			body: `{"error":{"code":"gateway_timeout","message":"The upstream did not answer in time.","type":"api_error","param":null}` + id,
		},
		"provider's own": {
			err: &apiError{
				status: 400, code: "context_length_exceeded", message: `too long: "<a>" & é`, errType: "tokens", param: "messages",
				providerCode: "context_length_exceeded", providerError: json.RawMessage(`{"code":"context_length_exceeded","n":1.0}`),
				cause: errors.New("secret"),
			},
			body: `{"error":{"code":"context_length_exceeded","message":"too long: \"<a>\" & é","type":"tokens","param":"messages",` +
				`"provider_code":"context_length_exceeded","provider_error":{"code":"context_length_exceeded","n":1.0}}` + id,
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			if err := c.err.write(w, "req_1"); err != nil {
				t.Fatal(err)
			}
			if w.Code != c.err.status || w.Body.String() != c.body {
				t.Errorf("answered %d %s\nwant %d %s", w.Code, w.Body, c.err.status, c.body)
			}
			if got := w.Header().Get("Content-Type"); got != "application/json" {
				t.Errorf("Content-Type %q", got)
			}
			for _, name := range []string{"Retry-After", "Allow", "Www-Authenticate"} {
				if got := w.Header().Get(name); got != c.header[name] {
					t.Errorf("%s: %q, want %q", name, got, c.header[name])
				}
			}
		})
	}
}

func TestWaitIsRoundedUpToWholeSeconds(t *testing.T) {
	waits := map[time.Duration]int{
		-time.Second:               0,
		0:                          0,
		1:                          1,
		time.Second - 1:            1,
		time.Second:                1,
		time.Second + 1:            2,
		59*time.Second + 999999999: 60,
		24 * time.Hour:             86400,
		1<<63 - 1:                  9223372037,
	}
	for d, want := range waits {
		if got := seconds(d); got != want {
			t.Errorf("%v is %d seconds, want %d", d, got, want)
		}
	}
}

func TestNegativeWaitIsNotWritten(t *testing.T) {
	w := httptest.NewRecorder()
	err := (&apiError{status: 429, code: "rate_limit_exceeded", message: "m", retryAfter: -time.Minute}).write(w, "req_1")
	if err != nil || strings.Contains(w.Body.String(), "retry_after") || w.Header().Get("Retry-After") != "" {
		t.Errorf("%v, %v: %s", err, w.Header(), w.Body)
	}
}

func TestErrorInAStreamIsAFrameAndTheEnd(t *testing.T) {
	e := &apiError{status: 502, code: "upstream_error", message: "cut\n\ndata: \"x\" <é>", param: "p", retryAfter: time.Second}
	want := `data: {"error":{"code":"upstream_error","message":"cut\n\ndata: \"x\" <é>"},"request_id":"req_1"}` + "\n\ndata: [DONE]\n\n"
	if got := string(e.frame("req_1")); got != want {
		t.Errorf("%q\nwant %q", got, want)
	}
}

func TestErrorNamesItsCauseOnlyInTheLog(t *testing.T) {
	e := errorf(502, "upstream_error", "The upstream failed.")
	if got := e.Error(); got != "upstream_error: The upstream failed." {
		t.Error(got)
	}
	e.cause = io.ErrUnexpectedEOF
	if got := e.Error(); got != "upstream_error: The upstream failed.: unexpected EOF" || !errors.Is(e, io.ErrUnexpectedEOF) {
		t.Error(got)
	}
}

func TestAnswerThatCannotBeEncodedIsAnErrorAndWritesNothing(t *testing.T) {
	w := httptest.NewRecorder()
	if err := writeJSON(w, http.StatusOK, func() {}); err == nil || w.Body.Len() > 0 || len(w.Header()) > 0 {
		t.Errorf("%v: %v %s", err, w.Header(), w.Body)
	}
}
