package mesh

// modalitySet is what a client wants an answer to be made of.
type modalitySet struct{ text, audio, image bool }

// outputModality reads one of the request's modalities.
func (p *parser) outputModality() {
	switch p.oneOf("text", "audio", "image") {
	case "text":
		p.req.modalities.text = true
	case "audio":
		p.req.modalities.audio = true
	case "image":
		p.req.modalities.image = true
	}
}

var outputAudioFields = []string{"voice", "format"}

func (p *parser) audio() {
	p.wantsAudio = true
	p.fields(outputAudioFields, func(i int) {
		if i == 0 {
			p.skip() // a name, or an object for a voice of one's own
		} else {
			p.oneOf("wav", "mp3", "flac", "opus", "pcm16")
		}
	})
}

// checkAudio finds a voice that nobody is to speak with: providers pass over it without a word.
func (p *parser) checkAudio() {
	if p.wantsAudio && !p.req.modalities.audio {
		p.at("audio").faultf("value_error", "Value error, audio needs 'audio' among the modalities")
		p.up()
	}
}

// audioInput is the price of a prompt's tokens that are sound.
func (p *Price) audioInput() Money {
	if p.AudioInput != nil {
		return *p.AudioInput
	}
	return p.Input
}

// audioOutput is the price of an answer's tokens that are sound.
func (p *Price) audioOutput() Money {
	if p.AudioOutput != nil {
		return *p.AudioOutput
	}
	return p.Output
}

// dearestInput is the most that a token of the prompt can cost, of whatever kind it is.
func (p *Price) dearestInput() Money { return max(p.Input, p.cachedInput(), p.audioInput()) }

// dearestOutput is the most that a token of the answer can cost.
func (p *Price) dearestOutput() Money { return max(p.Output, p.audioOutput()) }

// transcript reads what is said aloud: its text, and not the sound.
func (c *cursor) transcript(t *textSample) {
	c.eachMember(func(name []byte) {
		if string(name) == "transcript" {
			c.textTo(t)
			return
		}
		c.skip()
	})
}
