#ifndef CROSSDOCK_H
#define CROSSDOCK_H

#include <stddef.h>
#include <stdint.h>

/* The C ABI of crossdock: moves an LLM's KV-cache pages from prefill to decode workers, and tokens to their experts.
 *
 * KV pages: a layout, memory for its regions, a pool over its pages, a node over both, a peer, rooms.
 * Experts: a group whose ranks meet, outputs, then steps: dispatch, receive, combine, finish.
 * Memory by address, without pages or rooms: an endpoint, registered memory, transfers.
 * Functions answer a status; CROSSDOCK_OK is 0, and crossdock_last_error has words for the others.
 * Objects are handles: numbers that are checked at each call. Whoever makes one closes it.
 * Structures begin with their size: set it to sizeof, zero the rest, then set what is wanted.
 * Every function may be called from any thread.
 */

// Raised when something is added: `minor` of what the header was made for may be smaller than the library's.
#define CROSSDOCK_ABI_MAJOR 1

// What the library can do beyond the first release of this major version.
#define CROSSDOCK_ABI_MINOR 1

// From here to the peer.
#define CROSSDOCK_WRITE 0

// From the peer to here.
#define CROSSDOCK_READ 1

// A room has ended: `crossdock_room_poll` says how.
#define CROSSDOCK_EVENT_ENDED 1

// All pages of a room that received are home: nobody else can write them any more.
#define CROSSDOCK_EVENT_PAGES_HOME 2

// A peer that is dialed has answered, or never will: `crossdock_peer_poll` says which.
#define CROSSDOCK_EVENT_PEER 3

// Rows in bfloat16.
#define CROSSDOCK_ROWS_BF16 1

// Rows in FP8 e4m3, with an f32 scale for 128 channels.
#define CROSSDOCK_ROWS_FP8 2

// Rows in FP8 e4m3, with scales that are powers of two: a byte for 128 channels, four to a word.
#define CROSSDOCK_ROWS_FP8_UE8M0 3

// Rows and scales that mean nothing to the library.
#define CROSSDOCK_ROWS_OPAQUE 4

// A sum lacks what experts on masked ranks would have added.
#define CROSSDOCK_LOST_DROP 0

// The weights of the others are raised.
#define CROSSDOCK_LOST_RENORMALISE 1

// The call fails, after it is over for the other ranks too.
#define CROSSDOCK_LOST_FAIL 2

// Multi-head latent attention: one latent and one rotary key a token, the same on every TP rank.
#define CROSSDOCK_MLA 1

// Keys and values for each KV head (MHA, GQA, MQA).
#define CROSSDOCK_HEADS 2

// bfloat16.
#define CROSSDOCK_BF16 1

// IEEE half precision.
#define CROSSDOCK_F16 2

// IEEE single precision.
#define CROSSDOCK_F32 3

// 8-bit floating point, e4m3.
#define CROSSDOCK_FP8_E4M3 4

// 8-bit floating point, e5m2.
#define CROSSDOCK_FP8_E5M2 5

// 8-bit integers.
#define CROSSDOCK_INT8 6

// The packed MLA form: an e4m3 latent, its f32 scales, a bf16 rotary key.
#define CROSSDOCK_FP8_DS_MLA 7

// In a page, token after token, each with all its heads.
#define CROSSDOCK_TOKENS_FIRST 0

// In a page, head after head, each with all its tokens.
#define CROSSDOCK_HEADS_FIRST 1

// Layer after layer, each with all its pages, without gaps, in one region.
#define CROSSDOCK_LAYER_MAJOR 0

// Page after page, each with all its layers, without gaps, in one region.
#define CROSSDOCK_PAGE_MAJOR 1

// As `buffers` says: first the latents or keys of all layers, then, of a cache with heads, the values of all layers.
#define CROSSDOCK_BUFFERS 2

// A pool's pages hold every token.
#define CROSSDOCK_ALL_TOKENS 0

// They hold the last tokens of a request, as many as `window` says.
#define CROSSDOCK_WINDOW 1

// They hold entries of fixed size that do not grow with the request: a state.
#define CROSSDOCK_ENTRIES 2

// A source brings everything that it keeps.
#define CROSSDOCK_ALL_PARTS 0

// A source brings what the ranks of its side share by heads, and not what each of them keeps whole.
#define CROSSDOCK_SHARED_PARTS 1

// The system's ordinary pages.
#define CROSSDOCK_HUGE_PAGES_NEVER 0

// Huge pages where there are any.
#define CROSSDOCK_HUGE_PAGES_TRY 1

// Huge pages, or an error.
#define CROSSDOCK_HUGE_PAGES_REQUIRE 2

// Memory that was allocated here: peers on the same host can map it.
#define CROSSDOCK_MEMORY_SHARED 1

// The caller's own memory.
#define CROSSDOCK_MEMORY_PRIVATE 2

// Both sides prove that they know `key`.
#define CROSSDOCK_AUTHENTICATION_KEY 1

// Anybody who can reach the node may connect, and be granted what it grants its peers.
#define CROSSDOCK_AUTHENTICATION_OFF 2

// A thread of the node's own makes progress.
#define CROSSDOCK_PROGRESS_THREAD 0

// The caller does, by `crossdock_node_progress`.
#define CROSSDOCK_PROGRESS_CALLER 1

// For `spin_us`: do not spin at all.
#define CROSSDOCK_NO_SPIN UINT64_MAX

// Each row's scales together.
#define CROSSDOCK_SCALES_BY_ROW 0

// Latency mode: `[local experts, scale bytes / 4, rows]` words of four bytes, as matrix units want them.
#define CROSSDOCK_SCALES_BY_COLUMN 1

// A pool is over at most this many pages.
#define CROSSDOCK_MOST_PAGES 268435456

// All bytes are in the decode side's pages, and both sides may rely on it.
#define CROSSDOCK_DELIVERED 1

// A user cancelled it.
#define CROSSDOCK_CANCELLED 2

// A deadline passed.
#define CROSSDOCK_EXPIRED 3

// The session with the peer ended.
#define CROSSDOCK_PEER_LOST 4

// The room was never begun.
#define CROSSDOCK_ROOM_REFUSED 5

// A rail, a port or the bytes failed.
#define CROSSDOCK_FAILED 6

// Who decided how a room ended: this side.
#define CROSSDOCK_BY_HERE 1

// The other side did.
#define CROSSDOCK_BY_PEER 2

// How far a room had come: it waited for a session with the peer.
#define CROSSDOCK_STAGE_SESSION 1

// It waited for the other side of the room.
#define CROSSDOCK_STAGE_GRANT 2

// Bytes were moving.
#define CROSSDOCK_STAGE_TRANSFER 3

// All bytes were sent.
#define CROSSDOCK_STAGE_CONFIRM 4

// All bytes have landed.
#define CROSSDOCK_STAGE_VERIFY 5

// The scale is `amax / 448`.
#define CROSSDOCK_SCALE_PLAIN 0

// The scale is the smallest power of two that is not below that.
#define CROSSDOCK_SCALE_POWER_OF_TWO 1

// What a call answers: one of the `CROSSDOCK_OK` to `CROSSDOCK_LOST` below. Later libraries may answer others.
typedef int32_t crossdock_status;

// How an endpoint is opened. Zeros are what is usual.
typedef struct crossdock_endpoint_options {
  // `sizeof(crossdock_endpoint_options)`.
  size_t size;
  // For people, in logs and errors; required.
  const char *name;
  // `CROSSDOCK_AUTHENTICATION_KEY` or `CROSSDOCK_AUTHENTICATION_OFF`; required.
  uint32_t authentication;
  // Lanes for each rail and peer.
  uint32_t lanes_per_rail;
  // The key that all endpoints share.
  const uint8_t *key;
  // How long it is.
  size_t key_bytes;
  // Where peers dial, as `"ip:port"`; NULL for `"127.0.0.1:0"`. Port 0 takes any free one.
  const char *bind;
  // The address that peers are told, if it is another.
  const char *advertise;
  // As of a node; NULL for `"shm,tcp"`.
  const char *ports;
  // How long the progress thread spins after something has happened; `CROSSDOCK_NO_SPIN` for not at all.
  uint64_t spin_us;
  // How often peers tell this endpoint that they live.
  uint64_t heartbeat_ms;
  // How many heartbeats may be missing before a peer is lost.
  uint32_t heartbeats_missed;
  // Threads that copy, of the shared-memory port.
  uint32_t copy_threads;
  // Sessions at once.
  uint32_t max_sessions;
  // Transfers at once.
  uint32_t max_transfers;
} crossdock_endpoint_options;

// One process's end of transfers by address. 0 is none.
typedef uint64_t crossdock_endpoint;

// A range of memory. 0 is none.
typedef uint64_t crossdock_memory;

// What is to be moved: `count` blocks, of which three lists say where each begins here, where at the peer, and how long it
// is. Each block lies in one memory that is registered, on both sides.
typedef struct crossdock_transfer_options {
  // `sizeof(crossdock_transfer_options)`.
  size_t size;
  // The peer's address, `"ip:port"`. It is dialed if there is no session with it.
  const char *peer;
  // `[count]` addresses in this process.
  const uint64_t *local;
  // `[count]` addresses in the peer's.
  const uint64_t *remote;
  // `[count]` lengths in bytes.
  const uint64_t *bytes;
  // How many blocks; none at all is a probe.
  size_t count;
  // From this call; 0 for 30 seconds.
  uint64_t deadline_ms;
  // `CROSSDOCK_WRITE` or `CROSSDOCK_READ`.
  uint32_t direction;
  // 0.
  uint32_t reserved;
} crossdock_transfer_options;

