-- Append a publication to its channel and deliver it, in one step.
--
-- KEYS  1 position of the channel: hash of e (epoch), o (offset), t (tag)
--       2 history: stream, entry id <offset>-0, field p = the payload, or its first line where it is not kept
--       3 pub/sub channel
--       4 idempotency key -> position, " " and the number of the part if it is one (optional)
-- ARGV  1 epoch for a channel that has none    2 tag              3 frame up to its position  4 frame after it
--       5 "<exclude> <reply>", either empty  6 history size     7 "1" = keep it in history
--       8 history ttl, ms   9 position ttl, ms   10 idempotency ttl, ms   11 "1" = an earlier try may have arrived
--       12 number of the part under its key, or "0"
-- Returns the position as text. The payload is laid out as `codec.py` says.

if KEYS[4] then
  local known = redis.call('GET', KEYS[4])
  if known and tonumber(string.match(known, ' (%d+)$') or 0) >= tonumber(ARGV[12]) then
    return string.match(known, '^%S*')
  end
end

local place = redis.call('HMGET', KEYS[1], 'e', 'o', 't')
local epoch, offset, previous = place[1], place[2], place[3]
if not epoch then
  -- A stream that outlived its position belongs to an epoch nobody can name any more.
  epoch, offset, previous = ARGV[1], '0', '0'
  redis.call('DEL', KEYS[2])
elseif ARGV[11] == '1' then
  local mark = '.' .. ARGV[2]
  for _, entry in ipairs(redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1000)) do
    local payload = entry[2][2]
    local position = string.match(payload, '^%S+ (%S+)')
    if position and string.sub(position, -#mark) == mark then return position end
  end
end

-- Lua numbers are doubles: exact to 2^53, and %.0f keeps them from turning into 1e+15.
local next_offset = string.format('%.0f', tonumber(offset) + 1)
local position = epoch .. '.' .. next_offset .. '.' .. ARGV[2]
local header = epoch .. '.' .. offset .. '.' .. previous .. ' ' .. position .. ' ' .. ARGV[5] .. '\n'
local payload = header .. ARGV[3] .. position .. ARGV[4]

-- The stream first: if it refuses, no offset is used up.
redis.call('XADD', KEYS[2], 'MAXLEN', '=', ARGV[6], next_offset .. '-0', 'p', ARGV[7] == '1' and payload or header)
redis.call('HSET', KEYS[1], 'e', epoch, 'o', next_offset, 't', ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[8])
redis.call('PEXPIRE', KEYS[1], ARGV[9])
if KEYS[4] then
  redis.call('SET', KEYS[4], ARGV[12] == '0' and position or position .. ' ' .. ARGV[12], 'PX', ARGV[10])
end
redis.call('PUBLISH', KEYS[3], payload)
return position
