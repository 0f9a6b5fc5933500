// Shadow memory: what was written and read, by whom and when, for every two bytes of shared and global memory.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

#include "simt/runtime.h"

namespace simt {
namespace {

constexpr size_t granule = 2;
constexpr size_t dynamic_shared_limit = 227 << 10;  // of sm_90, the largest

struct Access {
  uint64_t block = 0;  // 0: none
  uint32_t clock = 0;
  uint16_t thread = 0;
  bool atomic = false;
};

struct Cell {
  uint64_t scope = 0;  // the launch (global memory) or block (shared memory) that the accesses below belong to
  Access write;
  Access foreign_read;         // by another block than the reads below
  std::vector<Access> reads;  // by one block, since its last barrier
  bool initialised = false;
  bool pending = false;  // a cp.async is on its way here
};

constexpr size_t page_cells = 2048;

// Cells appear page by page where the memory is used, so that a few bytes of a huge tensor cost little.
struct Region {
  size_t bytes;
  bool initialised;
  std::vector<std::unique_ptr<Cell[]>> pages;

  Region(size_t bytes, bool initialised) : bytes(bytes), initialised(initialised), pages(bytes / granule / page_cells + 1) {}
  Cell& cell(size_t i) {
    auto& page = pages[i / page_cells];
    if (!page) {
      page.reset(new Cell[page_cells]);
      for (size_t c = 0; c < page_cells; c++) page[c].initialised = initialised;
    }
    return page[i % page_cells];
  }
};

std::map<uintptr_t, Region> global;  // by first byte
Region* last_region = nullptr;
uintptr_t last_first = 0;

alignas(1024) unsigned char dynamic_memory[dynamic_shared_limit];
std::vector<Cell> dynamic_cells, static_cells;
size_t dynamic_bytes = 0;
uintptr_t static_first = 0, static_end = 0;  // thread-local block of this module: `__shared__` variables
uintptr_t module_first = 0, module_end = 0;

struct Copy {
  unsigned char* to;
  size_t bytes;
  unsigned char data[16];
  const void* pc;
  unsigned group;
};
struct Copies {
  unsigned open_group = 0;
  std::vector<Copy> pending;
};
std::map<unsigned, Copies> copies;  // by thread of the running block

std::string thread_of(const Access& a) {
  std::string block = a.block == block_number() ? "" : " of block " + std::to_string(a.block - first_block_number());
  return "thread " + std::to_string(a.thread) + block;
}

bool ordered(const Access& a) {
  return a.block == 0 || (a.block == block_number() && (a.thread == self->linear || a.clock <= known_clock(a.thread)));
}

// The heart: records one access to a cell and returns whether it was a race or a read of nothing.
bool note(Cell& cell, uint64_t scope, bool write, bool atomic, const char* space, const void* pc) {
  if (cell.scope != scope) {
    cell.scope = scope;
    cell.write = cell.foreign_read = Access{};
    cell.reads.clear();
    cell.pending = false;
  }
  Access now{block_number(), clock(), static_cast<uint16_t>(self->linear), atomic};
  if (cell.pending) {
    report("pending copy", std::string(write ? "writes" : "reads") + " shared memory before its cp.async was waited for", pc);
    return true;
  }
  if (!write && !cell.initialised) {
    report("unwritten", std::string("reads ") + space + " memory that was never written", pc);
    return true;
  }
  if (!ordered(cell.write) && !(atomic && cell.write.atomic)) {
    report("race", std::string(space) + " memory: " + (write ? "write" : "read") + " not ordered after a write by " + thread_of(cell.write), pc);
    return true;
  }
  if (write) {
    auto clash = std::find_if(cell.reads.begin(), cell.reads.end(), [&](const Access& a) { return !ordered(a) && !(atomic && a.atomic); });
    const Access* read = clash != cell.reads.end() ? &*clash : !ordered(cell.foreign_read) ? &cell.foreign_read : nullptr;
    if (read) {
      report("race", std::string(space) + " memory: write not ordered after a read by " + thread_of(*read), pc);
      return true;
    }
    cell.write = now;
    cell.reads.clear();
    cell.initialised = true;
  } else {
    if (!cell.reads.empty() && cell.reads[0].block != now.block) {
      cell.foreign_read = cell.reads[0];
      cell.reads.clear();
    }
    if (!cell.reads.empty() && ordered(cell.reads[0]) && ordered(cell.reads.back())) cell.reads.clear();
    cell.reads.push_back(now);
  }
  return false;
}

template <class CellAt>
void note_all(CellAt&& cell_at, size_t first, size_t bytes, uint64_t scope, bool write, bool atomic, const char* space, const void* pc) {
  for (size_t i = first / granule; i <= (first + bytes - 1) / granule; i++)
    if (note(cell_at(i), scope, write, atomic, space, pc)) return;
}

int find_module(dl_phdr_info* info, size_t, void*) {
  uintptr_t first = ~uintptr_t{0}, end = 0, tls_first = 0, tls_bytes = 0, here = reinterpret_cast<uintptr_t>(&find_module);
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_LOAD) {
      first = std::min<uintptr_t>(first, info->dlpi_addr + header.p_vaddr);
      end = std::max<uintptr_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
    }
    if (header.p_type == PT_TLS) {
      tls_first = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      tls_bytes = header.p_memsz;
    }
  }
  if (here < first || here >= end) return 0;
  module_first = first;
  module_end = end;
  static_first = tls_first;
  static_end = tls_first + tls_bytes;
  return 1;
}

