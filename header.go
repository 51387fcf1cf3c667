package mesh

import (
	"cmp"
	"mime"
	"net/http"
)

// mediaType returns what the Content-Type of a header is, in small letters and without parameters.
func mediaType(header http.Header) string {
	value := header.Get("Content-Type")
	switch value {
	case "application/json", "text/event-stream": // as nearly all are; mime takes its time
		return value
	}
	name, _, _ := mime.ParseMediaType(value)
	return name
}

// passHeader copies what a client may see of an upstream's header: what its answer is. The rest is about the
// connection with the upstream, the gateway's account there, or tells who the upstream is.
func passHeader(to, from http.Header) {
	for _, name := range []string{"Content-Type", "Content-Language"} {
		if values := from[name]; len(values) > 0 {
			to[name] = values
		}
	}
	if id := requestIDOf(from); id != "" {
		to.Set(upstreamRequestID, id)
	}
}

const upstreamRequestID = "X-Upstream-Request-Id"

// requestIDOf returns what the upstream calls the request.
func requestIDOf(header http.Header) string {
	return cmp.Or(header.Get("X-Request-Id"), header.Get("Request-Id"))
}
