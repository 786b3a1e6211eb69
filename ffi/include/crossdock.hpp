#ifndef CROSSDOCK_HPP
#define CROSSDOCK_HPP

/* crossdock for C++17, over crossdock.h and header only: moves an LLM's KV-cache pages from prefill to decode workers,
 * and tokens to the ranks that hold their experts and back.
 *
 * Order of calls, for pages: a Layout, Memory for its regions, a Pool over its pages, a Node over both, a Peer, rooms:
 * `receive` or `fetch` on the decode side, `send` or `serve` on the prefill side.
 * For experts: a Group that has met, outputs, and for each step in a Slot `dispatch`, `receive`, results, combine,
 * finish.
 * For memory by address, without pages or rooms: an Endpoint, registered Memory, transfers.
 * Calls that can fail answer a Result. Look at its `status()`, or take its `value()`: where there is none, that throws
 * crossdock::Exception, and where exceptions are off it prints what went wrong and aborts.
 * Objects own what they name and close it when they go: they are moved and never copied. Declare a Node after its
 * Memory, so that it goes first.
 * Options that are not set are as usual. Texts, keys and page numbers are views that are read during the call.
 * Every function may be called from any thread; an object is moved, closed and destroyed by one thread, as an int is.
 */

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "crossdock.h"

namespace crossdock {

// Result::value throws or aborts by how a file is compiled. So there are two sets of names: files of both kinds link
// into one program, each with what it means, and do not where they hand each other these types.
#if defined(__cpp_exceptions)
inline namespace throws {
#else
inline namespace aborts {
#endif

// What a call answers. Later libraries may answer others.
enum class Status : std::int32_t {
  ok = CROSSDOCK_OK,
  pending = CROSSDOCK_PENDING,
  bad_handle = CROSSDOCK_BAD_HANDLE,
  bad_argument = CROSSDOCK_BAD_ARGUMENT,
  bad_size = CROSSDOCK_BAD_SIZE,
  buffer_too_small = CROSSDOCK_BUFFER_TOO_SMALL,
  timed_out = CROSSDOCK_TIMED_OUT,
  busy = CROSSDOCK_BUSY,
  stopped = CROSSDOCK_STOPPED,
  unsupported = CROSSDOCK_UNSUPPORTED,
  memory = CROSSDOCK_MEMORY,
  layout = CROSSDOCK_LAYOUT,
  port = CROSSDOCK_PORT,
  network = CROSSDOCK_NETWORK,
  os = CROSSDOCK_OS,
  exhausted = CROSSDOCK_EXHAUSTED,
  page_in_use = CROSSDOCK_PAGE_IN_USE,
  page_in_quarantine = CROSSDOCK_PAGE_IN_QUARANTINE,
  page_abandoned = CROSSDOCK_PAGE_ABANDONED,
  page_out_of_range = CROSSDOCK_PAGE_OUT_OF_RANGE,
  duplicate_page = CROSSDOCK_DUPLICATE_PAGE,
  wrong_kind = CROSSDOCK_WRONG_KIND,
  out_of_order = CROSSDOCK_OUT_OF_ORDER,
  not_complete = CROSSDOCK_NOT_COMPLETE,
  finished = CROSSDOCK_FINISHED,
  abandoned = CROSSDOCK_ABANDONED,
  refused = CROSSDOCK_REFUSED,
  registry = CROSSDOCK_REGISTRY,
  internal = CROSSDOCK_INTERNAL,
  mismatch = CROSSDOCK_MISMATCH,
  step_lost = CROSSDOCK_STEP_LOST,
  group_lost = CROSSDOCK_GROUP_LOST,
  not_met = CROSSDOCK_NOT_MET,
  unknown_address = CROSSDOCK_UNKNOWN_ADDRESS,
  late = CROSSDOCK_LATE,
  lost = CROSSDOCK_LOST,
};

// What a token's cache is: one latent and one rotary key, or keys and values for each KV head.
enum class CacheKind : std::uint32_t { mla = CROSSDOCK_MLA, heads = CROSSDOCK_HEADS };

enum class Dtype : std::uint32_t {
  bf16 = CROSSDOCK_BF16,
  f16 = CROSSDOCK_F16,
  f32 = CROSSDOCK_F32,
  fp8_e4m3 = CROSSDOCK_FP8_E4M3,
  fp8_e5m2 = CROSSDOCK_FP8_E5M2,
  int8 = CROSSDOCK_INT8,
  fp8_ds_mla = CROSSDOCK_FP8_DS_MLA,
};

// In a page: [token][head][byte], or [head][token][byte].
enum class HeadOrder : std::uint32_t {
  tokens_first = CROSSDOCK_TOKENS_FIRST,
  heads_first = CROSSDOCK_HEADS_FIRST,
};

// In one region without gaps, as [layer][page] or as [page][layer]; or wherever LayoutOptions::buffers says.
enum class Placement : std::uint32_t {
  layer_major = CROSSDOCK_LAYER_MAJOR,
  page_major = CROSSDOCK_PAGE_MAJOR,
  buffers = CROSSDOCK_BUFFERS,
};

// What a pool's pages hold: every token, the last ones of a request, or entries that do not grow with it.
enum class Extent : std::uint32_t {
  all_tokens = CROSSDOCK_ALL_TOKENS,
  window = CROSSDOCK_WINDOW,
  entries = CROSSDOCK_ENTRIES,
};

// What a source brings: everything, or only what the ranks of its side share by heads.
enum class Parts : std::uint32_t { all = CROSSDOCK_ALL_PARTS, shared = CROSSDOCK_SHARED_PARTS };

enum class HugePages : std::uint32_t {
  never = CROSSDOCK_HUGE_PAGES_NEVER,
  // Where there are any.
  try_ = CROSSDOCK_HUGE_PAGES_TRY,
  // Or an error.
  require = CROSSDOCK_HUGE_PAGES_REQUIRE,
};

// Allocated here, so that peers on the same host can map it; or the caller's own.
enum class MemoryKind : std::uint32_t { shared = CROSSDOCK_MEMORY_SHARED, private_ = CROSSDOCK_MEMORY_PRIVATE };

// Who makes progress: a thread of the node's own, or the caller by Node::progress.
enum class Progress : std::uint32_t { thread = CROSSDOCK_PROGRESS_THREAD, caller = CROSSDOCK_PROGRESS_CALLER };

// What has happened. Later libraries may tell others.
enum class EventKind : std::uint32_t {
  // A room has ended: Room::poll says how.
  ended = CROSSDOCK_EVENT_ENDED,
  // All pages of a room that received are home: nobody else can write them any more.
  pages_home = CROSSDOCK_EVENT_PAGES_HOME,
  // A peer that is dialed has answered, or never will: Peer::poll says which.
  peer = CROSSDOCK_EVENT_PEER,
};

enum class Outcome : std::uint32_t {
  // All bytes are in the decode side's pages, and both sides may rely on it.
  delivered = CROSSDOCK_DELIVERED,
  cancelled = CROSSDOCK_CANCELLED,
  // A deadline passed.
  expired = CROSSDOCK_EXPIRED,
  // The session with the peer ended.
  peer_lost = CROSSDOCK_PEER_LOST,
  // The room was never begun.
  room_refused = CROSSDOCK_ROOM_REFUSED,
  // A rail, a port or the bytes failed.
  failed = CROSSDOCK_FAILED,
};

// Which side decided how a room ended.
enum class Decider : std::uint32_t { nobody = 0, here = CROSSDOCK_BY_HERE, peer = CROSSDOCK_BY_PEER };

// How far a room had come.
enum class Stage : std::uint32_t {
  none = 0,
  // It waited for a session with the peer.
  session = CROSSDOCK_STAGE_SESSION,
  // It waited for the other side of the room.
  grant = CROSSDOCK_STAGE_GRANT,
  // Bytes were moving.
  transfer = CROSSDOCK_STAGE_TRANSFER,
  // All bytes were sent.
  confirm = CROSSDOCK_STAGE_CONFIRM,
  // All bytes have landed.
  verify = CROSSDOCK_STAGE_VERIFY,
};

// How a token's row travels to its experts.
enum class RowKind : std::uint32_t {
  bf16 = CROSSDOCK_ROWS_BF16,
  // FP8 e4m3, with an f32 scale for 128 channels.
  fp8 = CROSSDOCK_ROWS_FP8,
  // FP8 e4m3, with scales that are powers of two: a byte for 128 channels, four to a word.
  fp8_ue8m0 = CROSSDOCK_ROWS_FP8_UE8M0,
  // Rows and scales that mean nothing to the library.
  opaque = CROSSDOCK_ROWS_OPAQUE,
};

// How the scale of rows that are made FP8 on the way follows from their largest value: as amax / 448, or as the
// smallest power of two that is not below that.
enum class ScaleRule : std::uint32_t { plain = CROSSDOCK_SCALE_PLAIN, power_of_two = CROSSDOCK_SCALE_POWER_OF_TWO };

// Each row's scales together; or [local experts, scale bytes / 4, rows] words of four bytes, as matrix units want them.
enum class ScaleOrder : std::uint32_t { by_row = CROSSDOCK_SCALES_BY_ROW, by_column = CROSSDOCK_SCALES_BY_COLUMN };

// What becomes of a token some of whose experts are on masked ranks.
enum class LostWeight : std::uint32_t {
  // Its sum lacks what they would have added.
  drop = CROSSDOCK_LOST_DROP,
  // The weights of the others are raised.
  renormalise = CROSSDOCK_LOST_RENORMALISE,
  // The call fails, after it is over for the other ranks too.
  fail = CROSSDOCK_LOST_FAIL,
};

namespace detail {

// The type of what lies one after the other in a container or an array, const where the container is.
template <typename From>
using Element = std::remove_pointer_t<decltype(std::data(std::declval<From&>()))>;

// Whether a span of T can view it; as for std::span, what is written to is no temporary. Arrays are compared, so that
// nothing passes as its base class, whose size may be another.
template <typename From, typename T>
using IfViewable = std::enable_if_t<(std::is_lvalue_reference_v<From> || std::is_const_v<T>) &&
                                    std::is_convertible_v<Element<From> (*)[], T (*)[]>>;

}  // namespace detail

// A view of values that lie one after the other: from a pointer and a size, a vector, an array, or one single object.
// What it views has to outlive it.
template <typename T>
class Span {
 public:
  constexpr Span() noexcept = default;
  constexpr Span(T* data, std::size_t size) noexcept : data_(data), size_(size) {}
  constexpr Span(T& one) noexcept : data_(std::addressof(one)), size_(1) {}
  Span(const std::remove_const_t<T>&&) = delete;

  template <typename From, typename = detail::IfViewable<From, T>>
  constexpr Span(From&& from) noexcept : data_(std::data(from)), size_(std::size(from)) {}

  constexpr T* data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return size_; }
  constexpr bool empty() const noexcept { return size_ == 0; }
  constexpr T* begin() const noexcept { return data_; }
  constexpr T* end() const noexcept { return data_ + size_; }
  constexpr T& operator[](std::size_t at) const { return data_[at]; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

// The bytes of a text, for a key or for what travels beside the pages.
inline Span<const std::uint8_t> as_bytes(std::string_view text) noexcept {
  return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

// As "CROSSDOCK_BUSY"; "?" for one that this library does not know.
inline const char* name_of(Status status) noexcept {
  return crossdock_status_name(static_cast<crossdock_status>(status));
}

// Why a call has failed.
struct Error {
  Status status = Status::ok;
  // What went wrong, with the values that it is about. Empty for `pending` and `timed_out`, which say it all.
  std::string message;
  // What can be done about it; may be empty.
  std::string advice;
  // The same call may succeed later.
  bool is_retryable = false;

  // All of it in one line.
  std::string words() const {
    std::string words = name_of(status);
    if (!message.empty()) words.append(": ").append(message);
    if (!advice.empty()) words.append("; ").append(advice);
    return words;
  }
};

// What went wrong in the last call of this thread that failed; results have it already.
inline Error last_error() {
  crossdock_error told = {};
  told.size = sizeof told;
  crossdock_last_error(&told);
  return {static_cast<Status>(told.status), told.message, told.advice, told.is_retryable != 0};
}

#if defined(__cpp_exceptions)
// Thrown by Result::value.
class Exception : public std::runtime_error {
 public:
  explicit Exception(Error error)
      : std::runtime_error(error.words()), error_(std::make_shared<const Error>(std::move(error))) {}

  const Error& error() const noexcept { return *error_; }
  Status status() const noexcept { return error_->status; }

 private:
  // Shared, since exceptions are copied where nothing may throw.
  std::shared_ptr<const Error> error_;
};
#endif

namespace detail {

[[noreturn]] inline void fail(const Error& error) {
#if defined(__cpp_exceptions)
  throw Exception(error);
#else
  std::fprintf(stderr, "crossdock: %s\n", error.words().c_str());
  std::abort();
#endif
}

}  // namespace detail

// What a call answers that has nothing to tell.
struct Nothing {};

// A value, or why there is none.
template <typename T = Nothing>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::in_place_index<1>, std::move(value)) {}
  Result(Error error) : held_(std::in_place_index<0>, std::move(error)) {}

  bool ok() const noexcept { return held_.index() == 1; }
  explicit operator bool() const noexcept { return ok(); }
  Status status() const noexcept { return error().status; }

  // With `Status::ok` where there is a value.
  const Error& error() const noexcept {
    static const Error none;
    const Error* error = std::get_if<0>(&held_);
    return error != nullptr ? *error : none;
  }

  // Throws, or aborts, where there is none.
  T& value() & { return *expect(std::get_if<1>(&held_)); }
  const T& value() const& { return *expect(std::get_if<1>(&held_)); }
  // Of a temporary result by value, so that a loop over it does not look at what is gone.
  T value() && { return std::move(*expect(std::get_if<1>(&held_))); }

 private:
  template <typename Value>
  Value* expect(Value* value) const {
    if (value == nullptr) detail::fail(error());
    return value;
  }

  std::variant<Error, T> held_;
};

namespace detail {

using Milliseconds = std::chrono::milliseconds;

// What is past is no time at all.
inline std::uint64_t timeout_ms(Milliseconds timeout) noexcept {
  return timeout.count() > 0 ? static_cast<std::uint64_t>(timeout.count()) : 0;
}

// C has a number of its own for not at all.
inline std::uint64_t spin_us(std::optional<std::chrono::microseconds> spin) noexcept {
  if (!spin) return 0;
  return spin->count() > 0 ? static_cast<std::uint64_t>(spin->count()) : CROSSDOCK_NO_SPIN;
}

// C says 0 for what is usual: a time that is set, and past already, is the shortest one instead.
inline std::uint64_t setting_ms(std::optional<Milliseconds> setting) noexcept {
  return setting ? std::max<std::uint64_t>(timeout_ms(*setting), 1) : 0;
}

// A text for C, NULL for none.
class Text {
 public:
  explicit Text(std::optional<std::string_view> text) : is_none_(!text) {
    if (text) text_ = *text;
    // C would see it end there. With what is in no UTF-8 in its place, the library refuses it, and says which it is.
    std::replace(text_.begin(), text_.end(), '\0', '\xff');
  }

  const char* get() const noexcept { return is_none_ ? nullptr : text_.c_str(); }

 private:
  std::string text_;
  bool is_none_;
};

// A text of options, which is as usual where it is empty.
inline Text usual_if_empty(std::string_view text) {
  return Text(text.empty() ? std::nullopt : std::optional(text));
}

inline Error error_of(crossdock_status status) {
  Error error = last_error();
  const auto answered = static_cast<Status>(status);
  // What has no words leaves those of an earlier call as they were: it is not over yet, or the time was.
  if (error.status != answered) {
    error = {answered, {}, {}, answered == Status::pending || answered == Status::timed_out};
  }
  return error;
}

inline Error bad_argument(std::string message) { return {Status::bad_argument, std::move(message), {}, false}; }

inline Result<> done(crossdock_status status) {
  if (status != CROSSDOCK_OK) return error_of(status);
  return Nothing();
}

template <typename C, typename = void>
struct IsSized : std::false_type {};
template <typename C>
struct IsSized<C, std::void_t<decltype(C::size)>> : std::true_type {};

// A structure with everything zero but its size.
template <typename C>
C blank() noexcept {
  C made = {};
  if constexpr (IsSized<C>::value) made.size = sizeof made;
  return made;
}

// What `call` writes as a C, told as a T.
template <typename T, typename C = T, typename Call>
Result<T> ask(Call call) {
  C told = blank<C>();
  const crossdock_status status = call(&told);
  if (status != CROSSDOCK_OK) return error_of(status);
  return T(told);
}

// As `ask`; nothing if it is pending.
template <typename T, typename C = T, typename Call>
Result<std::optional<T>> poll(Call call) {
  C told = blank<C>();
  const crossdock_status status = call(&told);
  if (status == CROSSDOCK_PENDING) return std::optional<T>();
  if (status != CROSSDOCK_OK) return error_of(status);
  return std::optional<T>(told);
}

// What `call` writes into a buffer of enough room, which it tells. `guess` saves the second call where it is enough.
template <typename Buffer, typename Call>
Result<Buffer> fill(std::size_t guess, Call call) {
  // A string has room for the NUL behind it.
  constexpr std::size_t beyond = std::is_same_v<Buffer, std::string> ? 1 : 0;
  Buffer buffer;
  std::size_t length = guess;
  crossdock_status status = CROSSDOCK_OK;
  // What is told may have grown between two calls.
  do {
    buffer.resize(length);
    status = call(buffer.data(), buffer.size() + beyond, &length);
  } while (status == CROSSDOCK_BUFFER_TOO_SMALL);
  if (status != CROSSDOCK_OK) return error_of(status);
  buffer.resize(length);
  return Result<Buffer>(std::move(buffer));
}

// A text that an object has.
inline Result<std::string> text(crossdock_status (*ask)(std::uint64_t, char*, std::size_t, std::size_t*),
                                std::uint64_t handle) {
  return fill<std::string>(127, [&](char* text, std::size_t capacity, std::size_t* length) {
    return ask(handle, text, capacity, length);
  });
}

// Owns a handle, and closes it. With `IsKept`, what is busy is not closed; all else is closed in any case.
template <crossdock_status (*Close)(std::uint64_t), bool IsKept = false>
class Owned {
 public:
  // Owns nothing: calls answer `Status::bad_handle`.
  Owned() noexcept = default;
  // Takes a handle of the C ABI over.
  explicit Owned(std::uint64_t handle) noexcept : handle_(handle) {}
  Owned(Owned&& other) noexcept : handle_(other.release()) {}
  Owned& operator=(Owned&& other) noexcept {
    Owned taken(std::move(other));
    std::swap(handle_, taken.handle_);
    return *this;
  }

  // For calls of the C ABI; 0 for none. It stays this object's.
  std::uint64_t handle() const noexcept { return handle_; }
  // Gives the handle away: whoever takes it closes it.
  std::uint64_t release() noexcept { return std::exchange(handle_, 0); }
  explicit operator bool() const noexcept { return handle_ != 0; }

  // Closes it, and tells what the destructor cannot. Of nothing, does nothing.
  Result<> close() {
    if (handle_ == 0) return Nothing();
    const crossdock_status status = Close(handle_);
    if (!IsKept || status != CROSSDOCK_BUSY) handle_ = 0;
    return done(status);
  }

 protected:
  ~Owned() {
    if (handle_ != 0) Close(handle_);
  }

 private:
  std::uint64_t handle_ = 0;
};

}  // namespace detail

// The ABI of the library that is loaded: major version times 65,536 plus minor version.
inline std::uint32_t abi_version() noexcept { return crossdock_abi_version(); }

// The release of the library that is loaded, as "0.1.0".
inline std::string_view version() noexcept { return crossdock_version(); }

// Whether the library that is loaded has all that this header was made for.
inline bool is_compatible() noexcept {
  constexpr std::uint32_t least = CROSSDOCK_ABI_MAJOR * 65536 + CROSSDOCK_ABI_MINOR;
  constexpr std::uint32_t next_major = (CROSSDOCK_ABI_MAJOR + 1) * 65536;
  return abi_version() >= least && abi_version() < next_major;
}

struct MemoryOptions {
  // Shown in /proc/self/maps.
  std::string_view name;
  HugePages huge_pages = HugePages::never;
};

// What a memory is.
struct MemoryInfo {
  void* base = nullptr;
  std::size_t bytes = 0;
  MemoryKind kind{};
  // To be passed to another process of this host; the memory's own.
  std::optional<int> fd;

  MemoryInfo() = default;
  explicit MemoryInfo(const crossdock_memory_info& told)
      : base(told.base), bytes(told.bytes), kind(static_cast<MemoryKind>(told.kind)) {
    if (told.fd >= 0) fd = told.fd;
  }
};

// A range of memory that peers write and read.
//
// Imported memory is the caller's own again when `close` has succeeded. While a node or a peer can still reach it, that
// fails with `Status::busy` and nothing has changed: close the node, and ask again. A destructor waits for nobody: what
// is busy then stays with the library, and its bytes have to stay where they are for as long as the process runs.
class Memory : public detail::Owned<crossdock_memory_close, true> {
 public:
  using Owned::Owned;

  // Zeroed memory, which peers on this host can map. It stays mapped as long as a node uses it.
  static Result<Memory> allocate(std::size_t bytes, const MemoryOptions& options = {}) {
    const detail::Text name = detail::usual_if_empty(options.name);
    auto given = detail::blank<crossdock_memory_options>();
    given.name = name.get();
    given.huge_pages = static_cast<std::uint32_t>(options.huge_pages);
    return detail::ask<Memory, crossdock_memory>(
        [&](crossdock_memory* made) { return crossdock_memory_allocate(bytes, &given, made); });
  }

  // The caller's host memory, of any origin. Peers on this host copy it through the kernel.
  static Result<Memory> import_host(void* base, std::size_t bytes) {
    return detail::ask<Memory, crossdock_memory>(
        [&](crossdock_memory* made) { return crossdock_memory_import(base, bytes, made); });
  }

  // The caller's GPU memory, of the device with this ordinal. `Status::unsupported`: there is no CUDA port yet.
  static Result<Memory> import_cuda(std::uint64_t device_pointer, std::size_t bytes, std::int32_t device) {
    return detail::ask<Memory, crossdock_memory>(
        [&](crossdock_memory* made) { return crossdock_memory_import_cuda(device_pointer, bytes, device, made); });
  }

  Result<MemoryInfo> describe() const {
    return detail::ask<MemoryInfo, crossdock_memory_info>(
        [&](crossdock_memory_info* told) { return crossdock_memory_describe(handle(), told); });
  }

  // All of it; valid as long as the memory is open, or a node uses it.
  Result<Span<std::uint8_t>> bytes() const {
    const Result<MemoryInfo> info = describe();
    if (!info) return info.error();
    return Span<std::uint8_t>(static_cast<std::uint8_t*>(info.value().base), info.value().bytes);
  }
};

// Where the pages of one layer are: page n begins at `offset + n * stride_bytes` of a region, which is the number of a
// memory among those of the node.
struct LayerBuffer : crossdock_layer_buffer {
  constexpr LayerBuffer() noexcept : crossdock_layer_buffer{} {}
  constexpr LayerBuffer(std::uint32_t in_region, std::uint64_t at_offset, std::uint64_t with_stride_bytes) noexcept
      : crossdock_layer_buffer{in_region, 0, at_offset, with_stride_bytes} {}
};
// Arrays of them are passed as they are.
static_assert(sizeof(LayerBuffer) == sizeof(crossdock_layer_buffer));

// What a layout is made of. Required: model, model_layers, kind with its bytes, dtype, page_tokens, pages.
struct LayoutOptions {
  // The model's name, compared with the peer's.
  std::string_view model;
  std::uint32_t model_layers = 0;
  // The first layer of this worker, numbered as in the model.
  std::uint32_t first_layer = 0;
  // How many it has; 0 for all from the first one on.
  std::uint32_t layers = 0;
  CacheKind kind{};
  // MLA: bytes of a token's latent in a layer.
  std::uint32_t latent_bytes = 0;
  // MLA: bytes of a token's rotary key in a layer.
  std::uint32_t rope_bytes = 0;
  // Heads: how many KV heads the model has.
  std::uint32_t heads = 0;
  // Heads: the first one here.
  std::uint32_t first_head = 0;
  // Heads: how many are here; 0 for all from the first one on.
  std::uint32_t local_heads = 0;
  // Heads: bytes of one token's key, and of its value, for one head.
  std::uint32_t head_bytes = 0;
  HeadOrder head_order = HeadOrder::tokens_first;
  Dtype dtype{};
  // Tokens in a page.
  std::uint32_t page_tokens = 0;
  // Pages of each layer.
  std::uint32_t pages = 0;
  Placement placement = Placement::layer_major;
  // Of a placement in one region.
  std::uint32_t region = 0;
  // Of Placement::buffers: the latents or keys of all layers, then, of heads, the values of all layers.
  Span<const LayerBuffer> buffers;
  // The worker's number among those of its side that serve a request together.
  std::uint32_t rank = 0;
  // Context parallelism: which of `context_ranks` this worker is.
  std::uint32_t context_rank = 0;
  // Over how many workers the tokens of a request are spread.
  std::uint32_t context_ranks = 1;
  // How many tokens follow each other on one of them.
  std::uint32_t context_interleave = 1;
};

// How one side spreads a model over its ranks.
struct Parallelism {
  // Tensor-parallel ranks.
  std::uint32_t tp = 1;
  // Context-parallel ranks.
  std::uint32_t context = 1;
  // How many tokens follow each other on one of those.
  std::uint32_t interleave = 1;
  // KV heads of the model; 0 for one whose cache every TP rank keeps whole (MLA).
  std::uint32_t kv_heads = 0;
  std::uint32_t model_layers = 0;
  // Pipeline stages: how many layers each has. Empty for one stage with all layers.
  Span<const std::uint32_t> stage_layers;
};

// Something that is kept in the pages of a pool.
struct PartOptions {
  // Compared with the peer's.
  std::string_view name;
  // How many heads there are; 1 for what is not split.
  std::uint32_t heads = 1;
  // The first one here.
  std::uint32_t first_head = 0;
  // How many are here; 0 for all from the first one on.
  std::uint32_t local_heads = 0;
  // Bytes of one token, or one entry, for one head.
  std::uint32_t head_bytes = 0;
  HeadOrder head_order = HeadOrder::tokens_first;
  // The layers that keep it, in ascending order, numbered as in the model.
  Span<const std::uint32_t> layers;
  // Where the pages of each of them are: as many as layers.
  Span<const LayerBuffer> buffers;
};

// Pages of their own, beside those of the tokens.
struct CachePoolOptions {
  // Compared with the peer's.
  std::string_view name;
  Extent extent = Extent::all_tokens;
  // How many tokens a window has.
  std::uint32_t window = 0;
  // Tokens in a page; 1 where pages hold entries.
  std::uint32_t page_tokens = 0;
  // Pages of each layer.
  std::uint32_t pages = 0;
  // What is in a page.
  Span<const PartOptions> parts;
};

// What a layout comes to: its fields are those of crossdock.h.
using LayoutInfo = crossdock_layout_info;

// Where a layer's pages are, and how long one is.
struct LayerPages {
  LayerBuffer buffer;
  std::uint64_t page_bytes = 0;
};

// A rank that brings something.
struct SourceRank {
  std::uint32_t rank = 0;
  Parts parts = Parts::all;
};

namespace detail {

inline crossdock_layout_options plain(const LayoutOptions& options, const Text& model) {
  auto given = blank<crossdock_layout_options>();
  given.model = model.get();
  given.model_layers = options.model_layers;
  given.first_layer = options.first_layer;
  given.layers = options.layers;
  given.kind = static_cast<std::uint32_t>(options.kind);
  given.latent_bytes = options.latent_bytes;
  given.rope_bytes = options.rope_bytes;
  given.heads = options.heads;
  given.first_head = options.first_head;
  given.local_heads = options.local_heads;
  given.head_bytes = options.head_bytes;
  given.head_order = static_cast<std::uint32_t>(options.head_order);
  given.dtype = static_cast<std::uint32_t>(options.dtype);
  given.page_tokens = options.page_tokens;
  given.pages = options.pages;
  given.placement = static_cast<std::uint32_t>(options.placement);
  given.region = options.region;
  given.buffers = options.buffers.data();
  given.buffer_count = options.buffers.size();
  given.rank = options.rank;
  given.context_rank = options.context_rank;
  given.context_ranks = options.context_ranks;
  given.context_interleave = options.context_interleave;
  return given;
}

inline crossdock_parallelism plain(const Parallelism& parallelism) {
  auto given = blank<crossdock_parallelism>();
  given.tp = parallelism.tp;
  given.context = parallelism.context;
  given.interleave = parallelism.interleave;
  given.kv_heads = parallelism.kv_heads;
  given.model_layers = parallelism.model_layers;
  given.stage_layers = parallelism.stage_layers.data();
  given.stages = parallelism.stage_layers.size();
  return given;
}

inline crossdock_part_options plain(const PartOptions& part, const Text& name) {
  auto given = blank<crossdock_part_options>();
  given.name = name.get();
  given.heads = part.heads;
  given.first_head = part.first_head;
  given.local_heads = part.local_heads;
  given.head_bytes = part.head_bytes;
  given.head_order = static_cast<std::uint32_t>(part.head_order);
  given.layers = part.layers.data();
  given.buffers = part.buffers.data();
  given.layer_count = part.layers.size();
  return given;
}

// C has one count for both lists.
inline Result<> agree(const PartOptions& part) {
  if (part.layers.size() == part.buffers.size()) return Nothing();
  return bad_argument("part " + std::string(part.name) + " has " + std::to_string(part.layers.size()) +
                      " layers and " + std::to_string(part.buffers.size()) + " buffers");
}

}  // namespace detail

// Describes one worker's KV: what is kept of each token, and where each layer's pages lie. Nodes that were opened with
// it keep their own.
class Layout : public detail::Owned<crossdock_layout_close> {
 public:
  using Owned::Owned;

  // `Status::layout` if it is not sound.
  static Result<Layout> create(const LayoutOptions& options) {
    const detail::Text model(options.model);
    const crossdock_layout_options given = detail::plain(options, model);
    return detail::ask<Layout, crossdock_layout>(
        [&](crossdock_layout* made) { return crossdock_layout_create(&given, made); });
  }

  // The share of a rank: `options` describe the whole model's cache on one worker, of which the layers, heads and
  // tokens that `rank` keeps are taken.
  static Result<Layout> of_rank(const LayoutOptions& options, const Parallelism& parallelism, std::uint32_t rank) {
    const detail::Text model(options.model);
    const crossdock_layout_options given = detail::plain(options, model);
    const crossdock_parallelism spread = detail::plain(parallelism);
    return detail::ask<Layout, crossdock_layout>(
        [&](crossdock_layout* made) { return crossdock_layout_of_rank(&given, &spread, rank, made); });
  }

  // Keeps something more in the pages of the tokens, as the keys of an indexer beside a latent.
  Result<> add_part(const PartOptions& part) {
    if (Result<> agrees = detail::agree(part); !agrees) return agrees;
    const detail::Text name(part.name);
    const crossdock_part_options given = detail::plain(part, name);
    return detail::done(crossdock_layout_add_part(handle(), &given));
  }

  // Keeps something more in pages of its own. A room has a list of pages for each pool, in the order in which they were
  // added, after that of the tokens.
  Result<> add_pool(const CachePoolOptions& pool) {
    std::vector<detail::Text> names;
    std::vector<crossdock_part_options> parts;
    std::vector<const crossdock_part_options*> pointers;
    names.reserve(pool.parts.size());
    parts.reserve(pool.parts.size());
    for (const PartOptions& part : pool.parts) {
      if (Result<> agrees = detail::agree(part); !agrees) return agrees;
      names.emplace_back(part.name);
      parts.push_back(detail::plain(part, names.back()));
      pointers.push_back(&parts.back());
    }
    const detail::Text name(pool.name);
    auto given = detail::blank<crossdock_cache_pool_options>();
    given.name = name.get();
    given.extent = static_cast<std::uint32_t>(pool.extent);
    given.window = pool.window;
    given.page_tokens = pool.page_tokens;
    given.pages = pool.pages;
    given.parts = pointers.data();
    given.part_count = pointers.size();
    return detail::done(crossdock_layout_add_pool(handle(), &given));
  }

  Result<LayoutInfo> describe() const {
    return detail::ask<LayoutInfo>([&](LayoutInfo* told) { return crossdock_layout_describe(handle(), told); });
  }

  // How many bytes of a region hold what is placed in it; 0 if nothing is.
  Result<std::uint64_t> region_bytes(std::uint32_t region = 0) const {
    return detail::ask<std::uint64_t>(
        [&](std::uint64_t* told) { return crossdock_layout_region_bytes(handle(), region, told); });
  }

  // How many pages hold what is kept here of a request of so many tokens.
  Result<std::uint32_t> pages_for(std::uint32_t tokens) const {
    return detail::ask<std::uint32_t>(
        [&](std::uint32_t* told) { return crossdock_layout_pages_for(handle(), tokens, told); });
  }

  // Where a layer's pages are. Part 0 is the latent or the keys, 1 the values, then those that were added; pool 0 is
  // that of the tokens.
  Result<LayerPages> find(std::uint32_t layer, std::uint32_t part = 0, std::uint32_t pool = 0) const {
    return detail::ask<LayerPages>([&](LayerPages* told) {
      return crossdock_layout_find(handle(), pool, part, layer, &told->buffer, &told->page_bytes);
    });
  }
};

// Which ranks of the prefill side bring what `rank` of the decode side keeps. Where several could, `spread_by`, as the
// room's number, chooses.
inline Result<std::vector<SourceRank>> sources(const Parallelism& prefill, const Parallelism& decode,
                                               std::uint32_t rank, std::uint64_t spread_by) {
  const crossdock_parallelism from = detail::plain(prefill), to = detail::plain(decode);
  const auto told = detail::fill<std::vector<crossdock_source_rank>>(
      8, [&](crossdock_source_rank* ranks, std::size_t capacity, std::size_t* count) {
        return crossdock_sources(&from, &to, rank, spread_by, ranks, capacity, count);
      });
  if (!told) return told.error();
  std::vector<SourceRank> ranks;
  for (const crossdock_source_rank& source : told.value()) {
    ranks.push_back({source.rank, static_cast<Parts>(source.parts)});
  }
  return Result<std::vector<SourceRank>>(std::move(ranks));
}

// Which ranks of the decode side need `rank` of the prefill side.
inline Result<std::vector<std::uint32_t>> destinations(const Parallelism& prefill, const Parallelism& decode,
                                                       std::uint32_t rank, std::uint64_t spread_by) {
  const crossdock_parallelism from = detail::plain(prefill), to = detail::plain(decode);
  return detail::fill<std::vector<std::uint32_t>>(
      8, [&](std::uint32_t* ranks, std::size_t capacity, std::size_t* count) {
        return crossdock_destinations(&from, &to, rank, spread_by, ranks, capacity, count);
      });
}

// A pool is over at most this many pages.
constexpr std::uint32_t most_pages = CROSSDOCK_MOST_PAGES;

struct PoolOptions {
  // How many pages it is over.
  std::uint32_t pages = 0;
  // Whether pages are taken from this pool; else the engine's own allocator chooses them, and rooms name them.
  bool allocates = false;
  // Of a pool that allocates: pressure begins when fewer pages than this are free,
  std::uint32_t low_watermark = 0;
  // and ends when at least so many are again.
  std::uint32_t high_watermark = 0;
};

// What a pool's pages are doing, all of one moment: its fields are those of crossdock.h.
using PoolStats = crossdock_pool_stats;

// Pages that were taken from a pool, in an order. Closing gives them back; rooms that send them keep them until they
// are over. A room that receives into them takes them over, see PageList.
class Pages : public detail::Owned<crossdock_pages_close> {
 public:
  using Owned::Owned;

  // Their numbers, in their order.
  Result<std::vector<std::uint32_t>> ids() const {
    return detail::fill<std::vector<std::uint32_t>>(
        64, [&](std::uint32_t* ids, std::size_t capacity, std::size_t* count) {
          return crossdock_pages_ids(handle(), ids, capacity, count);
        });
  }
};

// Knows of each page of a cache who holds it. Pages that are out come home to a closed pool all the same.
class Pool : public detail::Owned<crossdock_pool_close> {
 public:
  using Owned::Owned;

  static Result<Pool> create(const PoolOptions& options) {
    auto given = detail::blank<crossdock_pool_options>();
    given.pages = options.pages;
    given.allocates = options.allocates;
    given.low_watermark = options.low_watermark;
    given.high_watermark = options.high_watermark;
    return detail::ask<Pool, crossdock_pool>(
        [&](crossdock_pool* made) { return crossdock_pool_create(&given, made); });
  }

  // Of a pool that allocates; `Status::exhausted` if too few pages are free.
  Result<Pages> take(std::uint32_t count) {
    return detail::ask<Pages, crossdock_pages>(
        [&](crossdock_pages* made) { return crossdock_pool_take(handle(), count, made); });
  }

  // Pages by their numbers, 4 or 8 bytes each, of a pool whose pages the engine's allocator chooses: all or none.
  // `Status::page_in_use` where a room still sends or serves one of them, or a peer may write it.
  template <typename Ids, typename Id = detail::Element<const Ids>>
  Result<Pages> adopt(const Ids& ids) {
    static_assert(std::is_integral_v<Id> && (sizeof(Id) == 4 || sizeof(Id) == 8), "page numbers have 4 or 8 bytes");
    crossdock_page_list list = {};
    list.pool = handle();
    list.ids = std::data(ids);
    list.count = std::size(ids);
    list.id_bytes = sizeof(Id);
    return detail::ask<Pages, crossdock_pages>(
        [&](crossdock_pages* made) { return crossdock_pool_adopt(&list, made); });
  }

  Result<PoolStats> stats() const {
    return detail::ask<PoolStats>([&](PoolStats* told) { return crossdock_pool_get_stats(handle(), told); });
  }
};

// Pages for a room, of one pool: what it refers to has to outlive the call that opens the room.
class PageList {
 public:
  // Of a pool that allocates. A room that receives takes the pages over when it is opened, and `pages` owns nothing
  // then; a room that sends leaves them here. Where it cannot be opened they stay here too, but with `Status::busy` and
  // `Status::stopped` they are back in their pool.
  PageList(Pages& pages) noexcept : pages_(&pages) {}

  // Of a pool that does not: page numbers of 4 or 8 bytes, signed or not, as they lie in a vector, an array or a span.
  template <typename Ids, typename Id = detail::Element<const Ids>>
  PageList(const Pool& pool, const Ids& ids) noexcept {
    static_assert(std::is_integral_v<Id> && (sizeof(Id) == 4 || sizeof(Id) == 8), "page numbers have 4 or 8 bytes");
    ids_.pool = pool.handle();
    ids_.ids = std::data(ids);
    ids_.count = std::size(ids);
    ids_.id_bytes = sizeof(Id);
  }

 private:
  friend class Node;
  friend class Sending;

  crossdock_page_list plain() const noexcept {
    crossdock_page_list list = ids_;
    if (pages_ != nullptr) list.pages = pages_->handle();
    return list;
  }

  crossdock_page_list ids_ = {};
  Pages* pages_ = nullptr;
};

// Who answered at a dialed address: its fields are those of crossdock.h.
using PeerInfo = crossdock_peer_info;

// A node that a node talks to. Closing ends the session with one that was dialed, and dials it no more; one that was
// named by its number is only forgotten.
class Peer : public detail::Owned<crossdock_peer_close> {
 public:
  using Owned::Owned;

  // Who answered, or nothing yet. `Status::refused` if nobody ever will, `Status::wrong_kind` if it was not dialed.
  Result<std::optional<PeerInfo>> poll() const {
    return detail::poll<PeerInfo>([&](PeerInfo* told) { return crossdock_peer_poll(handle(), told); });
  }

  // As `poll`, and waits; `Status::timed_out`.
  Result<PeerInfo> wait(std::chrono::milliseconds timeout) const {
    return detail::ask<PeerInfo>(
        [&](PeerInfo* told) { return crossdock_peer_wait(handle(), detail::timeout_ms(timeout), told); });
  }

  // `Status::pending` until it has answered.
  Result<std::string> name() const {
    return detail::text(crossdock_peer_name, handle());
  }
};

// A rank of the prefill side that brings something.
struct Source : crossdock_source {
  Source(const Peer& from, std::uint32_t of_rank = 0, Parts with_parts = Parts::all) noexcept
      : crossdock_source{from.handle(), of_rank, static_cast<std::uint32_t>(with_parts)} {}
};
// Arrays of them are passed as they are.
static_assert(sizeof(Source) == sizeof(crossdock_source));

// What the decode side asks for. Required: sources, room, tokens, pages.
struct ReceiveOptions {
  // Together they bring each byte of the layers once.
  Span<const Source> sources;
  // The router's number for the request.
  std::uint64_t room = 0;
  // Which use of that number.
  std::uint32_t use_count = 0;
  // Tokens of the request.
  std::uint32_t tokens = 0;
  // Tokens of a prefix that is here already and is not to be sent.
  std::uint32_t skip_tokens = 0;
  // The layers that the sources bring; of 0 layers, all that this node keeps.
  std::uint32_t first_layer = 0;
  std::uint32_t layers = 0;
  // One list for each pool of the layout; the first page holds the first token that moves.
  Span<const PageList> pages;
  // From this call; 30 seconds where it is not set.
  std::optional<std::chrono::milliseconds> deadline;
  // Told with the room's events.
  std::uint64_t user_data = 0;
};

// What the prefill side offers. Required: room, tokens, pages.
struct SendOptions {
  // The ranks of the decode side that take their shares; rank 0 alone where there are none.
  Span<const std::uint32_t> ranks;
  // The router's number for the request.
  std::uint64_t room = 0;
  // Which use of that number.
  std::uint32_t use_count = 0;
  // Tokens of the request.
  std::uint32_t tokens = 0;
  // One list for each pool of the layout, from the first token on.
  Span<const PageList> pages;
  // Of a room that is served: handed to the reader with the bytes.
  Span<const std::uint8_t> aux;
  // From this call; 30 seconds where it is not set.
  std::optional<std::chrono::milliseconds> deadline;
  // Told with the room's events.
  std::uint64_t user_data = 0;
};

// How a room ended on this side.
struct End {
  Outcome outcome{};
  Decider by = Decider::nobody;
  Stage stage = Stage::none;
  // The same request may succeed in another room.
  bool is_retryable = false;
  // How long Receiving::aux is.
  std::uint64_t aux_bytes = 0;
  // What the caller gave the room.
  std::uint64_t user_data = 0;

  End() = default;
  explicit End(const crossdock_end& told)
      : outcome(static_cast<Outcome>(told.outcome)),
        by(static_cast<Decider>(told.by)),
        stage(static_cast<Stage>(told.stage)),
        is_retryable(told.is_retryable != 0),
        aux_bytes(told.aux_bytes),
        user_data(told.user_data) {}
};

// One hand-over, seen from one side. Closing one that has not ended cancels it; pages that nobody has taken go back to
// their pool when they come home.
class Room : public detail::Owned<crossdock_room_close> {
 public:
  using Owned::Owned;

  // Ends it here. Its end is told as ever; pages of a room that receives come home when the peer has stopped.
  Result<> cancel() { return detail::done(crossdock_room_cancel(handle())); }

  // How it ended, or nothing yet. It may be asked again.
  Result<std::optional<End>> poll() const {
    return detail::poll<End, crossdock_end>([&](crossdock_end* told) { return crossdock_room_poll(handle(), told); });
  }

  // As `poll`, and waits; `Status::timed_out`.
  Result<End> wait(std::chrono::milliseconds timeout) const {
    return detail::ask<End, crossdock_end>(
        [&](crossdock_end* told) { return crossdock_room_wait(handle(), detail::timeout_ms(timeout), told); });
  }

  // How it ended, in words, with peer and port: for logs. `Status::pending` until then.
  Result<std::string> message() const {
    return detail::text(crossdock_room_message, handle());
  }

  // What a person can do about it.
  Result<std::string> advice() const {
    return detail::text(crossdock_room_advice, handle());
  }

  // The peer's name; empty if the room had come to no session. Of a room between several ranks, that of the peer that its
  // end is about.
  Result<std::string> peer() const {
    return detail::text(crossdock_room_peer, handle());
  }

  // The port between the two sides; empty if the room had come to no session.
  Result<std::string> port() const {
    return detail::text(crossdock_room_port, handle());
  }
};

// The prefill end of a push: layers are sent as they are computed, then it is finished, then it ends.
class Sending : public Room {
 public:
  using Room::Room;

  // Appends to the pages of a pool, in a room that Node::send_ahead has opened: before their tokens are sent. More than
  // the pool has are refused.
  Result<> add_pages(const PageList& pages, std::uint32_t pool = 0) {
    const crossdock_page_list given = pages.plain();
    return detail::done(crossdock_room_add_pages(handle(), pool, &given));
  }

  // Sends all tokens of these layers, whose pages are filled. `Status::out_of_order` if some were sent before.
  Result<> send_layers(std::uint32_t first_layer, std::uint32_t layers = 1) {
    return detail::done(crossdock_room_send_layers(handle(), first_layer, layers));
  }

  // Sends these tokens of these layers, whose pages are filled: each layer's tokens in order, each once.
  Result<> send_tokens(std::uint32_t first_layer, std::uint32_t layers, std::uint32_t first_token,
                       std::uint32_t tokens) {
    return detail::done(crossdock_room_send_tokens(handle(), first_layer, layers, first_token, tokens));
  }

  // Everything has been sent: the peer may rely on the pages once it has them all. `aux` travels with it: the first
  // token, its probabilities. `Status::not_complete` if something has not been sent.
  Result<> finish(Span<const std::uint8_t> aux = {}) {
    return detail::done(crossdock_room_finish(handle(), aux.data(), aux.size()));
  }
};

// The prefill end of a pull: pages that are filled, for the peer that asks for the room to read.
class Serving : public Room {
 public:
  using Room::Room;
};

// The decode end of a push or of a pull.
class Receiving : public Room {
 public:
  using Room::Room;

  // Waits until nobody else can write the pages: until then they must not be used for anything else. A timeout of 0
  // only asks. `Status::timed_out`; `Status::abandoned` if they never come home.
  Result<> wait_pages(std::chrono::milliseconds timeout) const {
    return detail::done(crossdock_room_wait_pages(handle(), detail::timeout_ms(timeout)));
  }

  // The pages of the list at `list`, once they are home, of those that were given as Pages. `Status::pending` until
  // then, `Status::finished` if they were taken before or were named by their numbers.
  Result<Pages> take_pages(std::size_t list = 0) {
    return detail::ask<Pages, crossdock_pages>(
        [&](crossdock_pages* made) { return crossdock_room_take_pages(handle(), list, made); });
  }

  // What the prefill side sent beside the pages. `Status::pending` until the room has ended.
  Result<std::vector<std::uint8_t>> aux() const {
    return detail::fill<std::vector<std::uint8_t>>(
        64, [&](std::uint8_t* bytes, std::size_t capacity, std::size_t* length) {
          return crossdock_room_aux(handle(), bytes, capacity, length);
        });
  }

  // How many batches have landed in the current attempt: grows while the room moves.
  Result<std::uint64_t> arrivals() const {
    return detail::ask<std::uint64_t>([&](std::uint64_t* told) { return crossdock_room_arrivals(handle(), told); });
  }
};

// What has happened.
class Event {
 public:
  EventKind kind() const noexcept { return static_cast<EventKind>(told_.kind); }
  // The room's, or the peer's.
  std::uint64_t handle() const noexcept { return told_.handle; }
  // What the caller gave the room; 0 of a peer.
  std::uint64_t user_data() const noexcept { return told_.user_data; }

 private:
  friend class Node;

  crossdock_event told_ = {};
};
// Arrays of them are written as they are.
static_assert(sizeof(Event) == sizeof(crossdock_event) && std::is_standard_layout_v<Event>);

// Whom a node, or a rank of a group, lets in: one that lets anybody in has to be told to.
class Authentication {
 public:
  // Both sides prove that they know the key that all of them share: at least 16 bytes, better 32 random ones.
  static Authentication key(Span<const std::uint8_t> key) noexcept { return {CROSSDOCK_AUTHENTICATION_KEY, key}; }
  // Anybody who can reach it may connect, and be granted what its peers are.
  static Authentication off() noexcept { return {CROSSDOCK_AUTHENTICATION_OFF, {}}; }

 private:
  friend class Node;
  friend class Group;
  friend class Endpoint;

  Authentication(std::uint32_t kind, Span<const std::uint8_t> key) noexcept : kind_(kind), key_(key) {}

  std::uint32_t kind_;
  Span<const std::uint8_t> key_;
};

// How a node is opened. Numbers of 0 and texts and times that are not set are as usual.
struct NodeOptions {
  // The node's number, the same over restarts; 0 chooses one at random.
  std::uint64_t number = 0;
  Progress progress = Progress::thread;
  // Where peers dial, as "ip:port"; "127.0.0.1:0" where it is not set. Port 0 takes any free one.
  std::string_view bind;
  // The IP address that peers are told, if it is another.
  std::string_view advertise;
  // The ports to open, in the order of preference, with commas between: "shm", "tcp", "verbs" (every usable RDMA
  // device), "verbs:DEVICE". "shm,tcp" where it is not set.
  std::string_view ports;
  // Where the flight recorder writes when a room fails or a session is lost; nowhere where it is not set.
  std::string_view flight_folder;
  // Which rooms this node's decode side verifies by checksums: 0 none, 1 every one, n one in n.
  std::uint32_t verify_one_in = 0;
  // Lanes for each rail and peer.
  std::uint32_t lanes_per_rail = 0;
  // How long the progress thread spins after something has happened; 0 for not at all.
  std::optional<std::chrono::microseconds> spin;
  // How often peers tell this node that they live.
  std::optional<std::chrono::milliseconds> heartbeat;
  // For how long after the beginning of a session silence is not counted.
  std::optional<std::chrono::milliseconds> warm_up_grace;
  // For a whole handshake.
  std::optional<std::chrono::milliseconds> handshake_timeout;
  // For what is still at a lane of a room that has ended.
  std::optional<std::chrono::milliseconds> drain_timeout;
  // How many heartbeats may be missing before a peer is lost.
  std::uint32_t heartbeats_missed = 0;
  // Threads that copy, of the shared-memory port.
  std::uint32_t copy_threads = 0;
  // At once: sessions, rooms, grants, and calls that wait for the progress loop.
  std::uint32_t max_sessions = 0;
  std::uint32_t max_rooms = 0;
  std::uint32_t max_grants = 0;
  std::uint32_t max_commands = 0;
  // The longest control message; a list of pages takes 4 bytes each. The same on all nodes that talk to each other.
  std::uint64_t max_frame_bytes = 0;
};

// A node's number, and which start of it this is.
struct Identity {
  std::uint64_t number = 0;
  std::uint64_t incarnation = 0;
};

// What a node has done and what it holds: its fields are those of crossdock.h.
using NodeStats = crossdock_node_stats;

// One worker. Closing says goodbye to all peers, ends its rooms with Outcome::peer_lost, and waits for the progress
// thread; rooms and peers can be asked until they are closed themselves.
class Node : public detail::Owned<crossdock_node_close> {
 public:
  using Owned::Owned;

  // Opens the ports, registers the memory, begins to listen and starts to make progress. `name` is for people; `memory`
  // is that of the regions that the layout names, in their order.
  static Result<Node> open(std::string_view name, const Layout& layout, Span<const Memory> memory,
                           Authentication authentication, const NodeOptions& options = {}) {
    std::vector<crossdock_memory> regions;
    for (const Memory& region : memory) regions.push_back(region.handle());
    const detail::Text node_name(name);
    const detail::Text bind = detail::usual_if_empty(options.bind);
    const detail::Text advertise = detail::usual_if_empty(options.advertise);
    const detail::Text ports = detail::usual_if_empty(options.ports);
    const detail::Text flight_folder = detail::usual_if_empty(options.flight_folder);
    auto given = detail::blank<crossdock_node_options>();
    given.name = node_name.get();
    given.number = options.number;
    given.layout = layout.handle();
    given.memory = regions.data();
    given.memory_count = regions.size();
    given.authentication = authentication.kind_;
    given.progress = static_cast<std::uint32_t>(options.progress);
    given.key = authentication.key_.data();
    given.key_bytes = authentication.key_.size();
    given.bind = bind.get();
    given.advertise = advertise.get();
    given.ports = ports.get();
    given.flight_folder = flight_folder.get();
    given.verify_one_in = options.verify_one_in;
    given.lanes_per_rail = options.lanes_per_rail;
    given.spin_us = detail::spin_us(options.spin);
    given.heartbeat_ms = detail::setting_ms(options.heartbeat);
    given.warm_up_grace_ms = detail::setting_ms(options.warm_up_grace);
    given.handshake_timeout_ms = detail::setting_ms(options.handshake_timeout);
    given.drain_timeout_ms = detail::setting_ms(options.drain_timeout);
    given.heartbeats_missed = options.heartbeats_missed;
    given.copy_threads = options.copy_threads;
    given.max_sessions = options.max_sessions;
    given.max_rooms = options.max_rooms;
    given.max_grants = options.max_grants;
    given.max_commands = options.max_commands;
    given.max_frame_bytes = options.max_frame_bytes;
    return detail::ask<Node, crossdock_node>(
        [&](crossdock_node* made) { return crossdock_node_open(&given, made); });
  }

  // What peers dial, "ip:port".
  Result<std::string> address() const {
    return detail::text(crossdock_node_address, handle());
  }

  // The kinds of the ports that were opened, in their order, as "shm,tcp".
  Result<std::string> ports() const {
    return detail::text(crossdock_node_ports, handle());
  }

  Result<Identity> identity() const {
    return detail::ask<Identity>(
        [&](Identity* told) { return crossdock_node_identity(handle(), &told->number, &told->incarnation); });
  }

  // Dials a peer ("ip:port"; names are to be resolved before), now and whenever the session with it is lost. Returns at
  // once: rooms may be opened before it has answered, which Peer::wait tells.
  Result<Peer> connect(std::string_view address) {
    const detail::Text where(address);
    return detail::ask<Peer, crossdock_peer>(
        [&](crossdock_peer* made) { return crossdock_connect(handle(), where.get(), made); });
  }

  // Names a peer that dials this node, by its node number.
  Result<Peer> peer(std::uint64_t number) {
    return detail::ask<Peer, crossdock_peer>(
        [&](crossdock_peer* made) { return crossdock_peer_by_number(handle(), number, made); });
  }

  // The decode end of a push: the prefill side writes into the pages.
  Result<Receiving> receive(const ReceiveOptions& options) { return decode(crossdock_receive, options); }
  // The decode end of a pull: this side reads from the pages that the prefill side serves.
  Result<Receiving> fetch(const ReceiveOptions& options) { return decode(crossdock_fetch, options); }
  // The prefill end of a push.
  Result<Sending> send(const SendOptions& options) { return prefill<Sending>(crossdock_send, options); }
  // The same before all pages are known: the lists name the first ones, or none, and Sending::add_pages the others.
  Result<Sending> send_ahead(const SendOptions& options) {
    return prefill<Sending>(crossdock_send_ahead, options);
  }
  // The prefill end of a pull.
  Result<Serving> serve(const SendOptions& options) { return prefill<Serving>(crossdock_serve, options); }

  // The node's one event descriptor, for poll or epoll: readable while `poll` would tell something. It belongs to the
  // node: do not read from it, nor close it.
  Result<std::int32_t> event_fd() const {
    return detail::ask<std::int32_t>([&](std::int32_t* told) { return crossdock_node_event_fd(handle(), told); });
  }

  // Takes what has happened since it was asked last, oldest first, as much as fits: the part of `into` that was
  // written. Each end is told once.
  Result<Span<Event>> poll(Span<Event> into) {
    return events(into, [&](crossdock_event* told, std::size_t capacity, std::size_t* count) {
      return crossdock_node_poll(handle(), told, capacity, count);
    });
  }

  // As `poll`, and waits for the first event: none if the time was over first.
  Result<Span<Event>> wait(Span<Event> into, std::chrono::milliseconds timeout) {
    return events(into, [&](crossdock_event* told, std::size_t capacity, std::size_t* count) {
      return crossdock_node_wait(handle(), detail::timeout_ms(timeout), told, capacity, count);
    });
  }

  // With Progress::caller: makes progress, and never blocks. Whether something happened, so that more may be waiting.
  Result<bool> progress() {
    return detail::ask<bool, std::uint32_t>(
        [&](std::uint32_t* told) { return crossdock_node_progress(handle(), told); });
  }

  // With Progress::caller: sleeps until there is progress to make, for no longer than this.
  Result<> park(std::chrono::milliseconds longest) {
    return detail::done(crossdock_node_park(handle(), detail::timeout_ms(longest)));
  }

  // The progress loop is asked: whoever drives it is not to wait here. `Status::timed_out`.
  Result<NodeStats> stats(std::chrono::milliseconds timeout) const {
    return detail::ask<NodeStats>(
        [&](NodeStats* told) { return crossdock_node_get_stats(handle(), detail::timeout_ms(timeout), told); });
  }

  // Writes down what the flight recorder holds, as a file for `crossdock timeline`. It asks as `stats` does.
  Result<> write_flight(std::string_view path, std::chrono::milliseconds timeout) const {
    const detail::Text file(path);
    return detail::done(crossdock_node_write_flight(handle(), file.get(), detail::timeout_ms(timeout)));
  }

 private:
  static std::vector<crossdock_page_list> plain(Span<const PageList> lists) {
    std::vector<crossdock_page_list> given;
    for (const PageList& list : lists) given.push_back(list.plain());
    return given;
  }

  template <typename Begin>
  Result<Receiving> decode(Begin begin, const ReceiveOptions& options) {
    const std::vector<crossdock_page_list> lists = plain(options.pages);
    auto given = detail::blank<crossdock_receive_options>();
    given.sources = options.sources.data();
    given.source_count = options.sources.size();
    given.room = options.room;
    given.use_count = options.use_count;
    given.tokens = options.tokens;
    given.skip_tokens = options.skip_tokens;
    given.first_layer = options.first_layer;
    given.layers = options.layers;
    given.pages = lists.data();
    given.page_lists = lists.size();
    given.deadline_ms = detail::setting_ms(options.deadline);
    given.user_data = options.user_data;
    Result<Receiving> room = detail::ask<Receiving, crossdock_room>(
        [&](crossdock_room* made) { return begin(handle(), &given, made); });
    if (room.ok() || room.status() == Status::busy || room.status() == Status::stopped) {
      // Their handles are closed.
      for (const PageList& list : options.pages) {
        if (list.pages_ != nullptr) list.pages_->release();
      }
    }
    return room;
  }

  template <typename Side, typename Begin>
  Result<Side> prefill(Begin begin, const SendOptions& options) {
    const std::vector<crossdock_page_list> lists = plain(options.pages);
    auto given = detail::blank<crossdock_send_options>();
    given.ranks = options.ranks.data();
    given.rank_count = options.ranks.size();
    given.room = options.room;
    given.use_count = options.use_count;
    given.tokens = options.tokens;
    given.pages = lists.data();
    given.page_lists = lists.size();
    given.aux = options.aux.data();
    given.aux_bytes = options.aux.size();
    given.deadline_ms = detail::setting_ms(options.deadline);
    given.user_data = options.user_data;
    return detail::ask<Side, crossdock_room>([&](crossdock_room* made) { return begin(handle(), &given, made); });
  }

  template <typename Take>
  static Result<Span<Event>> events(Span<Event> into, Take take) {
    std::size_t count = 0;
    const crossdock_status status = take(reinterpret_cast<crossdock_event*>(into.data()), into.size(), &count);
    if (status != CROSSDOCK_OK && status != CROSSDOCK_TIMED_OUT) return detail::error_of(status);
    return Span<Event>(into.data(), count);
  }
};

// A registry's server, where workers tell where they are. Closing stops it.
class Registry : public detail::Owned<crossdock_registry_close> {
 public:
  using Owned::Owned;

  // Listens at "ip:port"; port 0 takes any free one. With a token, callers must present it.
  static Result<Registry> start(std::string_view bind, std::optional<std::string_view> token = std::nullopt) {
    const detail::Text where(bind), secret(token);
    return detail::ask<Registry, crossdock_registry>(
        [&](crossdock_registry* made) { return crossdock_registry_start(where.get(), secret.get(), made); });
  }

  // Where it listens.
  Result<std::string> address() const {
    return detail::text(crossdock_registry_address, handle());
  }
};

// A worker that is kept registered, from a thread of its own. Closing takes it out of the registry.
class Registration : public detail::Owned<crossdock_registration_close> {
 public:
  using Owned::Owned;

  // Until the registry has taken the worker. `Status::timed_out`, or `Status::registry` with what it said last.
  Result<> wait(std::chrono::milliseconds timeout) const {
    return detail::done(crossdock_registration_wait(handle(), detail::timeout_ms(timeout)));
  }

  // Says that the worker has warmed up, and returns at once.
  Result<> ready() { return detail::done(crossdock_registration_ready(handle())); }
};

// A registry's client. Registrations that were started with it go on when it is closed.
class RegistryClient : public detail::Owned<crossdock_registry_disconnect> {
 public:
  using Owned::Owned;

  // Of the registry at "host:port" or "etcd://host:port". Nothing is sent yet. A call takes at most `call_time`; 5
  // seconds where it is not set.
  static Result<RegistryClient> connect(std::string_view server, std::optional<std::string_view> token = std::nullopt,
                                        std::optional<std::chrono::milliseconds> call_time = std::nullopt) {
    const detail::Text where(server), secret(token);
    return detail::ask<RegistryClient, crossdock_registry_client>([&](crossdock_registry_client* made) {
      return crossdock_registry_connect(where.get(), secret.get(), detail::setting_ms(call_time), made);
    });
  }

  // Keeps a worker registered, and returns at once. The worker is JSON, as docs/bootstrap.md says:
  // {"node": "decode-0", "incarnation": "5eed", "role": "decode", "address": "10.0.0.7:7000", "ttl_ms": 10000}
  Result<Registration> register_worker(std::string_view worker) {
    const detail::Text json(worker);
    return detail::ask<Registration, crossdock_registration>(
        [&](crossdock_registration* made) { return crossdock_registry_register(handle(), json.get(), made); });
  }

  // The workers that match, as a JSON array. The query is as in the URL of a list, "role=decode&tp_rank=0"; empty for
  // all.
  Result<std::string> find(std::string_view query = {}) const { return wait_for(query, 0, {}); }

  // As `find`, and waits until at least `count` workers match. `Status::registry` if they do not in time.
  Result<std::string> wait_for(std::string_view query, std::size_t count, std::chrono::milliseconds timeout) const {
    const detail::Text which(query);
    return detail::fill<std::string>(4095, [&](char* text, std::size_t capacity, std::size_t* length) {
      return crossdock_registry_find(handle(), which.get(), count, detail::timeout_ms(timeout), text, capacity, length);
    });
  }

  // Waits until all ranks of a group are there and ready: the group as JSON. `Status::registry` if they are not in
  // time.
  Result<std::string> wait_for_group(std::string_view group, std::chrono::milliseconds timeout) const {
    const detail::Text which(group);
    return detail::fill<std::string>(4095, [&](char* text, std::size_t capacity, std::size_t* length) {
      return crossdock_registry_wait_for_group(handle(), which.get(), detail::timeout_ms(timeout), text, capacity,
                                               length);
    });
  }
};

// The bits of a bfloat16.
using Bf16 = std::uint16_t;

// The form in which rows travel.
struct RowForm {
  RowKind kind = RowKind::bf16;
  // Opaque rows: bytes of a row, and of its scales.
  std::uint32_t row_bytes = 0;
  std::uint32_t scale_bytes = 0;
};

// How a rank of a group is opened. Required: max_tokens, experts, top_k, hidden. Up to placement_version all ranks have
// to agree; ranks that differ refuse each other. Times and texts that are not set are as usual.
struct GroupOptions {
  // The most tokens that each rank dispatches in one step, by rank: as many as there are ranks.
  Span<const std::uint32_t> max_tokens;
  // Experts over all ranks.
  std::uint32_t experts = 0;
  // Experts that a token chooses, at most.
  std::uint32_t top_k = 0;
  // Channels of a token.
  std::uint32_t hidden = 0;
  // The largest form in which a dispatch may carry rows.
  RowForm form;
  // Micro-batches that may be under way at once.
  std::uint32_t slots = 1;
  // Whether rows, lists and results carry checksums that are compared.
  bool verify = false;
  // Which placement of the experts the ranks believe in.
  std::uint64_t placement_version = 0;
  // Which rank this is.
  std::uint32_t rank = 0;
  LostWeight lost = LostWeight::drop;
  // With fewer ranks than this that are not masked, calls fail.
  std::uint32_t least_ranks = 1;
  // How long a rank may neither make its call nor wait itself before those who wait for it mask it.
  std::optional<std::chrono::milliseconds> deadline;
  // How long the waits of a slot's first step last.
  std::optional<std::chrono::milliseconds> warm_up;
  // Where the other ranks dial this one, as "ip:port"; "127.0.0.1:0" where it is not set.
  std::string_view bind;
  // The IP address that they are told, if it is another.
  std::string_view advertise;
  // As of a node.
  std::string_view ports;
  // For people, in logs and errors.
  std::string_view name;
};

// What memory one rank needs, in bytes, where every token goes to it: its fields are those of crossdock.h.
using GroupSizes = crossdock_group_sizes;

// What the ranks of a group agreed on, as far as calls need it: its fields are those of crossdock.h.
using GroupInfo = crossdock_group_info;

// What a call cost, and what it waited for: its fields are those of crossdock.h.
using Report = crossdock_report;

// What a dispatch gave, and where it is: their fields are those of crossdock.h, with their shapes. Pointers are valid
// until the outputs are closed; what they point to changes with the next dispatch that is received into them.
using LatencyInfo = crossdock_latency_outputs;
using ThroughputInfo = crossdock_throughput_outputs;

// Where the tokens of a dispatch go: found once, used for several dispatches, or recorded.
class Route : public detail::Owned<crossdock_route_close> {
 public:
  using Owned::Owned;

  // To be kept, for Group::read_route.
  Result<std::vector<std::uint8_t>> bytes() const {
    return detail::fill<std::vector<std::uint8_t>>(
        1024, [&](std::uint8_t* bytes, std::size_t capacity, std::size_t* length) {
          return crossdock_route_write(handle(), bytes, capacity, length);
        });
  }
};

// A rank's tokens for one step. Required: count, rows, choices or a route. The pointers are to as many values as the
// group's top_k and hidden make of the count.
struct Tokens {
  std::size_t count = 0;
  // [count, hidden] in bfloat16, or rows that have their form already.
  const void* rows = nullptr;
  // [count, top_k]: the experts that each token chose, or -1. Not looked at where there is a route.
  const std::int64_t* choices = nullptr;
  // [count, top_k]: the weights of the choices, which go with the rows; NULL for none.
  const float* weights = nullptr;
  RowForm form;
  // Whether rows and scales have the form already; else bfloat16 rows are made FP8 on the way where that is the form.
  bool is_made = false;
  // Of RowKind::fp8 that is made on the way.
  ScaleRule scale_rule = ScaleRule::plain;
  // Rows that are made: their scales. Element e of token t is at t * scale_token_stride + e * scale_element_stride.
  Span<const std::uint8_t> scales;
  // Bytes of one element.
  std::uint32_t scale_element_bytes = 0;
  // In bytes; both 0 for scales without gaps.
  std::size_t scale_token_stride = 0;
  std::size_t scale_element_stride = 0;
  // Where the tokens go, if that was found before; it has to outlive the call.
  const Route* route = nullptr;
};

// Where the rows of a dispatch arrive, of either mode.
class Outputs : public detail::Owned<crossdock_outputs_close> {
 public:
  using Owned::Owned;

  // Where the rows of each source begin and end: of the latency mode [experts, ranks, 2], among an expert's rows; of
  // the throughput mode [ranks, 2].
  Result<std::vector<std::uint32_t>> ranges() const {
    return detail::fill<std::vector<std::uint32_t>>(
        64, [&](std::uint32_t* ranges, std::size_t capacity, std::size_t* count) {
          return crossdock_outputs_ranges(handle(), ranges, capacity, count);
        });
  }
};

// Of the latency mode: for each of this rank's experts the rows of the tokens that chose it, in the order of (source
// rank, source token).
class LatencyOutputs : public Outputs {
 public:
  using Outputs::Outputs;

  Result<LatencyInfo> describe() const {
    return detail::ask<LatencyInfo>(
        [&](LatencyInfo* told) { return crossdock_latency_outputs_describe(handle(), told); });
  }
};

// Of the throughput mode: the rows of the tokens that chose any of this rank's experts, in the same order.
class ThroughputOutputs : public Outputs {
 public:
  using Outputs::Outputs;

  Result<ThroughputInfo> describe() const {
    return detail::ask<ThroughputInfo>(
        [&](ThroughputInfo* told) { return crossdock_throughput_outputs_describe(handle(), told); });
  }

  // By local expert: how many choices fell on it, rounded up to a multiple of `alignment`.
  Result<std::vector<std::uint32_t>> counts(std::uint32_t alignment = 1) const {
    return detail::fill<std::vector<std::uint32_t>>(
        64, [&](std::uint32_t* counts, std::size_t capacity, std::size_t* count) {
          return crossdock_throughput_outputs_counts(handle(), alignment, counts, capacity, count);
        });
  }
};

// Where this rank's results go: [rows, hidden], where the other ranks read them.
struct Results {
  Bf16* values = nullptr;
  std::size_t rows = 0;
};

// What a combine of the throughput mode adds, and gives back.
struct FinishOptions {
  // Each none, or as long as what is combined: added to it.
  Span<const Bf16> first_bias;
  Span<const Bf16> second_bias;
  // None, or [tokens, top_k]: gets the sums of the weights that the ranks gave back.
  Span<float> weights;
};

// The place of one micro-batch in a group, which has to outlive it. Send halves wait for nobody, receive halves for
// every rank. All ranks make the same calls, of one mode a step: `Status::mismatch`, and `Status::out_of_order` where
// this rank's do not fit together. One thread uses a slot at a time: `Status::busy` for others. After
// `Status::step_lost` the next step can be made; after `Status::group_lost` the ranks have to meet anew.
class Slot {
 public:
  // Send half: leaves each token's row where the ranks of its experts find it.
  Result<Report> dispatch(const Tokens& tokens) {
    auto given = detail::blank<crossdock_tokens>();
    given.count = tokens.count;
    given.rows = tokens.rows;
    given.choices = tokens.choices;
    given.weights = tokens.weights;
    given.form = static_cast<std::uint32_t>(tokens.form.kind);
    given.is_made = tokens.is_made;
    given.scale_rule = static_cast<std::uint32_t>(tokens.scale_rule);
    given.row_bytes = tokens.form.row_bytes;
    given.scale_bytes = tokens.form.scale_bytes;
    given.scale_element_bytes = tokens.scale_element_bytes;
    given.scales = tokens.scales.data();
    given.scales_bytes = tokens.scales.size();
    given.scale_token_stride = tokens.scale_token_stride;
    given.scale_element_stride = tokens.scale_element_stride;
    if (tokens.route != nullptr) given.route = tokens.route->handle();
    return detail::ask<Report>([&](Report* told) { return crossdock_dispatch(group_, slot_, &given, told); });
  }

  // Receive half, which chooses the step's mode: packs the rows by expert,
  Result<> receive(LatencyOutputs& outputs) {
    return detail::done(crossdock_latency_receive(group_, slot_, outputs.handle()));
  }
  // or lays them in the order of the ranks.
  Result<> receive(ThroughputOutputs& outputs) {
    return detail::done(crossdock_throughput_receive(group_, slot_, outputs.handle()));
  }

  // Latency mode: where one local expert's results go, in the order of its packed rows. Valid until `latency_combine`.
  Result<Results> latency_results(std::uint32_t expert) {
    return results([&](void** values, std::size_t* rows) {
      return crossdock_latency_results(group_, slot_, expert, values, rows);
    });
  }

  // Latency mode: copies results that lie elsewhere, [local experts, rows, hidden], as the outputs have them.
  Result<> latency_copy_results(Span<const Bf16> results) {
    return detail::done(crossdock_latency_copy_results(group_, slot_, results.data(), results.size()));
  }

  // Send half: the results are there.
  Result<> latency_combine() { return detail::done(crossdock_latency_combine(group_, slot_)); }

  // Receive half: sums each token's results by its `weights`, [tokens, top_k], into `combined`, [tokens, hidden].
  Result<Report> latency_finish(Span<const float> weights, Span<Bf16> combined) {
    return detail::ask<Report>([&](Report* told) {
      return crossdock_latency_finish(group_, slot_, weights.data(), weights.size(), combined.data(), combined.size(),
                                      told);
    });
  }

  // Throughput mode: where the results go, one for each row that came, weighed and summed over this rank's experts.
  // Valid until `throughput_combine`.
  Result<Results> throughput_results() {
    return results([&](void** values, std::size_t* rows) {
      return crossdock_throughput_results(group_, slot_, values, rows);
    });
  }

  // Send half: the results are there. `weights`, [rows, top_k] or none, go back as they are.
  Result<> throughput_combine(Span<const float> weights = {}) {
    return detail::done(crossdock_throughput_combine(group_, slot_, weights.data(), weights.size()));
  }

  // Receive half: sums each token's results into `combined`, [tokens, hidden].
  Result<Report> throughput_finish(Span<Bf16> combined, const FinishOptions& options = {}) {
    for (const Span<const Bf16>& bias : {options.first_bias, options.second_bias}) {
      if (bias.data() != nullptr && bias.size() != combined.size()) {
        return detail::bad_argument("a bias of " + std::to_string(bias.size()) + " values, and " +
                                    std::to_string(combined.size()) + " are combined");
      }
    }
    return detail::ask<Report>([&](Report* told) {
      return crossdock_throughput_finish(group_, slot_, options.first_bias.data(), options.second_bias.data(),
                                         options.weights.data(), options.weights.size(), combined.data(),
                                         combined.size(), told);
    });
  }

  // Gives up a step: the next dispatch brings it to its end.
  Result<> abandon() { return detail::done(crossdock_slot_abandon(group_, slot_)); }

  // How long the last call waited for each rank; in this rank's own place, until its ports had sent earlier calls.
  Result<std::vector<std::chrono::nanoseconds>> waits() const {
    const auto told = detail::fill<std::vector<std::uint64_t>>(
        64, [&](std::uint64_t* waits_ns, std::size_t capacity, std::size_t* count) {
          return crossdock_slot_waits(group_, slot_, waits_ns, capacity, count);
        });
    if (!told) return told.error();
    std::vector<std::chrono::nanoseconds> waits;
    for (const std::uint64_t wait_ns : told.value()) waits.emplace_back(static_cast<std::int64_t>(wait_ns));
    return Result<std::vector<std::chrono::nanoseconds>>(std::move(waits));
  }

  // By token of the last call: the weight of those of its choices that masked ranks did not answer; empty where nothing
  // was lost.
  Result<std::vector<float>> lost() const {
    return detail::fill<std::vector<float>>(0, [&](float* lost, std::size_t capacity, std::size_t* count) {
      return crossdock_slot_lost(group_, slot_, lost, capacity, count);
    });
  }

  // Finds where tokens that choose like this go, [tokens, top_k]: for several dispatches, of any slot.
  Result<Route> find_route(Span<const std::int64_t> choices) {
    return detail::ask<Route, crossdock_route>([&](crossdock_route* made) {
      return crossdock_route_create(group_, slot_, choices.data(), choices.size(), made);
    });
  }

  // The route of the dispatch that is under way, before it is received.
  Result<Route> route_of_dispatch() const {
    return detail::ask<Route, crossdock_route>(
        [&](crossdock_route* made) { return crossdock_route_of_dispatch(group_, slot_, made); });
  }

 private:
  friend class Group;

  Slot(crossdock_group group, std::uint32_t slot) noexcept : group_(group), slot_(slot) {}

  template <typename Call>
  static Result<Results> results(Call call) {
    void* values = nullptr;
    Results told;
    const crossdock_status status = call(&values, &told.rows);
    if (status != CROSSDOCK_OK) return detail::error_of(status);
    told.values = static_cast<Bf16*>(values);
    return told;
  }

  crossdock_group group_;
  std::uint32_t slot_;
};

// One rank of a group that exchanges tokens for their experts. Closing leaves it: the other ranks are told, and wait
// for this one no longer.
class Group : public detail::Owned<crossdock_group_close> {
 public:
  using Owned::Owned;

  // What memory a rank of such a group needs, before anything is allocated.
  static Result<GroupSizes> needs(const GroupOptions& options) {
    const crossdock_group_options given = plain(options);
    return detail::ask<GroupSizes>([&](GroupSizes* told) { return crossdock_group_needs(&given, told); });
  }

  // Opens a rank: its ports, and the address that the other ranks dial. Then all ranks tell each other their addresses,
  // and meet.
  static Result<Group> open(const GroupOptions& options, Authentication authentication) {
    const detail::Text bind = detail::usual_if_empty(options.bind);
    const detail::Text advertise = detail::usual_if_empty(options.advertise);
    const detail::Text ports = detail::usual_if_empty(options.ports);
    const detail::Text name = detail::usual_if_empty(options.name);
    crossdock_group_options given = plain(options);
    given.authentication = authentication.kind_;
    given.key = authentication.key_.data();
    given.key_bytes = authentication.key_.size();
    given.bind = bind.get();
    given.advertise = advertise.get();
    given.ports = ports.get();
    given.name = name.get();
    return detail::ask<Group, crossdock_group>(
        [&](crossdock_group* made) { return crossdock_group_open(&given, made); });
  }

  // All ranks of a group in this process, by rank, which have met: for tests, and for ranks that are threads.
  static Result<std::vector<Group>> in_process(const GroupOptions& options) {
    const crossdock_group_options given = plain(options);
    std::vector<crossdock_group> handles(std::max<std::size_t>(given.ranks, 1));
    const crossdock_status status = crossdock_group_in_process(&given, handles.data());
    if (status != CROSSDOCK_OK) return detail::error_of(status);
    std::vector<Group> ranks;
    for (const crossdock_group handle : handles) ranks.emplace_back(handle);
    return Result<std::vector<Group>>(std::move(ranks));
  }

  // What the other ranks dial, "ip:port".
  Result<std::string> address() const { return detail::text(crossdock_group_address, handle()); }

  // Meets all other ranks, at the addresses of all ranks, by rank. `Status::not_met`: a rank that has not met the
  // others in time has to be opened anew.
  Result<> meet(Span<const std::string> addresses, std::chrono::milliseconds timeout) {
    std::vector<detail::Text> texts;
    std::vector<const char*> pointers;
    texts.reserve(addresses.size());
    for (const std::string& address : addresses) {
      texts.emplace_back(address);
      pointers.push_back(texts.back().get());
    }
    return detail::done(
        crossdock_group_meet(handle(), pointers.data(), pointers.size(), detail::timeout_ms(timeout)));
  }

  // What the ranks, which have met, agreed on.
  Result<GroupInfo> info() const {
    return detail::ask<GroupInfo>([&](GroupInfo* told) { return crossdock_group_describe(handle(), told); });
  }

  // The ranks that this one does not wait for any more, ascending.
  Result<std::vector<std::uint32_t>> masked() const {
    return detail::fill<std::vector<std::uint32_t>>(
        8, [&](std::uint32_t* ranks, std::size_t capacity, std::size_t* count) {
          return crossdock_group_masked(handle(), ranks, capacity, count);
        });
  }

  // Tells this rank that another is dead, so that waits for it end at once.
  Result<> mark_dead(std::uint32_t rank) { return detail::done(crossdock_group_mark_dead(handle(), rank)); }

  // Of those that the options have, from 0.
  Slot slot(std::uint32_t slot) noexcept { return {handle(), slot}; }

  // Memory for what this rank may get in one dispatch.
  Result<LatencyOutputs> latency_outputs(const RowForm& form = {}, ScaleOrder order = ScaleOrder::by_row) const {
    return detail::ask<LatencyOutputs, crossdock_outputs>([&](crossdock_outputs* made) {
      return crossdock_latency_outputs_create(handle(), static_cast<std::uint32_t>(form.kind), form.row_bytes,
                                              form.scale_bytes, static_cast<std::uint32_t>(order), made);
    });
  }
  Result<ThroughputOutputs> throughput_outputs(const RowForm& form = {}) const {
    return detail::ask<ThroughputOutputs, crossdock_outputs>([&](crossdock_outputs* made) {
      return crossdock_throughput_outputs_create(handle(), static_cast<std::uint32_t>(form.kind), form.row_bytes,
                                                 form.scale_bytes, made);
    });
  }

  // A route that was kept, of a rank of the same group.
  Result<Route> read_route(Span<const std::uint8_t> bytes) const {
    return detail::ask<Route, crossdock_route>([&](crossdock_route* made) {
      return crossdock_route_read(handle(), bytes.data(), bytes.size(), made);
    });
  }

  // How tokens that choose like this, [tokens, top_k], spread: [ranks] how many distinct ones go there, [experts] how
  // many choices fell on it, [tokens, ranks] whether it goes there. Each is NULL, or has room for that.
  Result<> spread(Span<const std::int64_t> choices, std::uint32_t* tokens_per_rank, std::uint32_t* tokens_per_expert,
                  std::uint8_t* is_token_in_rank) const {
    return detail::done(crossdock_spread(handle(), choices.data(), choices.size(), tokens_per_rank, tokens_per_expert,
                                         is_token_in_rank));
  }

 private:
  static crossdock_group_options plain(const GroupOptions& options) {
    auto given = detail::blank<crossdock_group_options>();
    given.max_tokens = options.max_tokens.data();
    given.ranks = options.max_tokens.size();
    given.experts = options.experts;
    given.top_k = options.top_k;
    given.hidden = options.hidden;
    given.rows = static_cast<std::uint32_t>(options.form.kind);
    given.row_bytes = options.form.row_bytes;
    given.scale_bytes = options.form.scale_bytes;
    given.slots = options.slots;
    given.verify = options.verify;
    given.placement_version = options.placement_version;
    given.rank = options.rank;
    given.lost = static_cast<std::uint32_t>(options.lost);
    given.least_ranks = options.least_ranks;
    given.deadline_ms = detail::setting_ms(options.deadline);
    given.warm_up_ms = detail::setting_ms(options.warm_up);
    return given;
  }
};

// How an endpoint is opened. Numbers of 0 and texts and times that are not set are as usual.
struct EndpointOptions {
  // As those of a node.
  std::string_view bind;
  std::string_view advertise;
  std::string_view ports;
  std::uint32_t lanes_per_rail = 0;
  std::optional<std::chrono::microseconds> spin;
  std::optional<std::chrono::milliseconds> heartbeat;
  std::uint32_t heartbeats_missed = 0;
  std::uint32_t copy_threads = 0;
  // At once.
  std::uint32_t max_sessions = 0;
  std::uint32_t max_transfers = 0;
};

enum class Direction : std::uint32_t {
  // From here to the peer.
  write = CROSSDOCK_WRITE,
  // From the peer to here.
  read = CROSSDOCK_READ,
};

// What is to be moved: as many blocks as each list is long, each in one memory that is registered, on both sides.
struct TransferOptions {
  Direction direction = Direction::write;
  // Addresses in this process, in the peer's, and lengths in bytes. None at all is a probe.
  Span<const std::uint64_t> local;
  Span<const std::uint64_t> remote;
  Span<const std::uint64_t> bytes;
  // From the call on; 30 seconds where it is not set.
  std::optional<std::chrono::milliseconds> deadline;
};

// A transfer that was begun. One that is closed goes on to its end.
class Transfer : public detail::Owned<crossdock_transfer_close> {
 public:
  using Owned::Owned;

  // True once all bytes are there, false until then; or why it has failed.
  Result<bool> poll() const {
    const crossdock_status status = crossdock_transfer_poll(handle());
    if (status == CROSSDOCK_PENDING) return false;
    if (status != CROSSDOCK_OK) return detail::error_of(status);
    return true;
  }

  // Until all bytes are there. `Status::unknown_address`, `late`, `lost`, `refused`: why they are not.
  Result<> wait(std::chrono::milliseconds timeout) const {
    return detail::done(crossdock_transfer_wait(handle(), detail::timeout_ms(timeout)));
  }

  // Until no op of it can touch this process's memory any more: with its end, if that was good; after a fault later.
  Result<> wait_quiet(std::chrono::milliseconds timeout) const {
    return detail::done(crossdock_transfer_wait_quiet(handle(), detail::timeout_ms(timeout)));
  }
};

// One process's end of transfers by address. Closing says goodbye to all peers; transfers that are under way end with
// `Status::abandoned`.
class Endpoint : public detail::Owned<crossdock_endpoint_close> {
 public:
  using Owned::Owned;

  // Opens the ports, begins to listen, and starts the progress thread.
  static Result<Endpoint> open(std::string_view name, Authentication authentication,
                               const EndpointOptions& options = {}) {
    const detail::Text called(name);
    const detail::Text bind = detail::usual_if_empty(options.bind);
    const detail::Text advertise = detail::usual_if_empty(options.advertise);
    const detail::Text ports = detail::usual_if_empty(options.ports);
    auto given = detail::blank<crossdock_endpoint_options>();
    given.name = called.get();
    given.authentication = authentication.kind_;
    given.key = authentication.key_.data();
    given.key_bytes = authentication.key_.size();
    given.bind = bind.get();
    given.advertise = advertise.get();
    given.ports = ports.get();
    given.lanes_per_rail = options.lanes_per_rail;
    given.spin_us = detail::spin_us(options.spin);
    given.heartbeat_ms = detail::setting_ms(options.heartbeat);
    given.heartbeats_missed = options.heartbeats_missed;
    given.copy_threads = options.copy_threads;
    given.max_sessions = options.max_sessions;
    given.max_transfers = options.max_transfers;
    return detail::ask<Endpoint, crossdock_endpoint>(
        [&](crossdock_endpoint* made) { return crossdock_endpoint_open(&given, made); });
  }

  // What peers dial, "ip:port".
  Result<std::string> address() const { return detail::text(crossdock_endpoint_address, handle()); }

  // Registers a memory: peers that connect from now on may write and read all of it for as long as they are connected,
  // and transfers may name its addresses.
  Result<> register_memory(const Memory& memory, std::chrono::milliseconds timeout) {
    return detail::done(crossdock_endpoint_register(handle(), memory.handle(), detail::timeout_ms(timeout)));
  }

  // Takes memory back, by where it begins, and waits until nobody can reach it through this endpoint any more.
  Result<> unregister_memory(std::uint64_t address, std::chrono::milliseconds timeout) {
    return detail::done(crossdock_endpoint_unregister(handle(), address, detail::timeout_ms(timeout)));
  }

  // Begins to move blocks to or from the peer at "ip:port", and returns at once.
  Result<Transfer> transfer(std::string_view peer, const TransferOptions& options) {
    if (options.local.size() != options.remote.size() || options.local.size() != options.bytes.size()) {
      return detail::bad_argument("local, remote and bytes are not of one length");
    }
    const detail::Text who(peer);
    auto given = detail::blank<crossdock_transfer_options>();
    given.peer = who.get();
    given.local = options.local.data();
    given.remote = options.remote.data();
    given.bytes = options.bytes.data();
    given.count = options.local.size();
    given.deadline_ms = detail::setting_ms(options.deadline);
    given.direction = static_cast<std::uint32_t>(options.direction);
    return detail::ask<Transfer, crossdock_transfer>(
        [&](crossdock_transfer* made) { return crossdock_transfer_begin(handle(), &given, made); });
  }
};

}  // namespace throws, or aborts
}  // namespace crossdock

#endif  // CROSSDOCK_HPP
