package mesh

// The direct dependencies, until the code that needs them is here.
import (
	_ "github.com/oklog/ulid/v2"
	_ "github.com/openai/openai-go/v3"
	_ "github.com/tiktoken-go/tokenizer"
	_ "go.etcd.io/bbolt"
	_ "go.uber.org/goleak"
	_ "go.uber.org/zap"
)
