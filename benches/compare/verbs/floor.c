// The floor of RDMA on one host: what libibverbs itself gives to a program that does nothing else. kvbench
// over verbs is measured against it, so its options are named as there.
//
//   floor [--op write|read] [--page-bytes 65536] [--pages 64] [--pool-mib 64] [--seconds 1] [--warmup 0.2]
//         [--depth 128] [--chain 16] [--signal 16] [--wait spin|event] [--relaxed 0|1]
//         [--devices rxe0,rxe1] [--gid N,N] [--mtu 1024]
//
// Two threads, each with a device of its own (the first two that there are, or the only one twice) and a pool,
// and one pair of RC queue pairs. Pages move between slots of the pools that are permuted at random, each slot
// once before any again. Work requests are posted in chains, every so many are signalled, and at most so many are
// outstanding. A round of pages ends with an immediate, which the target takes from its queue: with the last page
// of a WRITE; by itself when all pages of a READ are here. The target posts its receive again, and tells so
// through memory: rounds never run out of receives.
//
// Then single pages: a WRITE with an immediate that one of the same size answers, of which the time is half; or a
// READ.
//
// Prints one line of JSON. Every page of the measured part is compared with its source, and slots not reached
// must be as they were; the exit code is 1 where they are not. cpu_s is what the process used; what the kernel
// does for software devices is not all in it.
//
// cc -O2 -Wall -Wextra -pthread floor.c -libverbs -o floor

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <infiniband/verbs.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>

enum { RECEIVES = 128, MAX_CHAIN = 256, MAX_DEPTH = 8192, SAMPLES = 10000, DEADLINE_S = 20 };
// What the target is told by an immediate: to go on counting rounds, to answer, or to end.
enum { ANSWER = 0x80000000u, END = 0xffffffffu };

#define CHECK(condition, ...)                 \
  do {                                        \
    if (!(condition)) {                       \
      fprintf(stderr, "floor: " __VA_ARGS__); \
      fputc('\n', stderr);                    \
      exit(1);                                \
    }                                         \
  } while (0)

static const char *op = "write", *wait_how = "spin", *devices = "", *gids = "";
static double seconds = 1, warmup_s = 0.2, page_bytes_option = 65536, pages_option = 64, pool_mib = 64,
              depth_option = 128, chain_option = 16, signal_option = 16, relaxed = 0, mtu = 0;

struct end {
  struct ibv_context *context;
  struct ibv_comp_channel *channel;
  struct ibv_cq *cq;
  struct ibv_qp *qp;
  struct ibv_mr *mr;
  struct ibv_port_attr port;
  union ibv_gid gid;
  int gid_index;
  char *pool;
  uint32_t *slots;
};

