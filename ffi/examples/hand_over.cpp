// Two workers in one process: a registry tells the one where the other is, pages of a small model's cache are pushed
// layer by layer, then pulled. With the library installed:
// c++ -std=c++17 hand_over.cpp $(pkg-config --cflags --libs crossdock)
//
// Every `value()` throws crossdock::Exception where there is none. With -fno-exceptions it says why, and aborts.
#include <poll.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <crossdock.hpp>

namespace {

constexpr std::uint32_t layers = 4, page_tokens = 16, pool_pages = 64, tokens = 100, token_bytes = 1152;
constexpr std::chrono::milliseconds timeout(20000);

// Members go from the last to the first: the node before what it uses.
struct Worker {
  crossdock::Layout layout;
  crossdock::Memory memory;
  crossdock::Pool pool;
  crossdock::Node node;

  std::uint8_t* page(std::uint32_t layer, std::size_t page) const {
    const crossdock::LayerBuffer buffer = layout.find(layer).value().buffer;
    return memory.bytes().value().data() + buffer.offset + page * buffer.stride_bytes;
  }
};

// With `allocates`, pages are taken from the worker's pool; else an allocator of its own chooses them.
Worker open_worker(std::string_view name, bool allocates) {
  crossdock::LayoutOptions options;
  options.model = "example";
  options.model_layers = layers;
  options.kind = crossdock::CacheKind::mla;
  options.latent_bytes = 1024;
  options.rope_bytes = 128;
  options.dtype = crossdock::Dtype::bf16;
  options.page_tokens = page_tokens;
  options.pages = pool_pages;
  crossdock::Layout layout = crossdock::Layout::create(options).value();
  crossdock::Memory memory = crossdock::Memory::allocate(layout.region_bytes().value()).value();

  crossdock::PoolOptions pool;
  pool.pages = pool_pages;
  pool.allocates = allocates;
  const auto key = crossdock::as_bytes("a key that all nodes share, 32 b");
  crossdock::Node node =
      crossdock::Node::open(name, layout, memory, crossdock::Authentication::key(key)).value();
  // Objects are moved, and what they were moved from owns nothing any more.
  return {std::move(layout), std::move(memory), crossdock::Pool::create(pool).value(), std::move(node)};
}

// What a worker tells the registry.
std::string entry(const std::string& name, const std::string& role, const crossdock::Node& node) {
  char incarnation[17];
  std::snprintf(incarnation, sizeof incarnation, "%016llx",
                static_cast<unsigned long long>(node.identity().value().incarnation));
  return R"({"node": ")" + name + R"(", "incarnation": ")" + incarnation + R"(", "role": ")" + role +
         R"(", "address": ")" + node.address().value() + R"(", "ttl_ms": 10000})";
}

// What a JSON text says first under a name. An engine has a parser for this.
std::string field(const std::string& json, const std::string& name) {
  const std::string before = '"' + name + R"(":")";
  const std::size_t begin = json.find(before) + before.size();
  return json.substr(begin, json.find('"', begin) - begin);
}

