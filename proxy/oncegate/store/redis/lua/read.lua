-- Returns the next chunks of a complete response, as many as fit (at least one).
-- KEYS: record
-- ARGV: tag token first limit_bytes
-- Returns: {tag, 'chunks', chunk, ...} | {tag, 'gone'} | {tag, 'torn'}
--   gone: the key has another record, or none; torn: the record lacks the chunk
local tag, token, index = ARGV[1], ARGV[2], tonumber(ARGV[3])
local room = tonumber(ARGV[4])
local meta = redis.call('HGET', KEYS[1], 'meta')
if not meta or meta:sub(2, 17) ~= token then
  return {tag, 'gone'}
end
local chunk = redis.call('HGET', KEYS[1], 'b' .. index)
if not chunk then
  return {tag, 'torn'}
end
local reply = {tag, 'chunks'}
while chunk do
  reply[#reply + 1] = chunk
  room, index = room - #chunk, index + 1
  if room < redis.call('HSTRLEN', KEYS[1], 'b' .. index) then
    break
  end
  chunk = redis.call('HGET', KEYS[1], 'b' .. index)
end
return reply
