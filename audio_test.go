package mesh

import (
	"net/http"
	"strings"
	"testing"

	"go.uber.org/zap"
)

func amount(m Money) *Money { return &m }

func TestSoundHasItsOwnPriceWhereThereIsOne(t *testing.T) {
	plain := Price{Input: 2_000_000, Output: 10_000_000} // two nano-dollars a token, and ten
	sound := plain
	sound.AudioInput, sound.AudioOutput = amount(40_000_000), amount(80_000_000)
	cached := sound
	cached.Cached = amount(1_000_000)
	for _, tc := range []struct {
		name  string
		price Price
		used  usage
		want  Money
	}{
		{"no sound", sound, usage{prompt: 100, completion: 10}, 200 + 100},
		{"only sound", sound, usage{prompt: 100, promptAudio: 100, completion: 10, completionAudio: 10}, 4000 + 800},
		{"both", sound, usage{prompt: 100, promptAudio: 70, completion: 10, completionAudio: 4}, 30*2 + 70*40 + 6*10 + 4*80},
		{"without a price of its own", plain, usage{prompt: 100, promptAudio: 70, completion: 10, completionAudio: 4}, 200 + 100},
		{"beside what was cached", cached, usage{prompt: 100, cached: 20, promptAudio: 70}, 10*2 + 20*1 + 70*40},
		{"some of it cached", cached, usage{prompt: 100, cached: 60, promptAudio: 70}, 60*1 + 40*40},
		{"more than there are tokens", sound, usage{prompt: 10, promptAudio: 70, completion: 1, completionAudio: 2}, 400 + 80},
	} {
		if got := tc.price.cost(tc.used); got != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.want)
		}
	}
}

const audioModel = `	model test/voice up {
		price 2.50 10.00
		price_audio 40.00 80.00
	}`

const audioBody = `{"model":"test/voice","modalities":["text","audio"],"audio":{"voice":"alloy","format":"pcm16"},"messages":[{"role":"user","content":"Are dogs loyal?"}]}`

// 27 × 2.50 + 98 × 40 + 12 × 10 + 34 × 80 of speech.sse, and 30 × 2.50 + 100 × 40 + 20 × 10 + 50 × 80 of speech.json,
// per million
const (
	speechStreamCost = 6_827_500
	speechCost       = 8_275_000
)

func TestSoundOfAStreamPassesAndIsCharged(t *testing.T) {
	up := startUpstream(t, plays(t, "speech.sse"))
	g := startGateway(t, up.address(), site(audioModel))
	r := g.post(strings.Replace(audioBody, "{", `{"stream":true,"stream_options":{"include_usage":true},`, 1))
	want := strings.Replace(string(recorded(t, "speech.sse")), `"text_tokens":12}}}`, `"text_tokens":12}},"cost":"0.0068275"}`, 1)
	if string(r.body) != want {
		t.Errorf("got %s", r.body)
	}
	if body := string(up.last(t).body); !strings.Contains(body, `"modalities":["text","audio"],"audio":{"voice":"alloy","format":"pcm16"}`) {
		t.Errorf("the upstream received %s", body)
	}
	e := g.ledger(1)[0]
	if e.PromptTokens != 125 || e.PromptAudioTokens != 98 || e.CompletionTokens != 46 || e.CompletionAudioTokens != 34 || e.Cost != speechStreamCost {
		t.Errorf("%+v", e)
	}
	if e.TTFT == 0 {
		t.Error("nobody noticed when it began to speak")
	}
}

func TestSoundOfAWholeAnswerIsChargedAndReported(t *testing.T) {
	up := startUpstream(t, plays(t, "speech.json"))
	g := startGateway(t, up.address(), site(audioModel))
	r := g.post(audioBody)
	if r.decode(t)["cost"] != "0.008275" {
		t.Errorf("%s", r.body)
	}
	if e := g.ledger(1)[0]; e.PromptAudioTokens != 100 || e.CompletionAudioTokens != 50 || e.Cost != speechCost || e.Estimated {
		t.Errorf("%+v", e)
	}
	report := g.do(http.MethodGet, "/v1/usage/requests/"+r.Header.Get("X-Request-Id"), "")
	if !strings.Contains(string(report.body), `"prompt_audio_tokens":100,"completion_audio_tokens":50`) {
		t.Errorf("%s", report.body)
	}
}

// TestBrokenOffSpeechIsChargedWhatWasSaid has no usage, but a transcript of what the client has heard.
func TestBrokenOffSpeechIsChargedWhatWasSaid(t *testing.T) {
	said := `data: {"choices":[{"index":0,"delta":{"audio":{"transcript":"` + longWords + `","data":"` + strings.Repeat("AAAA", 1000) + `"}}}]}` + "\n\n"
	up := startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		answers(200, "text/event-stream", said)(w, r)
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	g := startGateway(t, up.address(), site(audioModel))
	g.post(strings.Replace(audioBody, "{", `{"stream":true,`, 1))
	if e := g.ledger(1)[0]; e.Outcome != OutcomeCut || e.CompletionTokens != 17 || !e.Estimated {
		t.Errorf("%+v", e)
	}
}

