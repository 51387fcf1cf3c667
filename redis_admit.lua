-- KEYS: account, pending, done, parts
-- ARGV: request id, rpm, rpd, spend cap ('0': none), period, '1' if the cap is hard, largest cost, pending entry,
-- '1' if it is part of a request that was counted; where there is a limit of either: tpm, largest concurrency; with the
-- latter: how many are under way without being pending, ids of those that may be pending and have ended.
-- Returns: the limit that refused the request or '', seconds and microseconds of the clock, start and sum of minute and
-- day, start of the period of spend, spend; with tpm: start and sum of the minute of tokens.
--
-- It may run twice for one request, because a client library repeats it after a broken connection, or late, after the
-- gateway has decided without it: neither counts again.
local account, pending, done, parts_pending = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, rpm, rpd, cap, period, hard, largest = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6] == '1', ARGV[7]
local tpm, concurrency = tonumber(ARGV[10] or '0'), tonumber(ARGV[11] or '0')

local now, micros = clock()
local a = redis.call('HMGET', account, 'minute', 'minute_used', 'day', 'day_used', 'total', 'month', 'month_spent',
	'spend_day', 'spend_day_spent', 'reserved', 'tokens_minute', 'tokens_minute_used')
local minute, minute_used = window(now - now % MINUTE, a[1], a[2])
local day, day_used = window(day_of(now), a[3], a[4])
minute_used, day_used = tonumber(minute_used), tonumber(day_used)
local tokens_minute, tokens_used = window(now - now % MINUTE, a[11], a[12])
local since, spend = 0, a[5] or '0'
if period == 'month' then
	since, spend = window(month_of(now), a[6], a[7])
elseif period == 'day' then
	since, spend = window(day_of(now), a[8], a[9])
end

local function under_way()
	local n = redis.call('HLEN', pending) - redis.call('HLEN', parts_pending) + tonumber(ARGV[12])
	for i = 13, #ARGV do
		n = n - redis.call('HEXISTS', pending, ARGV[i])
	end
	return n
end

local known = id ~= '' and (redis.call('HEXISTS', pending, id) == 1 or redis.call('SISMEMBER', done, id) == 1)
local refused = ''
if known then
	-- counted before
elseif cap ~= '0' and (reaches(cap, false, spend) or hard and reaches(cap, true, spend, a[10] or '0', largest)) then
	refused = 'spend'
elseif rpd > 0 and day_used >= rpd then
	refused = 'rpd'
elseif rpm > 0 and minute_used >= rpm then
	refused = 'rpm'
elseif tpm > 0 and tonumber(tokens_used) >= tpm then
	refused = 'tpm'
elseif concurrency > 0 and under_way() >= concurrency then
	refused = 'concurrency'
else
	local counts = ARGV[9] == '1' and 0 or 1
	minute_used, day_used = minute_used + counts, day_used + counts
	redis.call('HSET', account, 'minute', whole(minute), 'minute_used', whole(minute_used), 'day', whole(day), 'day_used', whole(day_used))
	if tpm > 0 then
		redis.call('HSET', account, 'tokens_minute', whole(tokens_minute), 'tokens_minute_used', tokens_used)
	end
	local reserved = hard and largest or '0'
	add(account, 'reserved', reserved)
	redis.call('EXPIRE', account, ACCOUNT_TTL)
	if id ~= '' then
		redis.call('HSET', pending, id, table.concat({whole(counts * minute), whole(counts * day), reserved, ARGV[8]}, ' '))
		redis.call('EXPIRE', pending, USAGE_TTL)
		if counts == 0 then
			redis.call('HSET', parts_pending, id, '1')
			redis.call('EXPIRE', parts_pending, USAGE_TTL)
		end
	end
end
local verdict = {refused, whole(now), whole(micros), whole(minute), whole(minute_used), whole(day), whole(day_used), whole(since), spend}
if tpm > 0 then
	verdict[10], verdict[11] = whole(tokens_minute), tokens_used
end
return verdict
