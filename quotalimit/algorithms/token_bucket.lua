-- The twin of token_bucket.py: bursts up to the bucket's size, refilled at an even rate.
--
-- A count is a string of five numbers: the units that the bucket lacks and the rest of one, the time of that, by how
-- much the clock has stepped back so far, and its epoch. What is missing is units * period + rest, which may take 106
-- bits: so it is kept in two numbers, and products are divided as they are made.

algorithms.bucket = (function()
  local bucket = {}
  local WORD = 2 ^ 53
  local DAY = 86400000

  -- a * b / m for whole numbers below 2^53: the quotient in two words, low and high, and the rest.
  local function divided(a, b, m)
    local product = a * b
    if product <= WORD then
      local rest = math.fmod(product, m)
      return (product - rest) / m, 0, rest
    end
    local rest_of_a = math.fmod(a, m)
    local quotient_of_a = (a - rest_of_a) / m
    local low, high, rest = 0, 0, 0
    local function add(units, more)
      if more >= m - rest and more > 0 then
        rest = rest - (m - more)
        units = units + 1
      else
        rest = rest + more
      end
      if units > 0 and low >= WORD - units then
        low = low - (WORD - units)
        high = high + 1
      else
        low = low + units
      end
    end
    local bit = WORD / 2
    while bit >= 1 do
      high = high * 2
      add(low, rest)
      if b >= bit then
        b = b - bit
        add(quotient_of_a, rest_of_a)
      end
      bit = bit / 2
    end
    return low, high, rest
  end

  -- Microseconds in which the rate refills units * period + rest, rounded up, in two words.
  local function refilled_in(limit, units, rest)
    local low, high, over = divided(units, limit.period, limit.amount)
    local more = math.fmod(rest, limit.amount)
    local extra = (rest - more) / limit.amount
    if over > 0 or more > 0 then extra = extra + (over > limit.amount - more and 2 or 1) end
    if low >= WORD - extra then return low - (WORD - extra), high + 1 end
    return low + extra, high
  end

  -- What the bucket lacks now: units and the rest of one.
  local function missing(count, limit, now)
    if count.units == 0 and count.rest == 0 then return 0, 0 end
    local units, beyond, rest = divided(limit.amount, math.max(0, now - count.time), limit.period)
    if beyond > 0 or units > count.units then return 0, 0 end
    units, rest = count.units - units, count.rest - rest
    if rest < 0 then units, rest = units - 1, rest + limit.period end
    if units < 0 then return 0, 0 end
    return units, rest
  end

  function bucket.knows()
    return true
  end

  function bucket.load(key)
    local count = {key = key, units = 0, rest = 0, time = 0, shift = 0, epoch = 0}
    local kept = redis.call('GET', key)
    if kept then
      count.units, count.rest, count.time, count.shift, count.epoch = struct.unpack('<ddddd', kept)
    end
    return count
  end

  function bucket.save(count, limit, now, slack)
    local kept = struct.pack('<ddddd', count.units, count.rest, count.time, count.shift, count.epoch)
    local low, high = bucket.whole_in(count, limit, now)
    local life = math.ceil((high > 0 and WORD or low) / 1000)
    if count.epoch > 0 then life = math.max(life, DAY) end
    redis.call('SET', count.key, kept, 'PX', life + slack)
  end

  function bucket.fits(count, limit, need, now, start, before)
    if need > limit.capacity then return nil end
    local units, rest = missing(count, limit, now)
    units = units + before
    if start > now then
      units, rest = missing({units = units, rest = rest, time = now}, limit, start)
    end
    units = units - (limit.capacity - need)
    if units < 0 or (units == 0 and rest == 0) then return 0, 0 end
    return refilled_in(limit, units, rest)
  end

  function bucket.fits_without(count, limit, charges, need, now)
    local copy = {units = count.units, rest = count.rest, time = count.time, shift = count.shift}
    for _, charge in ipairs(charges) do
      bucket.adjust(copy, limit, charge.mark, -charge.units, now)
    end
    local low, high = bucket.fits(copy, limit, need, now, now, 0)
    return low == 0 and high == 0
  end

  function bucket.take(count, limit, cost, now)
    local units, rest = missing(count, limit, now)
    count.units, count.rest, count.time = units + cost, rest, now
    return now + count.shift
  end

  function bucket.adjust(count, limit, mark, delta, now)
    local units, rest = missing(count, limit, now)
    count.time = now
    if delta < 0 then -- what has refilled since is there already, or overflowed: it is not given back twice
      local back, beyond, part = divided(limit.amount, math.max(0, now + count.shift - mark), limit.period)
      if beyond > 0 or back >= -delta then
        delta = 0
      else
        delta = delta + back
        if rest >= limit.period - part then
          units, rest = units + 1, rest - (limit.period - part)
        else
          rest = rest + part
        end
      end
    end
    units = units + delta
    if units < 0 then units, rest = 0, 0 end
    count.units, count.rest = units, rest
  end

  -- Whether the count was newer than now and is dated now.
  function bucket.redate(count, limit, now)
    if count.time <= now then return false end
    count.shift = count.shift + count.time - now
    count.time = now
    return true
  end

  function bucket.used(count, limit, now)
    local units, rest = missing(count, limit, now)
    return rest > 0 and units + 1 or units
  end

  function bucket.whole_in(count, limit, now)
    return refilled_in(limit, missing(count, limit, now))
  end

  function bucket.reset(count, limit, now)
    count.units, count.rest, count.time, count.epoch = 0, 0, math.max(count.time, now), count.epoch + 1
  end

  return bucket
end)()
