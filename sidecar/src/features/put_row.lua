-- Keeps the last event under KEYS[1], and says so to the region when KEYS[2] (the counter) is given.
-- ARGV: 1 what to do; 2 bytes; 3 lifetime in ms; 4 channel; 5 the row's name there.
--   event   keep these bytes, a row, unless a later one is there
--   unknown the row changed, and to what is not known: forget it, and take nothing for a while, since
--           whoever read the store before the change may still come to fill it in
--   garbage these bytes were there and are no row: remove them, if they still are there
-- Answers the number of the change when it was told, else 1 when something was changed and 0 when not; or
-- why the row could not be kept.
local FENCE = '\242' -- a format byte that no row has: redis.rs reads it as nothing there

local function event(row)
  -- layout.rs: format byte, 10 bytes, event time as i64 BE. Doubles are exact below 2^53; more is no event.
  if type(row) ~= 'string' or #row < 19 then return nil end
  local format, time = string.byte(row, 1), 0
  if format ~= 0xF0 and format ~= 0xF1 then return nil end
  for at = 12, 19 do time = time * 256 + string.byte(row, at) end
  if time >= 9007199254740992 then return nil end
  return time
end

local function higher(new, old)
  local a, b = string.byte(new, 1), string.byte(old, 1)
  if a ~= b then return a == 0xF0 end -- a deletion wins over a row of the same time
  for at = 1, math.min(#new, #old) do
    a, b = string.byte(new, at), string.byte(old, at)
    if a ~= b then return a > b end
  end
  return #new > #old
end

local changed, failed = 0, nil
local old = redis.pcall('GET', KEYS[1]) -- another type is an error here, and is overwritten
if ARGV[1] == 'unknown' then
  redis.call('UNLINK', KEYS[1])
  redis.pcall('SET', KEYS[1], FENCE, 'PX', ARGV[3]) -- without it when memory is short
  changed = 1
elseif ARGV[1] == 'garbage' then
  -- redis.rs looks at so many bytes.
  if type(old) == 'string' and string.sub(old, 1, 65536) == ARGV[2] then changed = redis.call('UNLINK', KEYS[1]) end
elseif old ~= FENCE then
  local had, new = event(old), event(ARGV[2])
  if not had or new > had or (new == had and higher(ARGV[2], old)) then
    local set = redis.pcall('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
    changed = 1
    if set.err then
      -- No memory for the new row: then not the old one either.
      redis.call('UNLINK', KEYS[1])
      failed = set
    end
  end
end
if KEYS[2] then
  local number = next_number(KEYS[2])
  redis.call('PUBLISH', ARGV[4], number .. ' ' .. ARGV[5])
  return failed or number
end
return failed or changed
