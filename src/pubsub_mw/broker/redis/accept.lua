-- Store a request for a worker, or in its connection's lane, unless it is known already or there is no room.
--
-- KEYS  1 to 4 as in lanes.lua   5 claim of the request
-- ARGV  1 as in lanes.lua   2 payload   3 id of the request   4 connection, or "" = in no lane   5 queue size
--       6 in flight         7 backlog
-- Returns 1 = stored, 2 = known, 3 = the queue is full, 4 = the connection's backlog is.

if redis.call('EXISTS', KEYS[5]) == 1 then return 2 end
local at = now()
local size = tonumber(ARGV[5])
if redis.call('XLEN', KEYS[1]) + redis.call('XLEN', KEYS[2]) >= size then
  -- What waits in a lane that Redis lost is nobody's.
  redis.call('XTRIM', KEYS[2], 'MINID', '=', at - ARGV[1])
  if redis.call('XLEN', KEYS[1]) + redis.call('XLEN', KEYS[2]) >= size then return 3 end
end
local connection = ARGV[4]
local free = 1
if connection ~= '' then
  free = tonumber(ARGV[6]) - redis.call('SCARD', KEYS[4] .. connection .. ':running')
  while free > 0 and start_next(connection) do free = free - 1 end
end
if free > 0 then
  start(connection, ARGV[2], at)
else
  local waiting = KEYS[4] .. connection .. ':waiting'
  if redis.call('LLEN', waiting) >= tonumber(ARGV[7]) then return 4 end
  local place = redis.call('XADD', KEYS[2], '*', 'p', ARGV[2])
  redis.call('RPUSH', waiting, place .. ' ' .. ARGV[3])
  redis.call('PEXPIRE', waiting, ARGV[1])
  redis.call('PEXPIRE', KEYS[2], ARGV[1])
  redis.call('ZADD', KEYS[3], 'NX', at, connection)
end
redis.call('SET', KEYS[5], '1', 'PX', ARGV[1])
return 1
