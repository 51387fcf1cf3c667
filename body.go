package mesh

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// readBody reads the whole body of r, at most limit bytes of it.
func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, *apiError) {
	if mediaType(r.Header) != "application/json" {
		return nil, errorf(http.StatusUnsupportedMediaType, "unsupported_media_type",
			"The request body must be JSON, sent with 'Content-Type: application/json'.")
	}
	if enc := r.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		return nil, errorf(http.StatusUnsupportedMediaType, "unsupported_media_type",
			"The request body must not be compressed (Content-Encoding: %s).", strconv.Quote(enc))
	}
	if r.ContentLength > limit {
		return nil, tooLarge(limit)
	}
	body, err := readAll(w, r, limit)
	if err == nil {
		return body, nil
	}
	// the limit need not be ours: a request_body in front of this handler has its own
	if tooBig, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, tooLarge(tooBig.Limit)
	}
	refused := errorf(http.StatusBadRequest, "invalid_request", "The request body could not be read to its end.")
	refused.cause = err
	return nil, refused
}

// readAll reads a body whose declared length, if it has one, is within limit. A declared length is believed only so far:
// whoever declares much and sends nothing shall not cost much.
func readAll(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	const believed = 1 << 20
	if length := r.ContentLength; length >= 0 && length <= believed {
		body := make([]byte, length)
		_, err := io.ReadFull(r.Body, body)
		return body, err
	}
	buf := bytes.NewBuffer(make([]byte, 0, min(max(r.ContentLength, 0), believed)+bytes.MinRead))
	_, err := buf.ReadFrom(http.MaxBytesReader(w, r.Body, limit))
	return buf.Bytes(), err
}

func tooLarge(limit int64) *apiError {
	return errorf(http.StatusRequestEntityTooLarge, "request_too_large", "The request body is larger than %d bytes.", limit)
}
