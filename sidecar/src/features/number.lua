-- The number of a change that is told now, as text. Before each script that tells of one.
local function next_number(counter)
  local number = redis.pcall('INCR', counter)
  if number == 1 then
    -- It was lost, or never there: go on above all numbers that it ever gave.
    local time = redis.call('TIME')
    number = time[1] * 1000000 + time[2]
    redis.pcall('SET', counter, string.format('%.0f', number))
  end
  -- Where it cannot rise, or Lua cannot count any further, 0 is a gap to all who hear it.
  if type(number) ~= 'number' or number >= 9007199254740992 then number = 0 end
  return string.format('%.0f', number)
end

