-- KEYS: the queue's stream, those that wait; the job, or, to renew, several
-- ARGV: what to do, and what that needs.
--
-- A job is a hash: status ('reserved' until it is queued), job, request, body; entry, its place in the stream; by, the run
-- that it is; runs, started; and in the end ended, response or error, and, until that is settled, event. What ends a job
-- writes event, and an entry stays in the stream until that is settled: whoever finds it there does so.
local stream, waiting, job = KEYS[1], KEYS[2], KEYS[3]
local GROUP, CONSUMER = 'workers', 'gateway' -- one for all instances: a run is known by its token
local PLACE_TTL = 60                         -- of a place in the queue whose job does not come
local JOB_TTL = 4 * 86400                    -- of what has not ended; it may wait for a day and run for another

local function now()
	local time = redis.call('TIME')
	return string.format('%d%03d', time[1], math.floor(tonumber(time[2]) / 1000))
end

local function field(name) return redis.call('HGET', job, name) end

local function drop(entry)
	redis.call('XACK', stream, GROUP, entry)
	redis.call('XDEL', stream, entry)
end

local function enter(id)
	local made = redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
	if made.err and not string.find(made.err, 'BUSYGROUP') then -- there mostly is one
		error(made.err)
	end
	local entry = redis.call('XADD', stream, '*', 'job', id)
	redis.call('HSET', job, 'status', 'queued', 'entry', entry)
	redis.call('EXPIRE', job, JOB_TTL)
	redis.call('EXPIRE', stream, JOB_TTL)
	redis.call('EXPIRE', waiting, JOB_TTL)
end

local does = {}

-- id, how many may wait. Returns 1 if there is a place.
function does.reserve(id, most)
	if redis.call('ZCARD', waiting) >= tonumber(most) then
		return 0
	end
	redis.call('ZADD', waiting, now(), id)
	redis.call('EXPIRE', waiting, JOB_TTL)
	redis.call('HSET', job, 'status', 'reserved')
	redis.call('EXPIRE', job, PLACE_TTL)
	return 1
end

-- id, job, request, body. Returns 0 if the place is gone.
function does.enqueue(id, about, request, body)
	if field('status') ~= 'reserved' then
		return 0
	end
	redis.call('HSET', job, 'job', about, 'request', request, 'body', body)
	enter(id)
	return 1
end

-- id. Returns 0 if it has begun.
function does.withdraw(id)
	local status = field('status')
	if status and status ~= 'reserved' and status ~= 'queued' then
		return 0
	end
	local entry = field('entry')
	if entry then
		drop(entry)
	end
	redis.call('DEL', job)
	redis.call('ZREM', waiting, id)
	return 1
end

-- id, entry, token. Returns 'run', 'ended' or 'gone', and status, job, request, body, runs, event.
function does.take(id, entry, token)
	local status = field('status')
	if not status or field('entry') ~= entry then
		drop(entry)
		if not status then
			redis.call('ZREM', waiting, id)
		end
		return {'gone'}
	end
	redis.call('ZREM', waiting, id)
	local f = redis.call('HMGET', job, 'job', 'request', 'body', 'event')
	if not f[4] then
		redis.call('HSET', job, 'by', token)
	end
	if status ~= 'queued' and status ~= 'in_progress' then
		return {'ended', status, f[1], f[2] or '', '', '0', f[4] or ''}
	end
	redis.call('HSET', job, 'status', 'in_progress', 'started', now())
	local runs = redis.call('HINCRBY', job, 'runs', '1')
	return {'run', 'in_progress', f[1], f[2], f[3], string.format('%d', runs), ''}
end

-- For each job: its token, its entry. Returns for each: 1 if it is still the token's, 2 if it was cancelled, 0 if not.
function does.renew(...)
	local those = {...}
	local said = {}
	for i = 3, #KEYS do
		local token, entry = those[2 * i - 5], those[2 * i - 4]
		local f = redis.call('HMGET', KEYS[i], 'by', 'status')
		if f[1] ~= token then
			said[#said + 1] = 0
		else
			redis.call('XCLAIM', stream, GROUP, CONSUMER, 0, entry, 'JUSTID')
			said[#said + 1] = f[2] == 'cancelled' and 2 or 1
		end
	end
	return said
end

-- token, status, response, error, event. Returns 0 if the job is not the token's.
function does.finish(token, status, response, failure, event)
	if field('by') ~= token then
		return 0
	end
	if field('event') then
		return 1
	end
	if field('status') ~= 'cancelled' then
		redis.call('HSET', job, 'status', status, 'ended', now())
		if response ~= '' then redis.call('HSET', job, 'response', response) end
		if failure ~= '' then redis.call('HSET', job, 'error', failure) end
	end
	redis.call('HSET', job, 'event', event)
	redis.call('HDEL', job, 'body', 'request')
	return 1
end

-- id, status, error, event: for a job that has not begun. One that runs can be cancelled only, and has no event then.
-- Returns the status that it had, or nothing.
function does.close(id, status, failure, event)
	local before = field('status')
	if before == 'queued' then
		redis.call('ZREM', waiting, id)
		redis.call('HSET', job, 'status', status, 'ended', now(), 'event', event)
		if failure ~= '' then redis.call('HSET', job, 'error', failure) end
		redis.call('HDEL', job, 'body', 'request')
	elseif before == 'in_progress' and status == 'cancelled' then
		redis.call('HSET', job, 'status', status, 'ended', now())
		redis.call('HDEL', job, 'body')
	end
	return before
end

-- id, token. Returns 0 if the job is not the token's.
function does.giveback(id, token)
	if field('by') ~= token or field('status') ~= 'in_progress' then
		return 0
	end
	drop(field('entry'))
	redis.call('HDEL', job, 'by', 'started')
	redis.call('HINCRBY', job, 'runs', '-1')
	redis.call('ZADD', waiting, now(), id)
	enter(id)
	return 1
end

-- id, seconds: its event has been settled. It is kept for so long.
function does.settled(id, seconds)
	local entry = field('entry')
	if entry then
		drop(entry)
	end
	redis.call('ZREM', waiting, id)
	redis.call('HDEL', job, 'event', 'by', 'body', 'request')
	redis.call('EXPIRE', job, seconds)
	return 1
end

return does[ARGV[1]](unpack(ARGV, 2))
