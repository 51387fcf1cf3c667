-- KEYS: account, pending, done
-- ARGV: request id, rpm, rpd, spend cap ('0': none), period, '1' if the cap is hard, largest cost, pending entry,
-- '1' if it is part of a request that was counted
-- Returns: the limit that refused the request or '', seconds and microseconds of the clock, start and sum of minute and
-- day, start of the period of spend, spend.
--
-- It may run twice for one request, because a client library repeats it after a broken connection, or late, after the
-- gateway has decided without it: neither counts again.
local account, pending, done = KEYS[1], KEYS[2], KEYS[3]
local id, rpm, rpd, cap, period, hard, largest = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6] == '1', ARGV[7]

local now, micros = clock()
local a = redis.call('HMGET', account, 'minute', 'minute_used', 'day', 'day_used', 'total', 'month', 'month_spent',
	'spend_day', 'spend_day_spent', 'reserved')
local minute, minute_used = window(now - now % MINUTE, a[1], a[2])
local day, day_used = window(day_of(now), a[3], a[4])
minute_used, day_used = tonumber(minute_used), tonumber(day_used)
local since, spend = 0, a[5] or '0'
if period == 'month' then
	since, spend = window(month_of(now), a[6], a[7])
elseif period == 'day' then
	since, spend = window(day_of(now), a[8], a[9])
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
else
	local counts = ARGV[9] == '1' and 0 or 1
	minute_used, day_used = minute_used + counts, day_used + counts
	redis.call('HSET', account, 'minute', whole(minute), 'minute_used', whole(minute_used), 'day', whole(day), 'day_used', whole(day_used))
	local reserved = hard and largest or '0'
	add(account, 'reserved', reserved)
	redis.call('EXPIRE', account, ACCOUNT_TTL)
	if id ~= '' then
		redis.call('HSET', pending, id, table.concat({whole(counts * minute), whole(counts * day), reserved, ARGV[8]}, ' '))
		redis.call('EXPIRE', pending, USAGE_TTL)
	end
end
return {refused, whole(now), whole(micros), whole(minute), whole(minute_used), whole(day), whole(day_used), whole(since), spend}
