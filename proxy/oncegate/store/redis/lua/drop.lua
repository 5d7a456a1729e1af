#!lua flags=allow-oom
-- Drops the response of a complete record whose retention is over, or that an operator purges, and leaves its tombstone.
-- KEYS: record
-- ARGV: tag token meta purge (meta: of the tombstone; purge: '1' if the retention need not be over)
-- Returns: {tag, 'dropped' or 'kept' or 'absent' or 'fenced'}
local tag, token, meta, purge = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'
local fields = redis.call('HMGET', KEYS[1], 'meta', 'until')
if not fields[1] then
  return {tag, 'absent'}
elseif fields[1]:sub(2, 17) ~= token then
  return {tag, 'fenced'}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if fields[1]:byte() == 3 then
  return {tag, 'dropped'}
elseif not purge and (tonumber(fields[2]) or math.huge) > now then
  return {tag, 'kept'}
end
-- A new hash, because one that has been large does not return to the compact encoding.
local left = redis.call('PTTL', KEYS[1])
redis.call('UNLINK', KEYS[1])
redis.call('HSET', KEYS[1], 'meta', meta)
redis.call('PEXPIRE', KEYS[1], math.max(left, 1))
return {tag, 'dropped'}
