#!lua flags=allow-oom
-- Writes the settings by which a proxy names keys, unless others name them by other settings.
-- KEYS: identities
-- ARGV: tag identity settings write_mode retention_ms (identity: the digest of the settings; write_mode is 'found', 'ask'
--   or 'accept': 'found' writes if these settings or none are stored, 'ask' only if these are, 'accept' in any case)
-- Returns: {tag, 'same' or 'accepted' or 'free'} | {tag, 'differs', settings, ...}
local tag, identity, write_mode, retention_ms = ARGV[1], ARGV[2], ARGV[4], tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = false
local others = {tag, 'differs'}
local entries = redis.call('HGETALL', KEYS[1])
for at = 1, #entries, 2 do
  local written_ms, settings = entries[at + 1]:match('^(%d+) (.*)$')
  if now - (tonumber(written_ms) or 0) > retention_ms then
    -- No record that was named by these settings is left.
    redis.call('HDEL', KEYS[1], entries[at])
  elseif entries[at] == identity then
    known = true
  else
    others[#others + 1] = settings
  end
end
local alone = #others == 2
if not known and not alone and write_mode ~= 'accept' then
  return others
elseif not known and alone and write_mode == 'ask' then
  return {tag, 'free'}
end
redis.call('HSET', KEYS[1], identity, string.format('%.0f', now) .. ' ' .. ARGV[3])
redis.call('PEXPIRE', KEYS[1], retention_ms)
return {tag, (known or alone) and 'same' or 'accepted'}
