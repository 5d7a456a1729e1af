#!lua flags=allow-oom
-- Writes the settings by which a proxy names keys, unless others name them by other settings.
-- KEYS: identities
-- ARGV: tag identity described consent retention_ms (consent is 'found', 'ask' or 'accept'; described: the settings)
-- Returns: {tag, 'same' or 'accepted' or 'free'} | {tag, 'differs', described, ...}
local tag, identity, consent, retention_ms = ARGV[1], ARGV[2], ARGV[4], tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = false
local others = {tag, 'differs'}
local found = redis.call('HGETALL', KEYS[1])
for at = 1, #found, 2 do
  local written_ms, described = found[at + 1]:match('^(%d+) (.*)$')
  if now - (tonumber(written_ms) or 0) > retention_ms then
    -- No record that was named by these settings is left.
    redis.call('HDEL', KEYS[1], found[at])
  elseif found[at] == identity then
    known = true
  else
    others[#others + 1] = described
  end
end
local alone = #others == 2
if not known and not alone and consent ~= 'accept' then
  return others
elseif not known and alone and consent == 'ask' then
  return {tag, 'free'}
end
redis.call('HSET', KEYS[1], identity, string.format('%.0f', now) .. ' ' .. ARGV[3])
redis.call('PEXPIRE', KEYS[1], retention_ms)
return {tag, (known or alone) and 'same' or 'accepted'}