// A transfer that was begun. 0 is none.
typedef uint64_t crossdock_transfer;

// How a rank of a group is opened. What all ranks agree on comes first; ranks that differ refuse each other.
typedef struct crossdock_group_options {
  // `sizeof(crossdock_group_options)`.
  size_t size;
  // The most tokens that each rank dispatches in one step, by rank.
  const uint32_t *max_tokens;
  // How many ranks there are.
  size_t ranks;
  // Experts over all ranks.
  uint32_t experts;
  // Experts that a token chooses, at most.
  uint32_t top_k;
  // Channels of a token.
  uint32_t hidden;
  // The largest form in which a dispatch may carry rows: one of `CROSSDOCK_ROWS_…`.
  uint32_t rows;
  // Opaque rows: bytes of a row.
  uint32_t row_bytes;
  // Opaque rows: bytes of its scales.
  uint32_t scale_bytes;
  // Micro-batches that may be under way at once.
  uint32_t slots;
  // 1 if rows, lists and results carry checksums that are compared.
  uint32_t verify;
  // Which placement of the experts the ranks believe in.
  uint64_t placement_version;
  // Which rank this is.
  uint32_t rank;
  // One of `CROSSDOCK_LOST_…`.
  uint32_t lost;
  // With fewer ranks than this that are not masked, calls fail.
  uint32_t least_ranks;
  // `CROSSDOCK_AUTHENTICATION_KEY` or `CROSSDOCK_AUTHENTICATION_OFF`; required.
  uint32_t authentication;
  // The key that all ranks share.
  const uint8_t *key;
  // How long it is.
  size_t key_bytes;
  // How long a rank may neither make its call nor wait itself before those who wait for it mask it.
  uint64_t deadline_ms;
  // How long the waits of a slot's first step last.
  uint64_t warm_up_ms;
  // Where the other ranks dial this one, as `"ip:port"`; NULL for `"127.0.0.1:0"`.
  const char *bind;
  // The address that they are told, if it is another.
  const char *advertise;
  // As of a node; NULL for `"shm,tcp"`.
  const char *ports;
  // For people, in logs and errors; NULL for a usual name.
  const char *name;
} crossdock_group_options;

// What memory one rank needs, in bytes; exact in the worst case, in which every token goes to this rank.
typedef struct crossdock_group_sizes {
  // `sizeof(crossdock_group_sizes)`, set by the caller.
  size_t size;
  // What dispatched rows take between ranks that map each other's memory.
  uint64_t dispatch_arenas_bytes;
  // What they take besides where every other rank is on another host.
  uint64_t port_dispatch_arenas_bytes;
  // What results take besides the outputs between ranks that map each other's memory.
  uint64_t combine_arenas_bytes;
  // What they take where every other rank is on another host.
  uint64_t port_combine_arenas_bytes;
  // What this rank's experts read and write.
  uint64_t outputs_bytes;
} crossdock_group_sizes;

// One rank of a group of experts. 0 is none.
typedef uint64_t crossdock_group;

// What a group agreed on, as far as calls need it.
typedef struct crossdock_group_info {
  // `sizeof(crossdock_group_info)`, set by the caller.
  size_t size;
  // Which rank this is.
  uint32_t rank;
  // How many there are.
  uint32_t ranks;
  // Experts over all ranks.
  uint32_t experts;
  // The first expert here.
  uint32_t first_expert;
  // How many are here.
  uint32_t local_experts;
  // Experts that a token chooses, at most.
  uint32_t top_k;
  // Channels of a token.
  uint32_t hidden;
  // Micro-batches that may be under way at once.
  uint32_t slots;
  // The most tokens that this rank dispatches in one step.
  uint32_t max_tokens;
  // 0.
  uint32_t reserved;
} crossdock_group_info;

// Where the pages of one layer are. It never grows.
typedef struct crossdock_layer_buffer {
  // The number of the memory among those of the node.
  uint32_t region;
  // 0.
  uint32_t reserved;
  // Where page 0 begins, from the start of the region.
  uint64_t offset;
  // From the start of one page to the start of the next.
  uint64_t stride_bytes;
} crossdock_layer_buffer;

// What a layout is made of.
typedef struct crossdock_layout_options {
  // `sizeof(crossdock_layout_options)`.
  size_t size;
  // The model's name, compared with the peer's.
  const char *model;
  // How many layers the model has.
  uint32_t model_layers;
  // The first layer of this worker, numbered as in the model.
  uint32_t first_layer;
  // How many layers this worker has; 0 for all from the first one on.
  uint32_t layers;
  // `CROSSDOCK_MLA` or `CROSSDOCK_HEADS`.
  uint32_t kind;
  // MLA: bytes of a token's latent in a layer.
  uint32_t latent_bytes;
  // MLA: bytes of a token's rotary key in a layer.
  uint32_t rope_bytes;
  // Heads: how many KV heads the model has.
  uint32_t heads;
  // Heads: the first one here.
  uint32_t first_head;
  // Heads: how many are here; 0 for all from the first one on.
  uint32_t local_heads;
  // Heads: bytes of one token's key, and of its value, for one head.
  uint32_t head_bytes;
  // Heads: `CROSSDOCK_TOKENS_FIRST` or `CROSSDOCK_HEADS_FIRST`.
  uint32_t head_order;
  // One of `CROSSDOCK_BF16` to `CROSSDOCK_FP8_DS_MLA`.
  uint32_t dtype;
  // How many tokens a page holds.
  uint32_t page_tokens;
  // How many pages each layer has.
  uint32_t pages;
  // `CROSSDOCK_LAYER_MAJOR`, `CROSSDOCK_PAGE_MAJOR` or `CROSSDOCK_BUFFERS`.
  uint32_t placement;
  // The region of the first two.
  uint32_t region;
  // The buffers of the third.
  const struct crossdock_layer_buffer *buffers;
  // How many they are.
  size_t buffer_count;
  // The worker's number among those of its side that serve a request together.
  uint32_t rank;
  // Context parallelism: which of `context_ranks` this worker is.
  uint32_t context_rank;
  // Over how many workers the tokens of a request are spread; 0 as 1.
  uint32_t context_ranks;
  // How many tokens follow each other on one of them; 0 as 1.
  uint32_t context_interleave;
} crossdock_layout_options;

// Describes one worker's KV: what is kept of each token, and where each layer's pages lie. 0 is none.
typedef uint64_t crossdock_layout;

// How one side spreads a model over its ranks.
typedef struct crossdock_parallelism {
  // `sizeof(crossdock_parallelism)`.
  size_t size;
  // Tensor-parallel ranks; 0 as 1.
  uint32_t tp;
  // Context-parallel ranks; 0 as 1.
  uint32_t context;
  // How many tokens follow each other on one of them; 0 as 1.
  uint32_t interleave;
  // How many KV heads the model has; 0 for one whose cache every TP rank keeps whole (MLA).
  uint32_t kv_heads;
  // How many layers the model has.
  uint32_t model_layers;
  // 0.
  uint32_t reserved;
  // Pipeline stages: how many layers each has. NULL for one stage with all layers.
  const uint32_t *stage_layers;
  // How many stages.
  size_t stages;
} crossdock_parallelism;

// Something that is kept in the pages of a pool.
typedef struct crossdock_part_options {
  // `sizeof(crossdock_part_options)`.
  size_t size;
  // Compared with the peer's.
  const char *name;
  // How many heads there are; 0 as 1, for what is not split.
  uint32_t heads;
  // The first one here.
  uint32_t first_head;
  // How many are here; 0 for all from the first one on.
  uint32_t local_heads;
  // Bytes of one token, or one entry, for one head.
  uint32_t head_bytes;
  // `CROSSDOCK_TOKENS_FIRST` or `CROSSDOCK_HEADS_FIRST`.
  uint32_t head_order;
  // 0.
  uint32_t reserved;
  // The layers that keep it, in ascending order, numbered as in the model.
  const uint32_t *layers;
  // Where the pages of each of them are.
  const struct crossdock_layer_buffer *buffers;
  // How many layers, and buffers.
  size_t layer_count;
} crossdock_part_options;

// Pages of their own, beside those of the tokens.
typedef struct crossdock_cache_pool_options {
  // `sizeof(crossdock_cache_pool_options)`.
  size_t size;
  // Compared with the peer's.
  const char *name;
  // `CROSSDOCK_ALL_TOKENS`, `CROSSDOCK_WINDOW` or `CROSSDOCK_ENTRIES`.
  uint32_t extent;
  // How many tokens a window has.
  uint32_t window;
  // How many tokens a page holds; 1 where pages hold entries.
  uint32_t page_tokens;
  // How many pages each layer has.
  uint32_t pages;
  // What is in a page: pointers to as many parts.
  const struct crossdock_part_options *const *parts;
  // How many parts.
  size_t part_count;
} crossdock_cache_pool_options;

// What a layout comes to.
typedef struct crossdock_layout_info {
  // `sizeof(crossdock_layout_info)`, set by the caller.
  size_t size;
  // The first layer here.
  uint32_t first_layer;
  // How many are here.
  uint32_t layers;
  // How many tokens a page holds.
  uint32_t page_tokens;
  // How many pages each layer has.
  uint32_t pages;
  // How many pools of pages there are; the first one holds the tokens.
  uint32_t pools;
  // The highest region that is used, plus one: so many memories a node needs.
  uint32_t regions;
  // What one token takes in one layer, in the pages of the tokens.
  uint64_t token_bytes;
  // What one page takes in one layer.
  uint64_t page_bytes;
  // The rank.
  uint32_t rank;
  // 0.
  uint32_t reserved;
} crossdock_layout_info;