void expect(bool is_right, const char* what) {
  if (is_right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// Takes a room over, of whatever kind, and closes it when it has ended: closed before, it would be cancelled.
void finish(crossdock::Room room) {
  const crossdock::End end = room.wait(timeout).value();
  expect(end.outcome == crossdock::Outcome::delivered, room.message().value().c_str());
  expect(room.port().value() == "shm" && !room.peer().value().empty(), "the peer and the port are told");
}

template <typename Id>
bool are_equal(const Worker& one, const std::vector<Id>& ones, const Worker& other,
               const std::vector<std::uint32_t>& others) {
  for (std::uint32_t layer = 0; layer < layers; layer++) {
    for (std::size_t at = 0; at < ones.size(); at++) {
      // The last page holds the last tokens alone.
      const std::size_t held = at + 1 < ones.size() ? page_tokens : tokens - at * page_tokens;
      const std::uint8_t* page = one.page(layer, static_cast<std::size_t>(ones[at]));
      if (std::memcmp(page, other.page(layer, others[at]), held * token_bytes) != 0) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  Worker prefill = open_worker("prefill-0", false), decode = open_worker("decode-0", true);
  for (std::uint32_t layer = 0; layer < layers; layer++) {
    for (std::uint32_t at = 0; at < pool_pages; at++) {
      std::memset(prefill.page(layer, at), static_cast<int>(layer * pool_pages + at), page_tokens * token_bytes);
    }
  }

  // The prefill worker is kept registered for as long as the registration lives; the decode worker finds and dials it.
  const auto registry = crossdock::Registry::start("127.0.0.1:0").value();
  auto client = crossdock::RegistryClient::connect(registry.address().value()).value();
  const auto registration = client.register_worker(entry("prefill-0", "prefill", prefill.node)).value();
  registration.wait(timeout).value();
  const std::string found = client.wait_for("role=prefill", 1, timeout).value();
  const crossdock::Peer peer = decode.node.connect(field(found, "address")).value();
  peer.wait(timeout).value();

  // An error that is expected is looked at: nothing is thrown, and nothing else has happened.
  const crossdock::Result<crossdock::Pages> too_many = decode.pool.take(pool_pages + 1);
  expect(too_many.status() == crossdock::Status::exhausted, "more pages than there are");
  std::printf("refused, as it has to be: %s\n", too_many.error().words().c_str());

  // Page numbers are passed as they are, of 32 or 64 bits: here as in a tensor of int64.
  const std::uint32_t count = decode.layout.pages_for(tokens).value();
  std::vector<std::int64_t> source_ids;
  for (std::uint32_t at = 0; at < count; at++) source_ids.push_back((at * 37 + 5) % pool_pages);
  const crossdock::PageList from(prefill.pool, source_ids);
  crossdock::Pages pages = decode.pool.take(count).value();
  const std::vector<std::uint32_t> target_ids = pages.ids().value();

  // Pushed: the decode side opens its end, the prefill side sends what is computed. It computes in two chunks, and knows the
  // pages of the second one when its turn comes.
  const crossdock::Source source = peer;
  const crossdock::PageList to = pages;
  crossdock::ReceiveOptions wanted;
  wanted.sources = source;
  wanted.room = 7;
  wanted.tokens = tokens;
  wanted.pages = to;
  wanted.deadline = timeout;
  wanted.user_data = 42;
  crossdock::Receiving receiving = decode.node.receive(wanted).value();
  expect(!pages, "pages that a room has taken over");
  crossdock::SendOptions offered;
  offered.room = 7;
  offered.tokens = tokens;
  const std::vector<std::int64_t> first_ids(source_ids.begin(), source_ids.begin() + 1);
  const std::vector<std::int64_t> more_ids(source_ids.begin() + 1, source_ids.end());
  const crossdock::PageList first(prefill.pool, first_ids), more(prefill.pool, more_ids);
  offered.pages = first;
  offered.deadline = timeout;
  crossdock::Sending sending = prefill.node.send_ahead(offered).value();
  for (std::uint32_t layer = 0; layer < layers; layer++) sending.send_tokens(layer, 1, 0, page_tokens).value();
  sending.add_pages(more).value();
  for (std::uint32_t layer = 0; layer < layers; layer++) {
    sending.send_tokens(layer, 1, page_tokens, tokens - page_tokens).value();
  }
  sending.finish(crossdock::as_bytes("first token")).value();

  // One descriptor tells of all rooms of a node, as an event loop wants it.
  bool is_ended = false, is_home = false;
  while (!is_ended || !is_home) {
    pollfd watched = {decode.node.event_fd().value(), POLLIN, 0};
    expect(poll(&watched, 1, static_cast<int>(timeout.count())) == 1, "an event in time");
    crossdock::Event events[8];
    for (const crossdock::Event& event : decode.node.poll(events).value()) {
      if (event.handle() != receiving.handle()) continue;
      is_ended |= event.kind() == crossdock::EventKind::ended && event.user_data() == 42;
      is_home |= event.kind() == crossdock::EventKind::pages_home;
    }
  }
  const std::vector<std::uint8_t> aux = receiving.aux().value();
  const std::string first_token(aux.begin(), aux.end());
  expect(first_token == "first token", "what was sent beside the pages");
  // Home again, and nobody else writes them any more.
  pages = receiving.take_pages().value();
  expect(pages.ids().value() == target_ids, "the pages that come home");
  finish(std::move(receiving));
  finish(std::move(sending));
  expect(are_equal(prefill, source_ids, decode, target_ids), "the bytes that were pushed");
  std::printf("%u pages of %u layers were pushed, and \"%s\" with them\n", count, layers, first_token.c_str());

  // Pulled: the prefill side serves, the decode side reads into other pages.
  crossdock::Pages others = decode.pool.take(count).value();
  const std::vector<std::uint32_t> other_ids = others.ids().value();
  const crossdock::PageList to_others = others;
  wanted.pages = to_others;
  offered.pages = from;
  wanted.room = offered.room = 8;
  crossdock::Serving serving = prefill.node.serve(offered).value();
  crossdock::Receiving fetching = decode.node.fetch(wanted).value();
  fetching.wait_pages(timeout).value();
  others = fetching.take_pages().value();
  finish(std::move(fetching));
  finish(std::move(serving));
  expect(are_equal(prefill, source_ids, decode, other_ids), "the bytes that were pulled");

  // Pages go back to their pool when they are closed: by a call, by a destructor, or because others take their place.
  pages.close().value();
  others = crossdock::Pages();
  expect(decode.pool.stats().value().free == pool_pages, "the pages that are free");
  std::printf("pages moved, and every byte is right\n");
  return 0;
}
