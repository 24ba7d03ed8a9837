-- Keeps the last event under KEYS[1], and says so to the region when KEYS[2] (the counter) is given.
-- ARGV: 1 the row's bytes, empty: forget what is there; 2 lifetime in ms; 3 channel; 4 the row's name there.
-- Answers 1 when the event was kept, 0 when a later or the same one was there.
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

local kept = 0
if ARGV[1] == '' then
  kept = redis.call('UNLINK', KEYS[1])
else
  local old = redis.pcall('GET', KEYS[1]) -- another type is an error here, and is overwritten
  local had, new = event(old), event(ARGV[1])
  if not had or new > had or (new == had and higher(ARGV[1], old)) then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
    kept = 1
  end
end
if KEYS[2] then
  redis.call('PUBLISH', ARGV[3], redis.call('INCR', KEYS[2]) .. ' ' .. ARGV[4])
end
return kept