// A rank that brings something. It never grows.
typedef struct crossdock_source_rank {
  // Its number among those of its side.
  uint32_t rank;
  // `CROSSDOCK_ALL_PARTS` or `CROSSDOCK_SHARED_PARTS`.
  uint32_t parts;
} crossdock_source_rank;

// How memory is allocated. Zeros are what is usual.
typedef struct crossdock_memory_options {
  // `sizeof(crossdock_memory_options)`.
  size_t size;
  // Shown in `/proc/self/maps`; NULL for a usual name.
  const char *name;
  // One of `CROSSDOCK_HUGE_PAGES_…`.
  uint32_t huge_pages;
  // 0.
  uint32_t reserved;
} crossdock_memory_options;

// What a memory is.
typedef struct crossdock_memory_info {
  // `sizeof(crossdock_memory_info)`, set by the caller.
  size_t size;
  // Where it begins.
  void *base;
  // How long it is, in bytes.
  size_t bytes;
  // `CROSSDOCK_MEMORY_SHARED` or `CROSSDOCK_MEMORY_PRIVATE`.
  uint32_t kind;
  // The descriptor to pass to another process of this host, which the memory owns; -1 if it has none.
  int32_t fd;
} crossdock_memory_info;

// How a node is opened. What is zero is as usual; what has no usual value is said to be required.
typedef struct crossdock_node_options {
  // `sizeof(crossdock_node_options)`.
  size_t size;
  // The node's name for people; required.
  const char *name;
  // The node's number, the same over restarts; 0 chooses one at random.
  uint64_t number;
  // What this node keeps; required.
  crossdock_layout layout;
  // The memory of the regions that the layout names, in their order; required.
  const crossdock_memory *memory;
  // How many they are.
  size_t memory_count;
  // `CROSSDOCK_AUTHENTICATION_KEY` or `CROSSDOCK_AUTHENTICATION_OFF`; required: a node that lets anybody in was told to.
  uint32_t authentication;
  // `CROSSDOCK_PROGRESS_THREAD` or `CROSSDOCK_PROGRESS_CALLER`.
  uint32_t progress;
  // The key that all nodes share, at least 16 bytes, better 32 random ones.
  const uint8_t *key;
  // How long it is.
  size_t key_bytes;
  // Where peers dial, as `"ip:port"`; NULL for `"127.0.0.1:0"`. Port 0 takes any free one.
  const char *bind;
  // The address that peers are told, if it is another.
  const char *advertise;
  // The ports to open, in the order of preference: `"shm"`, `"tcp"`, `"verbs"` (every usable RDMA device) or
  // `"verbs:DEVICE"`, with commas between. NULL for `"shm,tcp"`.
  const char *ports;
  // Where the flight recorder writes when a room fails or a session is lost; NULL for nowhere.
  const char *flight_folder;
  // Which rooms this node's decode side verifies by checksums: 0 none, 1 every one, n one in n.
  uint32_t verify_one_in;
  // Lanes for each rail and peer.
  uint32_t lanes_per_rail;
  // How long the progress thread spins after something has happened; `CROSSDOCK_NO_SPIN` for not at all.
  uint64_t spin_us;
  // How often peers tell this node that they live.
  uint64_t heartbeat_ms;
  // For how long after the beginning of a session silence is not counted.
  uint64_t warm_up_grace_ms;
  // For a whole handshake.
  uint64_t handshake_timeout_ms;
  // For what is still at a lane of a room that has ended.
  uint64_t drain_timeout_ms;
  // How many heartbeats may be missing before a peer is lost.
  uint32_t heartbeats_missed;
  // Threads that copy, of the shared-memory port.
  uint32_t copy_threads;
  // Sessions at once.
  uint32_t max_sessions;
  // Rooms at once.
  uint32_t max_rooms;
  // Grants at once.
  uint32_t max_grants;
  // Calls that may wait for the progress loop.
  uint32_t max_commands;
  // The longest control message; a list of pages takes 4 bytes each. The same on all nodes that talk to each other.
  uint64_t max_frame_bytes;
} crossdock_node_options;

// One worker. 0 is none.
typedef uint64_t crossdock_node;

// What has happened. It never grows.
typedef struct crossdock_event {
  // One of `CROSSDOCK_EVENT_…`; a later library may tell others.
  uint32_t kind;
  // 0.
  uint32_t reserved;
  // The room, or the peer.
  uint64_t handle;
  // What the caller gave the room; 0 of a peer.
  uint64_t user_data;
} crossdock_event;

// What a node has done and what it holds.
typedef struct crossdock_node_stats {
  // `sizeof(crossdock_node_stats)`, set by the caller.
  size_t size;
  // Rooms that are not over in every respect.
  uint64_t rooms;
  // Grants given to peers that are not quiescent.
  uint64_t grants;
  // Sessions that are not over in every respect.
  uint64_t sessions;
  // Rooms that were delivered since the node was opened.
  uint64_t delivered;
  // Rooms that ended otherwise.
  uint64_t undelivered;
  // Batches that have landed here.
  uint64_t arrivals;
  // Sessions that have begun.
  uint64_t sessions_begun;
} crossdock_node_stats;

// Memory for what a dispatch gives. 0 is none.
typedef uint64_t crossdock_outputs;

// What a dispatch gave in the latency mode: for each of this rank's experts the rows of the tokens that chose it, in the
// order of (source rank, source token). Pointers are valid until the outputs are closed; what they point to changes with
// the next dispatch that is received into them.
typedef struct crossdock_latency_outputs {
  // `sizeof(crossdock_latency_outputs)`, set by the caller.
  size_t size;
  // How many experts are here.
  size_t experts;
  // Rows that each expert has room for.
  size_t rows;
  // Bytes of a row.
  size_t row_bytes;
  // Bytes of a row's scales.
  size_t scale_bytes;
  // `[experts, rows, row_bytes]`.
  const void *values;
  // The scales, in the order that was asked for.
  const void *scales;
  // `[experts, rows]`: which of its source's tokens each row is.
  const uint32_t *tokens;
  // `[experts]`: how many rows came.
  const uint32_t *counts;
  // `[experts]`: how many rows came in all steps since the outputs were made.
  const uint64_t *totals;
} crossdock_latency_outputs;

// What a dispatch gave in the throughput mode: the rows of the tokens that chose any of this rank's experts, in the order
// of (source rank, source token). Pointers as of the latency mode.
typedef struct crossdock_throughput_outputs {
  // `sizeof(crossdock_throughput_outputs)`, set by the caller.
  size_t size;
  // How many rows came.
  size_t rows;
  // How many there is room for.
  size_t most_rows;
  // Bytes of a row.
  size_t row_bytes;
  // Bytes of a row's scales.
  size_t scale_bytes;
  // `[most_rows, row_bytes]`.
  const void *values;
  // `[most_rows, scale_bytes]`.
  const void *scales;
  // `[most_rows, top_k]`: which of this rank's experts each choice is; -1 for those of other ranks and for none.
  const int64_t *experts;
  // `[most_rows, top_k]`: the weights of this rank's choices; 0 elsewhere.
  const float *weights;
  // `[rows]`: which of its source's tokens each row is.
  const uint32_t *tokens;
} crossdock_throughput_outputs;

// A peer of a node. 0 is none.
typedef uint64_t crossdock_peer;

// Who answered at a dialed address.
typedef struct crossdock_peer_info {
  // `sizeof(crossdock_peer_info)`, set by the caller.
  size_t size;
  // The node's number.
  uint64_t node;
  // Which start of the node this is.
  uint64_t incarnation;
} crossdock_peer_info;

// How a pool is made.
typedef struct crossdock_pool_options {
  // `sizeof(crossdock_pool_options)`.
  size_t size;
  // How many pages it is over.
  uint32_t pages;
  // 0: the engine's own allocator chooses the pages, and rooms name them. 1: pages are taken from this pool.
  uint32_t allocates;
  // Pressure begins when fewer pages than this are free. Of a pool that allocates.
  uint32_t low_watermark;
  // Pressure ends when at least so many are free again.
  uint32_t high_watermark;
} crossdock_pool_options;

// Knows of each page of a cache who holds it. 0 is none.
typedef uint64_t crossdock_pool;

// The counts of a pool, all of one moment. Every page is in exactly one of `free`, `owned`, `granted`, `quarantined`,
// `abandoned` and `shared`.
typedef struct crossdock_pool_stats {
  // `sizeof(crossdock_pool_stats)`, set by the caller.
  size_t size;
  // All pages.
  uint32_t pages;
  // Pages that no room uses and nobody has taken.
  uint32_t free;
  // Pages that were taken.
  uint32_t owned;
  // Pages that a peer may write.
  uint32_t granted;
  // Pages whose room has ended and that a peer can still write.
  uint32_t quarantined;
  // Pages that can never come home.
  uint32_t abandoned;
  // Pages that are being sent, or are shared.
  uint32_t shared;
  // The longest run of free pages; 0 where the engine's allocator chooses.
  uint32_t largest_run;
  // The fewest pages that were ever free.
  uint32_t lowest_free;
  // 1 if the free pages fell below the low watermark and have not come up to the high one since.
  uint32_t under_pressure;
  // How often pages were taken.
  uint64_t takes;
  // How often they could not be.
  uint64_t failed_takes;
} crossdock_pool_stats;

