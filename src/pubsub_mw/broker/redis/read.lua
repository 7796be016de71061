-- Read a channel's newest position and what was published after an offset, in one step.
--
-- KEYS  1 position   2 history   (as in publish.lua)
-- ARGV  1 epoch for a channel that has none   2 offset after which to read, or "" for none
--       3 bytes after which the page ends     4 position ttl, ms, while nothing is published   5 position ttl, ms
-- Returns {epoch, offset, tag, payload...}.

local place = redis.call('HMGET', KEYS[1], 'e', 'o', 't')
local epoch, offset, tag = place[1], place[2], place[3]
if not epoch then
  epoch, offset, tag = ARGV[1], '0', '0'
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[1], 'e', epoch, 'o', offset, 't', tag)
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
else
  -- Whoever listens asks now and then, which keeps the position; written only when half of its time is over.
  local ttl = tonumber(offset == '0' and ARGV[4] or ARGV[5])
  if redis.call('PTTL', KEYS[1]) < ttl / 2 then redis.call('PEXPIRE', KEYS[1], ttl) end
end

local reply = {epoch, offset, tag}
if ARGV[2] ~= '' and tonumber(ARGV[2]) < tonumber(offset) then
  local size, from = 0, string.format('%.0f', tonumber(ARGV[2]) + 1)
  while size < tonumber(ARGV[3]) do
    local entries = redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', 16)
    for _, entry in ipairs(entries) do
      reply[#reply + 1] = entry[2][2]
      size = size + #entry[2][2]
      from = string.format('%.0f', tonumber(string.match(entry[1], '^%d+')) + 1)
      if size >= tonumber(ARGV[3]) then break end
    end
    if #entries < 16 then break end
  end
end
return reply
