-- KEYS: account, pending, done, lost, ledger, usage of the day, of its hours, parts, sessions of the day, usage of each
-- session there is
-- ARGV: entries to keep; then for each request: its id, 'settle' | 'lost' | 'void' | 'drop', entry, cost, model, prompt
-- tokens, cached tokens, completion tokens, '1' if the request failed, when the request began (Unix seconds, or ''), '1' if
-- this may have been entered before, '1' if it ended less than a minute ago, the hour in which it began (or ''), session,
-- which of KEYS is the session's ('0': none), '1' if it keeps its place under max_concurrency, '1' if it was admitted without
-- Redis
-- Returns, for each request: 1 if the ledger has the entry now and had none before, 2 if it replaced an estimate, 0 if
-- nothing was to do, 3 if it cannot be told any more whether it was entered before, and nothing was done; or an error, as
-- text. One more, at the end, is an error that came up when a sum was added to.
--
-- 'settle' enters what a request cost. 'lost' enters an estimate for a request whose gateway died, and does nothing
-- unless the request is still pending. 'void' undoes an admission that the gateway never got to know of. 'drop' gives up
-- a pending entry that is damaged; its request may yet be settled.
--
-- The requests are of one key and began on one day. What they add to sums is added up here, and to Redis once.
local account, pending, done, lost, ledger = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local usage, hours, parts_pending, sessions = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local keep = ARGV[1]
local FIELDS = 17 -- for each request
local SESSION_TTL, HOURS_TTL = 30 * DAY, 35 * DAY
local SESSIONS = 1000 -- of a day that can be listed
local CLOCKS = 3600      -- by how much the clock of a gateway may differ
local MODELS = 200       -- that have sums of their own in a day: where a pattern lets them, clients make names up
local OTHERS = 'other models' -- no model has a space in its name

-- What a script has done when it breaks off is not undone. Keys of a wrong type are to show before the first change.
redis.call('HEXISTS', account, 'total')
redis.call('SISMEMBER', done, '')
redis.call('HEXISTS', lost, '')
redis.call('XDEL', ledger, '0-1')
redis.call('HEXISTS', usage, 'models')
redis.call('HEXISTS', hours, '')
redis.call('HEXISTS', parts_pending, '')

local now = clock()

-- What is yet to be added, by key and field. Numbers that a double may not have exactly do not wait, nor does anything where
-- no other request comes.
local sums, ttls, alone = {}, {}, #ARGV == 1 + FIELDS
local function add_later(key, field, amount)
	if alone or #amount > 12 then
		return add(key, field, amount)
	end
	local fields = sums[key]
	if not fields then
		fields = {}
		sums[key] = fields
	end
	fields[field] = (fields[field] or 0) + tonumber(amount)
end
local function add_all()
	local bad -- the others are added to all the same
	for key, fields in pairs(sums) do
		for field, amount in pairs(fields) do
			local ok, why = pcall(add, key, field, whole(amount))
			if not ok then
				bad = bad or type(why) == 'table' and why.err or tostring(why)
			end
		end
	end
	for key, ttl in pairs(ttls) do
		redis.call('EXPIRE', key, ttl)
	end
	return bad
end

local names = {} -- by model, under which it is counted
local function counted_as(model)
	local name = names[model]
	if name then
		return name
	end
	name = model
	if redis.call('HEXISTS', usage, 'requests ' .. model) == 0 then
		if tonumber(redis.call('HGET', usage, 'models') or '0') >= MODELS then
			name = OTHERS
		else
			redis.call('HINCRBY', usage, 'models', '1')
		end
	end
	names[model] = name
	return name
end

local listed = {} -- sessions
local function list(session)
	if not listed[session] and redis.call('SCARD', sessions) < SESSIONS then
		redis.call('SADD', sessions, session)
		ttls[sessions] = SESSION_TTL
	end
	listed[session] = true
end

-- Adds what some requests used to the sums of a key.
local function count_in(key, suffix, requests, u)
	add_later(key, 'requests' .. suffix, requests)
	add_later(key, 'prompt_tokens' .. suffix, u.prompt)
	add_later(key, 'cached_tokens' .. suffix, u.cached)
	add_later(key, 'completion_tokens' .. suffix, u.completion)
	add_later(key, 'cost' .. suffix, u.cost)
	if u.failed == '1' then
		add_later(key, 'errors' .. suffix, requests)
		add_later(key, 'error_prompt_tokens' .. suffix, u.prompt)
		add_later(key, 'error_cached_tokens' .. suffix, u.cached)
		add_later(key, 'error_completion_tokens' .. suffix, u.completion)
		add_later(key, 'error_cost' .. suffix, u.cost)
	end
end

-- Adds it to all sums of the day.
local function count(requests, u, hour, session)
	count_in(usage, ' ' .. u.model, requests, u)
	ttls[usage] = USAGE_TTL
	if hour == '' then
		return
	end
	local suffix = ' ' .. hour .. ' ' .. u.model
	count_in(hours, suffix, requests, u)
	ttls[hours] = HOURS_TTL
	if session then
		count_in(session, suffix, requests, u)
		ttls[session] = SESSION_TTL
	end
end