// Pages that were taken from a pool, in an order. 0 is none.
typedef uint64_t crossdock_pages;

// Pages for a room: of a pool that allocates, `pages`; of one that does not, `ids`.
typedef struct crossdock_page_list {
  // The pool whose pages `ids` names; not looked at where `pages` is given.
  crossdock_pool pool;
  // Pages that were taken, or 0. A room that receives consumes the handle; one that sends does not.
  crossdock_pages pages;
  // `count` page numbers, of `id_bytes` each; read during the call.
  const void *ids;
  // How many.
  size_t count;
  // 4 (also as 0) for 32-bit numbers, 8 for 64-bit ones; signed or not.
  uint32_t id_bytes;
  // 0.
  uint32_t reserved;
} crossdock_page_list;

// A registry's server. 0 is none.
typedef uint64_t crossdock_registry;

// A registry's client. 0 is none.
typedef uint64_t crossdock_registry_client;

// A worker that is kept registered. 0 is none.
typedef uint64_t crossdock_registration;

// A rank of the prefill side. It never grows.
typedef struct crossdock_source {
  // The node.
  crossdock_peer peer;
  // Its rank.
  uint32_t rank;
  // `CROSSDOCK_ALL_PARTS` or `CROSSDOCK_SHARED_PARTS`.
  uint32_t parts;
} crossdock_source;

// What the decode side asks for.
typedef struct crossdock_receive_options {
  // `sizeof(crossdock_receive_options)`.
  size_t size;
  // From whom. Together they bring each byte of the layers once.
  const struct crossdock_source *sources;
  // How many they are.
  size_t source_count;
  // The router's number for the request.
  uint64_t room;
  // Which use of that number.
  uint32_t use_count;
  // Tokens of the request.
  uint32_t tokens;
  // Tokens of a prefix that is here already and is not to be sent.
  uint32_t skip_tokens;
  // The first layer that the sources bring, where that is not all that this node keeps.
  uint32_t first_layer;
  // How many they bring; 0 for all that this node keeps.
  uint32_t layers;
  // 0.
  uint32_t reserved;
  // For each pool of the node's layout, pages for what moves; the first page holds the first token that does.
  const struct crossdock_page_list *pages;
  // How many lists; one for each pool of the layout.
  size_t page_lists;
  // From this call; 0 for 30 seconds.
  uint64_t deadline_ms;
  // Told with the room's events.
  uint64_t user_data;
} crossdock_receive_options;

// One hand-over, seen from one side. 0 is none.
typedef uint64_t crossdock_room;

// What the prefill side offers.
typedef struct crossdock_send_options {
  // `sizeof(crossdock_send_options)`.
  size_t size;
  // The ranks of the decode side that take their shares; NULL for rank 0 alone.
  const uint32_t *ranks;
  // How many they are.
  size_t rank_count;
  // The router's number for the request.
  uint64_t room;
  // Which use of that number.
  uint32_t use_count;
  // Tokens of the request.
  uint32_t tokens;
  // For each pool of the node's layout, the pages, from the first token on.
  const struct crossdock_page_list *pages;
  // How many lists; one for each pool of the layout.
  size_t page_lists;
  // Of a room that is served: handed to the reader with the bytes. NULL for nothing.
  const uint8_t *aux;
  // How long it is.
  size_t aux_bytes;
  // From this call; 0 for 30 seconds.
  uint64_t deadline_ms;
  // Told with the room's events.
  uint64_t user_data;
} crossdock_send_options;

// How a room ended on this side.
typedef struct crossdock_end {
  // `sizeof(crossdock_end)`, set by the caller.
  size_t size;
  // One of `CROSSDOCK_DELIVERED` to `CROSSDOCK_FAILED`.
  uint32_t outcome;
  // `CROSSDOCK_BY_HERE` or `CROSSDOCK_BY_PEER`; 0 where nobody decided.
  uint32_t by;
  // One of `CROSSDOCK_STAGE_…`, where the outcome has one, else 0.
  uint32_t stage;
  // 1 if the same request may succeed in another room, else 0.
  uint32_t is_retryable;
  // How long `crossdock_room_aux` is.
  uint64_t aux_bytes;
  // What the caller gave the room.
  uint64_t user_data;
} crossdock_end;

// What went wrong in the last call of this thread that failed.
typedef struct crossdock_error {
  // Its size: `sizeof(crossdock_error)`, set by the caller.
  size_t size;
  // What the call answered.
  crossdock_status status;
  // 1 if the same call may succeed later, else 0.
  uint32_t is_retryable;
  // What went wrong, with the values that it is about. Never NULL; valid until the next call of this thread fails.
  const char *message;
  // What can be done about it; empty where there is nothing more to say. Never NULL, valid as long as the message.
  const char *advice;
} crossdock_error;

// Where the tokens of a dispatch go: found once, used for several dispatches, or recorded. 0 is none.
typedef uint64_t crossdock_route;

// A rank's tokens for one step.
typedef struct crossdock_tokens {
  // `sizeof(crossdock_tokens)`.
  size_t size;
  // How many tokens.
  size_t count;
  // `[count, hidden]` in bfloat16, or rows that have their form already (`is_made`).
  const void *rows;
  // `[count, top_k]`: the experts that each token chose, or -1. Not looked at where a route is given.
  const int64_t *choices;
  // `[count, top_k]`: the weights of the choices, which go with the rows; NULL for none.
  const float *weights;
  // The form in which rows travel: one of `CROSSDOCK_ROWS_…`.
  uint32_t form;
  // 0: bfloat16 rows, made FP8 on the way where that is the form. 1: rows and scales have the form already.
  uint32_t is_made;
  // `CROSSDOCK_ROWS_FP8` that is made on the way: `CROSSDOCK_SCALE_PLAIN` or `CROSSDOCK_SCALE_POWER_OF_TWO`.
  uint32_t scale_rule;
  // Opaque rows: bytes of a row.
  uint32_t row_bytes;
  // Opaque rows: bytes of its scales.
  uint32_t scale_bytes;
  // Rows that are made: bytes of one element of their scales.
  uint32_t scale_element_bytes;
  // Rows that are made: their scales; element e of token t is at `t * scale_token_stride + e * scale_element_stride`.
  const void *scales;
  // How many bytes there are.
  size_t scales_bytes;
  // From one token to the next, in bytes; 0, with the next too, for scales without gaps.
  size_t scale_token_stride;
  // From one element of a token to its next, in bytes.
  size_t scale_element_stride;
  // Where the tokens go, if that was found before; 0 to find it by `choices`.
  crossdock_route route;
} crossdock_tokens;

// What a call cost, and what it waited for.
typedef struct crossdock_report {
  // `sizeof(crossdock_report)`, set by the caller.
  size_t size;
  // Bytes that this rank reads from other ranks, or writes there through ports.
  uint64_t wire_bytes;
  // Bytes that DeepEP's formula counts.
  uint64_t logical_bytes;
  // Bytes of rows and sums that this rank wrote into memory.
  uint64_t copied_bytes;
  // How long this rank was in the call, its waits included.
  uint64_t time_ns;
  // How long it takes this machine to copy `copied_bytes` once, in one thread.
  uint64_t floor_ns;
  // How long this rank waited, for all ranks together; `crossdock_slot_waits` tells it by rank.
  uint64_t waited_ns;
  // How many ranks are masked now.
  uint64_t masked;
  // How many tokens lost weight; `crossdock_slot_lost` tells how much each.
  uint64_t lost_tokens;
} crossdock_report;

// Done.
#define CROSSDOCK_OK 0

// No error: it is not over yet; ask again, or wait.
#define CROSSDOCK_PENDING 1

// No object, or none of this kind, has this handle: it was closed, or never made.
#define CROSSDOCK_BAD_HANDLE 2

// An argument is NULL, too large, not UTF-8 or makes no sense; the message says which.
#define CROSSDOCK_BAD_ARGUMENT 3

// A structure's `size` is none that it ever had, or a field is set that this library does not know.
#define CROSSDOCK_BAD_SIZE 4

// The buffer is too small; the length that was given back says what is needed. Nothing was written to it.
#define CROSSDOCK_BUFFER_TOO_SMALL 5

// The time was over first. Nothing has changed; ask again, or wait on.
#define CROSSDOCK_TIMED_OUT 6

// A limit is reached: the same call may succeed later.
#define CROSSDOCK_BUSY 7

// The node has been closed, or its progress has ended.
#define CROSSDOCK_STOPPED 8

// This machine, or this library, cannot do it.
#define CROSSDOCK_UNSUPPORTED 9

// Memory could not be allocated or used.
#define CROSSDOCK_MEMORY 10

// The layout is not sound.
#define CROSSDOCK_LAYOUT 11

// A port could not be opened, or does not take the memory.
#define CROSSDOCK_PORT 12

// An address cannot be bound, or dialed.
#define CROSSDOCK_NETWORK 13

// The operating system refused a call.
#define CROSSDOCK_OS 14

// Too few pages are free.
#define CROSSDOCK_EXHAUSTED 15

// A page is held by somebody already.
#define CROSSDOCK_PAGE_IN_USE 16

// A peer can still write a page, though its room is over.
#define CROSSDOCK_PAGE_IN_QUARANTINE 17

// What held the page was dropped while a peer could write it: it never comes back.
#define CROSSDOCK_PAGE_ABANDONED 18

// There is no such page.
#define CROSSDOCK_PAGE_OUT_OF_RANGE 19

// A page is named twice.
#define CROSSDOCK_DUPLICATE_PAGE 20

