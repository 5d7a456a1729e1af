#!lua flags=allow-oom
-- Notes by which settings a replica names keys, unless others that name them otherwise are about.
-- KEYS: identities
-- ARGV: tag identity described how retention_ms (how is 'found', 'ask' or 'accept'; described: the settings, for people)
-- Returns: {tag, 'same' or 'accepted' or 'free'} | {tag, 'differs', described, ...}
local tag, identity, how, retention_ms = ARGV[1], ARGV[2], ARGV[4], tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = false
local others = {tag, 'differs'}
local found = redis.call('HGETALL', KEYS[1])
for at = 1, #found, 2 do
  local seen_ms, described = found[at + 1]:match('^(%d+) (.*)$')
  if now - (tonumber(seen_ms) or 0) > retention_ms then
    -- Nothing that it named is left.
    redis.call('HDEL', KEYS[1], found[at])
  elseif found[at] == identity then
    known = true
  else
    others[#others + 1] = described
  end
end
local alone = #others == 2
if not known and not alone and how ~= 'accept' then
  return others
elseif not known and alone and how == 'ask' then
  return {tag, 'free'}
end
redis.call('HSET', KEYS[1], identity, string.format('%.0f', now) .. ' ' .. ARGV[3])
redis.call('PEXPIRE', KEYS[1], retention_ms)
return {tag, (known or alone) and 'same' or 'accepted'}
