-- Take a request out of its connection's lane, if it waits there; else note that its answer is not wanted.
--
-- KEYS  1 to 4 as in lanes.lua   5 claim of the request   6 mark of a cancelled request
-- ARGV  1 as in lanes.lua   2 connection   3 id of the request
--       4 how long the mark is kept, ms, or "" = it was answered for want of a worker, and stays known
-- Returns 1 = it waited, 0 = it does not.

local waiting = KEYS[4] .. ARGV[2] .. ':waiting'
for _, item in ipairs(redis.call('LRANGE', waiting, 0, -1)) do
  local place, id = string.match(item, '^(%S+) (.*)$')
  if id == ARGV[3] then
    redis.call('LREM', waiting, 1, item)
    redis.call('XDEL', KEYS[2], place)
    if ARGV[4] ~= '' then redis.call('DEL', KEYS[5]) end
    return 1
  end
end
if ARGV[4] ~= '' then redis.call('SET', KEYS[6], '1', 'PX', ARGV[4]) end
return 0