static struct end here, there;
static size_t page_bytes, slot_count;
static uint64_t depth, chain, signal_every, pages;
static int reads, sleeps;
static _Atomic uint64_t rounds_taken;  // by the target, their receives posted again
static uint64_t rounds_begun, rounds_told;
static uint64_t ends[RECEIVES];     // of rounds of READs: the work requests posted by then
static uint64_t posted, completed;  // work requests of the initiator
static uint64_t moved;              // pages since the pools were made ready

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double cpu_s(void) {
  struct rusage u;
  getrusage(RUSAGE_SELF, &u);
  return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
         (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

static uint64_t random_word(void) {
  static uint64_t x = 0x9e3779b97f4a7c15u;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x;
}

// ---- making ready ----

static const char *item(const char *list, int which) {  // of "a,b"; the last one where there are not so many
  static char word[64];
  const char *comma = strchr(list, ',');
  if (which && comma) list = comma + 1, comma = NULL;
  snprintf(word, sizeof word, "%.*s", (int)(comma ? comma - list : (long)strlen(list)), list);
  return word;
}

static void choose_gid(struct end *e, int which) {
  struct ibv_gid_entry entry;
  static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
  e->gid_index = *gids ? atoi(item(gids, which)) : -1;
  if (e->port.link_layer != IBV_LINK_LAYER_ETHERNET && e->gid_index < 0) e->gid_index = 0;
  for (int i = 0; e->gid_index < 0 && i < e->port.gid_tbl_len; i++)
    if (!ibv_query_gid_ex(e->context, 1, (uint32_t)i, &entry, 0) && entry.gid_type == IBV_GID_TYPE_ROCE_V2 &&
        !memcmp(entry.gid.raw, mapped, sizeof mapped))
      e->gid_index = i;
  CHECK(e->gid_index >= 0, "no RoCE v2 address over IPv4; name one with --gid");
  CHECK(!ibv_query_gid(e->context, 1, e->gid_index, &e->gid), "no GID %d", e->gid_index);
}

static void open_end(struct end *e, int which) {
  int count = 0, found = -1;
  struct ibv_device **list = ibv_get_device_list(&count);
  CHECK(list && count, "no RDMA device");
  for (int i = 0; i < count; i++)
    if (!*devices ? i == which || !i : !strcmp(ibv_get_device_name(list[i]), item(devices, which))) found = i;
  CHECK(found >= 0, "no device %s", item(devices, which));
  CHECK(e->context = ibv_open_device(list[found]), "cannot open %s: %m", ibv_get_device_name(list[found]));
  CHECK(!ibv_query_port(e->context, 1, &e->port) && e->port.state == IBV_PORT_ACTIVE,
        "the port is not active");
  choose_gid(e, which);

  struct ibv_pd *pd = ibv_alloc_pd(e->context);
  size_t bytes = slot_count * page_bytes;
  e->pool = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  CHECK(e->pool != MAP_FAILED, "no memory: %m");
  unsigned access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
  if (relaxed) access |= IBV_ACCESS_RELAXED_ORDERING;
  CHECK(pd && (e->mr = ibv_reg_mr(pd, e->pool, bytes, access)), "cannot register %zu bytes: %m", bytes);
  CHECK(e->channel = ibv_create_comp_channel(e->context), "no completion channel: %m");
  CHECK(e->cq = ibv_create_cq(e->context, (int)depth + 2 * RECEIVES, NULL, e->channel, 0),
        "no completion queue: %m");
  struct ibv_qp_init_attr init = {.send_cq = e->cq, .recv_cq = e->cq, .qp_type = IBV_QPT_RC};
  init.cap = (struct ibv_qp_cap){(uint32_t)depth + RECEIVES, RECEIVES, 1, 1, 0};
  CHECK(e->qp = ibv_create_qp(pd, &init), "no queue pair: %m");

  e->slots = calloc(slot_count, sizeof *e->slots);
  for (uint32_t i = 0; i < slot_count; i++) {
    uint32_t other = (uint32_t)(random_word() % (i + 1));
    e->slots[i] = e->slots[other], e->slots[other] = i;
  }
}

static void post_receive(struct end *e) {
  struct ibv_recv_wr *bad, receive = {0};
  CHECK(!ibv_post_recv(e->qp, &receive, &bad), "a receive is refused");
}

static void connect_to(struct end *e, struct end *peer) {
  struct ibv_device_attr device;
  CHECK(!ibv_query_device(e->context, &device), "the device says nothing of itself");
  int atoms =
      device.max_qp_rd_atom < device.max_qp_init_rd_atom ? device.max_qp_rd_atom : device.max_qp_init_rd_atom;
  struct ibv_qp_attr a = {.qp_state = IBV_QPS_INIT,
                          .port_num = 1,
                          .qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ};
  CHECK(!ibv_modify_qp(e->qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS),
        "INIT is refused");
  for (int i = 0; i < RECEIVES; i++) post_receive(e);
  a.qp_state = IBV_QPS_RTR;
  a.path_mtu = e->port.active_mtu < peer->port.active_mtu ? e->port.active_mtu : peer->port.active_mtu;
  // More than the ports' own is taken here, and no packet arrives.
  for (int largest = a.path_mtu; mtu && 128 << a.path_mtu != (int)mtu; a.path_mtu--)
    CHECK(a.path_mtu > IBV_MTU_256, "--mtu is 256, 512 or so on, and here at most %d", 128 << largest);
  mtu = 128 << a.path_mtu;
  a.dest_qp_num = peer->qp->qp_num;
  a.max_dest_rd_atomic = a.max_rd_atomic = (uint8_t)(atoms < 128 ? atoms : 128);
  a.min_rnr_timer = 12;
  a.ah_attr = (struct ibv_ah_attr){
      .dlid = peer->port.lid, .port_num = 1, .is_global = e->port.link_layer == IBV_LINK_LAYER_ETHERNET};
  a.ah_attr.grh =
      (struct ibv_global_route){.dgid = peer->gid, .sgid_index = (uint8_t)e->gid_index, .hop_limit = 64};
  CHECK(!ibv_modify_qp(e->qp, &a,
                       IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                           IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER),
        "RTR is refused");
  a.qp_state = IBV_QPS_RTS, a.timeout = 18, a.retry_cnt = 6, a.rnr_retry = 6;
  CHECK(!ibv_modify_qp(e->qp, &a,
                       IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                           IBV_QP_MAX_QP_RD_ATOMIC),
        "RTS is refused");
}

// ---- waiting ----

static int poll_once(struct end *e, struct ibv_wc *wc) {
  int n = ibv_poll_cq(e->cq, 16, wc);
  CHECK(n >= 0, "the completion queue fails");
  for (int i = 0; i < n; i++)
    CHECK(!wc[i].status, "a work request failed: %s", ibv_wc_status_str(wc[i].status));
  return n;
}

static int reap(struct end *e, struct ibv_wc *wc) {  // at least one
  double deadline_s = now_s() + DEADLINE_S;
  for (uint64_t turn = 1;; turn++) {
    int n = poll_once(e, wc);
    if (n) return n;
    if (turn % 256 == 0) sched_yield();
    if (turn % 4096 == 0 || sleeps) CHECK(now_s() < deadline_s, "nothing has completed in %d s", DEADLINE_S);
    if (!sleeps) continue;
    // What came before the queue was armed tells nobody.
    CHECK(!ibv_req_notify_cq(e->cq, 0), "the queue cannot be armed");
    n = poll_once(e, wc);
    if (n) return n;
    struct pollfd channel = {e->channel->fd, POLLIN, 0};
    struct ibv_cq *cq;
    void *context;
    if (poll(&channel, 1, 1000) != 1) continue;
    CHECK(!ibv_get_cq_event(e->channel, &cq, &context), "the channel fails");
    ibv_ack_cq_events(cq, 1);
  }
}

// ---- moving ----

static char *slot(struct end *e, uint64_t page) { return e->pool + e->slots[page % slot_count] * page_bytes; }

// What moves a page, or with no bytes only an immediate.
static struct ibv_send_wr request(struct end *from, struct end *to, enum ibv_wr_opcode opcode, uint64_t page,
                                  size_t bytes, struct ibv_sge *piece) {
  *piece = (struct ibv_sge){(uintptr_t)slot(from, page), (uint32_t)bytes, from->mr->lkey};
  struct ibv_send_wr w = {.sg_list = piece, .num_sge = bytes != 0, .opcode = opcode};
  w.wr.rdma.remote_addr = (uintptr_t)slot(to, page);
  w.wr.rdma.rkey = to->mr->rkey;
  return w;
}

static void post(struct end *e, struct ibv_send_wr *first) {
  struct ibv_send_wr *bad;
  CHECK(!ibv_post_send(e->qp, first, &bad), "a work request is refused");
}

static void post_one(struct end *from, struct end *to, enum ibv_wr_opcode opcode, size_t bytes, uint64_t page,
                     uint32_t imm) {
  struct ibv_sge piece;
  struct ibv_send_wr w = request(from, to, opcode, page, bytes, &piece);
  w.imm_data = htonl(imm), w.send_flags = IBV_SEND_SIGNALED, w.wr_id = posted;
  if (from == &here) posted++;
  post(from, &w);
}

static void *target(void *nothing) {
  struct ibv_wc wc[16];
  uint64_t answered = 0;
  for (uint32_t next = 0;;) {
    int n = reap(&there, wc);
    for (int i = 0; i < n; i++) {
      if (!(wc[i].opcode & IBV_WC_RECV)) continue;
      uint32_t imm = ntohl(wc[i].imm_data);
      if (imm == END) return nothing;
      CHECK((imm & ~ANSWER) == next, "round %u came and not %u", imm & ~ANSWER, next);
      next = (next + 1) & ~ANSWER;
      post_receive(&there);
      atomic_fetch_add_explicit(&rounds_taken, 1, memory_order_release);
      if (imm & ANSWER) post_one(&there, &here, IBV_WR_RDMA_WRITE_WITH_IMM, page_bytes, answered++, 0);
    }
  }
}

static uint32_t next_round(void) { return (uint32_t)(rounds_told++) & ~ANSWER; }

static void retire(int wait) {
  struct ibv_wc wc[16];
  int n = wait ? reap(&here, wc) : poll_once(&here, wc);
  // In order, so one completion says that all before it are done.
  for (int i = 0; i < n; i++) completed = wc[i].wr_id + 1;
  // A fence would spare this, but behind one rdma_rxe stops for ever now and then.
  while (reads && rounds_told < rounds_begun && ends[rounds_told % RECEIVES] <= completed)
    post_one(&here, &there, IBV_WR_RDMA_WRITE_WITH_IMM, 0, 0, next_round());
}

static void one_round(void) {
  static struct ibv_send_wr work[MAX_CHAIN];
  static struct ibv_sge pieces[MAX_CHAIN];
  double deadline_s = now_s() + DEADLINE_S;
  while (rounds_begun - atomic_load_explicit(&rounds_taken, memory_order_acquire) >= RECEIVES) {
    retire(0);
    sched_yield();
    CHECK(now_s() < deadline_s, "the target has taken nothing in %d s", DEADLINE_S);
  }
  for (uint64_t left = pages; left;) {
    uint64_t n = left < chain ? left : chain;
    while (posted + n - completed > depth) retire(1);
    for (uint64_t i = 0; i < n; i++, posted++, moved++, left--) {
      enum ibv_wr_opcode opcode = reads      ? IBV_WR_RDMA_READ
                                  : left > 1 ? IBV_WR_RDMA_WRITE
                                             : IBV_WR_RDMA_WRITE_WITH_IMM;
      work[i] = request(&here, &there, opcode, moved, page_bytes, &pieces[i]);
      work[i].wr_id = posted;
      if ((posted + 1) % signal_every == 0) work[i].send_flags = IBV_SEND_SIGNALED;
      if (opcode == IBV_WR_RDMA_WRITE_WITH_IMM) work[i].imm_data = htonl(next_round());
      work[i].next = i + 1 < n ? &work[i + 1] : NULL;
    }
    post(&here, work);
    if (!left) ends[rounds_begun++ % RECEIVES] = posted;
    retire(0);
  }
}

static double rounds_for(double how_long_s) {  // returns the seconds
  double begin_s = now_s();
  do one_round();
  while (now_s() - begin_s < how_long_s);
  // One more that is signalled, and moves nothing.
  post_one(&here, &there, IBV_WR_RDMA_WRITE, 0, 0, 0);
  while (completed != posted || rounds_told != rounds_begun) retire(1);
  return now_s() - begin_s;
}

static int ascending(const void *a, const void *b) {
  return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b);
}

// The median of single pages. Pages go on being counted, so they are verified too; answers bring what is
// there already.
static double single_pages_us(int *samples) {
  static double times_us[SAMPLES];
  double end_s = now_s() + seconds;
  struct ibv_wc wc[16];
  // The first 16 warm up.
  for (*samples = -16; *samples < SAMPLES && (*samples < 1 || now_s() < end_s); ++*samples, moved++) {
    double begin_s = now_s(), halves = reads ? 1 : 2;
    if (reads) {
      post_one(&here, &there, IBV_WR_RDMA_READ, page_bytes, moved, 0);
    } else {
      rounds_begun++;
      post_one(&here, &there, IBV_WR_RDMA_WRITE_WITH_IMM, page_bytes, moved, next_round() | ANSWER);
    }
    for (int sent = 0, answered = reads; !sent || !answered;) {
      int n = reap(&here, wc);
      for (int i = 0; i < n; i++) {
        if (wc[i].opcode & IBV_WC_RECV) answered = 1, post_receive(&here);
        else sent = 1, completed = wc[i].wr_id + 1;
      }
    }
    if (*samples >= 0) times_us[*samples] = (now_s() - begin_s) * 1e6 / halves;
  }
  qsort(times_us, (size_t)*samples, sizeof *times_us, ascending);
  return times_us[*samples / 2];
}

static int all_arrived(void) {
  struct end *source = reads ? &there : &here, *sink = reads ? &here : &there;
  char *zeros = calloc(1, page_bytes);
  int good = 1;
  for (uint64_t i = 0; i < slot_count; i++)
    good &= !memcmp(slot(sink, i), i < moved ? slot(source, i) : zeros, page_bytes);
  free(zeros);
  return good;
}

// ---- the program ----

static void options(int argc, char **argv) {
  struct {
    const char *name, **word;
    double *number;
  } known[] = {
      {"--op", &op, NULL}, {"--wait", &wait_how, NULL}, {"--devices", &devices, NULL}, {"--gid", &gids, NULL},
      {"--page-bytes", NULL, &page_bytes_option}, {"--pages", NULL, &pages_option},
      {"--pool-mib", NULL, &pool_mib}, {"--seconds", NULL, &seconds}, {"--warmup", NULL, &warmup_s},
      {"--depth", NULL, &depth_option}, {"--chain", NULL, &chain_option}, {"--signal", NULL, &signal_option},
      {"--relaxed", NULL, &relaxed}, {"--mtu", NULL, &mtu},
  };
  size_t count = sizeof known / sizeof *known;
  for (int i = 1; i < argc; i += 2) {
    size_t k = 0;
    while (k < count && strcmp(argv[i], known[k].name)) k++;
    CHECK(k < count && i + 1 < argc,
          "what is %s? The options are told at the top of floor.c", argv[i]);
    if (known[k].word) *known[k].word = argv[i + 1];
    else *known[k].number = atof(argv[i + 1]);
  }
  reads = !strcmp(op, "read"), sleeps = !strcmp(wait_how, "event");
  CHECK(reads || !strcmp(op, "write"), "--op is write or read");
  CHECK(sleeps || !strcmp(wait_how, "spin"), "--wait is spin or event");
  CHECK(page_bytes_option >= 1 && pages_option >= 1 && pool_mib * (1 << 20) >= page_bytes_option,
        "no page, or none in the pool");
  page_bytes = (size_t)page_bytes_option, pages = (uint64_t)pages_option;
  depth = (uint64_t)depth_option, chain = (uint64_t)chain_option, signal_every = (uint64_t)signal_option;
  slot_count = (size_t)(pool_mib * (1 << 20)) / page_bytes;
  CHECK(chain >= 1 && chain <= MAX_CHAIN && depth <= MAX_DEPTH, "--chain is 1 to %d, --depth at most %d", MAX_CHAIN,
        MAX_DEPTH);
  // Or the queue could be full of work of which nothing is signalled.
  CHECK(signal_every >= 1 && chain + signal_every <= depth + 1, "--chain and --signal are at most --depth + 1");
  CHECK(slot_count >= depth, "the pool has fewer pages than may be outstanding");
}

int main(int argc, char **argv) {
  options(argc, argv);
  open_end(&here, 0);
  open_end(&there, 1);
  connect_to(&here, &there);
  connect_to(&there, &here);
  struct end *source = reads ? &there : &here, *sink = reads ? &here : &there;
  for (size_t i = 0; i + 8 <= slot_count * page_bytes; i += 8)
    *(uint64_t *)(source->pool + i) = random_word();
  pthread_t thread;
  CHECK(!pthread_create(&thread, NULL, target, NULL), "no thread");

  rounds_for(warmup_s);
  memset(sink->pool, 0, slot_count * page_bytes);
  moved = 0;
  double cpu_begin_s = cpu_s(), took_s = rounds_for(seconds), cpu_used_s = cpu_s() - cpu_begin_s;
  uint64_t ops = moved;
  int samples, good;
  double p50_us = single_pages_us(&samples);
  good = all_arrived();
  post_one(&here, &there, IBV_WR_RDMA_WRITE_WITH_IMM, 0, 0, END);
  pthread_join(thread, NULL);

  printf("{\"bench\":\"verbs_floor\",\"op\":\"%s\",\"page_bytes\":%zu,\"pages\":%lu,\"pool_mib\":%g,", op, page_bytes,
         pages, pool_mib);
  printf("\"depth\":%lu,\"chain\":%lu,\"signal\":%lu,\"wait\":\"%s\",\"mtu\":%g,\"devices\":[\"%s\",\"%s\"],", depth, chain,
         signal_every, wait_how, mtu, ibv_get_device_name(here.context->device),
         ibv_get_device_name(there.context->device));
  printf("\"seconds\":%.4f,\"ops\":%lu,\"op_per_s\":%.1f,\"gb_per_s\":%.6f,", took_s, ops, (double)ops / took_s,
         (double)ops * (double)page_bytes / took_s * 1e-9);
  printf("\"p50_us\":%.2f,\"samples\":%d,\"cpu_s\":%.4f,\"verified\":%s}\n", p50_us, samples, cpu_used_s,
         good ? "true" : "false");
  return !good;
}