func TestEachUpstreamMayHaveItsOwnPriceOfSound(t *testing.T) {
	up := startUpstream(t, plays(t, "speech.json"))
	g := startGateway(t, up.address(), site(`	model test/voice {
		upstream up price 2.50 10.00 price_audio 40.00 80.00
		price 1 1
	}
	model test/turned {
		upstream up price_audio 40.00 80.00 as x price 2.50 10.00 weight 2
	}`))
	for _, model := range []string{"test/voice", "test/turned"} {
		if r := g.post(strings.Replace(audioBody, "test/voice", model, 1)); r.decode(t)["cost"] != "0.008275" {
			t.Errorf("%s: %s", model, r.body)
		}
	}
}

func TestAudioNeedsItsModality(t *testing.T) {
	const fault = "value_error audio: Value error, audio needs 'audio' among the modalities"
	expectFaults(t, `{"audio":{"voice":"alloy"},`+msgs+`}`, fault)
	expectFaults(t, `{"audio":{},"modalities":["text","image"],`+msgs+`}`, fault)
	expectFaults(t, `{"audio":{},"modalities":null,"temperature":3,`+msgs+`}`, "less_than_equal temperature: Input should be less than or equal to 2", fault)
	expectFaults(t, `{"audio":{"voice":"alloy","format":"wav"},"modalities":["text","audio"],`+msgs+`}`)
	expectFaults(t, `{`+msgs+`,"modalities":["audio"],"audio":{}}`)
	expectFaults(t, `{"audio":null,`+msgs+`}`)
	expectFaults(t, `{"modalities":["audio"],`+msgs+`}`)
}

func TestMostThatARequestCanCostIsInTheDearerPrice(t *testing.T) {
	req, refused := parseChat([]byte(`{"max_tokens":10,` + msgs + `}`))
	if refused != nil {
		t.Fatal(refused)
	}
	most := func(p Price) Money {
		cost, bounded := req.maxCost([]candidate{{price: &p}})
		if !bounded {
			t.Errorf("%+v: nothing bounds it", p)
		}
		return cost
	}
	text := most(Price{Input: 1_000_000, Output: 2_000_000})
	dear := most(Price{Input: 1_000_000, Output: 2_000_000, AudioInput: amount(40_000_000), AudioOutput: amount(80_000_000)})
	if prompt := text - 20; dear != 40*prompt+800 {
		t.Errorf("%d, and with sound %d", text, dear)
	}
	if cheap := most(Price{Input: 1_000_000, Output: 2_000_000, AudioInput: amount(0), AudioOutput: amount(0)}); cheap != text {
		t.Errorf("%d, and with sound for nothing %d", text, cheap)
	}
	for _, message := range []string{
		`{"role":"user","content":[{"type":"input_audio","input_audio":{"data":"AA==","format":"wav"}}]}`,
		`{"role":"assistant","audio":{"id":"audio_1"}}`,
	} {
		spoken, refused := parseChat([]byte(`{"max_tokens":1,"messages":[` + message + `]}`))
		if refused != nil {
			t.Fatal(refused)
		}
		if _, bounded := spoken.maxCost([]candidate{{price: &Price{AudioInput: amount(40_000_000)}}}); bounded {
			t.Errorf("a recording of unknown length is bounded: %s", message)
		}
	}
}

func TestFileOfPricesKnowsWhatSoundCosts(t *testing.T) {
	book, err := readPrices([]string{inventedPrices}, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	p := book.models["acme/voice"].price
	if p.Input != 2_500_000_000 || p.AudioInput == nil || *p.AudioInput != 40*usd || p.AudioOutput == nil || *p.AudioOutput != 80*usd {
		t.Errorf("%+v", p)
	}
	if p := book.models["acme/gpt-zero"].price; p.AudioInput != nil || p.AudioOutput != nil {
		t.Errorf("%+v", p)
	}
	for _, field := range []string{"input_cost_per_audio_token", "output_cost_per_audio_token"} {
		for price, absurd := range map[string]bool{"4e-05": false, "0": false, "40": true, "1e-13": true, "-1e-6": true} {
			left, err := book.add([]byte(`{"x":{"` + field + `":` + price + `}}`))
			if err != nil || (len(left) == 1) != absurd {
				t.Errorf("%s %s: %v %v", field, price, left, err)
			}
		}
	}
}

func TestModelWithAPriceOfSoundIsNotFree(t *testing.T) {
	for _, p := range []Price{{AudioInput: amount(1)}, {AudioOutput: amount(1)}} {
		if p.free() {
			t.Errorf("%+v is free", p)
		}
	}
	if p := (Price{AudioInput: amount(0), AudioOutput: amount(0)}); !p.free() {
		t.Error("what costs nothing is not free")
	}
}
