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
		{"Temperature", `1`, "Temperature: the API calls it temperature"},
		{"messages", `[]`, "messages: messages cannot be a default"},
		{"model", `"a/b"`, "model: model cannot be a default"},
		{"stream", `true`, "stream: stream cannot be a default"},
		{"stream_options", `{}`, "stream_options: stream_options cannot be a default"},
		{"session_id", `"s"`, "session_id: session_id cannot be a default"},
		{"template", `"t"`, "template: template cannot be a default"},
		{"timeout", `1`, "timeout: timeout cannot be a default"},
		{"seed", `null`, "seed: a default cannot be null"},
		{"seed", `1 2`, "seed: it is not JSON"},
		{"vendor_thing", `{`, "vendor_thing: it is not JSON"},
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
