package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

func decoded(t *testing.T, schema string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(schema), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestSchemaIsFilledByType(t *testing.T) {
	for name, tc := range map[string]struct{ schema, want string }{
		"string":            {`{"type":"string"}`, `"hi"`},
		"number":            {`{"type":"number"}`, `1`},
		"integer":           {`{"type":"integer"}`, `1`},
		"boolean":           {`{"type":"boolean"}`, `true`},
		"null":              {`{"type":"null"}`, `null`},
		"array":             {`{"type":"array","items":{"type":"string"}}`, `[]`},
		"object":            {`{"type":"object"}`, `{}`},
		"optional member":   {`{"type":"object","properties":{"a":{"type":"string"}}}`, `{}`},
		"required member":   {`{"properties":{"a":{"type":"integer"}},"required":["a"]}`, `{"a":1}`},
		"undescribed":       {`{"type":"object","required":["a"]}`, `{"a":"hi"}`},
		"enum":              {`{"type":"string","enum":["x","y"]}`, `"x"`},
		"const":             {`{"const":7}`, `7`},
		"nullable":          {`{"type":["null","integer"]}`, `1`},
		"choice":            {`{"anyOf":[{"type":"integer"},{"type":"null"}]}`, `1`},
		"constraint":        {`{"type":"object","anyOf":[{"required":["a"]}]}`, `{}`},
		"reference":         {`{"$ref":"#/$defs/n","$defs":{"n":{"type":"integer"}}}`, `1`},
		"dangling":          {`{"$ref":"#/$defs/n"}`, `"hi"`},
		"foreign reference": {`{"$ref":"https://example.com/schema"}`, `"hi"`},
		"nothing":           {`{}`, `"hi"`},
		"not a schema":      {`true`, `"hi"`},
	} {
		if got := filled(decoded(t, tc.schema), "hi"); got != tc.want {
			t.Errorf("%s: got %s, want %s", name, got, tc.want)
		}
	}
}

func TestRecursiveSchemaEnds(t *testing.T) {
	got := filled(decoded(t, `{"$ref":"#/$defs/node","$defs":{"node":{"type":"object","required":["value","next"],
		"properties":{"value":{"type":"string"},"next":{"anyOf":[{"$ref":"#/$defs/node"},{"type":"null"}]}}}}}`), "hi")
	if want := `{"next":null,"value":"hi"}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := filled(decoded(t, `{"$ref":"#"}`), "hi"); got != "null" {
		t.Errorf("got %s for a schema that is only itself", got)
	}
}

// A schema of a few kilobytes must not make the model write gigabytes.
func TestSchemaThatMultipliesStaysSmall(t *testing.T) {
	var defs []string
	for i := range 20 {
		next := fmt.Sprintf(`{"$ref":"#/$defs/d%d"}`, i+1)
		defs = append(defs, fmt.Sprintf(`"d%d":{"type":"object","required":["a","b","c"],"properties":{"a":%s,"b":%[2]s,"c":%[2]s}}`, i, next))
	}
	schema := decoded(t, `{"$ref":"#/$defs/d0","$defs":{`+strings.Join(defs, ",")+`,"d20":{"type":"string"}}}`)
	got := filled(schema, strings.Repeat("é", 1<<20))
	if len(got) > 2*maxFilled*maxFilledText {
		t.Errorf("got %d bytes", len(got))
	}
	if !json.Valid([]byte(got)) || strings.ContainsRune(got, '\uFFFD') {
		t.Error("got invalid JSON or a torn character")
	}
}

func TestToolWithoutParametersGetsNone(t *testing.T) {
	if got := arguments(nil, "hi"); got != "{}" {
		t.Errorf("got %s", got)
	}
}
