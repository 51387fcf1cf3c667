package mesh

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// saidMessage is a message as a test looks at it.
type saidMessage struct {
	Role       string
	Content    any
	ToolCallID string                `json:"tool_call_id"`
	ToolCalls  []struct{ ID string } `json:"tool_calls"`
}

func messagesOf(t *testing.T, body []byte) []saidMessage {
	t.Helper()
	var request struct{ Messages []saidMessage }
	if err := json.Unmarshal(body, &request); err != nil {
		t.Fatalf("%v in %s", err, body)
	}
	return request.Messages
}

// sentFor returns what a candidate with a context of that many tokens gets of a request.
func sentFor(req *chatRequest, context int64) []byte {
	parts, _ := req.segmentsFor(&candidate{as: "small", upstream: new(Upstream), context: context, middleOut: true})
	return bytes.Join(parts, nil)
}

// estimated returns about how many tokens a conversation has, as middle-out counts them.
func estimated(t *testing.T, body []byte) (total int64, turns []turn) {
	t.Helper()
	req, refused := parseChat(body)
	if refused != nil {
		t.Fatalf("%v %v in %s", refused, refused.details, body)
	}
	turns = takeTurns(req.readMessages())
	for _, at := range turns {
		total += at.tokens
	}
	return total + tokensPerAnswer + int64(req.tools.to-req.tools.from)/bytesPerToken, turns
}

// sameMessage reports whether b is a, or a with its content cut in the middle.
func sameMessage(a, b saidMessage) bool {
	was, isText := a.Content.(string)
	is, _ := b.Content.(string)
	if before, after, cut := strings.Cut(is, cutMark); isText && cut && was != is {
		if !strings.HasPrefix(was, before) || !strings.HasSuffix(was, after) || len(before)+len(after) > len(was) {
			return false
		}
		b.Content = a.Content
	}
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return bytes.Equal(x, y)
}

// checkMiddleOut holds what became of a conversation against the promises.
func checkMiddleOut(t *testing.T, body []byte, context int64) {
	t.Helper()
	req, refused := parseChat(body)
	if refused != nil {
		t.Fatal(refused)
	}
	sent := sentFor(req, context)
	before, after := messagesOf(t, body), messagesOf(t, sent)
	kept, k := make([]bool, len(before)), 0
	for _, m := range after { // a subsequence, in order
		for k < len(before) && !sameMessage(before[k], m) {
			k++
		}
		if k == len(before) {
			t.Fatalf("%+v was not in the conversation, or is out of order", m)
		}
		kept[k], k = true, k+1
	}
	first := slices.IndexFunc(before, func(m saidMessage) bool { return m.Role != "system" && m.Role != "developer" })
	for i, m := range before {
		if must := m.Role == "system" || m.Role == "developer" || i == first || i == len(before)-1; must && !slices.ContainsFunc(after, func(a saidMessage) bool { return sameMessage(m, a) }) {
			t.Errorf("message %d (%s) is gone", i, m.Role)
		}
	}
	count := func(list []saidMessage) map[string]int {
		n := make(map[string]int)
		for _, m := range list {
			for _, c := range m.ToolCalls {
				n[c.ID]++
			}
			if m.Role == "tool" {
				n[m.ToolCallID] += 1000
			}
		}
		return n
	}
	early := make(map[string]bool) // ids of results that stand before their call
	called := make(map[string]bool)
	for _, m := range before {
		for _, c := range m.ToolCalls {
			called[c.ID] = true
		}
		early[m.ToolCallID] = early[m.ToolCallID] || m.Role == "tool" && !called[m.ToolCallID]
	}
	all := count(before)
	for id, n := range count(after) {
		// Ids that more than one call has, and results before their call, are the client's mistake.
		if all[id]%1000 == 1 && !early[id] && n != all[id] {
			t.Errorf("call %s was separated from its results: %d of %d", id, n, all[id])
		}
	}
	room := context - context/20 - req.maxTokens
	was, _ := estimated(t, body)
	is, turns := estimated(t, sent)
	if (was <= room || room <= 0) && !bytes.Equal(sent, sentFor(req, 0)) {
		t.Errorf("it would have fitted as it was: %d of %d", was, room)
	}
	if room > 0 && is > room && len(droppable(turns)) > 0 {
		t.Errorf("it has %d tokens of %d, and turns that could go", is, room)
	}
}

func TestMiddleOutOfRecordedConversations(t *testing.T) {
	files, err := filepath.Glob("testdata/conversations/*.json")
	if err != nil || len(files) < 3 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		body, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		total, _ := estimated(t, body)
		for _, context := range []int64{10, 100, 500, 1000, 2000, 3000, 5000, total, 2 * total, 1 << 40} {
			t.Run(filepath.Base(file), func(t *testing.T) { checkMiddleOut(t, body, context) })
		}
		req, _ := parseChat(body)
		if is, _ := estimated(t, sentFor(req, 1500)); is > 1500 {
			t.Errorf("%s has %d tokens of 1500", file, is)
		}
	}
}

