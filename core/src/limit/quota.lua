-- Leases a slice of one region-wide quota to a gateway. lease.rs is the same in Rust and says why.
-- KEYS[1]  a hash: gateway -> "rate demand expiry"; milli-tokens/s, milli-tokens/s, ms of this server's clock
-- ARGV     gateway, demand, held, rate, floor (milli-tokens/s), lease (ms)
-- Returns  the rate granted (milli-tokens/s) and the number of gateways with a lease.

-- As in lease.rs. Every product and sum below stays under 2^53, where a Lua number is exact.
local LARGEST_RATE = 10000000000
local LARGEST_DEMAND = 1000000000000
local LONGEST_LEASE = 60000
local FINEST = 524288

local gateway = ARGV[1]
local demand, held = tonumber(ARGV[2]), tonumber(ARGV[3])
local rate, floor, lease = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then
  redis.call('DEL', KEYS[1])
end
local mine = nil
local outstanding, total, gateways = 0, demand, 1
local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
  local its_rate, its_demand, expiry = string.match(fields[i + 1], '^(%d+) (%d+) (%d+)$')
  its_rate, its_demand, expiry = tonumber(its_rate or ''), tonumber(its_demand or ''), tonumber(expiry or '')
  if not its_rate or its_rate > LARGEST_RATE or its_demand > LARGEST_DEMAND
      or expiry <= now or expiry > now + LONGEST_LEASE then
    redis.call('HDEL', KEYS[1], fields[i])
  elseif fields[i] == gateway then
    mine = its_rate
  else
    outstanding, total, gateways = outstanding + its_rate, total + its_demand, gateways + 1
  end
end

local shared = rate - floor
local target
if total <= shared then
  target = demand + math.floor((rate - total) / gateways)
else
  local part, whole = demand, total
  while whole >= FINEST do
    part, whole = math.floor(part / 2), math.floor(whole / 2)
  end
  target = math.floor(shared * part / whole) + math.floor(floor / gateways)
end

local least = math.max(1, math.min(floor, math.floor(rate / gateways)))
local keep = math.min(mine or least, least)
local granted = math.max(1, math.min(target, math.max(rate - outstanding, keep)))
if not mine and held > 0 then
  granted = math.min(granted, held)
end

local record = string.format('%.0f %.0f %.0f', math.max(granted, held), demand, now + lease)
redis.call('HSET', KEYS[1], gateway, record)
redis.call('PEXPIRE', KEYS[1], LONGEST_LEASE)
return {granted, gateways}
