package mesh

import "go.uber.org/zap"

// warnOfDetached names the upstreams that go on answering after their client has left: with a flush_interval of -1,
// reverse_proxy does not cancel them (https://github.com/caddyserver/caddy/pull/4952).
func (h *Handler) warnOfDetached() {
	for _, u := range h.Upstreams {
		if u.detached {
			h.logger.Warn("flush_interval -1 is not needed, and keeps reverse_proxy from cancelling a request whose client has left",
				zap.String("upstream", u.Name))
		}
	}
}
