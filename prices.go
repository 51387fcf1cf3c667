package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// priceBook is what the files of `prices` say. They have the format of LiteLLM's model_prices_and_context_window.json: an
// object with a member for each model.
type priceBook struct {
	models    map[string]*listedModel
	providers map[string]map[string]*listedModel // models whose name begins with `<provider>/`, without that
}

// listedModel is a model of a price book.
type listedModel struct {
	price   *Price // nil where it has no price per token, request or image
	context int64
	about   About
}

const (
	// maxPriceFile is how many bytes a file of prices may have.
	maxPriceFile = 10 << 20

	// A price beyond these is in another unit, most likely a million times too high or too low. The dearest models cost
	// some hundreds of USD per million tokens, the cheapest some thousandths. Per million tokens, and per request or image:
	maxListedPrice   = 10_000 * usd
	minListedPrice   = usd / 10_000
	maxListedRequest = 1_000 * usd
)

// readPrices reads the files. Where they say different things of a model, the last one counts.
func readPrices(files []string, logger *zap.Logger) (*priceBook, error) {
	b := &priceBook{models: make(map[string]*listedModel), providers: make(map[string]map[string]*listedModel)}
	for _, file := range files {
		path, err := caddy.NewReplacer().ReplaceOrErr(file, true, true)
		if err != nil {
			return nil, fmt.Errorf("prices %s: %w", file, err)
		}
		text, err := readPriceFile(path)
		if err != nil {
			return nil, fmt.Errorf("prices: %w", err)
		}
		absurd, err := b.add(text)
		if err != nil {
			return nil, fmt.Errorf("prices %s: %w", path, err)
		}
		for _, name := range absurd {
			logger.Warn("a price is off by so much that it must be in another unit; the model is left out",
				zap.String("file", path), zap.String("model", name))
		}
	}
	return b, nil
}

func readPriceFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxPriceFile+1))
	if err == nil && len(text) > maxPriceFile {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxPriceFile)
	}
	return text, err
}

// add takes in a file, and returns the models that it leaves out.
func (b *priceBook) add(text []byte) (absurd []string, err error) {
	var models map[string]json.RawMessage
	if err := json.Unmarshal(text, &models); err != nil {
		return nil, err
	}
	for name, raw := range models {
		if name == "sample_spec" { // explains the format
			continue
		}
		var l listing
		if err := json.Unmarshal(raw, &l); err != nil {
			return nil, fmt.Errorf("model %s: %w", name, err)
		}
		m, err := l.model()
		if errors.Is(err, errAbsurd) {
			absurd = append(absurd, name)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("model %s: %w", name, err)
		}
		b.models[name] = m
		if provider, rest, ok := strings.Cut(name, "/"); ok {
			if b.providers[provider] == nil {
				b.providers[provider] = make(map[string]*listedModel)
			}
			b.providers[provider][rest] = m
		}
	}
	return absurd, nil
}

// find returns what the book says of a model that clients call name: under that name, else under the name it has at
// one of its upstreams, else under that with the provider in front. It returns nil where it says nothing.
func (b *priceBook) find(name string, targets []*Target, upstreams []*Upstream) *listedModel {
	if m := b.models[name]; m != nil {
		return m
	}
	for _, t := range targets {
		if m := b.models[t.nameThere(name)]; m != nil {
			return m
		}
	}
	for i, t := range targets {
		if m := b.providers[upstreams[i].provider()][t.nameThere(name)]; m != nil {
			return m
		}
	}
	return nil
}

// listing is a model as a file has it. Prices are in USD per token.
type listing struct {
	Input         *json.Number `json:"input_cost_per_token"`
	Output        *json.Number `json:"output_cost_per_token"`
	Cached        *json.Number `json:"cache_read_input_token_cost"`
	InputAudio    *json.Number `json:"input_cost_per_audio_token"`
	OutputAudio   *json.Number `json:"output_cost_per_audio_token"`
	OutputPixels  *json.Number `json:"output_cost_per_image_token"`
	Image         *json.Number `json:"output_cost_per_image"`
	Request       *json.Number `json:"input_cost_per_request"`
	MaxInput      *json.Number `json:"max_input_tokens"`
	MaxOutput     *json.Number `json:"max_output_tokens"`
	MaxTokens     *json.Number `json:"max_tokens"` // of input, where the other two are not given
	Mode          string       `json:"mode"`
	Tools         bool         `json:"supports_function_calling"`
	Schema        bool         `json:"supports_response_schema"`
	Reasoning     bool         `json:"supports_reasoning"`
	ImageInput    bool         `json:"supports_vision"`
	AudioInput    bool         `json:"supports_audio_input"`
	VideoInput    bool         `json:"supports_video_input"`
	DocumentInput bool         `json:"supports_pdf_input"`
	AudioOutput   bool         `json:"supports_audio_output"`
}

var errAbsurd = errors.New("the price is absurd")

func (l *listing) model() (m *listedModel, err error) {
	m = &listedModel{about: l.about()}
	if m.context, err = l.context(); err != nil {
		return nil, err
	}
	if m.about.Type == kindImage && l.OutputPixels != nil { // all that it makes are images
		l.Output = l.OutputPixels
	}
	if l.Input == nil && l.Output == nil && l.InputAudio == nil && l.OutputAudio == nil && l.Request == nil && l.Image == nil {
		return m, nil
	}
	m.price, err = l.price()
	return m, err
}