// The call does not fit to the object: another kind of room, another kind of pool.
#define CROSSDOCK_WRONG_KIND 21

// Tokens are sent in order, each once; and so are the halves of a step.
#define CROSSDOCK_OUT_OF_ORDER 22

// A room is finished when everything has been sent, and not before.
#define CROSSDOCK_NOT_COMPLETE 23

// The room has been finished, or what was asked for has been taken.
#define CROSSDOCK_FINISHED 24

// The node is gone before anything has proven that nobody writes the pages: they stay out of their pool.
#define CROSSDOCK_ABANDONED 25

// The peer was refused, or will never be reached.
#define CROSSDOCK_REFUSED 26

// The registry could not be asked, or refused.
#define CROSSDOCK_REGISTRY 27

// A fault of the library: please report it with its message.
#define CROSSDOCK_INTERNAL 28

// The ranks of a group made different calls: the step is not what any of them meant.
#define CROSSDOCK_MISMATCH 29

// This rank's step is lost; the next one can be made.
#define CROSSDOCK_STEP_LOST 30

// This rank is no longer part of its group, or too few ranks are left: meet anew.
#define CROSSDOCK_GROUP_LOST 31

// Some ranks of a group were not met in time.
#define CROSSDOCK_NOT_MET 32

// Bytes that a transfer names are not in one memory that is registered.
#define CROSSDOCK_UNKNOWN_ADDRESS 33

// The deadline of a transfer passed.
#define CROSSDOCK_LATE 34

// The session with the peer ended; it may come back.
#define CROSSDOCK_LOST 35

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The ABI of the library that is loaded: major version times 65,536 plus minor version.
uint32_t crossdock_abi_version(void);

// The release of the library that is loaded, as `"0.1.0"`. Never NULL, valid for ever.
const char *crossdock_version(void);

// Opens the ports, begins to listen, and starts the progress thread.
//
// Obligations:
// `options` points to a structure that says its size, and what it points to can be read; `endpoint` can be written.
crossdock_status crossdock_endpoint_open(const struct crossdock_endpoint_options *options,
                                         crossdock_endpoint *endpoint);

// What peers dial, `"ip:port"`, with a NUL; `length` does not count it.
//
// Obligations:
// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
crossdock_status crossdock_endpoint_address(crossdock_endpoint endpoint,
                                            char *buffer,
                                            size_t capacity,
                                            size_t *length);

// Registers a memory: peers that connect from now on may write and read all of it for as long as they are connected, and
// transfers may name its addresses. With `CROSSDOCK_TIMED_OUT` it is registered later.
crossdock_status crossdock_endpoint_register(crossdock_endpoint endpoint,
                                             crossdock_memory memory,
                                             uint64_t timeout_ms);

// Takes memory back, by the address at which it begins, and waits until nobody can reach it through this endpoint any more.
// Sessions of peers that were told of it end, and begin anew without it. With `CROSSDOCK_TIMED_OUT`, and with `CROSSDOCK_BUSY`,
// which says that a peer can still reach it after 30 seconds, it goes on leaving: asking again waits for that.
crossdock_status crossdock_endpoint_unregister(crossdock_endpoint endpoint,
                                               uint64_t address,
                                               uint64_t timeout_ms);

// Says goodbye to all peers and waits for the progress thread. Transfers that are under way end with
// `CROSSDOCK_ABANDONED`.
crossdock_status crossdock_endpoint_close(crossdock_endpoint endpoint);

// Begins to move blocks, and returns at once.
//
// Obligations:
// `options` points to a structure that says its size, and what it points to can be read; `transfer` can be written.
crossdock_status crossdock_transfer_begin(crossdock_endpoint endpoint,
                                          const struct crossdock_transfer_options *options,
                                          crossdock_transfer *transfer);

// Whether a transfer has ended: `CROSSDOCK_PENDING`, `CROSSDOCK_OK` when all bytes are there, or why not:
// `CROSSDOCK_UNKNOWN_ADDRESS`, `CROSSDOCK_LATE`, `CROSSDOCK_LOST`, `CROSSDOCK_REFUSED` and others. It may be asked again.
crossdock_status crossdock_transfer_poll(crossdock_transfer transfer);

// As `crossdock_transfer_poll`, and waits for the end.
crossdock_status crossdock_transfer_wait(crossdock_transfer transfer, uint64_t timeout_ms);

// Waits until no op of a transfer can touch this process's memory any more: with its end, if that was good; after a fault
// later.
crossdock_status crossdock_transfer_wait_quiet(crossdock_transfer transfer,
                                               uint64_t timeout_ms);

// Forgets a transfer, which goes on to its end.
crossdock_status crossdock_transfer_close(crossdock_transfer transfer);

// What memory a rank of such a group needs, before anything is allocated.
//
// Obligations:
// `options` and `sizes` point to structures that say their size, and what they point to can be read.
crossdock_status crossdock_group_needs(const struct crossdock_group_options *options,
                                       struct crossdock_group_sizes *sizes);

// Opens a rank: its ports, and the address that the other ranks dial. Then all ranks tell each other their addresses, and
// meet.
//
// Obligations:
// `options` points to a structure that says its size, and what it points to can be read; `group` can be written.
crossdock_status crossdock_group_open(const struct crossdock_group_options *options,
                                      crossdock_group *group);

// All ranks of a group in this process, which have met: for tests, and for ranks that are threads. `groups` gets as many
// handles as there are ranks.
//
// Obligations:
// `options` points to a structure that says its size, and what it points to can be read; `groups` can be written.
crossdock_status crossdock_group_in_process(const struct crossdock_group_options *options,
                                            crossdock_group *groups);

// What the other ranks dial, `"ip:port"`, with a NUL; `length` does not count it.
//
// Obligations:
// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
crossdock_status crossdock_group_address(crossdock_group group,
                                         char *buffer,
                                         size_t capacity,
                                         size_t *length);

// Meets all other ranks within this time. `addresses` are those of all ranks, by rank. A rank that has not met them has to
// be opened anew.
//
// Obligations:
// So many texts can be read, each of which ends with a NUL.
crossdock_status crossdock_group_meet(crossdock_group group,
                                      const char *const *addresses,
                                      size_t count,
                                      uint64_t timeout_ms);

// Tells what the ranks of a group, which have met, agreed on.
//
// Obligations:
// `info` points to a structure that says its size.
crossdock_status crossdock_group_describe(crossdock_group group, struct crossdock_group_info *info);

// The ranks that this one does not wait for any more, ascending; `count` tells how many they are.
//
// Obligations:
// `ranks` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
crossdock_status crossdock_group_masked(crossdock_group group,
                                        uint32_t *ranks,
                                        size_t capacity,
                                        size_t *count);

// Tells this rank that another is dead, so that waits for it end at once; from any thread. It is masked by the next call
// that would wait for it.
crossdock_status crossdock_group_mark_dead(crossdock_group group,
                                           uint32_t rank);

// Leaves a group: the other ranks are told, and wait for this one no longer. It ends when the last call of it that is under
// way has.
crossdock_status crossdock_group_close(crossdock_group group);

// Puts a layout together, and checks it.
//
// Obligations:
// `options` points to a structure that says its size, and what it points to can be read; `layout` can be written.
crossdock_status crossdock_layout_create(const struct crossdock_layout_options *options,
                                         crossdock_layout *layout);

// The share of a rank: `options` describe the whole model's cache on one worker, of which the layers, heads and tokens
// that `rank` of `parallelism` keeps are taken.
//
// Obligations:
// As `crossdock_layout_create`.
crossdock_status crossdock_layout_of_rank(const struct crossdock_layout_options *options,
                                          const struct crossdock_parallelism *parallelism,
                                          uint32_t rank,
                                          crossdock_layout *layout);

// Keeps something more in the pages of the tokens, as the keys of an indexer beside a latent.
//
// Obligations:
// `part` points to a structure that says its size, and what it points to can be read.
crossdock_status crossdock_layout_add_part(crossdock_layout layout,
                                           const struct crossdock_part_options *part);

// Keeps something more in pages of its own: a window of the last tokens, or a state. A room has a list of pages for each
// pool, in the order in which they were added, after that of the tokens.
//
// Obligations:
// `pool` points to a structure that says its size, and what it points to can be read.
crossdock_status crossdock_layout_add_pool(crossdock_layout layout,
                                           const struct crossdock_cache_pool_options *pool);

// Tells what a layout comes to.
//
// Obligations:
// `info` points to a structure that says its size.
crossdock_status crossdock_layout_describe(crossdock_layout layout,
                                           struct crossdock_layout_info *info);

// How many bytes a region needs to hold what the layout places in it; 0 if nothing.
//
// Obligations:
// `bytes` can be written.
crossdock_status crossdock_layout_region_bytes(crossdock_layout layout,
                                               uint32_t region,
                                               uint64_t *bytes);

// How many pages hold what is kept here of a request of so many tokens.
//
// Obligations:
// `pages` can be written.
crossdock_status crossdock_layout_pages_for(crossdock_layout layout,
                                            uint32_t tokens,
                                            uint32_t *pages);

// Where the pages of a layer are: of which pool, and which part of it (0 is the latent or the keys, 1 the values, then
// those that were added). `page_bytes` tells how long one is.
//
// Obligations:
// `buffer` can be written; `page_bytes` is NULL or can be.
crossdock_status crossdock_layout_find(crossdock_layout layout,
                                       uint32_t pool,
                                       uint32_t part,
                                       uint32_t layer,
                                       struct crossdock_layer_buffer *buffer,
                                       uint64_t *page_bytes);

