package mesh

import (
	"bytes"
	"slices"
)

// maxEvent is how long an event of a stream may be to be read. A longer one passes unread.
const maxEvent = 8 << 20

// stream passes the events of an upstream's stream on to the client, each as soon as its last byte has come, and
// byte for byte. Only the event that reports usage is changed, or withheld from a client that did not ask for it, and
// an event that reports an error is put into the gateway's own words.
type stream struct {
	a    *answer
	held []byte // the beginning of an event that has not ended yet
	scan eventScanner
	long bool // the event at hand is too long to be held
	told bool // of long, to whoever pings

	done     bool      // [DONE] has come
	answered bool      // a choice has come
	finished bool      // a choice has said why it ended
	failed   bool      // the upstream has reported an error; nothing follows it
	begun    bool      // an event has come that is no comment
	content  bool      // one has come that is worth to be sent
	fault    *apiError // the error it has reported
	head     []byte    // what every event of the answer begins with, where one may be added
}

func newStream(a *answer) *stream { return &stream{a: a} }

// Write takes the next bytes of the upstream's stream, wherever they begin and end.
func (s *stream) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		rest := p[n:]
		switch {
		case s.failed:
			return n, errLast
		case len(s.held) > 0: // take of the rest only what that event may need
			rest = firstLine(rest)
			s.held = append(s.held, rest...)
			err = s.passAll(s.held)
		default:
			err = s.passAll(rest)
		}
		n += len(rest)
	}
	return n, err
}

func firstLine(b []byte) []byte {
	if i := bytes.IndexByte(b, '\n'); i >= 0 {
		return b[:i+1]
	}
	return b
}

// passAll passes on all events that have ended, and holds the rest.
func (s *stream) passAll(buf []byte) error {
	from, start := 0, 0 // of what is to be passed on, and of the event at hand
	for end := s.scan.next(buf); end >= 0; end = s.scan.next(buf) {
		if s.long { // its beginning has passed already
			s.long = false
			start = end
			continue
		}
		verdict := s.read(buf[start:end])
		if verdict.pass {
			start = end
			continue
		}
		if s.failed && !s.content && s.a.isHeld() {
			return errLast // another candidate is asked
		}
		if err := s.pass(buf[from:start], verdict.before, verdict.insert, verdict.after); err != nil {
			return err
		}
		if s.failed {
			return errLast
		}
		from, start = end, end
	}
	if err := s.pass(buf[from:start]); err != nil {
		return err
	}
	if s.content || s.begun && s.a.hold != nil && !s.a.hold.forContent {
		s.a.letGo()
	}
	return s.hold(buf[start:], start)
}

// hold keeps the beginning of an event until the rest comes; of one that is too long, only what was not yet searched
// for its end. done is how many of the searched bytes were dealt with.
func (s *stream) hold(rest []byte, done int) error {
	s.scan.forget(done)
	if len(rest) > maxEvent {
		s.long = true
	}
	s.tellLong()
	if s.long {
		searched := rest[:s.scan.pos]
		rest = rest[s.scan.pos:]
		s.scan.forget(len(searched))
		if err := s.pass(searched); err != nil {
			return err
		}
		s.tellLong() // the answer may have been let go only now
	}
	if cap(s.held) > 4<<10 && len(rest) < 1<<10 {
		s.held = nil // one long event shall not cost memory for as long as the stream lasts
	}
	s.held = append(s.held[:0], rest...)
	return nil
}

// tellLong has no ping go out inside an event.
func (s *stream) tellLong() {
	if s.long != s.told && s.a.within(s.long) {
		s.told = s.long
	}
}

func (s *stream) pass(parts ...[]byte) error {
	for _, part := range parts {
		if len(part) == 0 {
			continue
		}
		if err := s.a.toClient(part); err != nil {
			return err
		}
	}
	return nil
}

// verdict is what becomes of an event: it passes as it is, or what the client gets in its place, if anything.
type verdict struct {
	pass                  bool
	before, insert, after []byte
}

