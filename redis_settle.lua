-- KEYS: account, pending, done, lost, ledger, usage of the day, usage of the session (if any)
-- ARGV: request id, 'settle' | 'lost' | 'void', entry, entries to keep, cost, model, prompt tokens, cached tokens,
-- completion tokens, '1' if the request failed
-- Returns: 1 if the ledger has the entry now and had none before, 2 if it replaced an estimate, 0 if nothing was to do.
--
-- 'settle' enters what a request cost. 'lost' enters an estimate for a request whose gateway died, and does nothing
-- unless the request is still pending. 'void' undoes an admission that the gateway never got to know of.
local account, pending, done, lost, ledger, usage, session = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local id, kind, entry, keep = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local USAGE_TTL, SESSION_TTL = 400 * DAY, 30 * DAY

local held = redis.call('HGET', pending, id)
if kind == 'lost' and not held then
	return 0
end
if held then
	local minute, day, reserved = string.match(held, '^(%d+) (%d+) (%d+) ')
	redis.call('HDEL', pending, id)
	add(account, 'reserved', reserved == '0' and '0' or '-' .. reserved)
	if kind == 'void' then
		local a = redis.call('HMGET', account, 'minute', 'day')
		if a[1] == minute then add(account, 'minute_used', '-1') end
		if a[2] == day then add(account, 'day_used', '-1') end
	end
end

local first = redis.call('SADD', done, id) == 1
redis.call('EXPIRE', done, REQUEST_TTL)
if kind == 'void' then
	return 0
end

local function count(u, sign)
	local function with_sign(n)
		if n == '0' or sign == '' then return n end
		return sign .. n
	end
	local function into(key, suffix, ttl)
		add(key, 'requests' .. suffix, with_sign('1'))
		add(key, 'errors' .. suffix, with_sign(u.failed))
		add(key, 'prompt_tokens' .. suffix, with_sign(u.prompt))
		add(key, 'cached_tokens' .. suffix, with_sign(u.cached))
		add(key, 'completion_tokens' .. suffix, with_sign(u.completion))
		add(key, 'cost' .. suffix, with_sign(u.cost))
		redis.call('EXPIRE', key, ttl)
	end
	into(usage, ' ' .. u.model, USAGE_TTL)
	if session then
		into(session, '', SESSION_TTL)
	end
end

local replaced = false
if not first then
	local estimate = kind == 'settle' and redis.call('HGET', lost, id)
	if not estimate then
		return 0
	end
	local old = cmsgpack.unpack(estimate)
	redis.call('HDEL', lost, id)
	redis.call('XDEL', ledger, old.entry)
	count(old, '-')
	if old.cost ~= '0' then
		local a = redis.call('HMGET', account, 'month', 'spend_day')
		add(account, 'total', '-' .. old.cost)
		if a[1] == old.month then add(account, 'month_spent', '-' .. old.cost) end
		if a[2] == old.day then add(account, 'spend_day_spent', '-' .. old.cost) end
	end
	replaced = true
end

local u = {cost = ARGV[5], model = ARGV[6], prompt = ARGV[7], cached = ARGV[8], completion = ARGV[9], failed = ARGV[10]}
local now = clock()
local a = redis.call('HMGET', account, 'month', 'spend_day')
local month, day = month_of(now), day_of(now)
if month > (tonumber(a[1]) or 0) then
	redis.call('HSET', account, 'month', whole(month), 'month_spent', '0')
	a[1] = whole(month)
end
if day > (tonumber(a[2]) or 0) then
	redis.call('HSET', account, 'spend_day', whole(day), 'spend_day_spent', '0')
	a[2] = whole(day)
end
add(account, 'total', u.cost)
add(account, 'month_spent', u.cost)
add(account, 'spend_day_spent', u.cost)
redis.call('EXPIRE', account, ACCOUNT_TTL)
count(u, '')

local position = redis.call('XADD', ledger, 'MAXLEN', '~', keep, '*', 'event', entry)
redis.call('EXPIRE', ledger, USAGE_TTL)
if kind == 'lost' then
	u.month, u.day, u.entry = a[1], a[2], position
	redis.call('HSET', lost, id, cmsgpack.pack(u))
	redis.call('EXPIRE', lost, REQUEST_TTL)
end
return replaced and 2 or 1
