package mesh

import (
	"errors"
	"io"
	"net/http"
	"slices"
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

// believed is how much of a declared length is believed before anything has come: whoever declares much and sends nothing
// shall not cost much.
const believed = 1 << 20

// readAll reads a body whose declared length, if it has one, is within limit. A declared length is all the memory that is
// taken, but for what was believed first; without one it is twice the body at most, and the body itself in the end.
func readAll(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	length := r.ContentLength
	if length < 0 {
		return readPieces(http.MaxBytesReader(w, r.Body, limit))
	}
	body := make([]byte, min(length, believed))
	if _, err := io.ReadFull(r.Body, body); err != nil || length <= believed {
		return body, err
	}
	whole := make([]byte, length)
	read := copy(whole, body)
	_, err := io.ReadFull(r.Body, whole[read:])
	return whole, err
}

// readPieces reads to the end, in pieces that are each as long as all before them, so that only joining them copies.
func readPieces(r io.Reader) ([]byte, error) {
	var pieces [][]byte
	for size := 4 << 10; ; {
		piece, n := make([]byte, size), 0
		for n < size {
			m, err := r.Read(piece[n:]) // not io.ReadFull: a body that breaks off ends in the error that it has for any end
			n += m
			if err == io.EOF {
				return slices.Concat(append(pieces, piece[:n])...), nil
			}
			if err != nil {
				return nil, err
			}
		}
		if len(pieces) > 0 {
			size += n
		}
		pieces = append(pieces, piece)
	}
}

func tooLarge(limit int64) *apiError {
	return errorf(http.StatusRequestEntityTooLarge, "request_too_large", "The request body is larger than %d bytes.", limit)
}
