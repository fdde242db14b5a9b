-- wrk script: posts a file's reviews, one a line, in turn, and prints the results on one line.
local reviews = {}
local turn = 0

function init(arguments)
  for review in io.lines(arguments[1]) do
    local headers = { ["Content-Type"] = "application/json" }
    reviews[#reviews + 1] = wrk.format("POST", "/mutate?timeout=10s", headers, review)
  end
end

function request()
  turn = turn % #reviews + 1
  return reviews[turn]
end

function done(summary, latency)
  local errors = summary.errors
  print(string.format("measured %d %d %d %d %d",
    summary.requests,
    summary.duration,
    latency:percentile(50),
    latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
