#!lua flags=allow-oom
-- Returns the epoch of the data set, founding one where there is none, and keeps the end of the quarantine.
-- KEYS: epoch
-- ARGV: tag fresh run quarantine_ms begin (fresh: the id of a new epoch; run: the server's replication id, or '';
--   begin: 1 if the caller has found a loss)
-- Returns: {tag, 'founded' or 'moved' or 'stands', id, left_ms}
local tag, fresh, run, quarantine_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local fields = redis.call('HMGET', KEYS[1], 'id', 'run', 'until')
local id, ends = fields[1] or fresh, tonumber(fields[3]) or 0
local founded = not fields[1]
local moved = not founded and run ~= '' and (fields[2] or '') ~= '' and fields[2] ~= run
if founded or moved or ARGV[5] == '1' then
  ends = math.max(ends, now + quarantine_ms)
  redis.call('HSET', KEYS[1], 'id', id, 'run', run, 'until', ends)
elseif run ~= '' and fields[2] ~= run then
  redis.call('HSET', KEYS[1], 'run', run)
end
-- An end further off than a whole quarantine means that the clock stepped back.
local left = math.min(math.max(ends - now, 0), quarantine_ms)
if founded then
  return {tag, 'founded', id, left}
elseif moved then
  return {tag, 'moved', id, left}
end
return {tag, 'stands', id, left}
