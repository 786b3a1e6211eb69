/* Two workers in one process: pages of a small model's cache are pushed layer by layer from the one to the other, then
 * pulled back. With the library installed: cc hand_over.c $(pkg-config --cflags --libs crossdock) */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <crossdock.h>

enum { LAYERS = 4, PAGE_TOKENS = 16, PAGES = 64, TOKENS = 100, TIMEOUT_MS = 20000 };

static void check(crossdock_status status, const char *what) {
  if (status == CROSSDOCK_OK) return;
  crossdock_error error = {.size = sizeof error};
  crossdock_last_error(&error);
  fprintf(stderr, "%s: %s: %s; %s\n", what, crossdock_status_name(status), error.message, error.advice);
  exit(1);
}

typedef struct worker {
  crossdock_layout layout;
  crossdock_memory memory;
  crossdock_pool pool;
  crossdock_node node;
  unsigned char *bytes;
} worker;

static worker open_worker(const char *name, unsigned char fill) {
  worker made;
  crossdock_layout_options options = {
      .size = sizeof options,
      .model = "example",
      .model_layers = LAYERS,
      .kind = CROSSDOCK_MLA,
      .latent_bytes = 1024,
      .rope_bytes = 128,
      .dtype = CROSSDOCK_BF16,
      .page_tokens = PAGE_TOKENS,
      .pages = PAGES,
  };
  check(crossdock_layout_create(&options, &made.layout), "layout");
  uint64_t bytes;
  check(crossdock_layout_region_bytes(made.layout, 0, &bytes), "region");
  check(crossdock_memory_allocate(bytes, NULL, &made.memory), "memory");
  crossdock_memory_info info = {.size = sizeof info};
  check(crossdock_memory_describe(made.memory, &info), "memory");
  made.bytes = info.base;
  memset(made.bytes, fill, bytes);
  crossdock_pool_options pool = {.size = sizeof pool, .pages = PAGES};
  check(crossdock_pool_create(&pool, &made.pool), "pool");
  static const uint8_t key[32] = "a key that all nodes share, 32 b";
  crossdock_node_options node = {
      .size = sizeof node,
      .name = name,
      .layout = made.layout,
      .memory = &made.memory,
      .memory_count = 1,
      .authentication = CROSSDOCK_AUTHENTICATION_KEY,
      .key = key,
      .key_bytes = sizeof key,
  };
  check(crossdock_node_open(&node, &made.node), "node");
  return made;
}

static void close_worker(worker *worker) {
  check(crossdock_node_close(worker->node), "close");
  check(crossdock_memory_close(worker->memory), "close");
  check(crossdock_pool_close(worker->pool), "close");
  check(crossdock_layout_close(worker->layout), "close");
}

static unsigned char *page(const worker *worker, uint32_t layer, uint32_t page) {
  crossdock_layer_buffer buffer;
  check(crossdock_layout_find(worker->layout, 0, 0, layer, &buffer, NULL), "layer");
  return worker->bytes + buffer.offset + page * buffer.stride_bytes;
}

/* Waits for the end of a room and the homecoming of its pages, and forgets it. */
static void finish(crossdock_room room, const char *what) {
  crossdock_end end = {.size = sizeof end};
  check(crossdock_room_wait(room, TIMEOUT_MS, &end), what);
  if (end.outcome != CROSSDOCK_DELIVERED) {
    char words[512];
    check(crossdock_room_message(room, words, sizeof words, NULL), what);
    fprintf(stderr, "%s: %s\n", what, words);
    exit(1);
  }
  check(crossdock_room_wait_pages(room, TIMEOUT_MS), what);
  check(crossdock_room_close(room), what);
}

static size_t compare(const worker *one, const uint32_t *ones, const worker *other, const uint32_t *others, uint32_t pages) {
  size_t wrong = 0;
  for (uint32_t layer = 0; layer < LAYERS; layer++) {
    for (uint32_t at = 0; at < pages; at++) {
      /* The last page holds the last tokens alone. */
      size_t tokens = at + 1 < pages ? PAGE_TOKENS : TOKENS - at * PAGE_TOKENS;
      wrong += memcmp(page(one, layer, ones[at]), page(other, layer, others[at]), tokens * 1152) != 0;
    }
  }
  return wrong;
}

