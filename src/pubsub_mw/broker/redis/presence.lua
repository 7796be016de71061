-- Change who is on a channel, take out whose lease is over, and tell everybody who came and who went.
--
-- KEYS  1 entries: hash of e (epoch), n (number), c:<connection> -> "<nonce> <user>", u:<user> -> connections
--       2 users: hash user -> info   3 leases: sorted set connection -> ms since 1970   4 pub/sub channel
-- ARGV  1 epoch for a channel that has none   2 epoch and 3 number that the caller knows
--       4 lease, ms   5 lifetime of the keys, ms, more than twice any lease   6 users that there may be
--       then five for each change: verb, connection, nonce, user, and info; for "leave": ms until then
-- Returns {epoch, number, {1 = accepted, 0 = full}..., notices}, or, to a caller who does not know what was
-- before, {epoch, number, {...}, {}, {user, info...}}.

local entries, users, leases = KEYS[1], KEYS[2], KEYS[3]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- One key alone means nothing: the channel is empty, or part of it was lost, and servers enter theirs again.
if redis.call('EXISTS', entries, users, leases) < 3 then redis.call('DEL', entries, users, leases) end
local epoch = redis.call('HGET', entries, 'e') or ARGV[1]
local number = redis.call('HGET', entries, 'n') or '0'
local knows = epoch == ARGV[2] and number == ARGV[3]
local accepted, notices = {}, {}

local function tell(sign, user, info)
  number = string.format('%.0f', tonumber(number) + 1)
  redis.call('HSET', entries, 'e', epoch, 'n', number)
  local notice = '!' .. epoch .. ' ' .. number .. ' ' .. sign .. ' ' .. user .. '\n' .. info
  redis.call('PUBLISH', KEYS[4], notice)
  notices[#notices + 1] = notice
end

local function find(connection)
  local entry = redis.call('HGET', entries, 'c:' .. connection)
  if entry then return string.match(entry, '^(%S+) (%S+)$') end
end

local function remove(connection)
  local _, user = find(connection)
  redis.call('ZREM', leases, connection)
  redis.call('HDEL', entries, 'c:' .. connection)
  if user and redis.call('HINCRBY', entries, 'u:' .. user, -1) <= 0 then
    redis.call('HDEL', entries, 'u:' .. user)
    local info = redis.call('HGET', users, user)
    redis.call('HDEL', users, user)
    tell('-', user, info or 'null')
  end
end

local function enter(verb, connection, nonce, user, info)
  local held_by, held_user = find(connection)
  if held_by and verb == 'stay' and held_by ~= nonce then return 1 end
  if held_by and held_user ~= user then
    remove(connection)
    held_by = nil
  end
  local is_new = redis.call('HEXISTS', users, user) == 0
  if is_new and redis.call('HLEN', users) >= tonumber(ARGV[6]) then return 0 end
  redis.call('ZADD', leases, now + tonumber(ARGV[4]), connection)
  if held_by == nonce then return 1 end
  redis.call('HSET', entries, 'c:' .. connection, nonce .. ' ' .. user)
  if not held_by then redis.call('HINCRBY', entries, 'u:' .. user, 1) end
  redis.call('HSET', users, user, info)
  if is_new then tell('+', user, info) end
  return 1
end

for index = 7, #ARGV, 5 do
  local verb, connection, nonce, user, rest = unpack(ARGV, index, index + 4)
  if verb == 'leave' then
    if find(connection) == nonce then redis.call('ZADD', leases, now + tonumber(rest), connection) end
    accepted[#accepted + 1] = 1
  else
    accepted[#accepted + 1] = enter(verb, connection, nonce, user, rest)
  end
end
for _, connection in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, 1000)) do remove(connection) end

local lifetime = tonumber(ARGV[5])
for index = 1, 3 do
  if redis.call('PTTL', KEYS[index]) < lifetime / 2 then redis.call('PEXPIRE', KEYS[index], lifetime) end
end
if knows then return {epoch, number, accepted, notices} end
return {epoch, number, accepted, {}, redis.call('HGETALL', users)}
