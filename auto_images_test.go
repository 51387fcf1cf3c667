package mesh

import (
	"net/http"
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