// Lets a layout go. Nodes that were opened with it keep their own.
crossdock_status crossdock_layout_close(crossdock_layout layout);

// Which ranks of the prefill side bring what `rank` of the decode side keeps. Where several could, `spread_by`, as the
// room's number, chooses. `count` tells how many they are.
//
// Obligations:
// Both sides point to structures that say their size; `sources` is NULL or `capacity` can be written there; `count` is
// NULL or can be written.
crossdock_status crossdock_sources(const struct crossdock_parallelism *prefill,
                                   const struct crossdock_parallelism *decode,
                                   uint32_t rank,
                                   uint64_t spread_by,
                                   struct crossdock_source_rank *sources,
                                   size_t capacity,
                                   size_t *count);

// Which ranks of the decode side need `rank` of the prefill side.
//
// Obligations:
// As `crossdock_sources`.
crossdock_status crossdock_destinations(const struct crossdock_parallelism *prefill,
                                        const struct crossdock_parallelism *decode,
                                        uint32_t rank,
                                        uint64_t spread_by,
                                        uint32_t *ranks,
                                        size_t capacity,
                                        size_t *count);

// Allocates zeroed memory that peers on this host can map. `options` may be NULL.
//
// Obligations:
// `options` is NULL or points to a structure that says its size; `memory` can be written.
crossdock_status crossdock_memory_allocate(size_t bytes,
                                           const struct crossdock_memory_options *options,
                                           crossdock_memory *memory);

// Uses memory that the caller allocated, of any origin: `base` to `base + bytes`, host memory that can be read and
// written. Peers on the same host cannot map it; they copy through the kernel.
//
// Obligations:
// The memory stays as it is until `crossdock_memory_close` has answered `CROSSDOCK_OK`. `memory` can be written.
crossdock_status crossdock_memory_import(void *base,
                                         size_t bytes,
                                         crossdock_memory *memory);

// Uses GPU memory that the caller allocated: a device pointer as a number, and the device's ordinal. This library has no
// CUDA port yet, so it answers `CROSSDOCK_UNSUPPORTED`; the call is here so that engines can ask.
//
// Obligations:
// The memory stays as it is until `crossdock_memory_close` has answered `CROSSDOCK_OK`. `memory` can be written.
crossdock_status crossdock_memory_import_cuda(uint64_t device_pointer,
                                              size_t bytes,
                                              int32_t device,
                                              crossdock_memory *memory);

// Tells where a memory is and what kind it is of.
//
// Obligations:
// `info` points to a structure that says its size.
crossdock_status crossdock_memory_describe(crossdock_memory memory,
                                           struct crossdock_memory_info *info);

// Lets a memory go. Allocated memory stays mapped as long as a node uses it. Imported memory is the caller's own again
// once this has answered `CROSSDOCK_OK`; while a node or a peer can still reach it, the answer is `CROSSDOCK_BUSY` and
// nothing has changed: close the node, and ask again.
crossdock_status crossdock_memory_close(crossdock_memory memory);

// Opens the ports, registers the memory, begins to listen and starts to make progress.
//
// Obligations:
// `options` points to a structure that says its size, and what it points to can be read; `node` can be written.
crossdock_status crossdock_node_open(const struct crossdock_node_options *options,
                                     crossdock_node *node);

// Says goodbye to all peers and ends the node's rooms, each with `CROSSDOCK_PEER_LOST`; waits for the progress thread.
// Rooms and peers keep their handles until those are closed.
crossdock_status crossdock_node_close(crossdock_node node);

// What peers dial, `"ip:port"`, with a NUL; `length` does not count it.
//
// Obligations:
// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
crossdock_status crossdock_node_address(crossdock_node node,
                                        char *buffer,
                                        size_t capacity,
                                        size_t *length);

// The kinds of the ports that were opened, in their order, as `"shm,tcp"`, with a NUL.
//
// Obligations:
// As `crossdock_node_address`.
crossdock_status crossdock_node_ports(crossdock_node node,
                                      char *buffer,
                                      size_t capacity,
                                      size_t *length);

// The node's number, and which start of it this is.
//
// Obligations:
// Both are NULL or can be written.
crossdock_status crossdock_node_identity(crossdock_node node,
                                         uint64_t *number,
                                         uint64_t *incarnation);

// The node's one event descriptor, for poll or epoll: readable while `crossdock_node_poll` would tell something, and
// now and then though it would not. It belongs to the node: do not read from it, nor close it.
//
// Obligations:
// `fd` can be written.
crossdock_status crossdock_node_event_fd(crossdock_node node,
                                         int32_t *fd);

// Takes what has happened since it was asked last, oldest first; `count` tells how many events were written, 0 if nothing
// has happened. Each end is told once.
//
// Obligations:
// So many events can be written; `count` can be written.
crossdock_status crossdock_node_poll(crossdock_node node,
                                     struct crossdock_event *events,
                                     size_t capacity,
                                     size_t *count);

// As `crossdock_node_poll`, and waits for the first event; `CROSSDOCK_TIMED_OUT` if there is none, `CROSSDOCK_STOPPED` when the
// node is closed meanwhile.
//
// Obligations:
// As `crossdock_node_poll`.
crossdock_status crossdock_node_wait(crossdock_node node,
                                     uint64_t timeout_ms,
                                     struct crossdock_event *events,
                                     size_t capacity,
                                     size_t *count);

// With `CROSSDOCK_PROGRESS_CALLER`: makes progress, and never blocks. `is_active`, which may be NULL, tells whether
// something happened, so that more may be waiting.
//
// Obligations:
// `is_active` is NULL or can be written.
crossdock_status crossdock_node_progress(crossdock_node node,
                                         uint32_t *is_active);

// With `CROSSDOCK_PROGRESS_CALLER`: sleeps until there is progress to make, for no longer than this.
crossdock_status crossdock_node_park(crossdock_node node,
                                     uint64_t longest_ms);

// Tells what a node has done and what it holds. The progress loop is asked: whoever drives it is not to wait here.
//
// Obligations:
// `stats` points to a structure that says its size.
crossdock_status crossdock_node_get_stats(crossdock_node node,
                                          uint64_t timeout_ms,
                                          struct crossdock_node_stats *stats);

// Writes down what the flight recorder holds, as a file for `crossdock timeline`.
//
// Obligations:
// `path` ends with a NUL.
crossdock_status crossdock_node_write_flight(crossdock_node node,
                                             const char *path,
                                             uint64_t timeout_ms);

// Memory for what a rank may get in one dispatch of the latency mode, in this form: one of `CROSSDOCK_ROWS_…`, with the
// bytes of opaque rows and scales.
//
// Obligations:
// `outputs` can be written.
crossdock_status crossdock_latency_outputs_create(crossdock_group group,
                                                  uint32_t rows,
                                                  uint32_t row_bytes,
                                                  uint32_t scale_bytes,
                                                  uint32_t scale_order,
                                                  crossdock_outputs *outputs);

// Memory for what a rank may get in one dispatch of the throughput mode, in this form.
//
// Obligations:
// `outputs` can be written.
crossdock_status crossdock_throughput_outputs_create(crossdock_group group,
                                                     uint32_t rows,
                                                     uint32_t row_bytes,
                                                     uint32_t scale_bytes,
                                                     crossdock_outputs *outputs);

// Tells what a dispatch in the latency mode gave, and where it is.
//
// Obligations:
// `info` points to a structure that says its size.
crossdock_status crossdock_latency_outputs_describe(crossdock_outputs outputs,
                                                    struct crossdock_latency_outputs *info);

// Tells what a dispatch in the throughput mode gave, and where it is.
//
// Obligations:
// `info` points to a structure that says its size.
crossdock_status crossdock_throughput_outputs_describe(crossdock_outputs outputs,
                                                       struct crossdock_throughput_outputs *info);

// Where the rows of each source begin, and where the last one's end: of the latency mode `[experts, ranks, 2]`, begin and
// end among an expert's rows; of the throughput mode `[ranks, 2]`. `count` tells how many numbers they are.
//
// Obligations:
// `ranges` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
crossdock_status crossdock_outputs_ranges(crossdock_outputs outputs,
                                          uint32_t *ranges,
                                          size_t capacity,
                                          size_t *count);

// By local expert, of the throughput mode: how many choices fell on it, rounded up to a multiple of `alignment`.
//
// Obligations:
// `counts` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
crossdock_status crossdock_throughput_outputs_counts(crossdock_outputs outputs,
                                                     uint32_t alignment,
                                                     uint32_t *counts,
                                                     size_t capacity,
                                                     size_t *count);

// Frees the memory of outputs, after the dispatch that is being received into them, if any.
crossdock_status crossdock_outputs_close(crossdock_outputs outputs);

// Dials a peer (`"ip:port"`; names are to be resolved before), now and whenever the session with it is lost. Returns at
// once: rooms may be opened before it has answered, which `crossdock_peer_wait` tells.
//
// Obligations:
// `address` ends with a NUL; `peer` can be written.
crossdock_status crossdock_connect(crossdock_node node,
                                   const char *address,
                                   crossdock_peer *peer);

// Names a peer that dials this node, by its node number.
//
// Obligations:
// `peer` can be written.
crossdock_status crossdock_peer_by_number(crossdock_node node,
                                          uint64_t number,
                                          crossdock_peer *peer);

// Whether a dialed peer has answered: `CROSSDOCK_PENDING`, `CROSSDOCK_OK` with who it is, or `CROSSDOCK_REFUSED` if it
// never will.
//
// Obligations:
// `info` is NULL or points to a structure that says its size.
crossdock_status crossdock_peer_poll(crossdock_peer peer,
                                     struct crossdock_peer_info *info);

