#!lua flags=allow-oom
-- Extends the owner's lease and the record's retention; a lapsed lease comes back if the token still owns the key.
-- KEYS: record
-- ARGV: tag token lease_ms retention_ms stage layout
--   stage: how far its exchange got, for operators
--   layout: the one that the record most probably has, 'packed' or 'hash'
-- Returns: tag .. ' renewed' or ' absent' or ' unknown' or ' complete' or ' fenced'
-- The index of open keys (see store/redis/layouts/open_index.py). It never fails a renewal.
local index = 'once:open'
local tag, token, lease = ARGV[1], ARGV[2], ARGV[3]
local fields = {}
local likely = ARGV[6] == 'packed'
local value = likely and redis.pcall('GET', KEYS[1])
if type(value) ~= 'string' then
  fields = redis.pcall('HMGET', KEYS[1], 'token', 'state', 'meta')
  value = fields.err and (redis.call('GET', KEYS[1]) or redis.call('HMGET', KEYS[1], 'meta'))
end
local owner, state, complete = fields[1], fields[2], fields[3]
if value then
  owner, complete = value:sub(2, 17), value:byte() ~= 4
  state = value:sub(71, 71) == 'i' and 'in_flight' or 'unknown'
elseif complete then
  owner = complete:sub(2, 17)
end
if not owner then
  return tag .. ' absent'
elseif owner ~= token then
  return tag .. ' fenced'
elseif complete then
  return tag .. ' complete'
elseif state ~= 'in_flight' then
  return tag .. ' unknown'
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if value then
  -- leased, lease_ms and stage, in the places of store/redis/layouts/packed.py.
  redis.call('SETRANGE', KEYS[1], 46, string.format('%013d%010d', now, lease) .. ARGV[5]:sub(1, 1))
else
  redis.call('HSET', KEYS[1], 'lease', string.format('%d', now + lease), 'stage', ARGV[5])
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
if index then
  redis.pcall('ZADD', index, string.format('%d', now + lease), KEYS[1])
end
return tag .. ' renewed'
