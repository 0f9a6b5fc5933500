// Fibers, barriers and warp collectives.
#include <pthread.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "simt/runtime.h"

namespace simt {

Thread* self = nullptr;

namespace {

constexpr size_t stack_bytes = 128 << 10;

enum class State { ready, at_barrier, at_collective, done };

struct Fiber {
  Thread thread;
  State state = State::ready;
  bool started = false;
  jmp_buf context;
  ucontext_t start;
  Site site;
  uint32_t clock = 1;
  uint32_t lanes[warp_size] = {};  // what it knows of the clocks of its warp
};

struct Meeting {  // a warp collective that waits for more lanes
  unsigned mask, arrived;
  const char* what;
  Site site;
  void* arguments[warp_size];
  Operation operation;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::vector<Meeting>> meetings;  // per warp
  std::vector<uint32_t> barrier_clock;         // of each thread, at the last barrier
  unsigned live = 0, waiting = 0;
} block;

char* stacks = nullptr;
size_t stack_count = 0;
jmp_buf host;
bool abandoned;
void (*body)(void*);
void* body_argument;
const char* name = "";
uint64_t launches = 0, blocks = 0, first_block = 0;
uint32_t random_state = 0;
bool shuffled = false, last_blocks_only = false, last_turns_only = false;
constexpr int64_t last_turns = 8;

Fiber& current() { return block.fibers[self->linear]; }

unsigned next_random() { return (random_state = random_state * 1664525u + 1013904223u) >> 8; }

[[noreturn]] void to_host() { _longjmp(host, 1); }

void fiber_main() {
  body(body_argument);
  end_thread();
  Fiber& me = current();
  me.state = State::done;
  block.live--;
  to_host();
}

// Every switch goes through the host's loop, which picks the next fiber.
void wait_in(State state, Site site) {
  Fiber& me = current();
  me.state = state;
  me.site = site;
  if (_setjmp(me.context) == 0) to_host();
}

void resume(Fiber& fiber) {
  self = &fiber.thread;
  if (_setjmp(host) == 0) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  self = nullptr;
}

std::string place(Site site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

// Releases the barrier when every live thread waits at it; threads that have ended count as arrived.
void try_barrier() {
  if (block.live == 0 || block.waiting != block.live) return;
  block.waiting = 0;
  const Fiber* first = nullptr;
  for (Fiber& f : block.fibers) {
    block.barrier_clock[f.thread.linear] = f.clock;
    if (f.state != State::at_barrier) continue;
    if (first == nullptr) first = &f;
    if (place(f.site) != place(first->site)) {
      self = &f.thread;
      report("divergent barrier",
             "meets thread " + std::to_string(first->thread.linear) + ", which waits at " + place(first->site), f.site);
      self = nullptr;
    }
  }
  for (Fiber& f : block.fibers) {
    if (f.state != State::at_barrier) continue;
    f.clock++;
    f.state = State::ready;
  }
}

unsigned living_lanes(unsigned warp) {
  unsigned mask = 0;
  for (unsigned l = 0; l < warp_size && warp * warp_size + l < block.fibers.size(); l++)
    if (block.fibers[warp * warp_size + l].state != State::done) mask |= 1u << l;
  return mask;
}

void finish_meeting(unsigned warp, Meeting& meeting) {
  Fiber* fibers = &block.fibers[warp * warp_size];
  uint32_t joined[warp_size] = {};
  for (unsigned l = 0; l < warp_size; l++) {
    if (!(meeting.arrived >> l & 1)) continue;
    for (unsigned k = 0; k < warp_size; k++) joined[k] = std::max(joined[k], fibers[l].lanes[k]);
    joined[l] = std::max(joined[l], fibers[l].clock);
  }
  for (unsigned l = 0; l < warp_size; l++) {
    if (!(meeting.arrived >> l & 1)) continue;
    std::copy(joined, joined + warp_size, fibers[l].lanes);
    fibers[l].clock++;
    fibers[l].state = State::ready;
  }
}

void deadlock() {
  for (Fiber& f : block.fibers) {
    if (f.state == State::done) continue;
    self = &f.thread;
    report("deadlock",
           std::to_string(block.live) + " threads never go on; this one waits at a " +
               (f.state == State::at_barrier ? "barrier" : "warp collective"),
           f.site);
    self = nullptr;
    break;
  }
  abandoned = true;
}

void run_block() {
  unsigned count = block.fibers.size(), at = 0;
  while (block.live > 0 && !abandoned) {
    unsigned from = shuffled ? next_random() % count : at, found = count;
    for (unsigned i = 0; i < count && found == count; i++)
      if (block.fibers[(from + i) % count].state == State::ready) found = (from + i) % count;
    if (found == count) return deadlock();
    resume(block.fibers[found]);
    if (block.fibers[found].state == State::done) try_barrier();
    at = found;
  }
}

void prepare_block(dim3 grid, dim3 dims, uint3 index) {
  unsigned count = dims.x * dims.y * dims.z;
  block.fibers.assign(count, Fiber{});
  block.meetings.assign((count + warp_size - 1) / warp_size, {});
  block.barrier_clock.assign(count, 0);
  block.live = count;
  block.waiting = 0;
  for (unsigned t = 0; t < count; t++) {
    Fiber& f = block.fibers[t];
    uint3 thread{t % dims.x, t / dims.x % dims.y, t / dims.x / dims.y};
    f.thread = Thread{thread, index, dims, grid, t, t % warp_size, t / warp_size};
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks + t * stack_bytes;
    f.start.uc_stack.ss_size = stack_bytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, fiber_main, 0);
  }
}

}  // namespace

void barrier(Site site) {
  block.waiting++;
  Fiber& me = current();
  me.state = State::at_barrier;
  me.site = site;
  try_barrier();
  if (_setjmp(me.context) == 0) to_host();
}

void collective(unsigned mask, const char* what, Site site, void* argument, Operation operation) {
  Thread& me = *self;
  if (!(mask >> me.lane & 1)) {
    report("bad mask", std::string(what) + " by a lane that its mask does not name", site);
    abandon_launch();
  }
  if (unsigned gone = mask & ~living_lanes(me.warp)) {
    char text[96];
    std::snprintf(text, sizeof text, "%s names lanes that have ended or do not exist (0x%x)", what, gone);
    report("bad mask", text, site);
    abandon_launch();
  }
  auto& meetings = block.meetings[me.warp];
  auto meeting = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return m.mask == mask; });
  if (meeting == meetings.end()) meeting = meetings.insert(meeting, Meeting{mask, 0, what, site, {}, operation});
  if (std::strcmp(meeting->what, what) != 0 || place(meeting->site) != place(site)) {
    report("bad mask", std::string(what) + " meets " + meeting->what + " of " + place(meeting->site), site);
    abandon_launch();
  }
  meeting->arrived |= 1u << me.lane;
  meeting->arguments[me.lane] = argument;
  if (meeting->arrived != mask) return wait_in(State::at_collective, site);
  Meeting complete = *meeting;
  meetings.erase(meeting);
  if (operation) operation(complete.arguments, mask);
  finish_meeting(me.warp, complete);
}