// As `crossdock_peer_poll`, and waits for the answer.
//
// Obligations:
// As `crossdock_peer_poll`.
crossdock_status crossdock_peer_wait(crossdock_peer peer,
                                     uint64_t timeout_ms,
                                     struct crossdock_peer_info *info);

// The name of a peer that has answered, with a NUL; `length` does not count it.
//
// Obligations:
// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
crossdock_status crossdock_peer_name(crossdock_peer peer,
                                     char *buffer,
                                     size_t capacity,
                                     size_t *length);

// Ends the session with a dialed peer and dials it no more; the handle is closed in any case. A peer that was named by
// its number is only forgotten.
crossdock_status crossdock_peer_close(crossdock_peer peer);

// Makes a pool.
//
// Obligations:
// `options` points to a structure that says its size; `pool` can be written.
crossdock_status crossdock_pool_create(const struct crossdock_pool_options *options,
                                       crossdock_pool *pool);

// Tells what a pool's pages are doing.
//
// Obligations:
// `stats` points to a structure that says its size.
crossdock_status crossdock_pool_get_stats(crossdock_pool pool, struct crossdock_pool_stats *stats);

// Lets a pool go. Pages that are out come home to it all the same, and rooms that use it go on.
crossdock_status crossdock_pool_close(crossdock_pool pool);

// Takes pages of a pool that allocates.
//
// Obligations:
// `pages` can be written.
crossdock_status crossdock_pool_take(crossdock_pool pool, uint32_t count, crossdock_pages *pages);

// Takes the pages that `list` names by their numbers, out of a pool whose pages the engine's allocator chooses: all of them
// or none. `CROSSDOCK_PAGE_IN_USE` where a room still sends or serves one of them, or a peer may write it: so it tells, too,
// whether the source of a room that has ended otherwise than delivered is read no more.
//
// Obligations:
// `list` points to a list, and what it names can be read; `pages` can be written.
crossdock_status crossdock_pool_adopt(const struct crossdock_page_list *list,
                                      crossdock_pages *pages);

// Tells the numbers of pages, in their order: `capacity` of them fit into `ids`, and `count` tells how many there are.
//
// Obligations:
// `ids` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
crossdock_status crossdock_pages_ids(crossdock_pages pages,
                                     uint32_t *ids,
                                     size_t capacity,
                                     size_t *count);

// Gives pages back to their pool. Rooms that send them keep them until they are over.
crossdock_status crossdock_pages_close(crossdock_pages pages);

// Starts a registry at `bind` (`"ip:port"`; port 0 takes any free one). With a token, callers must present it.
//
// Obligations:
// `bind` ends with a NUL, and so does `token`, or is NULL; `registry` can be written.
crossdock_status crossdock_registry_start(const char *bind,
                                          const char *token,
                                          crossdock_registry *registry);

// Where a registry listens, with a NUL; `length` does not count it.
//
// Obligations:
// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
crossdock_status crossdock_registry_address(crossdock_registry registry,
                                            char *buffer,
                                            size_t capacity,
                                            size_t *length);

// Stops a registry.
crossdock_status crossdock_registry_close(crossdock_registry registry);

// A client of the registry at `server`: `"host:port"`, or `"etcd://host:port"`. Nothing is sent yet. A call takes at most
// `call_ms`, 0 for 5 seconds.
//
// Obligations:
// `server` ends with a NUL, and so does `token`, or is NULL; `client` can be written.
crossdock_status crossdock_registry_connect(const char *server,
                                            const char *token,
                                            uint64_t call_ms,
                                            crossdock_registry_client *client);

// Keeps a worker registered, from a thread of its own, and returns at once. `worker` is JSON:
// `{"node": "decode-0", "incarnation": "5eed", "role": "decode", "address": "10.0.0.7:7000", "ttl_ms": 10000}` and what
// else `docs/bootstrap.md` names.
//
// Obligations:
// `worker` ends with a NUL; `registration` can be written.
crossdock_status crossdock_registry_register(crossdock_registry_client client,
                                             const char *worker,
                                             crossdock_registration *registration);

// Waits until the registry has taken the worker.
crossdock_status crossdock_registration_wait(crossdock_registration registration,
                                             uint64_t timeout_ms);

// Says that the worker has warmed up, and returns at once.
crossdock_status crossdock_registration_ready(crossdock_registration registration);

// Takes the worker out of the registry. The handle is closed in any case: where the registry cannot be asked, the worker is
// listed until its time to live is over.
crossdock_status crossdock_registration_close(crossdock_registration registration);

// The workers that match, as a JSON array, with a NUL; `length` does not count it. `query` is as in the URL of a list:
// `"role=decode&tp_rank=0"`, or NULL for all. With a `count`, waits until so many match, for at most `timeout_ms`; then
// `CROSSDOCK_REGISTRY`, retryable, says how many there were.
//
// Obligations:
// `query` ends with a NUL or is NULL; `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be
// written.
crossdock_status crossdock_registry_find(crossdock_registry_client client,
                                         const char *query,
                                         size_t count,
                                         uint64_t timeout_ms,
                                         char *buffer,
                                         size_t capacity,
                                         size_t *length);

// Waits until all ranks of a group are there and ready, and tells the group as JSON, with a NUL; its members are found by
// `crossdock_registry_find` with `"group=NAME"`.
//
// Obligations:
// `group` ends with a NUL; the rest as for `crossdock_registry_find`.
crossdock_status crossdock_registry_wait_for_group(crossdock_registry_client client,
                                                   const char *group,
                                                   uint64_t timeout_ms,
                                                   char *buffer,
                                                   size_t capacity,
                                                   size_t *length);

// Lets a client go. Registrations that were started with it go on.
crossdock_status crossdock_registry_disconnect(crossdock_registry_client client);

// Opens the decode end of a push: the prefill side writes into the pages. Pages that were given by a handle are the room's
// when the answer is `CROSSDOCK_OK`; with `CROSSDOCK_BUSY` and `CROSSDOCK_STOPPED` they are back in their pool, and the
// handle is closed too; with other answers it stays.
//
// Obligations:
// `options` points to a structure that says its size, and what it points to can be read; `room` can be written.
crossdock_status crossdock_receive(crossdock_node node,
                                   const struct crossdock_receive_options *options,
                                   crossdock_room *room);

// Opens the decode end of a pull: this side reads from the pages that the prefill side serves.
//
// Obligations:
// As `crossdock_receive`.
crossdock_status crossdock_fetch(crossdock_node node,
                                 const struct crossdock_receive_options *options,
                                 crossdock_room *room);

// Opens the prefill end of a push: layers are sent by `crossdock_room_send_layers` as they are computed, then
// `crossdock_room_finish` finishes it.
//
// Obligations:
// As `crossdock_receive`.
crossdock_status crossdock_send(crossdock_node node,
                                const struct crossdock_send_options *options,
                                crossdock_room *room);

// As `crossdock_send`, before all pages are known: the lists name the first ones, or none, and
// `crossdock_room_add_pages` names the others, before their tokens are sent. So a prompt that is computed in chunks is sent
// in chunks, of which each has its pages when its turn comes.
//
// Obligations:
// As `crossdock_receive`.
crossdock_status crossdock_send_ahead(crossdock_node node,
                                      const struct crossdock_send_options *options,
                                      crossdock_room *room);

// Opens the prefill end of a pull: pages that are filled, for the peer that asks for the room to read.
//
// Obligations:
// As `crossdock_receive`.
crossdock_status crossdock_serve(crossdock_node node,
                                 const struct crossdock_send_options *options,
                                 crossdock_room *room);

// Appends to the pages of a pool, in a room that `crossdock_send_ahead` has opened. They may be filled later than this, but
// before their tokens are sent. More than the pool has are refused. With an answer that is not `CROSSDOCK_OK` the room has
// not got them.
//
// Obligations:
// `pages` points to a list, and what it names can be read.
crossdock_status crossdock_room_add_pages(crossdock_room room,
                                          uint32_t pool,
                                          const struct crossdock_page_list *pages);

// Sends all tokens of these layers, whose pages are filled.
crossdock_status crossdock_room_send_layers(crossdock_room room,
                                            uint32_t first_layer,
                                            uint32_t layers);

// Sends these tokens of these layers, whose pages are filled: a chunk of a prompt that is computed in pieces. Each layer's
// tokens go in order, each once.
crossdock_status crossdock_room_send_tokens(crossdock_room room,
                                            uint32_t first_layer,
                                            uint32_t layers,
                                            uint32_t first_token,
                                            uint32_t tokens);

// Everything has been sent: the peer may rely on the pages once it has them all. `aux` travels with it: the first token,
// its probabilities.
//
// Obligations:
// So many bytes can be read.
crossdock_status crossdock_room_finish(crossdock_room room,
                                       const uint8_t *aux,
                                       size_t aux_bytes);

// Ends a room here. Its end is told as ever; pages of a room that receives come home when the peer has stopped.
crossdock_status crossdock_room_cancel(crossdock_room room);

// Whether a room has ended: `CROSSDOCK_PENDING`, or `CROSSDOCK_OK` with how it did. It may be asked again.
//
// Obligations:
// `end` is NULL or points to a structure that says its size.
crossdock_status crossdock_room_poll(crossdock_room room,
                                     struct crossdock_end *end);

// As `crossdock_room_poll`, and waits for the end.
//
// Obligations:
// As `crossdock_room_poll`.
crossdock_status crossdock_room_wait(crossdock_room room,
                                     uint64_t timeout_ms,
                                     struct crossdock_end *end);