-- The windows of spend and of tokens, which begin anew where they are over.
local month, day, tokens_minute
local function begin_anew(start, stored, name, sum)
	if start > (tonumber(stored) or 0) then
		stored = whole(start)
		redis.call('HSET', account, name, stored, sum, '0')
	end
	return stored
end
local function roll()
	if month then
		return
	end
	local a = redis.call('HMGET', account, 'month', 'spend_day', 'tokens_minute')
	day = begin_anew(day_of(now), a[2], 'spend_day', 'spend_day_spent')
	tokens_minute = a[3] and begin_anew(now - now % MINUTE, a[3], 'tokens_minute', 'tokens_minute_used')
	month = begin_anew(month_of(now), a[1], 'month', 'month_spent')
end

-- Counts a request that was admitted without Redis in the windows in which it began, unless these are over.
local function count_request(began)
	local a = redis.call('HMGET', account, 'minute', 'day')
	for i, w in ipairs({{'minute', began - began % MINUTE}, {'day', day_of(began)}}) do
		local name, start = w[1], w[2]
		if begin_anew(start, a[i], name, name .. '_used') == whole(start) then
			add(account, name .. '_used', '1')
		end
	end
end

local function negative(amount)
	return amount == '0' and amount or '-' .. amount
end

local function settle(from)
	local id, kind, entry, cost, model = ARGV[from], ARGV[from + 1], ARGV[from + 2], ARGV[from + 3], ARGV[from + 4]
	local began, repeated, recent = tonumber(ARGV[from + 9]), ARGV[from + 10] == '1', ARGV[from + 11] == '1'
	local hour, session, session_key = ARGV[from + 12], ARGV[from + 13], KEYS[tonumber(ARGV[from + 14])]
	local keeps, alone = ARGV[from + 15] == '1', ARGV[from + 16] == '1'

	if session_key then -- a wrong one is its own request's trouble
		redis.call('SISMEMBER', sessions, '')
		redis.call('HEXISTS', session_key, '')
	end
	local known = redis.call('SISMEMBER', done, id) == 1
	local held = redis.call('HGET', pending, id)
	local estimate = kind == 'settle' and redis.call('HGET', lost, id)
	if kind == 'lost' and not held then
		return 0
	end
	if kind == 'settle' and repeated and not (known or held or estimate) and began and now - began > REQUEST_TTL - CLOCKS then
		return 3
	end
	if held then
		local minute, request_day, reserved, entry_of = string.match(held, '^(%d+) (%d+) (%d+) (.*)$')
		reserved = reserved or '0'
		if keeps and entry_of then -- until it is dropped, by its gateway or, when that is dead, by another
			redis.call('HSET', pending, id, table.concat({minute, request_day, '0', entry_of}, ' '))
		else
			redis.call('HDEL', pending, id)
		end
		redis.call('HDEL', parts_pending, id)
		add_later(account, 'reserved', negative(reserved))
		if kind == 'void' then
			local a = redis.call('HMGET', account, 'minute', 'day')
			if a[1] == minute then add(account, 'minute_used', '-1') end -- now: later, another window may have begun
			if a[2] == request_day then add(account, 'day_used', '-1') end
		end
	end
	if kind == 'drop' then
		return 0
	end

	redis.call('SADD', done, id)
	ttls[done] = REQUEST_TTL
	if kind == 'void' or known and not estimate then
		return 0
	end

	roll()
	if alone and began and not (held or estimate) then
		count_request(began)
	end
	if estimate then
		local old = cmsgpack.unpack(estimate)
		redis.call('HDEL', lost, id)
		redis.call('XDEL', ledger, old.entry)
		old.prompt, old.cached, old.completion, old.cost = negative(old.prompt), negative(old.cached), negative(old.completion), negative(old.cost)
		count('-1', old, hour, session_key)
		add_later(account, 'total', old.cost)
		if month == old.month then add_later(account, 'month_spent', old.cost) end
		if day == old.day then add_later(account, 'spend_day_spent', old.cost) end
	end

	local u = {cost = cost, model = counted_as(model), prompt = ARGV[from + 5], cached = ARGV[from + 6], completion = ARGV[from + 7], failed = ARGV[from + 8]}
	add_later(account, 'total', u.cost)
	add_later(account, 'month_spent', u.cost)
	add_later(account, 'spend_day_spent', u.cost)
	if tokens_minute and kind == 'settle' and not estimate and recent then -- else its minute is long over
		add_later(account, 'tokens_minute_used', whole(tonumber(u.prompt) + tonumber(u.completion)))
	end
	ttls[account] = ACCOUNT_TTL
	count('1', u, hour, session_key)
	if session_key and hour ~= '' then
		list(session)
	end

	local position = redis.call('XADD', ledger, 'MAXLEN', '~', keep, '*', 'event', entry)
	ttls[ledger] = USAGE_TTL
	if kind == 'lost' then
		u.month, u.day, u.entry = month, day, position
		redis.call('HSET', lost, id, cmsgpack.pack(u))
		ttls[lost] = USAGE_TTL
	end
	return estimate and 2 or 1
end

local results = {}
for from = 2, #ARGV, FIELDS do
	local ok, result = pcall(settle, from)
	if not ok then
		result = type(result) == 'table' and result.err or tostring(result)
	end
	results[#results + 1] = result
end
results[#results + 1] = add_all()
return results
