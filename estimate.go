package mesh

import (
	"bytes"
	"sync"
	"sync/atomic"

	"github.com/tiktoken-go/tokenizer"
)

// An estimate stands in where an upstream does not say what an answer used, because it never does or because the
// answer was cut. It counts the tokens of the first maxSample bytes of the text with OpenAI's o200k_base vocabulary
// and scales the result to the whole, so that it costs the same however long the text is.
//
// The weights are OpenAI's: three tokens around each message and three before the answer
// (https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken), and 765 for an image of 1024 × 1024 in
// high detail (https://platform.openai.com/docs/guides/images-vision). Both as of 2026-11.
const (
	tokensPerMessage = 3
	tokensPerAnswer  = 3
	tokensPerImage   = 765

	bytesPerToken = 4 // OpenAI's rule of thumb for English
)

// estimate returns about how many tokens the prompt has.
func (p *promptSize) estimate(body []byte) int64 {
	return p.tokens(estimateTokens(p.text(body), p.bytes))
}

// quickEstimate is estimate by the rule of thumb alone, for where counting takes too long.
func (p *promptSize) quickEstimate() int64 { return p.tokens(int64(p.bytes) / bytesPerToken) }

// tokens adds to the tokens of the prompt's text those of all else in it.
func (p *promptSize) tokens(text int64) int64 {
	return text + int64(p.messages)*tokensPerMessage + int64(p.images)*tokensPerImage + tokensPerAnswer
}

// answerLength is how many tokens answers have had lately: a moving average over about the last averagedAnswers of them.
// The zero value says firstAnswer until it has learned better.
type answerLength struct{ scaled atomic.Int64 } // averagedAnswers times the average; 0 before the first

const (
	averagedAnswers = 64
	firstAnswer     = 256 // tokens
)

// note takes in an answer that ended.
func (a *answerLength) note(tokens int64) {
	for {
		was := a.scaled.Load()
		next := was + tokens - was/averagedAnswers
		if was == 0 {
			next = tokens * averagedAnswers
		}
		if a.scaled.CompareAndSwap(was, next) {
			return
		}
	}
}

// tokens returns the average.
func (a *answerLength) tokens() int64 {
	if scaled := a.scaled.Load(); scaled > 0 {
		return scaled / averagedAnswers
	}
	return firstAnswer
}

// textSample measures the text of an answer as it goes by.
type textSample struct {
	bytes  int    // as it stands in the JSON, escapes included
	sample []byte // the first maxSample bytes of it
}

func (t *textSample) add(raw []byte) {
	t.bytes += len(raw)
	if room := maxSample - len(t.sample); room > 0 {
		t.sample = append(t.sample, raw[:min(room, len(raw))]...)
	}
}

// estimate returns about how many tokens the answer has.
func (t *textSample) estimate() int64 { return estimateTokens(t.sample, t.bytes) }

// vocabulary is loaded when the first estimate needs it.
var vocabulary = sync.OnceValue(func() tokenizer.Codec {
	codec, err := tokenizer.Get(tokenizer.O200kBase)
	if err != nil {
		return nil // not with a vocabulary that is compiled in
	}
	return codec
})

// estimateTokens returns about how many tokens a text of length bytes has that begins with sample, both as they stand
// in JSON.
func estimateTokens(sample []byte, length int) int64 {
	if len(sample) == 0 {
		return 0
	}
	n := len(sample) / bytesPerToken
	if codec := vocabulary(); codec != nil {
		if count, err := codec.Count(string(unescape(wholeEscapes(sample)))); err == nil {
			n = count
		}
	}
	return max(1, int64(float64(n)*float64(length)/float64(len(sample))+0.5))
}

// wholeEscapes leaves out the escape sequence that a sample ends in the middle of: what has half of one in it cannot be
// unescaped, and has many more tokens as it stands.
func wholeEscapes(sample []byte) []byte {
	const longest = 6 // \u and four digits
	for at := max(0, len(sample)-longest); at < len(sample); at++ {
		before := len(sample[:at]) - len(bytes.TrimRight(sample[:at], `\`))
		if sample[at] == '\\' && before%2 == 0 && escapeLen(sample[at:]) == 0 {
			return sample[:at]
		}
	}
	return sample
}
