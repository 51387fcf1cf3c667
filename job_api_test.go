package mesh

import (
	"net/http"
	"strings"
	"testing"
)

// TestLocationHasThePrefixOfTheRequest has the gateway below a path.
func TestLocationHasThePrefixOfTheRequest(t *testing.T) {
	up := startUpstream(t, answers(200, "application/json", completion))
	inner := jobSite("store local $DIR/mesh.db", "", "")
	g := startGateway(t, up.address(), "handle_path /llm/* {\n"+inner+"\n}\nhandle_path \"/a b/*\" {\n"+strings.Replace(inner, "mesh.db", "other.db", 1)+"\n}\n"+
		"rewrite /chat /v1/chat/completions\nhandle {\n"+strings.Replace(inner, "mesh.db", "third.db", 1)+"\n}")
	for path, prefix := range map[string]string{
		"/llm/v1/chat/completions": "/llm", "//llm/v1/chat/completions": "/llm", "/a%20b/v1/chat/completions": "/a%20b",
		"/v1/chat/completions": "", "/chat": "",
	} {
		r := g.do(http.MethodPost, path, asyncBody)
		j := r.job(t, http.StatusAccepted)
		if got := r.Header.Get("Location"); got != prefix+jobsPath+"/"+j.ID {
			t.Errorf("%s: %s", path, got)
			continue
		}
		g.becomes(r.Header.Get("Location"), JobCompleted)
	}
	r := g.do(http.MethodPost, "/llm"+templatesPath, `{"name":"greet","system":"Greet."}`)
	id := r.template(t, http.StatusCreated).ID
	if got := r.Header.Get("Location"); got != "/llm"+templatesPath+"/"+id || g.do(http.MethodGet, got, "").StatusCode != http.StatusOK {
		t.Errorf("the template is at %s", got)
	}
}
