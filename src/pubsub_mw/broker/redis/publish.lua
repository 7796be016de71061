-- Append publications to their channels and deliver them, in one step. The first line, which `scripts.py` writes, says
-- what is the same for all: `history_ttl` and `position_ttl`, ms, and `tail`, what closes a frame after its position.
--
-- KEYS  of each publication: the position of its channel, a string; after it are named
--         :h  history: list, the newest last; payloads, or a payload's first line where it is not kept
--         :p  pub/sub channel
--         :i:<idempotency key>  string: position, " " and the number of the part if it is one
-- ARGV  1 "" or, if an earlier try may have arrived, the epoch for a channel that has none; else that is the tag
--       then five of each publication: tag, frame up to its position, end of the payload's first line,
--       history size, with "-" before it if this one is not kept, and
--       "" or "<number of the part under its key, or 0> <idempotency ttl, ms> <idempotency key>"
-- Returns the position as text; of several an array, or the first error when all have been tried. The payload is laid
-- out as `codec.py` says.

local call, format, match = redis.call, string.format, string.match

local function publish(place, tag, head, about, size, once)
  local part, ttl, key
  if once ~= '' then
    part, ttl, key = match(once, '^(%d+) (%d+) (.*)$')
    key = place .. ':i:' .. key
    local known = call('GET', key)
    if known and tonumber(match(known, ' (%d+)$') or 0) >= tonumber(part) then return match(known, '^%S*') end
  end

  local history, previous, epoch, offset = place .. ':h', call('GET', place)
  if previous then
    epoch, offset = match(previous, '^([^.]+)%.(%d+)')
    if ARGV[1] ~= '' then
      local mark = '.' .. tag
      for _, payload in ipairs(call('LRANGE', history, -1000, -1)) do
        local position = match(payload, '^%S+ (%S+)')
        if position and string.sub(position, -#mark) == mark then return position end
      end
    end
  else
    epoch, offset = ARGV[1] ~= '' and ARGV[1] or tag, 0
    previous = epoch .. '.0.0'
    -- A history that outlived its position belongs to an epoch nobody can name any more. Deleted only if it is there:
    -- once a script has written, a Redis that is full refuses it nothing.
    if call('EXISTS', history) == 1 then call('DEL', history) end
  end

  -- Lua numbers are doubles: exact to 2^53, and %d keeps them from turning into 1e+15. A string costs time by its
  -- length, whoever makes it, so the payload is put together at once.
  local position = epoch .. '.' .. format('%d', offset + 1) .. '.' .. tag
  local payload = previous .. ' ' .. position .. ' ' .. about .. '\n' .. head .. position .. tail
  local most, kept = tonumber(size), payload
  if most < 0 then most, kept = -most, match(payload, '^[^\n]*\n') end

  -- The history first: if it refuses, no offset is used up. Trimmed when it is an eighth too long.
  local length = call('RPUSH', history, kept)
  if length > most * 1.125 then call('LTRIM', history, length - most, -1) end
  call('PEXPIRE', history, history_ttl)
  call('SET', place, position, 'PX', position_ttl)
  if key then call('SET', key, part == '0' and position or position .. ' ' .. part, 'PX', ttl) end
  call('PUBLISH', place .. ':p', payload)
  return position
end

if #KEYS == 1 then return publish(KEYS[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]) end
local positions, failure = {}, nil
for index, place in ipairs(KEYS) do
  local is_done, reply = pcall(publish, place, unpack(ARGV, 5 * index - 3, 5 * index + 1))
  if is_done then positions[index] = reply else failure = failure or reply end
end
if type(failure) == 'string' then failure = redis.error_reply(failure) end
return failure or positions
