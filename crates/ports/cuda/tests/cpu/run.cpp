// Runs a kernel on a CPU: what the GPU's compiler knows by itself, a block of threads at a time, in an order that the seed
// chooses. For tests of what it moves; its speed and its memory model are a GPU's affair.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
struct uint4 {
  unsigned x, y, z, w;
};
struct Dimension {
  unsigned x;
};
static thread_local Dimension threadIdx, blockIdx;
static Dimension blockDim, gridDim;
static pthread_barrier_t together;
static void __syncthreads() { pthread_barrier_wait(&together); }
static void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
static unsigned atomicAdd(unsigned* at, unsigned by) { return __atomic_fetch_add(at, by, __ATOMIC_RELAXED); }
static void release(unsigned* at, unsigned value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }

#include "../../src/kernels/pages.cu"

extern "C" void run_move_words(u32 word_bytes, u32 blocks, u32 threads, u32 seed, const Pieces* all, u32 count, u64 tiles,
                               const Signal* signals, u32 signal_count, u32* finished) {
  // There is one grid at a time.
  static std::mutex alone;
  const std::lock_guard<std::mutex> guard(alone);
  blockDim.x = threads;
  gridDim.x = blocks;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (unsigned block : order) {
    pthread_barrier_init(&together, nullptr, threads);
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; thread++) {
      running.emplace_back([=] {
        threadIdx.x = thread;
        blockIdx.x = block;
        auto kernel = word_bytes == 16  ? crossdock_move_words_16
                      : word_bytes == 4 ? crossdock_move_words_4
                                        : crossdock_move_words_1;
        kernel(all, count, tiles, signals, signal_count, finished);
      });
    }
    for (std::thread& thread : running) thread.join();
    pthread_barrier_destroy(&together);
  }
}
