-- Stores one more chunk of a response for the owner and extends its lease; a repeat with the same bytes changes nothing.
-- KEYS: record
-- ARGV: tag token index chunk lease_ms
-- Returns: {tag, 'appended' or 'torn' or 'absent' or 'complete' or 'fenced'}
local tag, token, field = ARGV[1], ARGV[2], 'b' .. ARGV[3]
local fields = redis.call('HMGET', KEYS[1], 'token', 'state', 'meta', field)
if fields[3] then
  return {tag, fields[3]:sub(2, 17) == token and 'complete' or 'fenced'}
elseif not fields[1] then
  return {tag, 'absent'}
elseif fields[1] ~= token then
  return {tag, 'fenced'}
elseif fields[4] and fields[4] ~= ARGV[4] then
  return {tag, 'torn'}
end
local time = redis.call('TIME')
local lease = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[5]
if not fields[4] then
  -- One write for both: if it is refused at the memory limit, chunks and count still agree.
  local bytes = tonumber(redis.call('HGET', KEYS[1], 'bytes')) or 0
  redis.call('HSET', KEYS[1], field, ARGV[4], 'bytes', bytes + #ARGV[4], 'lease', lease)
else
  redis.call('HSET', KEYS[1], 'lease', lease)
end
return {tag, 'appended'}
