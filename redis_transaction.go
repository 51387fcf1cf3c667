package mesh

import (
	"context"
	"errors"
	"time"

	"github.com/redis/go-redis/v9"
)

// transact runs a transaction on a hash until no other change of it has come between, which is tried 20 times. An error of
// run ends it, and is returned as it is.
func transact(ctx context.Context, client redis.UniversalClient, hash string, run func(*redis.Tx) error) (err error) {
	const attempts = 20
	for range attempts {
		if err = client.Watch(ctx, run, hash); !errors.Is(err, redis.TxFailedErr) {
			return err
		}
		select {
		case <-time.After(around(5 * time.Millisecond)):
		case <-ctx.Done():
			return err
		}
	}
	return err
}
