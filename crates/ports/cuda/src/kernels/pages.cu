// Moves pieces of pages from one memory that this GPU reaches into another, then says so.
//
// NVRTC compiles it at run time for the device at hand, without any header. Tests compile it as C++ and run it on a CPU
// (tests/cpu): whatever NVRTC alone understands stands behind __CUDACC_RTC__.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// Pieces of one length, a word of 16, 4 or 1 bytes after another. src/moves.rs has the same.
struct Pieces {
  // Where piece 0 of page 0 begins.
  u64 from, to;
  u64 from_stride_bytes, to_stride_bytes;
  // Lists of page numbers (u32), which this GPU can read. 0: piece i is that of page i.
  u64 from_pages, to_pages;
  // Words of all pieces.
  u64 words;
  // Tiles of those before in the array.
  u64 first_tile;
  // Words of a piece.
  u32 piece_words;
  u32 reserved;
};

// A word that is set when all bytes are where they belong.
struct Signal {
  u64 at;
  u32 value;
  u32 reserved;
};

// How many words a thread has on their way at a time.
enum { IN_FLIGHT = 8 };

#ifdef __CUDACC_RTC__
// Neither side is read again soon: the cache is left to others.
static __device__ __forceinline__ uint4 load(const uint4* at) {
  uint4 word;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(at));
  return word;
}
static __device__ __forceinline__ void store(uint4* at, uint4 word) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}
// What this thread has seen is seen by whoever sees the value: other GPUs and the CPU, too.
static __device__ __forceinline__ void release(u32* at, u32 value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
#endif

template <typename Word>
static __device__ __forceinline__ Word load(const Word* at) {
  return *at;
}
template <typename Word>
static __device__ __forceinline__ void store(Word* at, Word word) {
  *at = word;
}

// The last entry whose tiles begin at or before this one.
static __device__ __forceinline__ u32 entry_of(const Pieces* all, u32 count, u64 tile) {
  u32 low = 0, high = count;
  while (high - low > 1) {
    u32 middle = low + (high - low) / 2;
    if (all[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// A tile is as many words as the block has threads, IN_FLIGHT times. It begins anywhere in a piece: so threads do not idle
// where pieces are short or of an odd length.
template <typename Word>
static __device__ __forceinline__ void move_tile(const Pieces& pieces, u64 tile) {
  const u64 first = (tile - pieces.first_tile) * IN_FLIGHT * blockDim.x;
  const u64 first_piece = first / pieces.piece_words;
  const u32 offset = (u32)(first - first_piece * pieces.piece_words);
  const u32* from_pages = (const u32*)pieces.from_pages;
  const u32* to_pages = (const u32*)pieces.to_pages;
  Word words[IN_FLIGHT];
  u64 to[IN_FLIGHT];
#pragma unroll
  for (u32 turn = 0; turn < IN_FLIGHT; turn++) {
    const u32 nth = turn * blockDim.x + threadIdx.x;
    to[turn] = 0;
    if (first + nth >= pieces.words) continue;
    // In 32 bits: a piece has fewer than 2^31 words, a tile far fewer.
    const u32 from_begin = offset + nth;
    const u32 pieces_on = from_begin / pieces.piece_words;
    const u64 within = (u64)(from_begin - pieces_on * pieces.piece_words) * sizeof(Word);
    const u64 piece = first_piece + pieces_on;
    const u64 from_page = from_pages ? from_pages[piece] : piece;
    const u64 to_page = to_pages ? to_pages[piece] : piece;
    to[turn] = pieces.to + to_page * pieces.to_stride_bytes + within;
    words[turn] = load((const Word*)(pieces.from + from_page * pieces.from_stride_bytes + within));
  }
#pragma unroll
  for (u32 turn = 0; turn < IN_FLIGHT; turn++) {
    if (to[turn] != 0) store((Word*)to[turn], words[turn]);
  }
}

template <typename Word>
static __device__ __forceinline__ void move_all(const Pieces* all, u32 count, u64 tiles, const Signal* signals,
                                                u32 signal_count, u32* finished) {
  for (u64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    move_tile<Word>(all[entry_of(all, count, tile)], tile);
  }
  // Every thread of the block has stored; thread 0 speaks for them all, and the block that is last for all blocks.
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence_system();
  if (atomicAdd(finished, 1) != gridDim.x - 1) return;
  // For the next launch, which the stream begins after this one.
  *finished = 0;
  __threadfence_system();
  for (u32 nth = 0; nth < signal_count; nth++) {
    release((u32*)signals[nth].at, signals[nth].value);
  }
}

// Any grid and block. `finished` is 0 when it begins, and when it ends.
extern "C" __global__ void crossdock_move_words_16(const Pieces* all, u32 count, u64 tiles, const Signal* signals,
                                                   u32 signal_count, u32* finished) {
  move_all<uint4>(all, count, tiles, signals, signal_count, finished);
}

extern "C" __global__ void crossdock_move_words_4(const Pieces* all, u32 count, u64 tiles, const Signal* signals,
                                                  u32 signal_count, u32* finished) {
  move_all<u32>(all, count, tiles, signals, signal_count, finished);
}

extern "C" __global__ void crossdock_move_words_1(const Pieces* all, u32 count, u64 tiles, const Signal* signals,
                                                  u32 signal_count, u32* finished) {
  move_all<u8>(all, count, tiles, signals, signal_count, finished);
}