int main(void) {
  worker prefill = open_worker("prefill-0", 0), decode = open_worker("decode-0", 0xee);
  for (uint32_t layer = 0; layer < LAYERS; layer++) {
    for (uint32_t at = 0; at < PAGES; at++) memset(page(&prefill, layer, at), (int)(layer * PAGES + at), PAGE_TOKENS * 1152);
  }

  char address[128];
  check(crossdock_node_address(prefill.node, address, sizeof address, NULL), "address");
  crossdock_peer peer;
  check(crossdock_connect(decode.node, address, &peer), "connect");
  check(crossdock_peer_wait(peer, TIMEOUT_MS, NULL), "connect");

  uint32_t pages, source_ids[PAGES], target_ids[PAGES];
  check(crossdock_layout_pages_for(decode.layout, TOKENS, &pages), "pages");
  for (uint32_t at = 0; at < pages; at++) {
    source_ids[at] = (at * 37 + 5) % PAGES;
    target_ids[at] = PAGES - 1 - at;
  }
  crossdock_page_list from = {.pool = prefill.pool, .ids = source_ids, .count = pages};
  crossdock_page_list to = {.pool = decode.pool, .ids = target_ids, .count = pages};
  crossdock_source source = {.peer = peer};

  /* Pushed: the decode side opens its end, the prefill side sends layer by layer. */
  crossdock_receive_options receive = {
      .size = sizeof receive,
      .sources = &source,
      .source_count = 1,
      .room = 7,
      .tokens = TOKENS,
      .pages = &to,
      .page_lists = 1,
      .deadline_ms = TIMEOUT_MS,
      .user_data = 42,
  };
  crossdock_room receiving, sending;
  check(crossdock_receive(decode.node, &receive, &receiving), "receive");
  crossdock_send_options send = {
      .size = sizeof send, .room = 7, .tokens = TOKENS, .pages = &from, .page_lists = 1, .deadline_ms = TIMEOUT_MS};
  check(crossdock_send(prefill.node, &send, &sending), "send");
  for (uint32_t layer = 0; layer < LAYERS; layer++) check(crossdock_room_send_layers(sending, layer, 1), "send");
  check(crossdock_room_finish(sending, (const uint8_t *)"first token", 11), "finish");

  /* One call tells of all rooms of a node. */
  int is_ended = 0, is_home = 0;
  while (!is_ended || !is_home) {
    crossdock_event events[8];
    size_t count;
    check(crossdock_node_wait(decode.node, TIMEOUT_MS, events, 8, &count), "events");
    for (size_t at = 0; at < count; at++) {
      if (events[at].handle != receiving) continue;
      is_ended |= events[at].kind == CROSSDOCK_EVENT_ENDED && events[at].user_data == 42;
      is_home |= events[at].kind == CROSSDOCK_EVENT_PAGES_HOME;
    }
  }
  char aux[16];
  size_t aux_bytes;
  check(crossdock_room_aux(receiving, (uint8_t *)aux, sizeof aux, &aux_bytes), "aux");
  size_t wrong = aux_bytes != 11 || memcmp(aux, "first token", 11) != 0;
  finish(receiving, "receive");
  finish(sending, "send");
  wrong += compare(&prefill, source_ids, &decode, target_ids, pages);
  printf("%u pages of %u layers were pushed, and \"%.*s\" with them\n", pages, (unsigned)LAYERS, (int)aux_bytes, aux);

  /* Pulled: the prefill side serves, the decode side reads into other pages. */
  for (uint32_t at = 0; at < pages; at++) target_ids[at] = at * 2;
  crossdock_room serving, fetching;
  send.room = receive.room = 8;
  check(crossdock_serve(prefill.node, &send, &serving), "serve");
  check(crossdock_fetch(decode.node, &receive, &fetching), "fetch");
  finish(fetching, "fetch");
  finish(serving, "serve");
  wrong += compare(&prefill, source_ids, &decode, target_ids, pages);

  /* A page that is handed out twice is refused, and nothing else has happened. */
  uint32_t twice[] = {3, 3};
  crossdock_page_list bad = {.pool = decode.pool, .ids = twice, .count = 2};
  receive.room = 9;
  receive.pages = &bad;
  wrong += crossdock_receive(decode.node, &receive, &receiving) != CROSSDOCK_DUPLICATE_PAGE;
  crossdock_pool_stats stats = {.size = sizeof stats};
  check(crossdock_pool_get_stats(decode.pool, &stats), "stats");
  wrong += stats.free != PAGES;

  check(crossdock_peer_close(peer), "close");
  close_worker(&decode);
  close_worker(&prefill);
  if (wrong) {
    printf("%zu are wrong\n", wrong);
    return 1;
  }
  printf("pages moved, and every byte is right\n");
  return 0;
}
