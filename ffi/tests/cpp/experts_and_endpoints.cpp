// What the example leaves out of crossdock.hpp: groups of experts in both modes, routes, memory by address, pages by their
// numbers, exceptions, and what is moved from. Says "all of it holds" at its end, and aborts where something does not.
#include <crossdock.hpp>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

using namespace crossdock;

#define HOLDS(condition)                                               \
  do {                                                                 \
    if (!(condition)) {                                                \
      std::fprintf(stderr, "line %d: not %s\n", __LINE__, #condition); \
      std::abort();                                                    \
    }                                                                  \
  } while (0)

namespace {

constexpr std::size_t kHidden = 128;
constexpr std::uint32_t kTokens = 2;
constexpr std::chrono::seconds kPatience{30};

Authentication key() { return Authentication::key(as_bytes("a key that all nodes share, 32 b")); }

// Two tokens of ones, for four experts on two ranks; each expert gives back what it got.
void step(Group& group) {
  Slot slot = group.slot(0);
  std::vector<Bf16> rows(kTokens * kHidden, 0x3F80), sums(rows.size());
  std::vector<std::int64_t> choices{0, 3, 1, 2};
  std::vector<float> weights(4, 0.5f);
  Tokens tokens;
  tokens.count = kTokens;
  tokens.rows = rows.data();
  tokens.choices = choices.data();

  LatencyOutputs outputs = group.latency_outputs().value();
  slot.dispatch(tokens).value();
  slot.receive(outputs).value();
  const LatencyInfo latency = outputs.describe().value();
  HOLDS(latency.experts == 2);
  for (std::uint32_t expert = 0; expert < latency.experts; ++expert) {
    const Results results = slot.latency_results(expert).value();
    HOLDS(results.rows == 2);
    const auto* from = static_cast<const char*>(static_cast<const void*>(latency.values));
    std::memcpy(results.values, from + expert * latency.rows * kHidden * 2, results.rows * kHidden * 2);
  }
  slot.latency_combine().value();
  slot.latency_finish(weights, sums).value();
  HOLDS(sums == rows);
  HOLDS(slot.waits().value().size() == 2);
  HOLDS(slot.lost().value().empty());

  // The same choices by a route that was written down and read again.
  Route found = slot.find_route(choices).value();
  const auto written = found.bytes().value();
  Route route = group.read_route(written).value();
  tokens.route = &route;
  ThroughputOutputs packed = group.throughput_outputs().value();
  slot.dispatch(tokens).value();
  slot.receive(packed).value();
  const ThroughputInfo throughput = packed.describe().value();
  HOLDS(packed.counts(4).value().size() == 2);
  HOLDS(packed.ranges().value().size() == 4);
  const Results results = slot.throughput_results().value();
  std::memcpy(results.values, throughput.values, results.rows * kHidden * 2);
  slot.throughput_combine().value();
  slot.throughput_finish(sums).value();
  // Here each rank adds its experts up itself, without weights: both ranks had one copy of each token.
  for (std::size_t at = 0; at < sums.size(); ++at) HOLDS(sums[at] == 0x4000);
  HOLDS(slot.latency_combine().status() == Status::out_of_order);
}

void both(std::vector<Group>& ranks) {
  std::thread first(step, std::ref(ranks[0]));
  step(ranks[1]);
  first.join();
  HOLDS(ranks[0].masked().value().empty());
}

void experts() {
  const std::vector<std::uint32_t> max_tokens(2, kTokens);
  GroupOptions options;
  options.max_tokens = max_tokens;
  options.experts = 4;
  options.top_k = 2;
  options.hidden = kHidden;
  HOLDS(Group::needs(options).value().outputs_bytes > 0);
  std::vector<Group> ranks = Group::in_process(options).value();
  both(ranks);

  // As processes meet.
  std::vector<Group> met;
  std::vector<std::string> addresses;
  for (options.rank = 0; options.rank < 2; ++options.rank) {
    met.push_back(Group::open(options, key()).value());
    addresses.push_back(met.back().address().value());
  }
  std::thread first([&] { met[0].meet(addresses, kPatience).value(); });
  met[1].meet(addresses, kPatience).value();
  first.join();
  both(met);
}

void endpoints() {
  std::vector<char> source(5000, 'p'), target(source.size());
  Memory local = Memory::import_host(source.data(), source.size()).value();
  Memory remote = Memory::import_host(target.data(), target.size()).value();
  {
    Endpoint here = Endpoint::open("here", key()).value(), there = Endpoint::open("there", key()).value();
    here.register_memory(local, kPatience).value();
    there.register_memory(remote, kPatience).value();
    const auto address = [](std::vector<char>& bytes, std::size_t at) {
      return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(bytes.data() + at));
    };
    const std::vector<std::uint64_t> from{address(source, 0), address(source, 2000)};
    const std::vector<std::uint64_t> to{address(target, 0), address(target, 2000)}, lengths{2000, 3000};
    TransferOptions options;
    options.local = from;
    options.remote = to;
    options.bytes = lengths;
    Transfer transfer = here.transfer(there.address().value(), options).value();
    transfer.wait(kPatience).value();
    transfer.wait_quiet(kPatience).value();
    HOLDS(transfer.poll().value());
    HOLDS(source == target);
    HOLDS(local.close().status() == Status::busy);
    options.remote = from;
    Transfer unknown = here.transfer(there.address().value(), options).value();
    HOLDS(unknown.wait(kPatience).status() == Status::unknown_address);
    here.unregister_memory(from[0], kPatience).value();
  }
  local.close().value();
  remote.close().value();
}

void pages() {
  PoolOptions options;
  options.pages = 8;
  Pool pool = Pool::create(options).value();
  const std::vector<std::int64_t> ids{1, 2, 3};
  Pages taken = pool.adopt(ids).value();
  HOLDS(pool.adopt(ids).status() == Status::page_in_use);
  HOLDS(pool.stats().value().owned == 3);
  taken.close().value();
  HOLDS(pool.stats().value().free == 8);
}

void faults() {
  HOLDS(Memory().describe().status() == Status::bad_handle);
  Memory one = Memory::allocate(4096).value();
  Memory other = std::move(one);
  HOLDS(!one && other);
  bool is_thrown = false;
  try {
    Memory::import_cuda(1 << 20, 4096, 0).value();
  } catch (const Exception& error) {
    is_thrown = std::strlen(error.what()) > 0;
  }
  HOLDS(is_thrown);
}

}  // namespace

int main() {
  experts();
  endpoints();
  pages();
  faults();
  std::puts("all of it holds");
}
