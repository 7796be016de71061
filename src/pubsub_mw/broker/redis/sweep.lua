-- Let lanes go on whose running requests Redis lost, and forget what waits in no lane.
--
-- KEYS  1 to 4 as in lanes.lua
-- ARGV  1 as in lanes.lua   2 after which a lane is looked at again, ms   3 lanes at most
-- Returns how many lanes it looked at.

local at = now()
redis.call('XTRIM', KEYS[2], 'MINID', '=', at - ARGV[1])
local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', at, 'LIMIT', 0, ARGV[3])
for _, connection in ipairs(due) do
  for _, entry in ipairs(redis.call('SMEMBERS', KEYS[4] .. connection .. ':running')) do
    if not redis.call('XRANGE', KEYS[1], entry, entry)[1] then release(connection, entry) end
  end
  release(connection, '')
  if redis.call('EXISTS', KEYS[4] .. connection .. ':waiting') == 1 then
    redis.call('ZADD', KEYS[3], at + ARGV[2], connection)
  else
    redis.call('ZREM', KEYS[3], connection)
  end
end
return #due