var passed = verdict{pass: true}

// read looks at one whole event.
func (s *stream) read(event []byte) verdict {
	payload, at := eventData(event)
	if s.done {
		return s.readOn(payload)
	}
	if len(payload) == 0 {
		return passed // a comment, such as a ping
	}
	if !s.begun {
		s.begun = true
		s.a.begun()
	}
	if string(bytes.TrimSpace(payload)) == "[DONE]" {
		s.done, s.content = true, true
		return verdict{before: s.missingUsage(), after: event}
	}
	result := &s.a.result
	before := result.text.bytes
	said := readAnswer(payload, &result.text)
	if !said.readable {
		return passed // one event that makes no sense is no reason to end an otherwise good stream
	}
	if said.failed {
		s.failed = true
		e := inBand(payload)
		s.fault = e
		result.errorCode = e.code
		return verdict{insert: e.frame(s.a.x.event.RequestID)}
	}
	s.a.trace.read(payload)
	if s.head == nil && said.choices > 0 && s.a.req.includeUsage { // Azure's first event has no choices, and no id
		s.head = said.head(payload)
	}
	s.answered = s.answered || said.choices > 0
	if result.text.bytes > before {
		s.a.firstByte()
	}
	s.finished = s.finished || said.finished
	s.content = s.content || said.finished || said.hasUsage && said.choices > 0 || result.text.bytes > before
	if said.badUsage && said.choices == 0 {
		return verdict{} // as if there were none: who wants usage gets an estimate
	}
	if !said.hasUsage {
		return passed
	}
	said.usage.images = s.a.images
	result.usage, result.known = said.usage, true
	if said.choices == 0 && !s.a.req.includeUsage {
		return verdict{}
	}
	return s.mark(event, payload, at, said)
}

// mark has an event that reports usage say what that cost, and how the model was chosen.
func (s *stream) mark(event, payload []byte, at int, said said) verdict {
	auto := s.a.x.auto
	if auto != nil {
		payload, at = append(auto.markUsage(payload, said), payload[said.usageEnd:]...), -1
		said = said.anew(payload)
	}
	insert, from, until := said.costEdit(s.a.by.price)
	if insert == nil && auto == nil {
		return passed
	}
	if at < 0 { // it was changed, or came in several lines; in JSON a line break between tokens is as good as a space
		event, at = dataEvent(bytes.ReplaceAll(payload, []byte("\n"), []byte(" ")))
	}
	return verdict{before: event[:at+from], insert: insert, after: event[at+until:]}
}

// dataEvent returns an event with a payload of one line, and where in it that is.
func dataEvent(payload []byte) (event []byte, at int) {
	event = append(make([]byte, 0, len(payload)+8), "data: "...)
	return append(append(event, payload...), "\n\n"...), len("data: ")
}

// missingUsage returns an event with about what the answer has used, where the client is to have one and the upstream has
// sent none.
func (s *stream) missingUsage() []byte {
	result := &s.a.result
	if s.head == nil || !s.answered || result.known || s.a.req.images != nil {
		return nil
	}
	result.by = s.a.by
	result.usage, result.told = s.a.req.estimate(result), true
	payload := usageEvent(s.head, result.usage)
	event, at := dataEvent(payload)
	v := s.mark(event, payload, at, readAnswer(payload, nil))
	if v.pass {
		return event
	}
	return slices.Concat(v.before, v.insert, v.after)
}

// readOn looks at what follows [DONE], after which no client reads on: usage is worth to be known all the same.
func (s *stream) readOn(payload []byte) verdict {
	if said := readAnswer(payload, nil); said.readable && said.hasUsage {
		s.a.result.usage, s.a.result.known = said.usage, true
	}
	return verdict{}
}