thread_local volatile char touch_thread_locals;  // makes the loader allocate the thread-local block

Region* find_region(uintptr_t address, size_t bytes) {
  if (last_region && address >= last_first && address + bytes <= last_first + last_region->bytes) return last_region;
  auto it = global.upper_bound(address);
  if (it == global.begin()) return nullptr;
  --it;
  if (address < it->first || address + bytes > it->first + it->second.bytes) return nullptr;
  last_first = it->first;
  return last_region = &it->second;
}

void access(const void* p, size_t bytes, bool write, bool atomic, const void* pc) {
  if (self == nullptr || is_private(p)) return;
  auto address = reinterpret_cast<uintptr_t>(p);
  auto dynamic_first = reinterpret_cast<uintptr_t>(dynamic_memory);
  bool is_static = address >= static_first && address < static_end;
  bool is_dynamic = address >= dynamic_first && address < dynamic_first + sizeof dynamic_memory;
  Region* region = is_static || is_dynamic ? nullptr : find_region(address, bytes);
  if (!is_static && !is_dynamic && !region && address >= module_first && address < module_end) return;  // constants
  bool inside = is_static || region || (is_dynamic && address + bytes <= dynamic_first + dynamic_bytes);
  if (!inside) {
    report("out of bounds",
           std::to_string(bytes) + "-byte " + (write ? "write" : "read") + (is_dynamic ? " past dynamic shared memory" : " outside every buffer"), pc);
    abandon_launch();
  }
  if (is_static || is_dynamic) {
    auto& cells = is_static ? static_cells : dynamic_cells;
    auto cell_at = [&](size_t i) -> Cell& { return cells[i]; };
    note_all(cell_at, address - (is_static ? static_first : dynamic_first), bytes, block_number(), write, atomic, "shared", pc);
  } else {
    note_all([&](size_t i) -> Cell& { return region->cell(i); }, address - last_first, bytes, launch_number(), write, atomic, "global", pc);
  }
}

void check_aligned(const void* address, size_t bytes, const void* pc) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  report("misaligned", std::to_string(bytes) + "-byte access at an address that is no multiple of it", pc);
  abandon_launch();
}

Cell* shared_cell(const void* p) {
  auto address = reinterpret_cast<uintptr_t>(p), dynamic_first = reinterpret_cast<uintptr_t>(dynamic_memory);
  if (address >= dynamic_first && address < dynamic_first + dynamic_bytes) return &dynamic_cells[(address - dynamic_first) / granule];
  if (address >= static_first && address < static_end) return &static_cells[(address - static_first) / granule];
  return nullptr;
}

}  // namespace

void begin_block(size_t shared_bytes) {
  if (!module_first) {
    touch_thread_locals = 0;
    dl_iterate_phdr(find_module, nullptr);
    static_cells.resize((static_end - static_first) / granule + 1);
    dynamic_cells.resize(dynamic_shared_limit / granule);
  }
  dynamic_bytes = shared_bytes;
  // Not-a-number patterns where a kernel forgets to write.
  std::memset(dynamic_memory, 0xff, shared_bytes);
  for (Cell& cell : static_cells) cell.initialised = false;
  for (size_t i = 0; i < shared_bytes / granule; i++) dynamic_cells[i].initialised = false;
  copies.clear();
}

