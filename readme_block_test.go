package mesh

import (
	"go/ast"
	goparser "go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// blocksOf says which part of a mesh block the functions parse that have words of their own.
var blocksOf = map[string]string{
	"parseCaddyfile": "mesh", "LocalStore.UnmarshalCaddyfile": "mesh/store local", "RedisStore.UnmarshalCaddyfile": "mesh/store redis",
	"key": "mesh/key", "upstream": "mesh/upstream", "circuit": "mesh/upstream/circuit", "model": "mesh/model", "template": "mesh/template",
	"compare": "mesh/compare", "auto": "mesh/auto", "async": "mesh/async", "metrics": "mesh/metrics", "tracing": "mesh/tracing",
}

// parsedWords returns the words that the parser knows, by block, from its source: they are known in no other place.
func parsedWords(t *testing.T) map[string][]string {
	t.Helper()
	files, err := filepath.Glob("caddyfile*.go")
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string][]string)
	for _, path := range files {
		file, err := goparser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || strings.HasSuffix(path, "_test.go") {
				continue
			}
			words := wordsIn(t, fn)
			if len(words) == 0 {
				continue
			}
			block := blocksOf[nameOfParser(fn)]
			if block == "" {
				t.Fatalf("%s parses a block that this test does not know", nameOfParser(fn))
			}
			all[block] = words
		}
	}
	return all
}

func nameOfParser(fn *ast.FuncDecl) string {
	if fn.Recv == nil {
		return fn.Name.Name
	}
	receiver := fn.Recv.List[0].Type.(*ast.StarExpr).X.(*ast.Ident).Name
	return strings.TrimPrefix(receiver+"."+fn.Name.Name, "blockParser.")
}

// wordsIn returns the keys of the literals of type words in a function, in order.
func wordsIn(t *testing.T, fn *ast.FuncDecl) (all []string) {
	ast.Inspect(fn, func(n ast.Node) bool {
		literal, ok := n.(*ast.CompositeLit)
		if !ok {
			return true
		}
		if kind, ok := literal.Type.(*ast.Ident); !ok || kind.Name != "words" {
			return true
		}
		for _, element := range literal.Elts {
			word, err := strconv.Unquote(element.(*ast.KeyValueExpr).Key.(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, word)
		}
		return true
	})
	slices.Sort(all)
	return all
}

// shownWords returns the words that a description of the syntax shows, by block.
func shownWords(text string) map[string][]string {
	all := make(map[string][]string)
	var within []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0, strings.HasPrefix(fields[0], "["), strings.HasPrefix(fields[0], "<"): // goes on, or is explained
			continue
		case fields[0] == "}":
			within = within[:len(within)-1]
			continue
		}
		word := fields[0]
		if block := strings.Join(within, "/"); block != "" && !slices.Contains(all[block], word) {
			all[block] = append(all[block], word)
		}
		if fields[len(fields)-1] == "{" {
			if word == "store" {
				word += " " + fields[1]
			}
			within = append(within, word)
		}
	}
	for _, words := range all {
		slices.Sort(words)
	}
	return all
}

// TestWholeBlockIsWhole compares the README's block, and the comment above the parser, with what the parser knows.
func TestWholeBlockIsWhole(t *testing.T) {
	known := parsedWords(t)
	if len(known) != len(blocksOf) {
		t.Errorf("only %d blocks were found: %v", len(known), slices.Sorted(maps.Keys(known)))
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(readme), "\n## The whole block\n\n```caddyfile\n")
	block, _, _ := strings.Cut(after, "```")
	source, err := os.ReadFile("caddyfile.go")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ = strings.Cut(string(source), "// parseCaddyfile sets up the handler from Caddyfile tokens. Syntax:\n")
	comment, _, _ := strings.Cut(after, "\n// Addresses are")
	shown, commented := shownWords(block), shownWords(strings.ReplaceAll(comment, "//", ""))
	for name, words := range known {
		if !slices.Equal(shown[name], words) {
			t.Errorf("%s: the README has\n%v, and the parser knows\n%v", name, shown[name], words)
		}
		if !strings.Contains(name, "store ") && !slices.Equal(commented[name], words) { // stores are modules, with comments of their own
			t.Errorf("%s: the comment has\n%v, and the parser knows\n%v", name, commented[name], words)
		}
	}
}