// end closes the stream towards the client, and says how it went.
func (s *stream) end() Outcome {
	a := s.a
	if a.err == nil && !s.failed && len(s.held) > 0 {
		s.endEvent()
	}
	switch {
	case s.failed:
		a.FlushError() //nolint:errcheck // the client is gone, then
		return OutcomeError
	case s.done && !a.clientGone: // whatever came after that
		return OutcomeCompleted
	case a.clientGone || a.x.r.Context().Err() != nil:
		return OutcomeClientGone
	case a.err == nil && s.finished:
		return s.close(OutcomeCompleted, append(s.missingUsage(), "data: [DONE]\n\n"...))
	case a.stopped():
		return s.closeWith(OutcomeCut, errEnding)
	case a.timedOut, a.gaveUp:
		return s.closeWith(OutcomeTimeout, errUnfinished)
	}
	return s.closeWith(OutcomeCut, errCut)
}

// endEvent supplies the line ends that an upstream left out behind its last event. One that it broke off goes no
// further.
func (s *stream) endEvent() {
	rest := append(bytes.TrimRight(s.held, "\r\n"), "\n\n"...)
	data, _ := eventData(rest)
	if string(data) != "[DONE]" && !readAnswer(data, nil).readable {
		return
	}
	s.held, s.scan = nil, eventScanner{}
	s.Write(rest) //nolint:errcheck // a client that is gone is seen by toClient
}

func (s *stream) closeWith(outcome Outcome, e *apiError) Outcome {
	s.a.result.errorCode = e.code
	return s.close(outcome, e.frame(s.a.x.event.RequestID))
}

func (s *stream) close(outcome Outcome, frames []byte) Outcome {
	if s.long { // its end is missing, and what follows must not become part of it
		frames = append([]byte("\n\n"), frames...)
	}
	if s.pass(frames) != nil || s.a.FlushError() != nil {
		return OutcomeClientGone
	}
	return outcome
}

// eventScanner finds the ends of events in a text/event-stream: a blank line, where a line ends in LF, CR LF or CR
// (HTML Living Standard, 9.2.5).
type eventScanner struct {
	line   int  // where the line at hand begins
	pos    int  // up to where it was searched
	bareCR bool // the line before it ended in a CR alone
}

// next returns the offset behind the next event's end, or -1 if that has not come yet; then buf must come again,
// longer.
func (s *eventScanner) next(buf []byte) int {
	for {
		i := lineEnd(buf[s.pos:])
		if i < 0 {
			s.pos = len(buf)
			return -1
		}
		i += s.pos
		blank, next := i == s.line, i+1
		isCR := buf[i] == '\r'
		if isCR && next == len(buf) && !(blank && s.bareCR) {
			s.pos = i // the LF that belongs to it may be about to come
			return -1
		}
		if isCR && next < len(buf) && buf[next] == '\n' {
			next++
			isCR = false
		}
		s.line, s.pos, s.bareCR = next, next, isCR
		if blank {
			return next
		}
	}
}

// forget says that the first n bytes of buf will not come again.
func (s *eventScanner) forget(n int) { s.line, s.pos = max(s.line-n, -1), s.pos-n }

func lineEnd(b []byte) int {
	lf := bytes.IndexByte(b, '\n')
	if lf >= 0 {
		b = b[:lf]
	}
	if cr := bytes.IndexByte(b, '\r'); cr >= 0 {
		return cr
	}
	return lf
}

// eventData returns the data of an event, and where in the event it stands; -1 where it is put together from
// several lines.
func eventData(event []byte) (data []byte, at int) {
	found := 0
	for pos := 0; pos < len(event); {
		end := lineEnd(event[pos:])
		if end < 0 {
			end = len(event) - pos
		}
		line := event[pos : pos+end]
		if value, ok := bytes.CutPrefix(line, []byte("data:")); ok {
			value = bytes.TrimPrefix(value, []byte(" "))
			if found++; found == 1 {
				data, at = value, pos+end-len(value)
			} else {
				joined := append(append(make([]byte, 0, len(data)+1+len(value)), data...), '\n')
				data, at = append(joined, value...), -1
			}
		}
		pos += end + 1
	}
	return data, at
}
