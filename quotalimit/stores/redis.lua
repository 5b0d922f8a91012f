-- What every other call of a RedisStore takes, with the algorithms: what was settled before, then the question.

local REPORT, LOOK, RESET = 2, 3, 4
local UNKNOWN_WINDOW, REFUSED = 0, 2
local FITS, EXHAUSTED, BUSY, TOO_LARGE = 0, 1, 2, 3
local HOUR, DAY = 3600000, 86400000

local kinds = {[98] = algorithms.bucket, [99] = algorithms.calendar, [115] = algorithms.sliding}
local counts, changed, claims, told, refused = {}, {}, {}, {}, {}

-- The count that a key holds and the algorithm of its limit, read once a call.
local function count_of(place, kind)
  local count = counts[place]
  if not count then
    count = kinds[kind].load(KEYS[place])
    count.algorithm = kinds[kind]
    counts[place] = count
  end
  return count
end

local function change(count, limit)
  changed[count] = limit
end

-- Write what has changed, and answer.
local function answer(how, numbers)
  for count, limit in pairs(changed) do count.algorithm.save(count, limit, now, slack) end
  return struct.pack('<i8i8' .. string.rep('i8', #numbers), how, now, unpack(numbers))
end

-- What was settled. A change that comes again, because its answer was lost, is in the journal.
if changes > 0 then
  local journal = KEYS[#KEYS]
  redis.call('ZREMRANGEBYSCORE', journal, '-inf', string.format('(%.0f', oldest))
  for at = 2, 1 + changes do
    local serial, place, kind, capacity, period, amount, mark, epoch, delta = struct.unpack('<ddddddddd', ARGV[at])
    if redis.call('ZADD', journal, 'NX', serial, serial) == 1 then
      local count = count_of(place, kind)
      if count.epoch == epoch then
        local limit = {capacity = capacity, period = period, amount = amount, edges = {}}
        count.algorithm.redate(count, limit, now)
        count.algorithm.adjust(count, limit, mark, delta, now)
        change(count, limit)
      end
    end
  end
  -- A process has one journal, but on a cluster one for each identity.
  redis.call('PEXPIRE', journal, string.find(journal, '{', 1, true) and HOUR or DAY)
end

now = math.max(now, not_before)
for at = 2 + changes, #ARGV do
  local blob = ARGV[at]
  local place, kind, capacity, period, amount, first, second, third, need, cost, holds, ahead, before, heads =
    struct.unpack('<dddddddddddddd', blob)
  local claim = {need = need, cost = cost, holds = holds == 1, ahead = ahead, before = before, heads = {}, charges = {}}
  for offset = 113, #blob, 16 do
    local one, other = struct.unpack('<dd', blob, offset)
    if #claim.heads < heads then
      claim.heads[#claim.heads + 1] = {need = one, due = other}
    else
      claim.charges[#claim.charges + 1] = {mark = one, units = other}
    end
  end
  if place == 0 then place = at - 1 end -- each claim has its own key
  claim.count = count_of(place, kind)
  claim.limit = {capacity = capacity, period = period, amount = amount, edges = {first, second, third}}
  if asked ~= RESET and not claim.count.algorithm.knows(claim.limit, now) then return answer(UNKNOWN_WINDOW, told) end
  claims[#claims + 1] = claim
end

if asked == RESET then
  for _, claim in ipairs(claims) do
    claim.count.algorithm.reset(claim.count, claim.limit, now)
    change(claim.count, claim.limit)
  end
  return answer(DONE, told)
end

-- How long a claim that fits must wait all the same, not to delay the waiting calls in front of it.
local function delay(claim)
  local count, limit = claim.count, claim.limit
  for _, head in ipairs(claim.heads) do
    local start = math.max(now, head.due)
    local low, high = count.algorithm.fits(count, limit, head.need, now, start, claim.before)
    if low ~= 0 or high ~= 0 then
      low, high = count.algorithm.fits(count, limit, claim.ahead, now, now, 0)
      return high > 0 and low or math.max(low, start - now, 1), high
    end
  end
  return 0, 0
end

-- Whether a claim fits, or why not, and its wait.
local function judge(claim)
  local count, limit = claim.count, claim.limit
  if claim.need < 0 then return FITS, 0, 0 end -- the enclosing calls hold all that it needs
  local low, high = count.algorithm.fits(count, limit, claim.need, now, now, 0)
  if not low then return TOO_LARGE, 0, 0 end
  if low == 0 and high == 0 then
    low, high = delay(claim)
    return (low > 0 or high > 0) and EXHAUSTED or FITS, low, high
  end
  if claim.ahead > claim.need then
    local last, last_high = count.algorithm.fits(count, limit, claim.ahead, now, now, 0)
    if last_high > high or (last_high == high and last > low) then low, high = last, last_high end
  end
  if #claim.charges > 0 and count.algorithm.fits_without(count, limit, claim.charges, claim.need, now) then
    return BUSY, low, high
  end
  return EXHAUSTED, low, high
end

local function tell(list, ...)
  for _, number in ipairs({...}) do list[#list + 1] = number end
end

local function tell_use(list, claim)
  local count, limit = claim.count, claim.limit
  tell(list, count.algorithm.used(count, limit, now), count.algorithm.whole_in(count, limit, now))
end

for place, claim in ipairs(claims) do
  if claim.count.algorithm.redate(claim.count, claim.limit, now) then change(claim.count, claim.limit) end
  local reason, low, high = judge(claim)
  if reason ~= FITS then
    tell(refused, place - 1, reason, low, high)
    tell_use(refused, claim)
  end
  if asked == LOOK then
    tell(told, place - 1, reason, low, high)
    tell_use(told, claim)
  end
end
if asked == LOOK then return answer(DONE, told) end
if #refused > 0 then return answer(REFUSED, refused) end

for _, claim in ipairs(claims) do
  local mark = 0
  if claim.cost > 0 or claim.holds then
    mark = claim.count.algorithm.take(claim.count, claim.limit, claim.cost, now, claim.holds)
    change(claim.count, claim.limit)
  end
  told[#told + 1] = mark
  told[#told + 1] = claim.count.epoch
  if asked == REPORT then tell_use(told, claim) end
end
return answer(DONE, told)
