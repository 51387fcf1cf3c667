package mesh

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// autoPaints is autoBlock with a model among the candidates that makes images, at 0.01 each.
var autoPaints = strings.Replace(autoBlock, "candidate paid/large", "candidate test/painter \"pictures\"\n\t\tcandidate paid/large", 1) +
	"\tmodel test/painter up {\n\t\ttype image\n\t\tprice_image 0.01\n\t}\n"

// routedAndPainting is routed with an images API beside it.
func routedAndPainting(t *testing.T, says func(*http.Request) string) *upstream {
	paints, speaks := plays(t, "images_url.json"), routes(says)
	return startUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, imagesPath) {
			paints(w, r)
			return
		}
		speaks(w, r)
	})
}

func TestImagesOfAnAutoModelSayWhatTheyCost(t *testing.T) {
	onlyPainter := strings.Replace(site(autoPaints), "name tester", "name tester\n\t\tmodels test/painter", 1)
	for name, c := range map[string]struct {
		site    string
		entries int // of one request
	}{
		"chosen":       {site(autoPaints), 2},
		"the only one": {onlyPainter, 1},
	} {
		t.Run(name, func(t *testing.T) {
			g := startGateway(t, routedAndPainting(t, saying("test/painter")).address(), c.site)
			const body = `{"model":"auto","messages":[{"role":"user","content":"An otter"}]`
			whole, stream := g.post(body+"}"), g.post(body+`,"stream":true,"stream_options":{"include_usage":true}}`)
			job := g.becomes(g.submit(body+`,"async_mode":true}`), JobCompleted)
			for _, answer := range []string{string(whole.body), string(stream.body), string(job.Response)} {
				if strings.Count(answer, `"cost":"0.01"`) != 1 || strings.Contains(answer, "\n\n") != (answer == string(stream.body)) {
					t.Errorf("%s", answer)
				}
			}
			events := g.ledger(3 * c.entries)
			for _, e := range events {
				if e.ParentID == "" && (e.Model != "test/painter" || e.Images != 1 || e.Cost != 10_000_000) {
					t.Errorf("%+v", e)
				}
			}
			g.spent(events)
		})
	}
}

func TestAutoChoosesAmongModelsThatCanTakeTheRequest(t *testing.T) {
	const (
		said   = `"messages":[{"role":"user","content":"An otter"}]`
		seen   = `"messages":[{"role":"user","content":[{"type":"text","text":"What is it?"},{"type":"image_url","image_url":{"url":"https://example.com/x.png"}}]}]`
		tools  = `"tools":[{"type":"function","function":{"name":"f"}}],`
		small  = "paid/small: short questions"
		paints = "test/painter: pictures"
	)
	onlyTexts, onlyPaints := strings.Replace(site(autoPaints), "name tester", "name tester\n\t\tmodels paid/*", 1),
		strings.Replace(site(autoPaints), "name tester", "name tester\n\t\tmodels test/painter", 1)
	painterElse := site(strings.NewReplacer("candidate test/painter \"pictures\"\n", "\n", "default paid/large", "default test/painter").Replace(autoPaints))
	all := []string{small, paints, "paid/large: mathematics", "test/code: programs"}
	texts := []string{all[0], all[2], all[3]}
	for name, c := range map[string]struct {
		site, body string
		says       string
		asked      []string // what the classifier is asked to choose among
		want       string
	}{
		"all can":                     {site(autoPaints), said, "test/painter", all, "test/painter"},
		"a temperature":               {site(autoPaints), `"temperature":1,` + said, "test/painter", texts, "paid/large"},
		"tools":                       {site(autoPaints), tools + said, "test/code", texts, "test/code"},
		"a picture to see":            {site(autoPaints), seen, "paid/small", texts, "paid/small"},
		"options of images":           {site(autoPaints), `"image":{"n":2},` + said, "", nil, "test/painter"},
		"images":                      {site(autoPaints), `"modality":"image",` + said, "", nil, "test/painter"},
		"images, where none is known": {onlyTexts, `"modality":"image",` + said, "paid/small", texts[:2], "paid/small"},
		"only the default can":        {painterElse, `"image":{"size":"1x1"},` + said, "", nil, "test/painter"},
		"all but the default can":     {painterElse, `"temperature":1,` + said, "nobody", texts, "paid/small"},
		"none can, of texts":          {onlyTexts, `"image":{"n":2},` + said, "", nil, "422 image"},
		"none can, of images":         {onlyPaints, tools + said, "", nil, "422 tools"},
		"none can":                    {site(autoPaints), `"image":{"n":2},` + tools + said, "", nil, "422 image"},
		"it is wrong for images":      {site(autoPaints), `"modality":"image",` + tools + said, "", nil, "422 tools"},
	} {
		t.Run(name, func(t *testing.T) {
			up := routedAndPainting(t, saying(c.says))
			g := startGateway(t, up.address(), c.site)
			r := g.post(`{"model":"auto",` + c.body + `}`)
			got := r.Header.Get("X-Resolved-Model-Id")
			if e, failed := r.decode(t)["error"].(map[string]any); failed {
				got = fmt.Sprint(r.StatusCode, " ", e["param"])
			}
			if got != c.want {
				t.Errorf("%q, want %q: %s", got, c.want, r.body)
			}
			question := ""
			for _, call := range up.received() {
				if strings.Contains(string(call.body), `"model":"classifier"`) {
					question = string(call.body)
				}
			}
			for _, candidate := range all {
				if asked := strings.Contains(question, candidate); asked != slices.Contains(c.asked, candidate) {
					t.Errorf("%q is among the candidates: %t", candidate, asked)
				}
			}
		})
	}
}

// A hard cap must have room for whoever is chosen, words or images, whichever of them was looked at last.
func TestAutoKeepsAHardCapForImagesToo(t *testing.T) {
	const painter, code = "candidate test/painter \"pictures\"\n", "candidate test/code \"programs\"\n"
	dear := strings.Replace(autoPaints, "price_image 0.01", "price_image 5", 1)
	for name, block := range map[string]string{
		"images in the middle": dear,
		"images at the end":    strings.Replace(strings.Replace(dear, painter, "\n", 1), code, code+"\t\t"+painter, 1),
	} {
		t.Run(name, func(t *testing.T) {
			for amount, want := range map[string]int{"4": 402, "6": 200} {
				up := routedAndPainting(t, saying("test/code"))
				capped := strings.NewReplacer("name tester", "name tester\n\t\tspend_cap_usd "+amount+" hard",
					"timeout 30s", "timeout 30s\n\t\tmax_tokens 10", "price 2.50 10.00", "price 2.50 10.00\n\t\tcontext_length 1000").Replace(site(block))
				g := startGateway(t, up.address(), capped)
				r := g.post(`{"model":"auto","messages":[{"role":"user","content":"An otter"}]}`)
				if r.StatusCode != want {
					t.Errorf("cap %s: %s %s", amount, r.Status, r.body)
				}
			}
		})
	}
}

func TestAutoInACompareChoosesAmongTexts(t *testing.T) {
	g := startGateway(t, routedAndPainting(t, saying("test/painter")).address(), site(autoPaints+"\tcompare {\n\t\tmodel paid/small\n\t}\n"))
	c := g.compare(compareBody(`"test/a","auto"`, `,"skip_comparison":true`)).comparison(t)
	if got := c.Results[1]; got.Error != nil || got.Content == nil || *got.Content != "I am large" {
		t.Errorf("%+v", got)
	}
}
