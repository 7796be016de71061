-- Read a channel's newest position and what was published after an offset, in one step.
--
-- KEYS  1 position   2 history   (as in publish.lua)
-- ARGV  1 epoch for a channel that has none   2 offset after which to read, or "" for none
--       3 bytes after which the page ends     4 position ttl, ms, while nothing is published   5 position ttl, ms
-- Returns {position, payload...}.

local position = redis.call('GET', KEYS[1])
if not position then
  position = ARGV[1] .. '.0.0'
  redis.call('DEL', KEYS[2])
  redis.call('SET', KEYS[1], position, 'PX', ARGV[4])
end
local offset = tonumber(string.match(position, '^[^.]+%.(%d+)'))
-- Whoever listens asks now and then, which keeps the position; written only when half of its time is over.
local ttl = tonumber(offset == 0 and ARGV[4] or ARGV[5])
if redis.call('PTTL', KEYS[1]) < ttl / 2 then redis.call('PEXPIRE', KEYS[1], ttl) end

local reply = {position}
if ARGV[2] ~= '' and tonumber(ARGV[2]) < offset then
  -- The newest entry is that of the position.
  local length, size = redis.call('LLEN', KEYS[2]), 0
  local from = math.max(0, length - (offset - tonumber(ARGV[2])))
  while from < length and size < tonumber(ARGV[3]) do
    for _, payload in ipairs(redis.call('LRANGE', KEYS[2], from, from + 15)) do
      reply[#reply + 1] = payload
      size, from = size + #payload, from + 1
      if size >= tonumber(ARGV[3]) then break end
    end
  end
end
return reply
