package main

import (
	"strings"
	"testing"
)

func TestCaddyfileSetsTheDelay(t *testing.T) {
	for directive, want := range map[string]string{
		"demo_model":                            `{"handler":"demo_model"}`,
		"demo_model 1s":                         `{"delay":1000000000,"handler":"demo_model"}`,
		"demo_model 0":                          `{"delay":-1,"handler":"demo_model"}`,
		"demo_model /demo/* 5ms":                `{"delay":5000000,"handler":"demo_model"}`,
		"demo_model\n\treverse_proxy localhost": `{"handler":"reverse_proxy","upstreams":[{"dial":"localhost:80"}]},{"handler":"demo_model"}`,
	} {
		config, err := adapt("http://localhost {\n\t" + directive + "\n}\n")
		if err != nil {
			t.Errorf("%s: %v", directive, err)
		}
		if !strings.Contains(string(config), `"handle":[`+want+`]`) {
			t.Errorf("%s: got %s, want the handler %s", directive, config, want)
		}
	}
}

func TestCaddyfileMistakesAreErrors(t *testing.T) {
	for directive, want := range map[string]string{
		"demo_model fast":                 "parsing delay",
		"demo_model -1s":                  "negative",
		"demo_model 1s 2s":                "wrong argument count",
		"demo_model {\n\t\tdelay 1s\n\t}": `unrecognized subdirective "delay"`,
	} {
		_, err := adapt("http://localhost {\n\t" + directive + "\n}\n")
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "Caddyfile:") {
			t.Errorf("%s: got error %v, want one with a line and %q", directive, err, want)
		}
	}
}