func (l *listing) price() (p *Price, err error) {
	p = new(Price)
	if p.Input, err = listedPrice(l.Input); err != nil {
		return nil, err
	}
	if p.Output, err = listedPrice(l.Output); err != nil {
		return nil, err
	}
	for _, special := range []struct {
		listed *json.Number
		to     **Money
	}{{l.Cached, &p.Cached}, {l.InputAudio, &p.AudioInput}, {l.OutputAudio, &p.AudioOutput}} {
		if special.listed == nil {
			continue
		}
		amount, err := listedPrice(special.listed)
		if err != nil {
			return nil, err
		}
		*special.to = &amount
	}
	if p.Image, err = listedAmount(l.Image); err != nil {
		return nil, err
	}
	p.Request, err = listedAmount(l.Request)
	return p, err
}

// listedAmount reads a price that is not one of tokens.
func listedAmount(n *json.Number) (Money, error) {
	if n == nil {
		return 0, nil
	}
	amount, ok := scaled(n.String(), 9)
	if !ok || amount > maxListedRequest {
		return 0, errAbsurd
	}
	return amount, nil
}

// listedPrice reads a price per token as one per million tokens.
func listedPrice(n *json.Number) (Money, error) {
	if n == nil {
		return 0, nil
	}
	const perMillionInNanoDollars = 6 + 9
	amount, ok := scaled(n.String(), perMillionInNanoDollars)
	isZero := strings.Trim(mantissa(n.String()), "0.-") == ""
	if !ok || amount > maxListedPrice || amount < minListedPrice && !isZero {
		return 0, errAbsurd
	}
	return amount, nil
}

func (l *listing) context() (int64, error) {
	tokens := func(n *json.Number) (int64, error) {
		if n == nil {
			return 0, nil
		}
		count, ok := scaled(n.String(), 0)
		if !ok {
			return 0, fmt.Errorf("%s is no number of tokens", n)
		}
		return int64(count), nil
	}
	input, err := tokens(l.MaxInput)
	if err != nil {
		return 0, err
	}
	output, err := tokens(l.MaxOutput)
	if err != nil {
		return 0, err
	}
	if input == 0 && output == 0 {
		return tokens(l.MaxTokens)
	}
	if input == 0 { // how much of an answer there may be says nothing of the prompt
		return 0, nil
	}
	return max(input, output), nil
}

// about translates what the file says a model can do.
func (l *listing) about() (a About) {
	add := func(to *[]string, words ...any) {
		for i := 0; i < len(words); i += 2 {
			if words[i].(bool) {
				*to = append(*to, words[i+1].(string))
			}
		}
	}
	a.Supports = []string{}
	add(&a.Supports, l.Tools, canTools, l.Schema, canStructuredOutput, l.Reasoning, canThinking)
	a.InputModalities = []string{"text"}
	add(&a.InputModalities, l.ImageInput, "image", l.AudioInput, "audio", l.VideoInput, "video", l.DocumentInput, "file")
	a.OutputModalities = []string{"text"}
	add(&a.OutputModalities, l.AudioOutput, "audio")
	switch l.Mode {
	case "", "chat", "completion", "responses":
	case "image_generation", "image_edit":
		a.Type, a.OutputModalities = "image", []string{"image"}
	case "audio_speech":
		a.Type, a.OutputModalities = "audio", []string{"audio"}
	case "audio_transcription":
		a.Type, a.InputModalities = "audio", []string{"audio"}
	case "video_generation":
		a.Type, a.OutputModalities = "video", []string{"video"}
	case "embedding", "rerank", "moderation", "ocr", "search":
		a.Type, a.OutputModalities = l.Mode, []string{}
	default:
		a.Type = strings.Join(strings.Fields(l.Mode), "_")
	}
	return a
}

func mantissa(number string) string {
	if i := strings.IndexAny(number, "eE"); i >= 0 {
		return number[:i]
	}
	return number
}

// scaled returns a JSON number times ten to the power of shift, to the nearest whole, halves up. Only what is finer
// than that is rounded: no float comes between. It fails where the number is negative, or where the result does not fit.
func scaled(number string, shift int) (Money, bool) {
	digits := mantissa(number)
	exponent := shift
	if len(digits) < len(number) {
		e, err := strconv.Atoi(number[len(digits)+1:])
		if err != nil || e > 1000 || e < -1000 {
			return 0, false
		}
		exponent += e
	}
	whole, fraction, _ := strings.Cut(digits, ".")
	exponent -= len(fraction)
	digits = strings.TrimLeft(whole+fraction, "0")
	if strings.Trim(digits, "-0") == "" {
		return 0, true
	}
	keep := len(digits) + exponent
	if digits[0] == '-' || keep > 19 {
		return 0, false
	}
	if keep < 0 {
		return 0, true
	}
	up := Money(0)
	if keep < len(digits) {
		if digits[keep] >= '5' {
			up = 1
		}
		digits = digits[:keep]
	}
	n, err := strconv.ParseInt("0"+digits+strings.Repeat("0", keep-len(digits)), 10, 64)
	return Money(n).plus(up), err == nil
}
