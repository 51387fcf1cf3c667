package mesh

import (
	"io"
	"net/http"
	"time"
)

// A connection that is closed while the client still sends is reset, and with it goes the answer, if the client has not
// read that by then. So what comes of a body that nobody wants is read and thrown away for a while: as long as
// something comes, and no longer than that in all. The numbers are nginx's, of lingering_close.
const (
	lingerIdle = 5 * time.Second
	lingerTime = 30 * time.Second
)

// bodyIsUnread reports whether there is a body that has not been read. net/http would hold an answer back to take that
// in, so that the connection can be used again; but it may be slow to come. Closing the connection is better. HTTP/2 has
// no such problem.
func (x *exchange) bodyIsUnread() bool {
	return !x.taken && x.r.ProtoMajor == 1 && x.r.ContentLength != 0
}

// linger sends the answer, and reads on. A client that waits to be told to go on sends nothing more.
func (x *exchange) linger() {
	control := http.NewResponseController(x.w)
	if control.Flush() != nil || x.r.Header.Get("Expect") != "" {
		return
	}
	end := time.Now().Add(lingerTime)
	waiting := readerFunc(func(p []byte) (int, error) {
		deadline := time.Now().Add(lingerIdle)
		if deadline.After(end) {
			deadline = end
		}
		if err := control.SetReadDeadline(deadline); err != nil {
			return 0, err
		}
		return x.r.Body.Read(p)
	})
	io.Copy(io.Discard, waiting) //nolint:errcheck // it has its answer
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