func FuzzMiddleOut(f *testing.F) {
	f.Add([]byte("suauatTaTTtu"), uint16(120), "words in \"a\" text é😀 ")
	f.Add([]byte("suTauTTTau"), uint16(300), `\ud83d`)
	f.Add([]byte("sstattu"), uint16(40), "x")
	f.Fuzz(func(t *testing.T, script []byte, context uint16, text string) {
		if len(script) > 60 || len(text) > 200 {
			t.Skip()
		}
		text = strings.ReplaceAll(strings.ToValidUTF8(text, "?"), cutMark, ".")
		var list []map[string]any
		calls := 0
		id := func(n int) string { return "call" + string(rune('a'+n)) }
		for i, b := range script {
			content := string(rune('A'+i%26)) + strings.Repeat(text, int(b)%17)
			switch b % 6 {
			case 0:
				list = append(list, map[string]any{"role": "system", "content": content})
			case 1, 2:
				list = append(list, map[string]any{"role": "user", "content": content})
			case 3:
				list = append(list, map[string]any{"role": "assistant", "content": content})
			case 4:
				list = append(list, map[string]any{"role": "assistant", "content": nil, "tool_calls": []any{map[string]any{"id": id(calls), "type": "function", "n": i}}})
				calls++
			default:
				list = append(list, map[string]any{"role": "tool", "tool_call_id": id(max(0, calls-1-int(b)%3)), "content": content})
			}
		}
		if len(list) == 0 {
			t.Skip()
		}
		body, err := json.Marshal(map[string]any{"messages": list, "model": "x"})
		if err != nil {
			t.Fatal(err)
		}
		checkMiddleOut(t, body, int64(context))
	})
}

func TestMiddleOutIsForWhoWantsIt(t *testing.T) {
	long, err := os.ReadFile("testdata/conversations/chat.json")
	if err != nil {
		t.Fatal(err)
	}
	up := startUpstream(t, answers(200, "application/json", completion))
	g := startGateway(t, up.address(), site(`	model test/small up {
		context_length 1500
		transforms middle-out
	}
	model test/strict up {
		context_length 1500
	}
	model test/endless up {
		transforms middle-out
	}`))
	for _, tc := range []struct {
		model, transforms string
		shorter           bool
	}{
		{"small", "", true}, {"small", "null", true}, {"small", "[]", false}, {"small", `["middle-out"]`, true},
		{"strict", "", false}, {"strict", "[]", false}, {"strict", `["middle-out"]`, true},
		{"endless", "", false}, {"endless", `["middle-out"]`, false},
	} {
		body := strings.Replace(string(long), "test/small", "test/"+tc.model, 1)
		want := strings.Replace(string(long), "test/small", tc.model, 1)
		if tc.transforms != "" {
			body = strings.Replace(body, "{", `{"transforms":`+tc.transforms+`,`, 1)
		}
		if r := g.post(body); r.StatusCode != http.StatusOK {
			t.Fatalf("%s %s", r.Status, r.body)
		}
		got := up.last(t).body
		if shorter := len(got) < len(want)-100; shorter != tc.shorter || len(got) > len(want) {
			t.Errorf("%s with %q: %d bytes of %d", tc.model, tc.transforms, len(got), len(want))
		}
	}
	g.ledger(9)
}

func TestEachCandidateGetsWhatFitsIt(t *testing.T) {
	long, err := os.ReadFile("testdata/conversations/chat.json")
	if err != nil {
		t.Fatal(err)
	}
	whole, _ := estimated(t, long)
	up := startUpstream(t, answers(503, "application/json", bad))
	g := startGateway(t, up.address(), site(`	model test/rising up {
		context_length 1000
		transforms middle-out
		fallback test/middling test/large
	}
	model test/falling up {
		context_length 100000
		transforms middle-out
		fallback test/middling test/small
	}
	model test/middling up {
		context_length 1500
		transforms middle-out
	}
	model test/large up {
		context_length 100000
		transforms middle-out
	}
	model test/small up {
		context_length 1000
		transforms middle-out
	}`))
	const small, middling = 1000, 1500
	asked := 0
	for first, fits := range map[string][]int64{"rising": {small, middling, whole}, "falling": {whole, middling, small}} {
		if r := g.post(strings.Replace(string(long), "test/small", "test/"+first, 1)); r.StatusCode != http.StatusBadGateway {
			t.Fatalf("%s %s", r.Status, r.body)
		}
		got := up.received()[asked:]
		if asked += len(got); len(got) != len(fits) {
			t.Fatalf("%s: %d candidates were asked", first, len(got))
		}
		for i, most := range fits {
			least := map[int64]int64{small: 0, middling: small, whole: whole}[most]
			if total, _ := estimated(t, got[i].body); total > most || total < least {
				t.Errorf("%s: of %d tokens candidate %d got %d; from %d to %d are right", first, whole, i, total, least, most)
			}
		}
	}
}

func TestShortenedTextIsCutBetweenCharacters(t *testing.T) {
	for _, raw := range []string{strings.Repeat("é😀", 50), strings.Repeat(`\ud83d\ude00`, 50), strings.Repeat(`\n\"\u00e9`, 50), strings.Repeat(`\ud83d`, 50)} {
		for keep := range len(raw) {
			gone := middleOf([]byte(raw), keep)
			var is, was string
			if err := json.Unmarshal([]byte(`"`+raw[:gone.from]+cutMark+raw[gone.to:]+`"`), &is); err != nil {
				t.Fatalf("%d of %s: %v", keep, raw, err)
			}
			json.Unmarshal([]byte(`"`+raw+`"`), &was) //nolint:errcheck // it is valid
			before, after, _ := strings.Cut(is, cutMark)
			if !strings.HasPrefix(was, before) || !strings.HasSuffix(was, after) || gone.from+len(raw)-gone.to > keep+12 {
				t.Fatalf("%d of %s: %q", keep, raw, is)
			}
		}
	}
}

func TestEstimateDoesNotCountHalfAnEscape(t *testing.T) {
	for raw, want := range map[string]string{
		`ab`: `ab`, `a\`: `a`, `a\\`: `a\\`, `a\\\`: `a\\`, `a\u12`: `a`, `a\u1234`: `a\u1234`, `a\\u12`: `a\\u12`, `\u`: ``, ``: ``, `\n\u00e`: `\n`,
	} {
		if got := string(wholeEscapes([]byte(raw))); got != want {
			t.Errorf("%s: %s, want %s", raw, got, want)
		}
	}
}
