#!lua flags=allow-oom
-- Gives a mark another value if it has the one that is expected; an empty value stands for no mark.
-- KEYS: mark
-- ARGV: tag before after lasts_ms
-- Returns: {tag, 'swapped' or 'kept'}
local tag, before, after, lasts = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if (redis.call('GET', KEYS[1]) or '') ~= before then
  return {tag, 'kept'}
end
if after == '' then
  redis.call('UNLINK', KEYS[1])
else
  redis.call('SET', KEYS[1], after, 'PX', lasts)
end
return {tag, 'swapped'}