unsigned char* dynamic_shared() { return dynamic_memory; }

void vector_access(const void* address, size_t bytes, bool write) {
  const void* pc = __builtin_return_address(0);
  check_aligned(address, bytes, pc);
  access(address, bytes, write, false, pc);
}

void atomic_access(const void* address, size_t bytes, const void* pc) { access(address, bytes, true, true, pc); }

void async_copy(void* shared, const void* from, size_t bytes, bool valid) {
  const void* pc = __builtin_return_address(0);
  check_aligned(shared, bytes, pc);
  check_aligned(from, bytes, pc);
  access(shared, bytes, true, false, pc);
  if (valid) access(from, bytes, false, false, pc);
  if (!shared_cell(shared)) {
    report("out of bounds", "cp.async into something else than shared memory", pc);
    abandon_launch();
  }
  for (size_t i = 0; i < bytes; i += granule) shared_cell(static_cast<char*>(shared) + i)->pending = true;
  Copies& mine = copies[self->linear];
  Copy copy{static_cast<unsigned char*>(shared), bytes, {}, pc, mine.open_group};
  if (valid) std::memcpy(copy.data, from, bytes);
  mine.pending.push_back(copy);
}

void async_commit() { copies[self->linear].open_group++; }

void async_wait(unsigned groups_left_pending) {
  Copies& mine = copies[self->linear];
  auto left = std::stable_partition(mine.pending.begin(), mine.pending.end(), [&](const Copy& c) {
    return c.group >= mine.open_group || c.group + groups_left_pending >= mine.open_group;
  });
  for (auto copy = left; copy != mine.pending.end(); ++copy) {
    for (size_t i = 0; i < copy->bytes; i += granule) shared_cell(copy->to + i)->pending = false;
    access(copy->to, copy->bytes, true, false, copy->pc);
    std::memcpy(copy->to, copy->data, copy->bytes);
  }
  mine.pending.erase(left, mine.pending.end());
}

void end_thread() {
  auto mine = copies.find(self->linear);
  if (mine != copies.end() && !mine->second.pending.empty())
    report("pending copy", "the thread ends with a cp.async that was never waited for", mine->second.pending[0].pc);
}

void* allocate(size_t bytes, size_t misalignment, bool initialised) {
  constexpr size_t margin = 4096;
  size_t room = (bytes + misalignment + 2 * margin + 4095) / 4096 * 4096;
  auto* base = static_cast<unsigned char*>(std::aligned_alloc(4096, room));
  if (bytes < huge) std::memset(base, 0xff, room);
  unsigned char* memory = base + margin + misalignment;
  adopt(memory, bytes, initialised);
  return memory;
}

void adopt(void* memory, size_t bytes, bool initialised) {
  global.insert_or_assign(reinterpret_cast<uintptr_t>(memory), Region(bytes, initialised));
  last_region = nullptr;
}

void disown(void* memory) {
  global.erase(reinterpret_cast<uintptr_t>(memory));
  last_region = nullptr;
}

void release(void* memory) {
  disown(memory);
  std::free(reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) - 4096) / 4096 * 4096));
}

}  // namespace simt

// What the compiler calls before each access of a file compiled with -fsanitize=thread.
#define SIMT_HOOK(name, bytes, write)          \
  extern "C" void __tsan_##name(void* p) {     \
    simt::access(p, bytes, write, false, __builtin_return_address(0)); \
  }
#define SIMT_HOOKS(bytes)                    \
  SIMT_HOOK(read##bytes, bytes, false)       \
  SIMT_HOOK(write##bytes, bytes, true)       \
  SIMT_HOOK(unaligned_read##bytes, bytes, false)  \
  SIMT_HOOK(unaligned_write##bytes, bytes, true)  \
  SIMT_HOOK(volatile_read##bytes, bytes, false)   \
  SIMT_HOOK(volatile_write##bytes, bytes, true)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
extern "C" {
void __tsan_read_range(void* p, size_t n) { simt::access(p, n, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { simt::access(p, n, true, false, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
