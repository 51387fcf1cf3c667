package main

import "strings"

// A small request can ask for a huge value, by references to references and a text that comes again and again.
const (
	maxFilled     = 1000 // values; the rest is null
	maxFilledText = 1000 // bytes of text in each string
)

// arguments are those of a call to a tool with these parameters. A tool without parameters gets none.
func arguments(parameters any, text string) string {
	schema, _ := parameters.(object)
	if len(schema) == 0 {
		return "{}"
	}
	return filled(schema, text)
}

// filled is the JSON of a value that schema describes. Of an object it has the required members only; every string
// is text, every number 1, every boolean true, every array empty; of an enum or a choice it takes the first.
// Constraints beyond that, such as a string's format, it does not know.
func filled(schema any, text string) string {
	if len(text) > maxFilledText {
		text = strings.ToValidUTF8(text[:maxFilledText], "")
	}
	root, _ := schema.(object)
	f := filler{root: root, text: text, open: map[string]bool{}}
	encoded, _ := encodeJSON(f.value(root)) // made of what was decoded from JSON: cannot fail
	return string(encoded)
}

type filler struct {
	root object // where references start
	text string
	open map[string]bool // references that are being followed: schemas may be recursive
	made int
}

func (f *filler) value(schema object) any {
	if f.made++; f.made > maxFilled {
		return nil
	}
	if ref, ok := schema["$ref"].(string); ok {
		return f.referenced(ref)
	}
	if value, ok := schema["const"]; ok {
		return value
	}
	if enum := list(schema["enum"]); len(enum) > 0 {
		return enum[0]
	}
	if schema["type"] != nil { // then choices, if any, only constrain it
		return f.typed(schema)
	}
	for _, keyword := range []string{"anyOf", "oneOf", "allOf"} { // generators write allOf around one reference
		if choices := list(schema[keyword]); len(choices) > 0 {
			return f.value(f.choice(choices))
		}
	}
	return f.typed(schema)
}

// choice is the first that does not lead back to where f came from.
func (f *filler) choice(choices []any) object {
	for _, choice := range choices {
		schema, _ := choice.(object)
		ref, _ := schema["$ref"].(string)
		if !f.open[ref] {
			return schema
		}
	}
	return object{"type": "null"}
}

func (f *filler) typed(schema object) any {
	switch typeOf(schema) {
	case "object":
		return f.object(schema)
	case "array":
		return []any{}
	case "number", "integer":
		return 1
	case "boolean":
		return true
	case "null":
		return nil
	}
	return f.text
}

// typeOf is the first of schema's types that is not null.
func typeOf(schema object) string {
	if name, ok := schema["type"].(string); ok {
		return name
	}
	for _, name := range list(schema["type"]) {
		if name, ok := name.(string); ok && name != "null" {
			return name
		}
	}
	if _, ok := schema["properties"]; ok {
		return "object"
	}
	return "string"
}

func (f *filler) object(schema object) object {
	properties, _ := schema["properties"].(object)
	value := object{}
	for _, name := range list(schema["required"]) {
		if name, ok := name.(string); ok {
			property, _ := properties[name].(object)
			value[name] = f.value(property)
		}
	}
	return value
}

// referenced follows a reference within the schema: "#", or a path such as "#/$defs/step". What it does not find may be
// anything.
func (f *filler) referenced(ref string) any {
	if f.open[ref] {
		return nil // no value could satisfy it
	}
	f.open[ref] = true
	defer delete(f.open, ref)

	schema := f.root
	for _, step := range strings.Split(ref, "/")[1:] {
		schema, _ = schema[step].(object)
	}
	return f.value(schema)
}

func list(v any) []any {
	l, _ := v.([]any)
	return l
}
