package mesh

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"
)

// TestEventIsEncodedAsItsTagsSay fills every field there is, so that one that encodeEvent forgets shows.
func TestEventIsEncodedAsItsTagsSay(t *testing.T) {
	full := Event{RequestID: "req_1", KeyID: "key"}
	fields := reflect.ValueOf(&full).Elem()
	for i := range fields.NumField() {
		switch f := fields.Field(i); f.Kind() {
		case reflect.String:
			f.SetString("<a \"b\" \\ é \u2028 \x01\xff>" + fields.Type().Field(i).Name)
		case reflect.Bool:
			f.SetBool(true)
		case reflect.Int, reflect.Int64:
			f.SetInt(int64(i) + 1_234_567_890)
		case reflect.Slice:
			f.Set(reflect.ValueOf([]Tried{{"a/b", "é\x01", "503"}, {Model: "c"}}))
		case reflect.Struct:
			f.Set(reflect.ValueOf(time.Date(2026, 11, 25, 1, 2, 3, 400, time.UTC)))
		default:
			t.Fatalf("%s is of a kind this test does not fill", fields.Type().Field(i).Name)
		}
	}
	for _, e := range []Event{full, {RequestID: "req_2", KeyID: "key"}} {
		want, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		got, err := encodeEvent(&e)
		if err != nil {
			t.Fatal(err)
		}
		if !json.Valid(got) || !sameJSON(t, got, want) {
			t.Errorf("encoded\n%s, want\n%s", got, want)
		}
	}
}

func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	var x, y map[string]any
	if err := json.Unmarshal(a, &x); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &y); err != nil {
		t.Fatal(err)
	}
	return reflect.DeepEqual(x, y)
}

func BenchmarkEncodeEvent(b *testing.B) {
	e := Event{
		RequestID: "req_01KB0000000000000000000000", KeyID: "0123456789abcdef", KeyName: "tester", Time: time.Now().UTC(),
		Duration: time.Second, TTFT: time.Millisecond, Model: "openai/gpt-4o", Upstream: "openai", Attempts: 1, Status: 200,
		Outcome: OutcomeCompleted, PromptTokens: 1234, CompletionTokens: 567, Cost: 1_234_567,
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := encodeEvent(&e); err != nil {
			b.Fatal(err)
		}
	}
}
