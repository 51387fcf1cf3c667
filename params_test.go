package mesh

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestWrongParametersAreRefusedByName(t *testing.T) {
	for _, tc := range []struct{ name, value, want string }{
		{"temperature", `0.5`, ""},
		{"max_tokens", `512`, ""},
		{"stop", `["a","b"]`, ""},
		{"response_format", `{"type":"json_object"}`, ""},
		{"user", `"alice"`, ""},
		{"temperature", `3`, "temperature: Input should be less than or equal to 2"},
		{"max_tokens", `0`, "max_tokens: Input should be greater than or equal to 1"},
		{"max_tokens", `"many"`, "max_tokens: Input should be a valid integer"},
		{"Temperature", `1`, "Temperature: it differs from temperature"},
		{"messages", `[]`, "messages: it is the gateway's own"},
		{"model", `"a/b"`, "model: it is the gateway's own"},
		{"stream", `true`, "stream: it is the gateway's own"},
		{"stream_options", `{}`, "stream_options: it is the gateway's own"},
		{"session_id", `"s"`, "session_id: it is the gateway's own"},
		{"template", `"t"`, "template: it is the gateway's own"},
		{"timeout", `1`, "timeout: it is the gateway's own"},
		{"seed", `null`, "seed: null sets nothing"},
		{"seed", `1 2`, "seed: it is not valid JSON"},
		{"vendor_thing", `{`, "vendor_thing: it is not valid JSON"},
		{"", `1`, "a parameter needs a name"},
	} {
		err := Params{tc.name: json.RawMessage(tc.value)}.check()
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s %s: %v", tc.name, tc.value, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s %s: %v, want %s", tc.name, tc.value, err, tc.want)
		}
	}
}
