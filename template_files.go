package mesh

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
)

// checkTemplates finds what is wrong with the templates as they are written.
func (h *Handler) checkTemplates(models modelTable) error {
	seen := make(map[string]bool, len(h.Templates))
	for i, t := range h.Templates {
		if t == nil {
			return wrongf(nil, "template #%d: %w", i+1, errNull)
		}
		if err := t.checkAgainst(models); err != nil {
			return wrongf(t, "template %s: %w", nameOr(t.Name, i), err)
		}
		if seen[t.Name] {
			return wrongf(t, "template %s is defined twice", t.Name)
		}
		seen[t.Name] = true
	}
	return nil
}

func (t *Template) checkAgainst(models modelTable) error {
	if err := t.check(); err != nil {
		return err
	}
	if t.Model != "" && !models.knows(t.Model) {
		return fmt.Errorf("model: no model matches %s", t.Model)
	}
	return nil
}

// configuredTemplates returns the templates of the configuration and of its files.
func (h *Handler) configuredTemplates() (*TemplateShelf, error) {
	now := time.Now().UTC().Truncate(time.Microsecond)
	all := make(map[string]*Template)
	from := make(map[string]string) // by name
	for _, t := range h.Templates {
		t.configure(now)
		all[t.id], from[t.Name] = t, "the configuration"
	}
	for _, pattern := range h.TemplateFiles {
		files, err := filepath.Glob(pattern)
		if err != nil {
			return nil, fmt.Errorf("templates %s: %w", pattern, err)
		}
		if len(files) == 0 {
			h.logger.Warn("no file has this name; there are no templates in it", zap.String("templates", pattern))
		}
		for _, file := range files {
			t, err := readTemplateFile(file, h.models)
			if err != nil {
				return nil, fmt.Errorf("template file %s: %w", file, err)
			}
			if other := from[t.Name]; other != "" {
				return nil, fmt.Errorf("template file %s: template %s is in %s already", file, t.Name, other)
			}
			t.configure(now)
			all[t.id], from[t.Name] = t, file
		}
	}
	return shelfOf(all), nil
}

func readTemplateFile(file string, models modelTable) (*Template, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if len(data) > maxTemplateSize {
		return nil, fmt.Errorf("it has more than %d bytes", maxTemplateSize)
	}
	draft, refusal := parseTemplate(data)
	if refusal == nil {
		refusal = unknownTemplateMembers(data)
	}
	if refusal != nil {
		return nil, errors.New(strings.Replace(refusal.message, "The request body", "it", 1))
	}
	t := &draft.Template
	return t, t.checkAgainst(models)
}
