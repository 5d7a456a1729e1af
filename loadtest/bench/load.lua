-- Charges for wrk: wrk ... URL PATH KEY unique|same. The text of a request is made once; only the key changes.
local head, tail, key, unique, n
local body = '{"amount":2000,"currency":"usd","source":"tok_visa"}'

function init(args)
  local path
  path, key, unique, n = args[1], args[2], args[3] == "unique", 0
  head = "POST " .. path .. " HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port ..
    "\r\nContent-Type: application/json\r\nAuthorization: Bearer sk_test_4eC39HqLyjWDarjtT1zdp7dc"
  tail = "\r\nContent-Length: " .. #body .. "\r\n\r\n" .. body
  if key ~= "" then head = head .. "\r\nIdempotency-Key: " .. key end
end

function request()
  if not unique then return head .. tail end
  n = n + 1
  return head .. "-" .. n .. tail
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d %d\n", summary.requests, summary.duration, e.status,
    e.connect + e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(99)))
end
