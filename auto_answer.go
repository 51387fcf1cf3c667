package mesh

// mark adds to an answer how its model was chosen. said is what the answer says of itself.
func (a *autoRoute) mark(body []byte, said said) []byte {
	var o objectWriter
	if said.hasUsage {
		o.buf = append(a.markUsage(body, said), body[said.usageEnd:said.closing]...)
	} else {
		o.buf = append(make([]byte, 0, len(body)+256), body[:said.closing]...)
	}
	o.name("x_auto_routed")
	o.buf = append(o.buf, "true"...)
	o.text("x_resolved_model_id", a.model)
	if a.reason != "" {
		o.name("x_auto_routed_fallback")
		o.buf = append(o.buf, "true"...)
		o.text("x_auto_routed_fallback_reason", string(a.reason))
	}
	return append(o.buf, body[said.closing:]...)
}

// markUsage returns an answer up to the end of its usage, with what the classifier used added to that.
func (a *autoRoute) markUsage(body []byte, said said) []byte {
	o := objectWriter{buf: append(make([]byte, 0, len(body)+512), body[:said.usageEnd]...)}
	if a.call == nil {
		return o.buf
	}
	e := &a.call.x.event
	o.number("classifier_prompt_tokens", e.PromptTokens)
	o.number("classifier_completion_tokens", e.CompletionTokens)
	o.number("classifier_total_tokens", e.PromptTokens+e.CompletionTokens)
	if u := a.call.usage(); u != nil && u.Cost != nil {
		o.money("classifier_cost", *u.Cost)
	}
	return o.buf
}
