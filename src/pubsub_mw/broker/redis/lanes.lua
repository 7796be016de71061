-- The lanes: how many requests of a connection run, and which wait for that, in order. Stands before each script that
-- changes one. What runs is a set, not a count, so whatever is said twice about a request changes a lane once.
--
-- KEYS  1 requests: stream of what workers take; p (payload), c (connection, "" = in no lane), a (accepted at, ms)
--       2 waiting: stream of what waits in all lanes; p (payload); an id begins with when it was accepted, ms
--       3 lanes: sorted set connection -> when to look whether what it waits for is still there, ms since 1970
--       4 prefix of what each lane has: <connection>:running, set of ids in 1, and <connection>:waiting, list of
--         "<id in 2> <id of the request>"
-- ARGV  1 how long a lane to which nothing happens is kept, and what waits in it, ms

local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function start(connection, payload, accepted_at)
  local entry = redis.call('XADD', KEYS[1], '*', 'p', payload, 'c', connection, 'a', accepted_at)
  if connection == '' then return end
  redis.call('SADD', KEYS[4] .. connection .. ':running', entry)
  redis.call('PEXPIRE', KEYS[4] .. connection .. ':running', ARGV[1])
end

-- Start what waits first, and say whether something did. What Redis lost meanwhile is passed over.
local function start_next(connection)
  while true do
    local item = redis.call('LPOP', KEYS[4] .. connection .. ':waiting')
    if not item then return false end
    local place = string.match(item, '^%S+')
    local found = redis.call('XRANGE', KEYS[2], place, place)[1]
    if found then
      redis.call('XDEL', KEYS[2], place)
      start(connection, found[2][2], string.match(place, '^%d+'))
      return true
    end
  end
end

-- Start the next one in the place of `entry`, unless another has done so, or if nothing runs at all.
local function release(connection, entry)
  local running = KEYS[4] .. connection .. ':running'
  if redis.call('SREM', running, entry) == 1 or redis.call('EXISTS', running) == 0 then start_next(connection) end
end