// Waits until nobody else can write the pages of a room that receives: until then they must not be used for anything
// else. `timeout_ms` of 0 only asks. `CROSSDOCK_ABANDONED` if they never come home.
crossdock_status crossdock_room_wait_pages(crossdock_room room,
                                           uint64_t timeout_ms);

// The pages of a room that received, once they are home, of the list at `list`: those that were given by a handle. They are
// the caller's again, by a new handle.
//
// Obligations:
// `pages` can be written.
crossdock_status crossdock_room_take_pages(crossdock_room room,
                                           size_t list,
                                           crossdock_pages *pages);

// What the prefill side sent beside the pages, of a room that received and was delivered.
//
// Obligations:
// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
crossdock_status crossdock_room_aux(crossdock_room room,
                                    uint8_t *buffer,
                                    size_t capacity,
                                    size_t *length);

// How a room ended, in words, with peer and port: for logs. With a NUL, which `length` does not count.
//
// Obligations:
// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
crossdock_status crossdock_room_message(crossdock_room room,
                                        char *buffer,
                                        size_t capacity,
                                        size_t *length);

// The peer of a room that has ended, by the name that it gave itself; empty if the room had come to no session. Of a room
// between several ranks, the peer that its end is about.
//
// Obligations:
// As `crossdock_room_message`.
crossdock_status crossdock_room_peer(crossdock_room room,
                                     char *buffer,
                                     size_t capacity,
                                     size_t *length);

// The port between the two sides of a room that has ended (`shm`, `tcp`, `verbs`); empty if the room had come to no
// session.
//
// Obligations:
// As `crossdock_room_message`.
crossdock_status crossdock_room_port(crossdock_room room,
                                     char *buffer,
                                     size_t capacity,
                                     size_t *length);

// What a person can do about how a room ended.
//
// Obligations:
// As `crossdock_room_message`.
crossdock_status crossdock_room_advice(crossdock_room room,
                                       char *buffer,
                                       size_t capacity,
                                       size_t *length);

// How many batches have landed in the current attempt of a room that receives: grows while the room moves.
//
// Obligations:
// `arrivals` can be written.
crossdock_status crossdock_room_arrivals(crossdock_room room,
                                         uint64_t *arrivals);

// Forgets a room; one that has not ended is cancelled. Pages that nobody has taken go back to their pool when they come
// home.
crossdock_status crossdock_room_close(crossdock_room room);

// Tells what went wrong in the last call of this thread that failed; `CROSSDOCK_OK` in `status` if none has. What
// `CROSSDOCK_PENDING`, `CROSSDOCK_TIMED_OUT` and `CROSSDOCK_BUFFER_TOO_SMALL` say needs no words: they leave it as it was.
//
// Obligations:
// `error` points to a structure that says its size, or is NULL.
crossdock_status crossdock_last_error(struct crossdock_error *error);

// The name of a status, as `"CROSSDOCK_BUSY"`; `"?"` for none. Never NULL, valid for ever.
const char *crossdock_status_name(crossdock_status status);

// The send half of a dispatch: leaves each token's row where the ranks of its experts find it. Waits for nobody, except
// where the last step of this slot was not taken to its end. The receive half is `crossdock_latency_receive` or
// `crossdock_throughput_receive`, which all ranks choose alike.
//
// Obligations:
// `tokens` points to a structure that says its size, and what it points to can be read; `report` is NULL or points to one.
crossdock_status crossdock_dispatch(crossdock_group group,
                                    uint32_t slot,
                                    const struct crossdock_tokens *tokens,
                                    struct crossdock_report *report);

// The receive half of a dispatch in the latency mode: waits for every rank's rows, and packs them by expert.
crossdock_status crossdock_latency_receive(crossdock_group group,
                                           uint32_t slot,
                                           crossdock_outputs outputs);

// Latency mode: where this rank's results for one local expert go, `[rows, hidden]` in bfloat16, in the order of its packed
// rows, as many as came. The other ranks read them there: valid until `crossdock_latency_combine`.
//
// Obligations:
// `results` can be written; `rows` is NULL or can be.
crossdock_status crossdock_latency_results(crossdock_group group,
                                           uint32_t slot,
                                           uint32_t expert,
                                           void **results,
                                           size_t *rows);

// Latency mode: copies results from `[local experts, rows, hidden]` in bfloat16, as the outputs have them, for whom they lie
// elsewhere.
//
// Obligations:
// So many can be read.
crossdock_status crossdock_latency_copy_results(crossdock_group group,
                                                uint32_t slot,
                                                const void *results,
                                                size_t count);

// The send half of a combine in the latency mode: says that the results are there. Waits for nobody.
crossdock_status crossdock_latency_combine(crossdock_group group,
                                           uint32_t slot);

// The receive half of a combine in the latency mode: waits for every rank's results, and sums those of each token:
// `weights` is `[tokens, top_k]`, `combined` gets `[tokens, hidden]` in bfloat16.
//
// Obligations:
// So many weights can be read, so many values written; `report` is NULL or points to a structure that says its size.
crossdock_status crossdock_latency_finish(crossdock_group group,
                                          uint32_t slot,
                                          const float *weights,
                                          size_t weight_count,
                                          void *combined,
                                          size_t value_count,
                                          struct crossdock_report *report);

// The receive half of a dispatch in the throughput mode: waits for every rank's rows, in the order of the ranks.
crossdock_status crossdock_throughput_receive(crossdock_group group,
                                              uint32_t slot,
                                              crossdock_outputs outputs);

// Throughput mode: where this rank's results go, `[rows, hidden]` in bfloat16, one for each row that came, weighed and
// summed over this rank's experts. The other ranks read them there: valid until `crossdock_throughput_combine`.
//
// Obligations:
// `results` can be written; `rows` is NULL or can be.
crossdock_status crossdock_throughput_results(crossdock_group group,
                                              uint32_t slot,
                                              void **results,
                                              size_t *rows);

// The send half of a combine in the throughput mode. `weights`, `[rows, top_k]` or NULL, go back as they are. Waits for
// nobody.
//
// Obligations:
// So many weights can be read.
crossdock_status crossdock_throughput_combine(crossdock_group group,
                                              uint32_t slot,
                                              const float *weights,
                                              size_t weight_count);

// The receive half of a combine in the throughput mode: waits for every rank's results, and sums those of each token.
// `combined` gets `[tokens, hidden]` in bfloat16: the biases, of which each is NULL or as long, and what the ranks made of
// the token. `weights`, NULL or `[tokens, top_k]`, get the sums of the weights that the ranks gave back.
//
// Obligations:
// So many values can be read or written; `report` is NULL or points to a structure that says its size.
crossdock_status crossdock_throughput_finish(crossdock_group group,
                                             uint32_t slot,
                                             const void *first_bias,
                                             const void *second_bias,
                                             float *weights,
                                             size_t weight_count,
                                             void *combined,
                                             size_t value_count,
                                             struct crossdock_report *report);

// Gives up a step of a slot: the next dispatch brings it to its end.
crossdock_status crossdock_slot_abandon(crossdock_group group, uint32_t slot);

// How long the slot's last call waited for each rank, in nanoseconds; in its own place, until its ports had sent earlier
// calls.
//
// Obligations:
// `waits_ns` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
crossdock_status crossdock_slot_waits(crossdock_group group,
                                      uint32_t slot,
                                      uint64_t *waits_ns,
                                      size_t capacity,
                                      size_t *count);

// By token of the slot's last call: the weight of those of its choices that masked ranks did not answer; empty where nothing
// was lost.
//
// Obligations:
// `lost` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
crossdock_status crossdock_slot_lost(crossdock_group group,
                                     uint32_t slot,
                                     float *lost,
                                     size_t capacity,
                                     size_t *count);

// Finds where tokens that choose like this go, `[tokens, top_k]`, to be used for several dispatches of any slot.
//
// Obligations:
// So many choices can be read; `route` can be written.
crossdock_status crossdock_route_create(crossdock_group group,
                                        uint32_t slot,
                                        const int64_t *choices,
                                        size_t count,
                                        crossdock_route *route);

// The route of the dispatch that is under way in a slot.
//
// Obligations:
// `route` can be written.
crossdock_status crossdock_route_of_dispatch(crossdock_group group,
                                             uint32_t slot,
                                             crossdock_route *route);

// A route as bytes, to be kept: `length` tells how many.
//
// Obligations:
// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
crossdock_status crossdock_route_write(crossdock_route route,
                                       uint8_t *buffer,
                                       size_t capacity,
                                       size_t *length);

// A route that was kept, of a rank of the same group.
//
// Obligations:
// So many bytes can be read; `route` can be written.
crossdock_status crossdock_route_read(crossdock_group group,
                                      const uint8_t *bytes,
                                      size_t count,
                                      crossdock_route *route);

// Lets a route go.
crossdock_status crossdock_route_close(crossdock_route route);

// How tokens spread: by rank how many distinct ones go there, by expert how many choices fell on it, and by token and rank
// whether it goes there (`[count / top_k, ranks]`, a byte each). Each is NULL or as long as there are ranks, experts, tokens
// times ranks.
//
// Obligations:
// So many choices can be read, and so many numbers written.
crossdock_status crossdock_spread(crossdock_group group,
                                  const int64_t *choices,
                                  size_t count,
                                  uint32_t *tokens_per_rank,
                                  uint32_t *tokens_per_expert,
                                  uint8_t *is_token_in_rank);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* CROSSDOCK_H */
