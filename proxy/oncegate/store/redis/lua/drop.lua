#!lua flags=allow-oom
-- Drops the response of a complete record whose retention is over, or that an operator purges, and leaves its tombstone.
-- KEYS: record
-- ARGV: tag token meta purge layout
--   meta: of the tombstone. purge: '1' if the retention need not be over
--   layout: the one that the record most probably has, 'packed' or 'hash'
-- Returns: {tag, 'dropped' or 'kept' or 'absent' or 'fenced'}
local tag, token, meta, purge = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'
local likely = ARGV[5] == 'packed'
local packed, fields = likely and redis.pcall('GET', KEYS[1]), {}
if type(packed) ~= 'string' then
  fields = redis.pcall('HMGET', KEYS[1], 'meta', 'until')
  packed = fields.err and (redis.call('GET', KEYS[1]) or redis.call('HMGET', KEYS[1], 'meta'))
end
local found, ends = packed or fields[1], fields[2]
if packed and packed:byte() == 6 then
  ends = packed:sub(-13)
end
if not found or found:byte() == 4 then
  return {tag, 'absent'}
elseif found:sub(2, 17) ~= token then
  return {tag, 'fenced'}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if found:byte() == 3 then
  return {tag, 'dropped'}
elseif not purge and (tonumber(ends) or math.huge) > now then
  return {tag, 'kept'}
end
local left = redis.call('PTTL', KEYS[1])
if packed then
  redis.call('SET', KEYS[1], meta)
else
  -- A new hash, because one that has been large does not return to the compact encoding.
  redis.call('UNLINK', KEYS[1])
  redis.call('HSET', KEYS[1], 'meta', meta)
end
redis.call('PEXPIRE', KEYS[1], math.max(left, 1))
return {tag, 'dropped'}
