-- What the scripts of the shared store have in common.
--
-- A key's account is one hash, with the fields of a local store's balance:
--   minute, minute_used, day, day_used    the windows of requests
--   tokens_minute, tokens_minute_used     that of tokens, once there has been a limit for them
--   total, month, month_spent, spend_day, spend_day_spent, reserved    money
-- A window's start is in Unix seconds. A window that began earlier than the one the clock is in counts as empty, and
-- one that begins later stays: a clock that was set back refills nothing.
--
-- Money is in nano-dollars and never becomes a Lua number, which is a double and exact only up to 2^53, nine million
-- dollars. It stays a decimal string: Redis adds with HINCRBY, in 64 bits, and comparisons are made on pairs of
-- numbers, whole dollars and nano-dollars, each of which a double has exactly.

local ACCOUNT_TTL = 10 * 365 * 86400 -- total spend is never to be forgotten while the key is in use
local USAGE_TTL = 400 * 86400        -- the ledger, sums, and what has yet to be settled or may yet be replaced
local REQUEST_TTL = 3 * 86400        -- which requests have been settled

local MINUTE, DAY = 60, 86400

local function clock()
	local time = redis.call('TIME')
	return tonumber(time[1]), tonumber(time[2])
end

-- The start of the month, by Howard Hinnant's days-to-civil algorithm.
local function month_of(now)
	local days = math.floor(now / DAY)
	local z = days + 719468
	local of_era = z % 146097
	local year = math.floor((of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524) - math.floor(of_era / 146096)) / 365)
	local of_year = of_era - (365 * year + math.floor(year / 4) - math.floor(year / 100))
	local month = math.floor((5 * of_year + 2) / 153)
	local of_month = of_year - math.floor((153 * month + 2) / 5)
	return (days - of_month) * DAY
end

local function day_of(now) return now - now % DAY end

-- The start and sum of the window that begins at start, where stored_start and stored_sum are what is stored.
local function window(start, stored_start, stored_sum)
	stored_start = tonumber(stored_start) or 0
	if start > stored_start then
		return start, '0'
	end
	return stored_start, stored_sum or '0'
end

-- An integer as it is to be stored; Lua's own form has an exponent from 10^14 on.
local function whole(n) return string.format('%.0f', n) end

local function parts(amount)
	return tonumber(string.sub(amount, 1, -10)) or 0, tonumber(string.sub(amount, -9))
end

-- Whether the sum of amounts, none of them negative, is at least (or, if strictly, more than) limit.
local function reaches(limit, strictly, ...)
	local dollars, nanos = 0, 0
	for _, amount in ipairs({...}) do
		local d, n = parts(amount)
		dollars, nanos = dollars + d, nanos + n
	end
	dollars, nanos = dollars + math.floor(nanos / 1e9), nanos % 1e9
	local d, n = parts(limit)
	if dollars ~= d then
		return dollars > d
	end
	if strictly then
		return nanos > n
	end
	return nanos >= n
end

-- Adds to a field, up to the largest number there is.
local function add(key, field, amount)
	if amount == '0' then
		return
	end
	local sum = redis.pcall('HINCRBY', key, field, amount)
	if type(sum) ~= 'table' then
		return
	end
	if string.find(sum.err, 'overflow') then
		redis.call('HSET', key, field, '9223372036854775807')
		return
	end
	error(sum.err)
end