void report_bad_source(unsigned lane, Site site) {
  report("bad mask", "a shuffle reads lane " + std::to_string(lane) + ", which its mask does not name", site);
}

void run(const char* kernel, dim3 grid, dim3 dims, size_t shared_bytes, void (*kernel_body)(void*), void* argument) {
  size_t count = dims.x * dims.y * dims.z;
  if (stack_count < count) {
    if (stacks) munmap(stacks, stack_count * stack_bytes);
    void* memory = mmap(nullptr, count * stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks = static_cast<char*>(memory);
    stack_count = count;
  }
  name = kernel;
  body = kernel_body;
  body_argument = argument;
  abandoned = false;
  launches++;
  first_block = blocks + 1;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = last_blocks_only ? grid.x - 1 : 0; x < grid.x && !abandoned; x++) {
        blocks++;
        begin_block(shared_bytes);
        prepare_block(grid, dims, uint3{x, y, z});
        run_block();
      }
}

void abandon_launch() {
  abandoned = true;
  to_host();
}

void set_last_blocks_only(bool only) { last_blocks_only = only; }
void set_last_turns_only(bool only) { last_turns_only = only; }

int64_t first_turn(int64_t first, int64_t end, int64_t step) {
  int64_t before = (end - first) / step - last_turns;
  return last_turns_only && before > 0 ? first + before * step : first;
}

void set_seed(unsigned seed) {
  shuffled = seed != 0;
  random_state = seed;
}

const char* kernel_name() { return name; }
uint64_t launch_number() { return launches; }
uint64_t block_number() { return blocks; }
uint64_t first_block_number() { return first_block; }
uint32_t clock() { return current().clock; }

uint32_t known_clock(unsigned t) {
  uint32_t known = block.barrier_clock[t];
  return t / warp_size == self->warp ? std::max(known, current().lanes[t % warp_size]) : known;
}

bool is_private(const void* address) {
  static const auto host_stack = [] {
    pthread_attr_t attributes;
    void* low;
    size_t size;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &low, &size);
    pthread_attr_destroy(&attributes);
    return std::pair(static_cast<char*>(low), static_cast<char*>(low) + size);
  }();
  auto p = static_cast<const char*>(address);
  auto fibers = reinterpret_cast<const char*>(block.fibers.data());
  return (p >= stacks && p < stacks + stack_count * stack_bytes) ||
         (p >= fibers && p < fibers + block.fibers.size() * sizeof(Fiber)) ||
         (p >= host_stack.first && p < host_stack.second);
}

}  // namespace simt
