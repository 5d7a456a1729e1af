-- Returns the next chunks of a complete response, as many as fit (at least one).
-- KEYS: record
-- ARGV: tag token first limit_bytes
-- Returns: {tag, 'chunks', chunk, ...} | {tag, 'gone'} | {tag, 'torn'}
--   gone: the key has another record, or none, or its retention is over; torn: the record lacks the chunk
local tag, token, index = ARGV[1], ARGV[2], tonumber(ARGV[3])
local room = tonumber(ARGV[4])
local fields = redis.pcall('HMGET', KEYS[1], 'meta', 'until')
local packed = fields.err and (redis.call('GET', KEYS[1]) or redis.call('HMGET', KEYS[1], 'meta'))
local meta, ends, chunk = packed or fields[1], fields[2], nil
if packed and packed:byte() == 6 then
  ends = packed:sub(-13)
end
if not meta or meta:sub(2, 17) ~= token or meta:byte() == 3 or meta:byte() == 4 then
  return {tag, 'gone'}
end
if ends then
  local time = redis.call('TIME')
  if (tonumber(ends) or math.huge) <= time[1] * 1000 + math.floor(time[2] / 1000) then
    return {tag, 'gone'}
  end
end
if packed then
  -- The one piece behind the head, whose length stands in the bytes 82 to 85 (see store/redis/layouts/packed.py).
  local first = #meta > 85 and struct.unpack('>I4', meta, 82) + 1 or #meta
  chunk = index == 0 and meta:sub(first, meta:byte() == 6 and -14 or -1)
else
  chunk = redis.call('HGET', KEYS[1], 'b' .. index)
end
if not chunk or (packed and chunk == '') then
  return {tag, 'torn'}
end
local reply = {tag, 'chunks'}
while chunk do
  reply[#reply + 1] = chunk
  room, index = room - #chunk, index + 1
  if packed or room < redis.call('HSTRLEN', KEYS[1], 'b' .. index) then
    break
  end
  chunk = redis.call('HGET', KEYS[1], 'b' .. index)
end
return reply
