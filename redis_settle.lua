-- KEYS: account, pending, done, lost, ledger, usage of the day, of its
-- hours, parts; if there is a session: sessions of the day, usage of the session
-- ARGV: request id, 'settle' | 'lost' | 'void' | 'drop', entry, entries to keep, cost, model, prompt tokens, cached tokens,
-- completion tokens, '1' if the request failed, when the request began (Unix seconds, or ''), '1' if this may have been
-- entered before, '1' if it ended less than a minute ago, the hour in which it began (or ''), session,
-- '1' if it keeps its place under max_concurrency
-- Returns: 1 if the ledger has the entry now and had none before, 2 if it replaced an estimate, 0 if nothing was to do,
-- 3 if it cannot be told any more whether it was entered before, and nothing was done.
--
-- 'settle' enters what a request cost. 'lost' enters an estimate for a request whose gateway died, and does nothing
-- unless the request is still pending. 'void' undoes an admission that the gateway never got to know of. 'drop' gives up
-- a pending entry that is damaged; its request may yet be settled.
local account, pending, done, lost, ledger = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local usage, hours, parts_pending, sessions, session = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local hour, keeps = ARGV[14], ARGV[16] == '1'
local id, kind, entry, keep, began, repeated = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[11]), ARGV[12] == '1'
local SESSION_TTL, HOURS_TTL = 30 * DAY, 35 * DAY
local SESSIONS = 1000 -- of a day that can be listed
local CLOCKS = 3600      -- by how much the clock of a gateway may differ
local MODELS = 200       -- that have sums of their own in a day: where a pattern lets them, clients make names up
local OTHERS = 'other models' -- no model has a space in its name

-- What a script has done when it breaks off is not undone. Keys of a wrong type are to show before the first change.
local known = redis.call('SISMEMBER', done, id) == 1
redis.call('HEXISTS', account, 'total')
redis.call('XDEL', ledger, '0-1')
redis.call('HEXISTS', usage, 'models')
redis.call('HEXISTS', lost, id)
redis.call('HEXISTS', hours, '')
local is_part = redis.call('HEXISTS', parts_pending, id) == 1
if session then
	redis.call('HEXISTS', session, '')
	redis.call('SISMEMBER', sessions, '')
end

local now = clock()
local held = redis.call('HGET', pending, id)
local estimate = kind == 'settle' and redis.call('HGET', lost, id)
if kind == 'lost' and not held then
	return 0
end
if kind == 'settle' and repeated and not (known or held or estimate) and began and now - began > REQUEST_TTL - CLOCKS then
	return 3
end
if held then
	local minute, day, reserved, entry_of = string.match(held, '^(%d+) (%d+) (%d+) (.*)$')
	reserved = reserved or '0'
	if keeps and entry_of then -- until it is dropped, by its gateway or, when that is dead, by another
		redis.call('HSET', pending, id, table.concat({minute, day, '0', entry_of}, ' '))
	else
		redis.call('HDEL', pending, id)
	end
	if is_part then
		redis.call('HDEL', parts_pending, id)
	end
	add(account, 'reserved', reserved == '0' and '0' or '-' .. reserved)
	if kind == 'void' then
		local a = redis.call('HMGET', account, 'minute', 'day')
		if a[1] == minute then add(account, 'minute_used', '-1') end
		if a[2] == day then add(account, 'day_used', '-1') end
	end
end
if kind == 'drop' then
	return 0
end

redis.call('SADD', done, id)
redis.call('EXPIRE', done, REQUEST_TTL)
if kind == 'void' or known and not estimate then
	return 0
end

local function counted_as(model)
	if redis.call('HEXISTS', usage, 'requests ' .. model) == 1 then
		return model
	end
	if tonumber(redis.call('HGET', usage, 'models') or '0') >= MODELS then
		return OTHERS
	end
	redis.call('HINCRBY', usage, 'models', '1')
	return model
end

local function count(u, sign)
	local function with_sign(n)
		if n == '0' or sign == '' then return n end
		return sign .. n
	end
	local function into(key, suffix, ttl)
		add(key, 'requests' .. suffix, with_sign('1'))
		add(key, 'prompt_tokens' .. suffix, with_sign(u.prompt))
		add(key, 'cached_tokens' .. suffix, with_sign(u.cached))
		add(key, 'completion_tokens' .. suffix, with_sign(u.completion))
		add(key, 'cost' .. suffix, with_sign(u.cost))
		if u.failed == '1' then
			add(key, 'errors' .. suffix, with_sign('1'))
			add(key, 'error_prompt_tokens' .. suffix, with_sign(u.prompt))
			add(key, 'error_cached_tokens' .. suffix, with_sign(u.cached))
			add(key, 'error_completion_tokens' .. suffix, with_sign(u.completion))
			add(key, 'error_cost' .. suffix, with_sign(u.cost))
		end
		redis.call('EXPIRE', key, ttl)
	end
	into(usage, ' ' .. u.model, USAGE_TTL)
	if hour == '' then
		return
	end
	into(hours, ' ' .. hour .. ' ' .. u.model, HOURS_TTL)
	if not session then
		return
	end
	into(session, ' ' .. hour .. ' ' .. u.model, SESSION_TTL)
	if sign == '' and redis.call('SCARD', sessions) < SESSIONS then
		redis.call('SADD', sessions, ARGV[15])
		redis.call('EXPIRE', sessions, SESSION_TTL)
	end
end

if estimate then
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
end

local u = {cost = ARGV[5], model = counted_as(ARGV[6]), prompt = ARGV[7], cached = ARGV[8], completion = ARGV[9], failed = ARGV[10]}
local a = redis.call('HMGET', account, 'month', 'spend_day', 'tokens_minute')
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
if a[3] and kind == 'settle' and not estimate and ARGV[13] == '1' then -- else its minute is long over
	local minute = now - now % MINUTE
	if minute > tonumber(a[3]) then
		redis.call('HSET', account, 'tokens_minute', whole(minute), 'tokens_minute_used', '0')
	end
	add(account, 'tokens_minute_used', whole(tonumber(u.prompt) + tonumber(u.completion)))
end
redis.call('EXPIRE', account, ACCOUNT_TTL)
count(u, '')

local position = redis.call('XADD', ledger, 'MAXLEN', '~', keep, '*', 'event', entry)
redis.call('EXPIRE', ledger, USAGE_TTL)
if kind == 'lost' then
	u.month, u.day, u.entry = a[1], a[2], position
	redis.call('HSET', lost, id, cmsgpack.pack(u))
	redis.call('EXPIRE', lost, USAGE_TTL)
end
return estimate and 2 or 1
