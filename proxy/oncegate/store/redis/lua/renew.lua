#!lua flags=allow-oom
-- Extends the owner's lease and the record's retention; a lapsed lease comes back if the token still owns the key.
-- KEYS: record
-- ARGV: tag token lease_ms retention_ms stage (how far its exchange got, for operators)
-- Returns: {tag, 'renewed' or 'absent' or 'unknown' or 'complete' or 'fenced'}
local tag, token = ARGV[1], ARGV[2]
local fields = redis.call('HMGET', KEYS[1], 'token', 'state', 'meta')
if fields[3] then
  return {tag, fields[3]:sub(2, 17) == token and 'complete' or 'fenced'}
elseif not fields[1] then
  return {tag, 'absent'}
elseif fields[1] ~= token then
  return {tag, 'fenced'}
elseif fields[2] ~= 'in_flight' then
  return {tag, 'unknown'}
end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'lease', time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[3], 'stage', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {tag, 'renewed'}
