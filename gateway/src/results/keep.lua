-- Puts a result where others find it, if there is one, and gives our lease back.
-- KEYS: result, lease (one slot). ARGV: our id, value or nothing, ms of freshness left at a moment, that moment
-- in microseconds of this clock. Gives 1: kept; 2: Redis takes nothing; 0: nothing was to be kept any more.
local kept = 0
if ARGV[2] ~= '' then
  local time = redis.call('TIME')
  local since = (time[1] * 1000000 + time[2] - tonumber(ARGV[4])) / 1000
  local left = math.floor(tonumber(ARGV[3]) - math.max(since, 0))
  if left > 0 then
    local set = redis.pcall('SET', KEYS[1], ARGV[2], 'PX', left)
    kept = set.err and 2 or 1
  end
end
if redis.pcall('GET', KEYS[2]) == ARGV[1] then
  redis.call('DEL', KEYS[2])
end
return kept
