#!lua flags=allow-oom
-- Who listens to the changes of features, and how far each has come. (The flag above: a Redis 7 that is full
-- still takes a lease.) KEYS[1] is a hash. A listener's field is its id, the value '<number it has applied>
-- <end of its lease, ms>'. Beside them: 'since', when the list began, in us; 'seen', when it was last written,
-- in ms; 'server', which Redis did so.
-- ARGV: 1 what to do; 2 how long a lease lasts, ms; 3 the listener's id; 4 the number that it has applied.
--   begin  a new lease                 renew  go on with one that has not run out
--   end    the lease is given back     ask    who holds one
-- Answers: since; how many leases there are; how long all have been listed, ms; the lowest number of them
-- ('-': none). The last two are worked out for 'ask' alone. Nothing for 'renew' where there is no lease.

-- Listeners write every second. A longer silence is a clock that leapt, or the silence of no listener.
local SILENCE = 2000
-- How long a lease that has run out is listed for people to see.
local REMEMBER = 60000

local time = redis.call('TIME')
local us = time[1] * 1000000 + time[2]
local now = math.floor(us / 1000)
local info = redis.pcall('INFO', 'server') -- not everybody may ask
local server = type(info) == 'string' and string.match(info, 'run_id:(%x+)') or '-'
local kept = redis.pcall('HMGET', KEYS[1], 'since', 'seen', 'server')
if kept.err then kept = {} end
local since, seen = string.match(kept[1] or '', '^%d+$'), tonumber(kept[2] or nil)
if not since or not seen or kept[3] ~= server or math.abs(now - seen) > SILENCE then
  -- Leases may be held that are not listed here: nobody's word counts until they have run out, and
  -- whoever holds one has to begin anew.
  redis.call('DEL', KEYS[1])
  since, seen = string.format('%.0f', us), now
  redis.call('HSET', KEYS[1], 'since', since, 'seen', seen, 'server', server)
end

local function lease(value)
  local number, ends = string.match(value, '^(%d+) (%d+)$')
  ends = tonumber(ends)
  -- Nobody of ours wrote an end so far away: no clock went back so much without a new list.
  if not ends or ends > now + ARGV[2] + SILENCE then return nil end
  return number, ends
end

local function listed() return redis.call('HLEN', KEYS[1]) - 3 end

local function put() redis.call('HSET', KEYS[1], ARGV[3], ARGV[4] .. ' ' .. now + ARGV[2], 'seen', now) end

if ARGV[1] == 'begin' then
  local all = redis.call('HGETALL', KEYS[1])
  for at = 1, #all, 2 do
    local _, ends = lease(all[at + 1])
    if ends and ends < now - REMEMBER then redis.call('HDEL', KEYS[1], all[at]) end
  end
  put()
  return { since, listed() }
elseif ARGV[1] == 'renew' then
  local _, ends = lease(redis.call('HGET', KEYS[1], ARGV[3]) or '')
  if not ends or ends < now then return {} end
  put()
  return { since, listed() }
elseif ARGV[1] == 'end' then
  redis.call('HDEL', KEYS[1], ARGV[3])
  return { since, listed() }
end

if now - seen > SILENCE / 2 then redis.call('HSET', KEYS[1], 'seen', now) end
-- Numbers may be beyond what a double counts exactly: compared as they are written.
local function lower(a, b) return #a < #b or (#a == #b and a < b) end
local holding, lowest = 0, nil
for _, value in ipairs(redis.call('HVALS', KEYS[1])) do
  local number, ends = lease(value)
  if ends and ends >= now then
    holding = holding + 1
    if not lowest or lower(number, lowest) then lowest = number end
  end
end
return { since, holding, math.max(0, math.floor((us - since) / 1000)), lowest or '-' }
