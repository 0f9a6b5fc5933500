// A CUDA device made of fibers: runs a kernel's threads one after another on the host and watches every memory access.
//
// Each CUDA thread of a block is a fiber that runs until it waits (barrier, warp collective) or ends; blocks run one
// after another. Files with kernels are compiled by g++ with -fsanitize=thread but linked without its library: the
// compiler then calls __tsan_read4(address) and the like before each access, and memory.cpp supplies those functions.
// A race is found from what is ordered before what (vector clocks), not from what happened to go wrong, so one run in
// any order is enough; the seed reorders the threads all the same, to show that results do not depend on the order.
//
// Reported, each once per source line: races in shared and global memory, within a block and between blocks; reads of
// memory that was never written; accesses out of bounds and misaligned; threads at different barriers; deadlocks; bad
// masks; reads of shared memory with a cp.async still under way.
// Not modelled: spinning on another block (blocks run in turn), memory fences, wgmma and TMA, the exact arithmetic of
// tensor cores. Granularity is two bytes, the smallest element type of the kernels here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <tuple>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

using Site = std::source_location;
constexpr unsigned warp_size = 32;

// --- seen by kernels ------------------------------------------------------------------------------------------------

struct Thread {
  uint3 index, block;
  dim3 block_dim, grid_dim;
  unsigned linear, lane, warp;  // place in the block, in its warp; which warp
};
extern Thread* self;  // the running thread; null on the host

void barrier(Site site);

// The lanes of `mask` meet; the last to come runs `operation` on all arguments (null for lanes outside), if any.
using Operation = void (*)(void* arguments[warp_size], unsigned mask);
void collective(unsigned mask, const char* what, Site site, void* argument, Operation operation);
void report_bad_source(unsigned lane, Site site);  // a shuffle from a lane that does not take part

unsigned char* dynamic_shared();
void vector_access(const void* address, size_t bytes, bool write);  // must be a multiple of its size
int64_t first_turn(int64_t first, int64_t end, int64_t step);  // of a loop, see set_last_turns_only
void atomic_access(const void* address, size_t bytes, const void* pc);

// cp.async: the data arrive in shared memory when the copying thread waits for the copy's group.
void async_copy(void* shared, const void* global, size_t bytes, bool valid);
void async_commit();
void async_wait(unsigned groups_left_pending);

// --- seen by the host -----------------------------------------------------------------------------------------------

struct Report {
  std::string kind, message, kernel, where;  // where: source lines, innermost first
  uint3 block, thread;
  unsigned count;
};
std::vector<Report> take_reports();
void set_seed(unsigned seed);  // 0: threads in order

// Device memory with nothing accessible before or after it. Reading what was not `initialised` or written is reported.
void* allocate(size_t bytes, size_t misalignment, bool initialised);
void release(void* memory);
// The caller's memory as device memory, without a copy: for tensors too large for one. Where so much is allocated, it is not
// filled either.
constexpr size_t huge = size_t{1} << 28;  // bytes
void adopt(void* memory, size_t bytes, bool initialised);
void disown(void* memory);

// Only the last blocks along x run, all others count as not needed: for tensors whose last elements are of interest.
void set_last_blocks_only(bool only);
// The same for long loops: of one that asks first_turn, only the last turns run.
void set_last_turns_only(bool only);

void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } call{kernel, std::tuple<P...>(static_cast<P>(arguments)...)};
  run(name, grid, block, shared_bytes,
      [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->arguments); }, &call);
}

// --- between the runtime's own files --------------------------------------------------------------------------------

void report(const char* kind, std::string message, const void* pc);
void report(const char* kind, std::string message, Site site);
[[noreturn]] void abandon_launch();  // from a fiber: gives the whole launch up before something worse happens

const char* kernel_name();
uint64_t launch_number();
uint64_t block_number();           // unique over launches
uint64_t first_block_number();     // of this launch
uint32_t clock();                  // of the running thread; grows at each meeting
uint32_t known_clock(unsigned t);  // the latest moment of thread t of this block that is ordered before now
bool is_private(const void* address);  // stacks, and the runtime's own record of the threads
void begin_block(size_t shared_bytes);  // memory: fresh shared memory
void end_thread();                      // memory: checks that no copy is left pending

}  // namespace simt
