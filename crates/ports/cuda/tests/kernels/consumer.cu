// Waits for the arrivals of each round and looks whether the page is that round's. A test's own (tests/order.rs).

typedef unsigned int u32;
typedef unsigned long long u64;

static __device__ __forceinline__ u32 acquire(const u32* at) {
  u32 value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
static __device__ __forceinline__ void release(u32* at, u32 value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
static __device__ __forceinline__ u64 clock_ns() {
  u64 ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// One block. `seen` tells the CPU how far it is; `wrong` counts words that were another round's; a round that does not come
// within `patience_ns` ends it.
extern "C" __global__ void crossdock_consume(const u32* arrivals, const u32* page, u32 words, u32 first_round, u32 rounds,
                                             u64 patience_ns, u32* seen, u32* wrong) {
  __shared__ u32 has_come;
  for (u32 round = first_round; round != first_round + rounds; round++) {
    if (threadIdx.x == 0) {
      const u64 begin = clock_ns();
      has_come = 1;
      while ((int)(acquire(arrivals) - round) < 0) {
        if (clock_ns() - begin > patience_ns) {
          has_come = 0;
          break;
        }
      }
    }
    __syncthreads();
    if (!has_come) return;
    for (u32 word = threadIdx.x; word < words; word += blockDim.x) {
      if (page[word] != round) atomicAdd(wrong, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) release(seen, round);
  }
}
