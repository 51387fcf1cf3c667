package mesh

import (
	"slices"
	"strings"
)

// preset is what is known of a provider: what `upstream <name> preset` writes into the configuration.
type preset struct {
	name            string
	address         string // of its API that takes OpenAI's chat completions; empty where everyone has another one
	keyHeader       string // carries the API key in place of Authorization
	provider        string // in files of prices, where that is not the preset's name
	noStreamOptions bool   // it refuses stream_options
}

// presets are from the pages that the comments name, as of 2026-11.
var presets = []preset{
	// https://platform.claude.com/docs/en/cli-sdks-libraries/libraries/openai-sdk
	{name: "anthropic", address: "https://api.anthropic.com/v1"},
	// https://learn.microsoft.com/en-us/azure/foundry/openai/api-version-lifecycle: https://<resource>.openai.azure.com/openai/v1
	{name: "azure", keyHeader: "api-key"},
	// https://api-docs.deepseek.com/quick_start/your_first_api_call
	{name: "deepseek", address: "https://api.deepseek.com"},
	// https://ai.google.dev/gemini-api/docs/openai
	{name: "gemini", address: "https://generativelanguage.googleapis.com/v1beta/openai"},
	// https://console.groq.com/docs/openai
	{name: "groq", address: "https://api.groq.com/openai/v1"},
	// https://docs.mistral.ai/api. It answers stream_options.include_usage with 422 and reports usage without being asked:
	// https://github.com/openai/openai-agents-python/issues/442, https://github.com/dnakov/anon-kode/issues/53
	{name: "mistral", address: "https://api.mistral.ai/v1", noStreamOptions: true},
	// https://docs.ollama.com/api/openai-compatibility
	{name: "ollama", address: "http://localhost:11434/v1"},
	// https://openrouter.ai/docs/quickstart
	{name: "openrouter", address: "https://openrouter.ai/api/v1"},
	// https://docs.together.ai/docs/inference/openai-compatibility
	{name: "together", address: "https://api.together.ai/v1", provider: "together_ai"},
	// https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
	{name: "vllm", address: "http://localhost:8000/v1", provider: "hosted_vllm"},
	// https://docs.x.ai/api/integrations
	{name: "xai", address: "https://api.x.ai/v1"},
}

func findPreset(name string) *preset {
	if i := slices.IndexFunc(presets, func(p preset) bool { return p.name == name }); i >= 0 {
		return &presets[i]
	}
	return nil
}

// preset writes what the preset says into u, and returns the addresses. It is called with what stands behind the word
// `preset`: the preset's name, unless that is the upstream's, and addresses in place of the preset's own.
func (p *blockParser) preset(u *Upstream, args []string) (addresses []string, err error) {
	name := u.Name
	if len(args) > 0 && !strings.ContainsAny(args[0], ":/") {
		name, args = args[0], args[1:]
	}
	known := findPreset(name)
	if known == nil {
		var names []string
		for i := range presets {
			names = append(names, presets[i].name)
		}
		return nil, p.Errf("upstream %s: there is no preset %q; there are %s", u.Name, name, strings.Join(names, ", "))
	}
	u.APIKeyHeader, u.NoStreamOptions = known.keyHeader, known.noStreamOptions
	if known.provider != "" {
		u.Provider = known.provider
	} else if known.name != u.Name {
		u.Provider = known.name
	}
	if len(args) > 0 {
		return args, nil
	}
	if known.address == "" {
		return nil, p.Errf("upstream %s: preset %s needs an address", u.Name, known.name)
	}
	return []string{known.address}, nil
}
